"""Which of the trained parameters a setting of `regularization` is about."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.trainable.select import parameters, select

_PREFIX = "model."  # a parameter's name in the model → in the module that the engine prepares


def named(model: nn.Module, texts: Sequence[str], key: str) -> frozenset[str] | None:
    """The names, as in `Shard`, of the parameters that `texts` mean in the words of `trainable.freeze`; None where
    there are none: what weight decay takes. To be called before an engine prepares the model. Raises UserError, which
    names `key`."""
    if not texts:
        return None
    known = parameters(model)
    return frozenset(_PREFIX + one.name for text in texts for one in select(known, text, key, adapters=True))


def trained(engine: Engine, asked: frozenset[str] | None, key: str) -> frozenset[str]:
    """Of what was asked for, what is ever trained. Raises UserError where that is nothing."""
    groups = [(str(group["tag"]), list[str](group["names"])) for group in engine.optimizer.param_groups]
    if asked is None:
        found = {name for tag, names in groups if not tag.endswith("no_decay") for name in names}
    else:
        found = asked & {name for _, names in groups for name in names}
    if not found:
        what = "no weight matrix" if asked is None else "none of these parameters"
        raise UserError(f"{key}: {what} is trained: name others in its parameters, or leave it out")
    return frozenset(found)
