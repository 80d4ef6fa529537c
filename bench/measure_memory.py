"""The measured peak of a training step, rank by rank: the trainer's own engine, module, terms and step, on a model
from a config and rows of random tokens.

On the CPU the peak is that of the allocator (torch.profiler's record of every allocation and release, so no RSS), on
an accelerator `max_memory_allocated`, both from the birth of the process group to the end of the third step.

    python bench/measure_memory.py CASES.json               one process
    torchrun --nproc-per-node 2 bench/measure_memory.py …   each of several ranks

CASES.json holds a list of `Case`s as JSON objects; every rank prints a line `{"case": …, "rank": …, "peak": bytes}`
for each, rank 0's also go to --output.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 3


@dataclass(frozen=True)
class Case:
    """One configuration. `parallel`, `optim` are sections of a recipe; `objective` too. `accumulation` micro-steps of
    `rows` rows make a step."""

    name: str
    config: dict[str, Any] | str  # a model's config, or the name of a pretrained one
    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=lambda: {"strategy": "single"})
    objective: dict[str, Any] = field(default_factory=lambda: {"type": "causal_lm"})
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "adamw"})
    precision: str = "fp32"
    rows: int = 4
    length: int = 128
    accumulation: int = 1
    checkpointing: bool = False
    packing: bool = False
    padded: bool = True
    freeze: tuple[str, ...] = ()
    adapters: tuple[dict[str, Any], ...] = ()
    quantization: str | dict[str, Any] | None = None
    kernels: str = "auto"
    bucket: int | None = None  # elements of DeepSpeed's buckets, where not the engine's own

    def recipe(self) -> Any:
        """The recipe that says the same."""
        from tunesmith.recipe import Recipe

        task = str(self.objective["type"])
        form = {"classification": "classification", "seq2seq": "translation"}.get(task, "text")
        return Recipe.model_validate(
            {
                "model": (
                    {"model_name_or_path": self.config}
                    if isinstance(self.config, str)
                    else {"init": "from_config", "config": self.config}
                )
                | {
                    "tokenizer": "none",
                    "gradient_checkpointing": self.checkpointing,
                    "quantization": self.quantization,
                },
                "data": {
                    "train": [{"path": "none", "format": form}],
                    "max_length": self.length,
                    "packing": self.packing,
                },
                "objective": self.objective,
                "trainable": {"freeze": list(self.freeze), "adapters": list(self.adapters)},
                "optim": self.optim,
                "training": {
                    "global_batch_size": self.rows * self.accumulation * self.world_size,
                    "per_device_train_batch_size": self.rows,
                    "precision": self.precision,
                    "max_steps": STEPS,
                },
                "parallel": self.parallel,
                "kernels": self.kernels,
                "run_name": "measured",
            }
        )


def read_cases(path: Path) -> list[Case]:
    return [
        Case(**{**given, "freeze": tuple(given.get("freeze", ()))}) for given in json.loads(path.read_text())
    ]


class _NoTokenizer:
    """As much of a tokenizer as a model from a config is told of."""

    pad_token_id = 0

    def __len__(self) -> int:
        return 8


def _batches(case: Case, task: Any, config: Any, rank: int) -> list[Any]:
    """Random tokens: rows of which one is short, where the case is padded, or two samples in every packed sequence.
    In both, one token has no label: a fused loss then copies the others' rows."""
    import torch

    from tunesmith.batch import IGNORED
    from tunesmith.planning.tasks import Shape, source_length, target_length
    from tunesmith.terms import TokenCrossEntropy

    generator = torch.Generator().manual_seed(rank)
    objective = case.recipe().objective
    length = source_length(objective, case.length)
    shape = Shape(case.rows, length, target_length(objective, case.length), case.padded, case.packing)
    made: list[Any] = []
    for _ in range(case.accumulation):
        batch = task.batch(shape, config, torch.device("cpu"))
        ids = torch.randint(3, config.vocab_size, batch.inputs["input_ids"].shape, generator=generator)
        batch.inputs["input_ids"] = ids
        if case.packing:
            half = length // 2
            positions = torch.cat([torch.arange(half), torch.arange(length - half)])
            batch.inputs["position_ids"] = positions.expand(case.rows, -1).contiguous()
        elif case.padded:
            batch.inputs["attention_mask"][0, length // 2 :] = 0
        if case.objective["type"] in {"causal_lm", "masked_lm"}:
            batch.targets["labels"] = ids.clone()
        if (case.packing or case.padded) and any(isinstance(term, TokenCrossEntropy) for term in task.terms):
            batch.targets["labels"][0, -1] = IGNORED
        made.append(batch)
    return made


def _build(case: Case, engine: Any) -> tuple[Any, Any, Any]:
    """(the module, what fills it with weights, the task)"""
    import torch

    from tunesmith.assemble import assemble
    from tunesmith.module import TrainModule
    from tunesmith.planning.tasks import task_of
    from tunesmith.trainable import apply_trainable

    recipe = case.recipe()
    task = task_of(recipe.objective)

    class Objective:
        auto_class = task.auto_class

        @staticmethod
        def config_overrides() -> dict[str, Any]:
            return {}

    built = assemble(recipe, Path(), Objective(), _NoTokenizer(), engine.device, empty=engine.builds_empty)  # type: ignore[arg-type]
    apply_trainable(built.model, recipe.trainable)
    for parameter in built.model.parameters():  # safetensors maps files, which no allocator counts
        if type(parameter) is torch.nn.Parameter and not parameter.is_meta:
            parameter.data = parameter.data.clone()
    torch.manual_seed(0)
    return TrainModule(built.model, task, case.precision), built.fill, task  # type: ignore[arg-type]


@contextmanager
def _buckets(case: Case) -> Iterator[None]:
    if case.bucket is None:
        yield
        return
    from tunesmith.engine import zero_config

    module: Any = zero_config
    before, module._BUCKET = module._BUCKET, case.bucket
    try:
        yield
    finally:
        module._BUCKET = before


def _run(
    case: Case,
    engine: Any,
    built: tuple[Any, Any, Any] | None,
    probed: Callable[[], None] = lambda: None,
) -> None:
    """Some steps; `probed` is called when one forward and backward are done."""
    import torch

    from tunesmith.fused_head import FusedHead
    from tunesmith.fusing import choose_head
    from tunesmith.loss_scale import LossScale
    from tunesmith.optim import Spec
    from tunesmith.step import train_step

    module, fill, task = built or _build(case, engine)
    config = module.model.config
    head = choose_head(case.recipe(), module.model, task)
    with _buckets(case):
        engine.prepare(module, fill, Spec.of(case.recipe()))
    module.fused_head = head if isinstance(head, FusedHead) else None
    batches = _batches(case, task, config, engine.rank)
    engine.module.train()
    engine.rehearse(batches[0], torch.ones(len(task.terms), device=engine.device))
    probed()
    scale = LossScale(case.precision == "fp16", engine.device)
    broken = torch.zeros((), device=engine.device)
    for step in range(STEPS):
        result = train_step(
            engine,
            batches,
            task.terms,
            step=step,
            seed=0,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            scale=scale,
            broken=broken,
            stop=False,
        )
        broken = result.broken
    assert float(broken) == 0.0


def allocated(
    run: Callable[[], None], before: Callable[[], None] | None = None
) -> tuple[int, list[tuple[int, int]]]:
    """(the most that the CPU's allocator has handed out during `run`, above what it had `before` that, the record of
    (bytes allocated or released, sum))."""
    import torch

    # a tensor of an earlier caller's in a cycle would be subtracted where the collector happened to release it
    gc.collect()
    with _profile() as start:
        torch.empty(1)
    if before is not None:
        before()
    with _profile() as profile:
        run()
    (size, total), *_ = _allocations(start)
    events = _allocations(profile)
    return max(total for _, total in events) - (total - size), events


def measure(case: Case) -> tuple[int, list[tuple[int, int]]]:
    """(the peak in bytes, on the CPU the record of (bytes allocated or released, sum)) of this rank."""
    import torch

    from tunesmith.engine import build_engine

    with _buckets(case):
        engine = build_engine(case.recipe())
    try:
        if engine.device.type != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _run(case, engine, None)
            return torch.cuda.max_memory_allocated() - before, []
        _count_in_all_threads()
        built: list[tuple[Any, Any, Any]] = []

        def build() -> None:
            # loading and quantising are not counted, what they leave is
            if case.quantization is not None:
                built.append(_build(case, engine))

        return allocated(lambda: _run(case, engine, built[0] if built else None), build)
    finally:
        engine.close()


def resident(case: Case) -> tuple[int, int]:
    """(the most that the process has held when one forward and backward are done, the most that it ever held), in
    bytes, on the CPU and without a profiler."""
    from tunesmith.engine import build_engine
    from tunesmith.memory import peak_memory_bytes

    engine, found = build_engine(case.recipe()), list[int]()
    try:
        _run(case, engine, None, lambda: found.append(peak_memory_bytes(engine.device)))
        return found[0], peak_memory_bytes(engine.device)
    finally:
        engine.close()


def _profile() -> Any:
    import torch

    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    )


def _count_in_all_threads() -> None:
    """gloo's threads release what the collectives' last holders let go of. The profiler hears its own thread only; with
    this flag of c10 the sum that it reports counts all."""
    import torch

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def _allocations(profile: Any) -> list[tuple[int, int]]:
    """Every allocation and release that the profiler saw, in order: (bytes, all that the CPU's allocator has handed
    out)."""
    from torch._C._profiler import _EventType

    found: list[tuple[int, int, int]] = []
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.alloc_size, fields.total_allocated))
    return [(size, total) for _, size, total in sorted(found, key=lambda one: one[0])]


def alone(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a child of this process: DeepSpeed and accelerate keep their groups for the life of a
    process."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:  # noqa: BLE001 — one case's fault is its line, and the others still run
            if os.environ.get("TUNESMITH_DEBUG"):
                traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process died"}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("cases", type=Path)
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    import torch
    import transformers  # noqa: F401 — once, for all children

    from tunesmith.quiet import quiet_libraries

    quiet_libraries()
    rank, port = int(os.environ.get("RANK", "0")), int(os.environ.get("MASTER_PORT", "0"))
    if not torch.cuda.is_available():
        os.environ |= {"TUNESMITH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "true"}
        torch.set_num_threads(1)
    # ranks make a store of their own for each case: torchrun's serves them once
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for number, case in enumerate(read_cases(given.cases)):
        os.environ["MASTER_PORT"] = str(port + 1 + number)
        line = {"case": case.name, "rank": rank, **alone(lambda case=case: {"peak": measure(case)[0]})}
        print(json.dumps(line), flush=True)
        if given.output is not None and rank == 0:
            with given.output.open("a") as out:
                out.write(json.dumps(line | {"description": dataclasses.asdict(case)}) + "\n")


if __name__ == "__main__":
    main()
