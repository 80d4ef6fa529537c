"""The steps that bench/engine_time.py holds ours against: what a careful hand writes on bare PyTorch and DeepSpeed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tunesmith import optim
from tunesmith.batch import Batch
from tunesmith.recipe import Recipe

LEARNING_RATE, MAX_NORM = 1e-4, 1.0

Contestant = Callable[[list[Batch], int], Any]
"""Does one step with a rank's micro-batches; returns the norm of the gradient before clipping."""


class Clock:
    """What a step is made of: for each step and part [seconds, this thread's own CPU seconds], without the waiting
    and without what the collectives' threads do meanwhile."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []

    @contextmanager
    def __call__(self, part: str) -> Generator[None]:
        started, computed = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            spent = self.steps[-1].setdefault(part, [0.0, 0.0])
            spent[0] += time.perf_counter() - started
            spent[1] += time.thread_time() - computed

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return function(*args, **kwargs)

        return timed

    def medians(self) -> dict[str, list[float]]:
        return {
            part: [statistics.median(step[part][kind] for step in self.steps) for kind in (0, 1)]
            for part in self.steps[0]
        }


def bare(strategy: str, model: Any, settings: Recipe, clock: Clock) -> Contestant:
    match strategy:
        case "ddp":
            return _bare_ddp(model, settings, clock)
        case "fsdp2":
            return _bare_fsdp2(model, settings, clock)
        case _:
            return _bare_deepspeed(model, settings, clock)


def _adamw(model: nn.Module, settings: Recipe) -> torch.optim.AdamW:
    groups = optim.parameter_groups(model, settings.optim)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def _normalizer(batches: list[Batch], clock: Clock) -> Tensor:
    """Labelled rows of the step over all ranks, per rank: the wrappers mean over the ranks."""
    with clock("sums over ranks"):
        rows = torch.tensor(float(sum(batch.targets["labels"].numel() for batch in batches)))
        dist.all_reduce(rows)
    return rows / dist.get_world_size()


def _loss(model: nn.Module, batch: Batch, normalizer: Tensor, clock: Clock) -> Tensor:
    with clock("forward"):
        logits = model(**batch.inputs).logits
        return F.cross_entropy(logits, batch.targets["labels"], reduction="sum") / normalizer


def _set_learning_rate(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE


def _bare_torch(
    model: nn.Module, optimizer: torch.optim.Optimizer, inner: Callable[[], Any], clock: Clock
) -> Contestant:
    """The loop of a careful hand; `inner` is around the micro-steps before the last."""
    model.train()

    def step(batches: list[Batch], number: int) -> Any:
        normalizer = _normalizer(batches, clock)
        for at, batch in enumerate(batches):
            with nullcontext() if at == len(batches) - 1 else inner():
                loss = _loss(model, batch, normalizer, clock)
                with clock("backward"):
                    loss.backward()
        with clock("norm"):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        _set_learning_rate(optimizer)
        with clock("step"):
            optimizer.step()
            optimizer.zero_grad()
        return norm

    return step


def _bare_ddp(model: Any, settings: Recipe, clock: Clock) -> Contestant:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return _bare_torch(wrapped, _adamw(model, settings), wrapped.no_sync, clock)


def _bare_fsdp2(model: Any, settings: Recipe, clock: Clock) -> Contestant:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # reduced in every micro-step, as ours: no rank ever holds a whole gradient
    return _bare_torch(model, _adamw(model, settings), nullcontext, clock)


def _bare_deepspeed(model: Any, settings: Recipe, clock: Clock) -> Contestant:
    import deepspeed

    from tunesmith.engine.zero_config import config as zero_config

    config = zero_config(int(settings.parallel.strategy[-1]), settings.parallel, dist.get_world_size())
    config |= {"gradient_clipping": MAX_NORM}
    config["zero_optimization"].pop("compute_grad_norm", None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model, settings), config=config)
    engine.train()

    def step(batches: list[Batch], number: int) -> Any:
        normalizer = _normalizer(batches, clock)
        for at, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(at == len(batches) - 1)
            loss = _loss(engine, batch, normalizer, clock)
            with clock("backward"):
                engine.backward(loss, scale_wrt_gas=False)
        _set_learning_rate(engine.optimizer)
        with clock("step"):
            engine.step()
        return engine.get_global_grad_norm()

    return step
