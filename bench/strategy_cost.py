"""What each strategy costs a step, beside the plain one of the same recipe, each in processes of its own.

Time: CPU time on one thread, the making of the rows in it, the plain step and those of up to six strategies in turns,
after a first of each; the median of the ratios, and from where to where they go. Memory: the peak of a process that
takes two steps, less that of the plain one. The recipes are those of bench/strategy_recipes.py.

    python bench/strategy_cost.py [--steps 5] [--only NAME ...] [--write]

`--write`: into docs/strategies-cost.md, and into the cost line of each strategy's page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import strategy_cost_page
import torch
from contestant import contestant
from strategy_bases import Values, prepare
from strategy_cost_page import Cost
from strategy_recipes import strategies

from tunesmith.memory import peak_memory_bytes
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe


def in_child(work: Callable[[Any], None]) -> Any:
    """What `work` sends, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(theirs,))
    child.start()
    theirs.close()  # so that a child that ends without a word is noticed
    try:
        return ours.recv()
    except EOFError:
        sys.exit("the child failed: its message stands above")
    finally:
        child.join()


def ratios(plain: Values, chosen: list[Values], steps: int) -> list[list[float]]:
    """Of each of `chosen`, step by step."""

    def work(pipe: Any) -> None:
        every = [contestant(Recipe.model_validate(values)) for values in (plain, *chosen)]
        taken: list[dict[int, float]] = []
        for step in range(steps + 1):
            order = [(step + place) % len(every) for place in range(len(every))]  # none is always the first
            taken.append({index: every[index].step(step) for index in order})
        pipe.send([[row[i] / row[0] for row in taken[1:]] for i in range(1, len(every))])

    return in_child(work)


def peak(values: Values) -> int:
    def work(pipe: Any) -> None:
        one = contestant(Recipe.model_validate(values))
        for step in range(2):
            one.step(step)
        pipe.send(peak_memory_bytes(torch.device("cpu")))

    return in_child(work)


def measured(folder: str, steps: int, names: list[str]) -> list[Cost]:
    every = strategies(folder)
    by_plain: dict[str, list[str]] = {}
    for name in names:
        by_plain.setdefault(json.dumps(every[name].plain), []).append(name)
    found: dict[str, Cost] = {}
    for of_one in by_plain.values():
        plain = every[of_one[0]].plain
        plain_bytes = peak(plain)
        for some in batched(of_one, 6):
            more = [peak(every[name].chosen) - plain_bytes for name in some]
            rows = ratios(plain, [every[name].chosen for name in some], steps)
            for name, more_bytes, row in zip(some, more, rows, strict=True):
                times = (statistics.median(row), min(row), max(row))
                found[name] = Cost(name, every[name].page, *times, more_bytes, plain_bytes)
                print(f"{name}: {found[name].time}, {found[name].memory}", flush=True)
    return [found[name] for name in names]


def batched(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(strategies("")))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        in_child(lambda pipe: pipe.send(prepare(folder)))
        found = measured(folder, asked.steps, asked.only)
    if asked.write:
        strategy_cost_page.write(found, asked.steps)


if __name__ == "__main__":
    main()
