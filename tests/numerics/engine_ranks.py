"""Ranks that stay alive, as `rank_pool`'s, for functions that work on an engine, not for whole runs."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from objective_cases import open_stream
from rank_pool import SECONDS, _deepspeed_globals, _free_port  # pyright: ignore[reportPrivateUsage]
from tunesmith.batch import Batch
from tunesmith.engine import Engine, build_engine
from tunesmith.gradients import clip_coefficient
from tunesmith.module import TrainModule
from tunesmith.optim import Spec
from tunesmith.precision import round_parameters
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import Single
from tunesmith.update import set_learning_rates


@dataclass
class EngineRanks:
    """`call` runs a module-level function on all ranks and returns what each gave."""

    world_size: int
    processes: list[BaseProcess]
    pipes: list[Connection]

    @staticmethod
    def start(world_size: int) -> EngineRanks:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world_size)]
        processes = [
            context.Process(target=_serve, args=(rank, world_size, pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        return EngineRanks(world_size, list(processes), [own for own, _ in pipes])

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        assert all(process.is_alive() for process in self.processes), "the ranks died in an earlier test"
        port = _free_port()
        for pipe in self.pipes:
            pipe.send((port, function, args))
        found: dict[Connection, tuple[str, Any]] = {}
        try:
            while len(found) < self.world_size:
                ready = wait([pipe for pipe in self.pipes if pipe not in found], SECONDS)
                assert ready, "\n".join(["the ranks hang", *(told for told, _ in found.values())])
                found |= {pipe: pipe.recv() for pipe in self.pipes if pipe in ready}
        except (AssertionError, EOFError):
            self.stop()  # what they send later would be taken for the next call's
            raise
        if told := "\n".join(told for told, _ in found.values() if told):
            raise RuntimeError(told)
        return [found[pipe][1] for pipe in self.pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
        "TUNESMITH_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    environment, fresh = dict(os.environ), _deepspeed_globals()
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send(("", function(*args)))
        except BaseException:  # noqa: BLE001 — the test reports it
            pipe.send((f"rank {rank}:\n{traceback.format_exc()}", None))
        os.environ.clear()
        os.environ |= environment
        for module, values in fresh:
            vars(module).update(values)
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class Bench:
    """A prepared engine and the training batches of its rank."""

    engine: Engine
    recipe: Recipe
    stream: Any

    def batches(self, step: int) -> list[Batch]:
        engine = self.engine
        return [
            engine.part(batch)
            for batch in self.stream.batches(step, engine.data_rank, engine.data_size, prefetch=False)
        ]

    def gradients(self, step: int) -> float:
        """Forward and backward of a window; its loss."""
        engine, batches = self.engine, self.batches(step)
        units = engine.sum(torch.tensor(float(sum(self._units(batch) for batch in batches))))
        normalizers = (units / engine.mean_size).reshape(1)
        total = torch.zeros((), device=engine.device)
        for number, batch in enumerate(batches):
            with engine.accumulate(last=number == len(batches) - 1):
                loss = engine.forward(batch, "loss", normalizers)
                engine.backward(loss.total)
            total += loss.total.detach()
        return float(engine.sum(total) / engine.mean_size)

    def loss(self, step: int) -> float:
        """Of the window, without gradients."""
        engine, batches = self.engine, self.batches(step)
        units = engine.sum(torch.tensor(float(sum(self._units(batch) for batch in batches))))
        normalizers = (units / engine.mean_size).reshape(1)
        total = torch.zeros((), device=engine.device)
        with torch.no_grad():
            for batch in batches:
                total += engine.forward(batch, "loss", normalizers).total
        return float(engine.sum(total) / engine.mean_size)

    def update(self, step: int, *, skip: bool = False) -> None:
        engine = self.engine
        norm = engine.gradient_square_sum().sqrt()
        set_learning_rates(engine.optimizer, self.recipe.optim.learning_rate, step)
        suppressed = torch.tensor(float(skip), device=engine.device)
        engine.step(clip_coefficient(norm, self.recipe.optim.max_grad_norm), suppressed)

    def _units(self, batch: Batch) -> int:
        terms = self.engine.train_module.objective.terms
        assert len(terms) == 1
        return int(terms[0].units(batch))

    def whole(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.engine.whole_weights().items()}


@contextmanager
def bench(recipe: Recipe, base: Path) -> Generator[Bench]:
    """An engine as `parallel` asks, on the recipe's model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    stream = open_stream(recipe, base)
    folder = recipe.model.model_name_or_path
    assert folder is not None
    causal = AutoConfig.from_pretrained(folder).model_type in ("llama", "gpt2")
    kind: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder)
    if isinstance(recipe.parallel, Single):
        environment = {name: os.environ.pop(name) for name in ("WORLD_SIZE",) if name in os.environ}
    else:
        environment = {}
    engine = build_engine(recipe)
    try:
        spec = Spec.of(recipe)
        round_parameters(model, spec.parameter_dtype)
        engine.prepare(TrainModule(model, stream.objective, "fp32"), lambda device: None, spec)
        engine.module.train()
        yield Bench(engine, recipe, stream)
    finally:
        engine.close()
        os.environ |= environment
