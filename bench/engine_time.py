"""The time of an optimizer step under each engine of several ranks: ours beside bare PyTorch DDP, bare `fully_shard`
and bare DeepSpeed doing the same.

Two processes on this machine's CPU (gloo, a thread each). Both contestants live in one job, each with its own copy
of MiniLM-L6, and take turns step by step (ours first, then last, and so on), on the same batches: the machine's mood
falls on both, and each pair of steps gives a ratio. A step is timed from a barrier to the slower rank's end. fp32,
two micro-batches, gradient clipping, AdamW, the learning rate set in every step; no dropout, so that the first steps'
gradient norms can be held against each other: a contestant that does something else stops the bench.

    python bench/engine_time.py [--engines ddp zero1 zero2 zero3 fsdp2] [--pairs 40] [--rows 4] [--parts] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bare_steps import LEARNING_RATE, MAX_NORM, Clock, Contestant, bare
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.data.prepare import prepare
from tunesmith.engine import Engine, build_engine
from tunesmith.loss_scale import LossScale
from tunesmith.model import load_model
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective, build_objective
from tunesmith.optim import Spec
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.startup import probe
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RANKS, MICRO_STEPS, WINDOWS, WARM_UP, CHECKED = 2, 2, 8, 4, 2
SAME_NORM = 1e-4  # relative: torch's own fp32 norm is up to 5e-6 low, and weights drift apart by rounding


def recipe(strategy: str, rows: int, cache: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm", "dropout": 0.0},
            "data": {
                "train": [{"path": "builtin:stdlib_docstrings", "format": "classification"}],
                "max_length": 64,
                "group_by_length": False,
                "cache_dir": cache,
            },
            "objective": {"type": "classification"},
            "optim": {"learning_rate": LEARNING_RATE, "weight_decay": 0.01, "max_grad_norm": MAX_NORM},
            "training": {
                "global_batch_size": rows * MICRO_STEPS * RANKS,
                "per_device_train_batch_size": rows,
                "precision": "fp32",
            },
            "parallel": {"strategy": strategy},
            "run_name": "bench",
        }
    )


def ours(engine: Engine, objective: Objective, clock: Clock) -> Contestant:
    """`train_step`, and what the loop reads of it on a CPU. What it is made of is timed where it calls the engine."""
    from tunesmith import step as stepping

    timed: Any = engine
    timed.sum = clock.wrapped("sums over ranks", engine.sum)
    timed.forward = clock.wrapped("forward", engine.forward)
    timed.backward = clock.wrapped("backward", engine.backward)
    timed.gradient_square_sum = clock.wrapped("norm", engine.gradient_square_sum)
    timed.step = clock.wrapped("step", engine.step)
    stepping.seed_generators = clock.wrapped("seeds", stepping.seed_generators)
    scale, broken = LossScale(False, engine.device), torch.zeros((), device=engine.device)
    engine.module.train()

    def step(batches: list[Batch], number: int) -> Tensor:
        result = stepping.train_step(
            engine, batches, objective.terms, step=number, seed=0, learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM, scale=scale, broken=broken, stop=False,
        )  # fmt: skip
        flags = torch.stack([result.broken.double(), result.counts[-1], result.overflow.double()])
        assert flags.tolist() == [0.0, 0.0, 0.0]
        return result.norm

    return step


def compare(strategy: str, rows: int, pairs: int, cache: str) -> dict[str, Any]:
    """One rank's part; the same figures on every rank."""
    settings = recipe(strategy, rows, cache)
    engine = build_engine(settings)
    tokenizer, _ = tokenizer_for(settings, Path())
    objective = build_objective(settings, tokenizer)
    dataset = prepare(settings.data, Path(), objective, tokenizer_hash(tokenizer))["train"]
    stream = build_stream(settings, dataset, objective)
    clocks = Clock(), Clock()

    def load(empty: bool) -> Any:
        return load_model(settings.model, Path(), objective, tokenizer, 0, empty=empty)

    loaded = load(engine.builds_empty)
    module = TrainModule(loaded.model, objective, "fp32").train()
    engine.prepare(module, loaded.fill, Spec.of(settings))
    assert probe(engine, stream)["unused_parameters"] == []
    # under ZeRO-3 transformers partitions this one too, as it does while a configuration of DeepSpeed is alive
    contestants = (
        ours(engine, objective, clocks[0]),
        bare(strategy, load(False).model, settings, clocks[1]),
    )
    windows = [stream.batches(n, engine.rank, RANKS, prefetch=False) for n in range(WINDOWS)]
    assert all(len(batches) == MICRO_STEPS for batches in windows)
    for number in range(WARM_UP):
        norms = [
            _timed(one, clock, windows[number], number)[1]
            for one, clock in zip(contestants, clocks, strict=True)
        ]
        if number < CHECKED and abs(norms[0] / norms[1] - 1) > SAME_NORM:
            raise RuntimeError(f"{strategy}: not the same training: norms {norms} in step {number}")
    for clock in clocks:
        clock.steps.clear()
    seconds: tuple[list[list[float]], list[list[float]]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            number = WARM_UP + pair
            found, _ = _timed(contestants[which], clocks[which], windows[number % WINDOWS], number)
            seconds[which].append(found)
    result = {"ours": seconds[0], "bare": seconds[1], "parts": [clock.medians() for clock in clocks]}
    engine.close()
    return result


def _timed(step: Contestant, clock: Clock, batches: list[Batch], number: int) -> tuple[list[float], float]:
    """([seconds, CPU seconds], norm): the slower rank's time, and the sum of what both ranks' threads computed."""
    clock.steps.append({})
    dist.barrier()
    started, computed = time.perf_counter(), time.process_time()
    norm = step(batches, number)
    took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    used = torch.tensor(time.process_time() - computed, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    dist.all_reduce(used)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return [took.item(), used.item()], float(whole)


def _serve(rank: int, port: int, pipe: Connection, asked: tuple[str, int, int, str]) -> None:
    """One rank, with what torchrun sets."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "TUNESMITH_DEVICE": "cpu",
    }
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    quiet_libraries()
    result = compare(*asked)
    if rank == 0:
        pipe.send(result)


def measure(strategy: str, rows: int, pairs: int, cache: str) -> dict[str, Any]:
    """A job of its own for each engine: libraries keep state for the life of a process."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiving, sending = context.Pipe(duplex=False)
    asked = (strategy, rows, pairs, cache)
    ranks = [
        context.Process(target=_serve, args=(rank, port, sending, asked), daemon=True)
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    sending.close()  # the ranks hold it: when they have died, recv says so
    try:
        result: dict[str, Any] = receiving.recv()
    except EOFError:
        raise SystemExit(f"{strategy}: the ranks died; their own messages stand above") from None
    finally:
        for rank in ranks:
            rank.join()
    return result


def report(strategy: str, found: dict[str, Any], parts: bool) -> dict[str, float]:
    own, others = found["ours"], found["bare"]
    wall = [a[0] / b[0] for a, b in zip(own, others, strict=True)]
    computed = [a[1] / b[1] for a, b in zip(own, others, strict=True)]
    low, median, high = statistics.quantiles(wall, n=4)
    milliseconds = [statistics.median(each[0] for each in times) * 1e3 for times in (own, others)]
    print(
        f"{strategy:6} {milliseconds[0]:8.1f} {milliseconds[1]:8.1f}   {median:.3f} ({low:.3f} to {high:.3f})"
        f"   {statistics.median(computed):.3f}",
        flush=True,
    )
    if parts:
        for name, times in zip(("ours", "bare"), found["parts"], strict=True):
            told = [f"{part} {a * 1e3:.1f} ({b * 1e3:.1f})" for part, (a, b) in times.items()]
            print(f"       {name}: {', '.join(told)}", flush=True)
    return {
        "ours_ms": milliseconds[0],
        "bare_ms": milliseconds[1],
        "ratio": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "cpu_ratio": statistics.median(computed),
        "pairs": len(wall),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    options.add_argument("--pairs", type=int, default=40)
    options.add_argument("--rows", type=int, default=4, help="of a micro-batch, on each rank")
    options.add_argument(
        "--parts", action="store_true", help="also what a step is made of, on rank 0: ms (of CPU)"
    )
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the ranks load torch
    print("engine  ours ms  bare ms   ratio of pairs: median (quartiles)   of CPU time", flush=True)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for strategy in given.engines:
            result = measure(strategy, given.rows, given.pairs, cache)
            found[strategy] = report(strategy, result, given.parts)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
