"""The learning rate of each parameter, in units of the recipe's."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.errors import UserError
from tunesmith.recipe.trainable import Trainable
from tunesmith.trainable.select import Parameter, select


def factors(
    trained: list[Parameter], settings: Trainable, learning_rate: float, lr_scale: Mapping[str, float]
) -> dict[str, float]:
    """By parameter name: `layer_lr_decay` ** depth (Bao et al. 2022, BEiT: the head and the last norm have all of it,
    the top layer of each stack one factor, the embeddings one more than the lowest layer), or the parameter's own
    rate in `learning_rates` / `learning_rate`; × its `lr_scale`. Adapters in a layer lie in that layer. Raises
    UserError for a setting without effect."""
    decay = settings.layer_lr_decay or 1.0
    if decay < 1.0 and all(one.place.depth == 0 for one in trained):
        raise UserError("trainable.layer_lr_decay: has no effect: nothing below the head is trained")
    found = {one.name: decay**one.place.depth for one in trained}
    for name, rate in _own_rates(trained, settings, learning_rate).items():
        found[name] = rate / learning_rate
    return {name: factor * lr_scale.get(name, 1.0) for name, factor in found.items()}


def _own_rates(trained: list[Parameter], settings: Trainable, learning_rate: float) -> dict[str, float]:
    key = "trainable.learning_rates"
    if settings.learning_rates and learning_rate == 0:
        raise UserError(
            f"{key}: optim.learning_rate is 0, which the schedule multiplies: give it a value above 0"
        )
    named: dict[str, str] = {}  # parameter: the entry that counts
    for text, rate in settings.learning_rates.items():
        if rate == 0:
            raise UserError(f"{key}: {text!r}: a rate of 0 trains nothing: name it in trainable.freeze")
        named |= {one.name: text for one in select(trained, text, key, adapters=True)}
    for text in settings.learning_rates:
        if text not in named.values():
            raise UserError(f"{key}: {text!r} has no effect: a later entry gives all of it another rate")
    return {name: settings.learning_rates[text] for name, text in named.items()}
