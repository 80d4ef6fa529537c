"""`averaging` made into the part of the step that keeps the average, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from tunesmith.averaging.average import Average
from tunesmith.averaging.timing import Timing, initial_share
from tunesmith.errors import UserError
from tunesmith.parts import Strategies
from tunesmith.recipe.averaging import EMA, SWA

if TYPE_CHECKING:
    from tunesmith.strategies import Building

_TOLD = 0.05  # of an average that is its beginning still


def build(building: Building) -> Strategies:
    """What the recipe's `averaging` adds to a run."""
    settings = building.recipe.averaging
    if settings is None:
        return Strategies()
    model, stream = building.built.model, building.stream
    return build_average(settings, model, building.total_steps, stream.steps_per_epoch)


def build_average(
    settings: EMA | SWA, model: nn.Module, total_steps: int, steps_per_epoch: int
) -> Strategies:
    """The average, with its facts and notes; `model` is what will be trained, frozen where it is. Raises UserError
    where the run is too short for an average, or statistics of the weights would be those of others."""
    _refuse_statistics(model)
    timing = Timing.of(settings, total_steps, steps_per_epoch)
    times = timing.times(total_steps)
    if times < 2:
        every = "update_every" if isinstance(settings, EMA) else "every"
        raise UserError(
            f"averaging: begins after step {timing.start} of {total_steps} and takes the weights every {timing.every} "
            f"steps: {times} of them are no average; lower averaging.start or averaging.{every}"
        )
    facts: dict[str, Any] = {"type": settings.type, "starts_after_step": timing.start, "averaged": times}
    notes: list[str] = []
    if isinstance(settings, EMA):
        facts["initial_share"] = share = initial_share(settings, times - 1)
        if share > _TOLD:
            notes.append(
                f"averaging: {share:.0%} of the last average are the weights that it began with; of averaging.decay: "
                f"{0.01 ** (1 / (times - 1)):.4g}, it would be 1%"
            )
    return Strategies(steps=(Average(settings, timing),), facts={"averaging": facts}, notes=tuple(notes))


def state_bytes(trained: int) -> int:
    """What the average of `trained` elements takes, sharded as the optimizer's state is."""
    return 4 * trained


def _refuse_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not module.track_running_stats:
            continue
        if not module.affine or any(p.requires_grad for p in module.parameters(recurse=False)):
            raise UserError(
                f"averaging: {name} is a {type(module).__name__}, whose running statistics are those of the current "
                f"weights, not of the average: freeze it (trainable.freeze: ['{name}.*']), or leave averaging out"
            )
