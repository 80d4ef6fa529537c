"""What a strategy can add to a run, beside the terms of the loss: parts of the forward, parts of the step, and another
way from a window to its gradients. Each knows nothing of the others, so that they compose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.terms import Term

if TYPE_CHECKING:
    from tunesmith.data.stream import Stream
    from tunesmith.engine import Engine
    from tunesmith.loss_scale import LossScale
    from tunesmith.module import Loss, TrainModule

EXTRAS = "tunesmith_extras"
"""The child of a model that holds what strategies train beside it (projections, variances). It is trained, sharded and
checkpointed like the rest, and never exported."""


class ForwardPart:
    """Takes part in the module's forward for the loss. Nothing here by default.

    `options`: keyword arguments for the model's forward (output_hidden_states). `views`: how many times each row
    stands in the batch, one copy of all rows behind the other, each with dropout of its own."""

    options: Mapping[str, Any] = {}
    views: int = 1

    def modules(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """What is to be trained beside the model, by a name of its own; asked once, before the engine prepares."""
        return {}

    def begin(self, engine: Engine) -> None:
        """Once, when the engine has prepared the model: for frozen companions, which are no children of it."""

    def around(self, batch: Batch) -> AbstractContextManager[None]:
        """Entered around the model's own forward."""
        return nullcontext()

    def add(self, module: TrainModule, outputs: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
        """What the terms read beside the model's outputs, under names of its own."""
        return {}

    def export(self, state: Mapping[str, Tensor], run_dir: Path) -> None:
        """`final/` is written; `state`: the trained weights of all `modules` there were, by name. On rank 0 alone."""


class StepPart:
    """Takes part in every optimizer step. Nothing here by default. All ranks call everything alike.

    `name`: of its state in checkpoints and of its numbers in the log."""

    name: str = ""

    def begin(self, engine: Engine, stream: Stream) -> None:
        """Once, when the engine has prepared the model and the weights are those that the run begins with; before
        a checkpoint is loaded."""

    def open(self, step: int) -> None:
        """Before step `step` (0-based) draws its batches."""

    def rollout(self, step: int, batches: Sequence[Batch]) -> Sequence[Batch]:
        """What this rank's micro-batches of step `step` become before their units are counted: as many, with answers
        of the model in them. Every rank has as many micro-batches."""
        return batches

    def weights(self, step: int, terms: Sequence[Term]) -> Mapping[str, float]:
        """Factors on the weights of terms, by the terms' names; those that are not named keep theirs."""
        return {}

    def penalize(self, step: int, scale: Tensor) -> Tensor | None:
        """Adds a penalty's gradient × `scale` (0-dim, fp16's loss scale) to the local gradients, after the last
        backward and before the norm is taken. Returns the penalty over the whole model: 0-dim, fp64, the same on
        every rank; None where it has none. Without waiting for the device."""
        return None

    def disturb(self, step: int, coefficient: Tensor) -> None:
        """Changes the local gradients after the norm is taken, which `coefficient` (0-dim, on the device: clipping ×
        un-scaling, 0 where the step is skipped) is about to multiply. Without waiting for the device."""

    def observe(self, step: int, losses: Tensor) -> None:
        """`losses`: [terms] fp64 on the device, the terms' sum / units over the global batch, the same on every
        rank."""

    def after_step(self, step: int, skip: Tensor) -> None:
        """The weights are updated; where `skip` (0-dim) is not 0, they were not."""

    def learning_rate(self, step: int) -> float | None:
        """The rate that `step` (0-based) trains with, in place of the schedule's; None: the schedule's."""
        return None

    def settle(self) -> None:
        """The training is done, and the weights are those of the step that `final/` is made of: they may be changed
        for good."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Sequence[str]:
        """What an evaluation found after `step` steps, the same on every rank. Returns lines for people."""
        return ()

    @property
    def ended(self) -> str | None:
        """Why there is nothing left to train; asked after evaluations."""
        return None

    def sharded_state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """State as large as the parameters: parameter's name → key → tensor shaped like its shard's value."""
        return {}

    def load_sharded_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None: ...

    def state(self) -> dict[str, Any]:
        """Small state, the same on every rank: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Window:
    """This rank's micro-batches of one optimizer step, and what a pass over them needs. `normalizers`: [terms] fp32;
    `weights`: [terms] fp32."""

    engine: Engine
    batches: Sequence[Batch]
    normalizers: Tensor
    weights: Tensor
    scale: LossScale
    step: int
    seed: int

    def forward(self, batch: Batch) -> Loss:
        return self.engine.forward(batch, "loss", self.normalizers, weights=self.weights)


MicroStep = Callable[[Window, Batch, bool], Tensor]
"""(window, batch, whether it is the window's last) → the terms' sum / normalizer, detached [terms]; its gradient is
added by as many forwards and backwards as it takes, all of them within `engine.accumulate`."""

Gradients = Callable[[Window, Callable[[], Tensor]], Tensor]
"""(window, a pass over it, which leaves the gradient and returns the terms' sums / normalizers [terms]) → the same."""


def plain_micro_step(window: Window, batch: Batch, last: bool) -> Tensor:
    with window.engine.accumulate(last=last):
        loss = window.forward(batch)
        window.engine.backward(window.scale.apply(loss.total))
    return loss.parts


def plain_gradients(window: Window, once: Callable[[], Tensor]) -> Tensor:
    return once()


@dataclass(frozen=True, slots=True)
class Strategies:
    """What the recipe's strategies add. `terms` come behind the objective's; `own` is what becomes of each of the
    objective's while it trains; `facts` and `notes` are for the start-up report."""

    terms: tuple[Term, ...] = ()
    forward: tuple[ForwardPart, ...] = ()
    steps: tuple[StepPart, ...] = ()
    micro_step: MicroStep = plain_micro_step
    gradients: Gradients = plain_gradients
    own: Callable[[Term], Term] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    def __or__(self, other: Strategies) -> Strategies:
        """Both. At most one of them may have a way of its own to the gradients of a micro-step, and of a window."""
        micro = [one.micro_step for one in (self, other) if one.micro_step is not plain_micro_step]
        window = [one.gradients for one in (self, other) if one.gradients is not plain_gradients]
        own = [one.own for one in (self, other) if one.own is not None]
        assert max(len(micro), len(window)) < 2, "two strategies make the gradients"
        assert len(own) < 2, "two strategies change the objective's terms"
        return Strategies(
            self.terms + other.terms,
            self.forward + other.forward,
            self.steps + other.steps,
            micro[0] if micro else plain_micro_step,
            window[0] if window else plain_gradients,
            own[0] if own else None,
            {**self.facts, **other.facts},
            self.notes + other.notes,
        )

    def weights(self, step: int, terms: Sequence[Term]) -> Tensor:
        """The weights of all terms at `step`: [terms] fp64, on the CPU."""
        factors = {term.name: 1.0 for term in terms}
        for part in self.steps:
            for name, factor in part.weights(step, terms).items():
                factors[name] *= factor
        return torch.tensor([term.weight * factors[term.name] for term in terms], dtype=torch.float64)
