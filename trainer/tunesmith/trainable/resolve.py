"""The recipe's `trainable` section on a model: which parameters are trained, from which step on, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import nn

from tunesmith.errors import UserError
from tunesmith.recipe.moments import step_of
from tunesmith.recipe.trainable import Gradual, Later, Trainable
from tunesmith.trainable.plan import Plan, Training, places
from tunesmith.trainable.rates import factors
from tunesmith.trainable.select import Parameter, parameters, select

_Openings = dict[str, tuple[int, int]]  # parameter: (opens, warm-up)


def plan_trainable(
    model: nn.Module,
    settings: Trainable,
    learning_rate: float,
    total_steps: int,
    steps_per_epoch: int,
    lr_scale: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of a run of `total_steps`. In place: what is ever trained requires a gradient, all else none.

    To be called when `model` has its adapters, before an engine prepares it: whatever PEFT has frozen stays so, but
    for what `unfreeze` names. `learning_rate` is the recipe's; `lr_scale` holds factors on it that adapters ask for,
    by parameter name. Raises UserError for a name that means nothing, a setting without effect, and where nothing
    is left to train.
    """
    known = parameters(model)
    openings = _openings(known, settings, total_steps, steps_per_epoch)
    # gradual unfreezing may end with the run
    missed = _openings(known, settings, None, steps_per_epoch).keys() - openings.keys()
    trained = [one for one in known if one.name in openings]
    for one in known:
        one.value.requires_grad_(one.name in openings)
    _refuse_nothing(trained, openings, total_steps)
    rates = factors(trained, settings, learning_rate, lr_scale or {})
    plan = {
        f"model.{one.name}": Training(
            opens=openings[one.name][0],
            factor=rates[one.name],
            warmup=openings[one.name][1],
            place=str(one.place),
            numel=one.numel,
        )
        for one in trained
    }
    told = places(str(one.place) for one in known if one.name in missed)
    note = f"trainable.unfreeze: the run ends before it reaches {told}: it stays frozen"
    return Plan(plan, (note,) if missed else ())


def apply_trainable(model: nn.Module, settings: Trainable) -> dict[str, Any]:
    """For whoever does not know a run's steps: what is ever trained requires a gradient, all else none. Returns
    counts of parameters. Raises UserError as `plan_trainable` does, but for moments."""
    known = parameters(model)
    openings = _openings(known, settings, None, 1)
    for one in known:
        one.value.requires_grad_(one.name in openings)
    _refuse_nothing([one for one in known if one.name in openings], {}, None)
    return counts(model)


def counts(model: nn.Module) -> dict[str, int]:
    """`trainable_parameters`, `total_parameters`: elements, each once however often it is tied."""
    known = parameters(model)
    trained = sum(one.numel for one in known if one.value.requires_grad)
    return {"trainable_parameters": trained, "total_parameters": sum(one.numel for one in known)}


def _openings(
    known: list[Parameter], settings: Trainable, total_steps: int | None, steps_per_epoch: int
) -> _Openings:
    """What is ever trained. Without `total_steps` no moment is refused or kept."""
    found = {one.name for one in known if one.value.requires_grad and not one.spare}
    trained = set(found)
    for text in settings.freeze:
        names = {one.name for one in select(known, text, "trainable.freeze")}
        if not names & found:
            raise UserError(f"trainable.freeze: {text!r} has no effect: the adapters leave it frozen anyway")
        trained -= names
    for text in settings.exceptions:
        names = _trainable_names(select(known, text, "trainable.unfreeze"), text)
        if names <= trained:
            raise UserError(f"trainable.unfreeze: {text!r} has no effect: nothing has frozen it")
        trained |= names
    if isinstance(settings.unfreeze, Gradual):
        candidates = [one for one in known if one.name in trained]
        return _gradual(candidates, settings.unfreeze, total_steps, steps_per_epoch)
    held = {one.name for text in settings.exceptions for one in select(known, text, "trainable.unfreeze")}
    openings = _later(known, settings.later, held, total_steps, steps_per_epoch)
    return dict.fromkeys(trained, (0, 0)) | openings


def _trainable_names(selected: list[Parameter], text: str) -> set[str]:
    """Raises UserError for what no optimizer can move."""
    for one in selected:
        if not one.can_train:
            raise UserError(
                f"trainable.unfreeze: {text!r} names {one.names[-1]}, which is held in few bits and cannot be "
                "trained: leave it out, or name its module in model.quantization.skip_modules"
            )
    return {one.name for one in selected}


def _later(
    known: list[Parameter],
    entries: list[Later],
    held: set[str],
    total_steps: int | None,
    steps_per_epoch: int,
) -> _Openings:
    """`held`: trained from the start, by name."""
    found: _Openings = {}
    timed = [(_step(entry.at, "unfreeze: at", total_steps, steps_per_epoch), entry) for entry in entries]
    for opens, entry in sorted(timed, key=lambda pair: pair[0]):
        texts = [(entry.layers, True)] if entry.layers else [(text, False) for text in entry.parameters or []]
        for text, layers in texts:
            selected = select(known, text, "trainable.unfreeze", layers=layers)
            names = _trainable_names(selected, text) - held - found.keys()
            if not names and total_steps is not None:  # else nobody knows which comes first
                raise UserError(
                    f"trainable.unfreeze: {text!r} at {entry.at} has no effect: it is trained before then"
                )
            found |= dict.fromkeys(names, (opens, entry.warmup_steps))
    return found


def _step(moment: int | float | str, key: str, total_steps: int | None, steps_per_epoch: int) -> int:
    if total_steps is None:
        return 0
    opens = step_of(moment, total_steps, steps_per_epoch)
    if opens >= total_steps:
        raise UserError(
            f"trainable.{key}: {moment} is after {opens} steps, and the run has {total_steps}: it would have no effect"
        )
    return opens


def _gradual(
    candidates: list[Parameter], settings: Gradual, total_steps: int | None, steps_per_epoch: int
) -> _Openings:
    """The head, and what lies outside the model, from the start; with the top layers what follows them; the embeddings
    last. What the run does not reach is left out."""
    _step(settings.every, "unfreeze: every", total_steps, steps_per_epoch)
    if all(one.is_head or one.place.kind == "adapter" for one in candidates):
        raise UserError("trainable.unfreeze: every: has no effect: nothing below the head is trained")
    if not any(one.place.kind == "layer" for one in candidates):
        raise UserError(
            "trainable.unfreeze: every: no layer of the model is trained: name what opens, and when"
        )
    found: _Openings = {}
    for one in candidates:
        number = 0 if one.is_head else max(_group(place, settings.layers) for place in one.places)
        if total_steps is None or number == 0:
            found[one.name] = (0, 0)
            continue
        opens = step_of(settings.every, total_steps, steps_per_epoch, times=number)
        if opens < total_steps:
            found[one.name] = (opens, settings.warmup_steps)
    return found


def _group(place: Any, layers: int) -> int:
    """The number of the opening, from 1; 0: from the start."""
    match place.kind:
        case "adapter" | "head":
            return 0
        case "after":
            return 1
        case "layer":
            return (place.layers - 1 - place.layer) // layers + 1
        case _:
            return ceil(place.layers / layers) + 1


def _refuse_nothing(trained: list[Parameter], openings: _Openings, total_steps: int | None) -> None:
    if not trained:
        raise UserError("trainable: no parameter is left to train: freeze fewer, or unfreeze some")
    first = min((opens for opens, _ in openings.values()), default=0)
    if total_steps is not None and first > 0:
        raise UserError(
            f"trainable: nothing is trained in the first {first} steps: leave a part of the model (its head) "
            "trained from the start"
        )
