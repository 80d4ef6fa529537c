"""A recipe's step in this process, to be timed in turns with another's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith import optim
from tunesmith.assemble import assemble
from tunesmith.data.stream import Stream
from tunesmith.engine.single import SingleEngine
from tunesmith.fused_head import FusedHead
from tunesmith.fusing import choose_head
from tunesmith.loss_scale import LossScale
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.parts import Strategies
from tunesmith.recipe import Recipe
from tunesmith.startup import probe
from tunesmith.step import train_step
from tunesmith.strategies import Building, build_strategies
from tunesmith.streams import build_stream
from tunesmith.tasks.prepare import prepare_rows
from tunesmith.tasks.runs import read_runs
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash


@dataclass
class Contestant:
    engine: SingleEngine
    stream: Stream
    strategies: Strategies

    def step(self, step: int) -> float:
        """CPU seconds, those of making the rows among them."""
        engine = self.engine
        scale: Any = LossScale(False, engine.device)
        started = time.process_time()
        batches = self.stream.batches(step, 0, 1, prefetch=False)
        for part in self.strategies.steps:
            part.open(step)
            batches = part.rollout(step, batches)
        train_step(
            engine, batches, engine.train_module.terms, step=step, seed=0, learning_rate=1e-4, max_grad_norm=1.0,
            scale=scale, broken=torch.zeros(()), stop=False, strategies=self.strategies,
        )  # fmt: skip
        return time.process_time() - started


def contestant(made: Recipe, steps: int = 100) -> Contestant:
    """Built as a run builds it, in fp32 on one process; `steps`: of the run that it would be."""
    base, engine = Path(), SingleEngine(torch.device("cpu"))
    made = read_runs(made, base)
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    datasets = prepare_rows(made, base, objective, tokenizer_hash(tokenizer), engine.device)
    built = assemble(made, base, objective, tokenizer, engine.device, empty=False)
    stream = build_stream(made, datasets["train"], objective)
    found = build_strategies(
        Building(made, base, built, objective, tokenizer, datasets, stream, steps, engine.device)
    )
    head = choose_head(made, built.model, objective)
    module = TrainModule(built.model, objective, "fp32", found.terms, found.forward)
    engine.prepare(module, built.fill, optim.Spec.of(made))
    for part in found.forward:
        part.begin(engine)
    for part in found.steps:
        part.begin(engine, stream)
    module.fused_head = head if isinstance(head, FusedHead) else None
    probe(engine, stream)  # finds what a task's step does not use
    engine.module.train()
    return Contestant(engine, stream, found)
