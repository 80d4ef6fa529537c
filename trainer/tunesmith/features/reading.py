"""What a head reads of its backbone's output, found out by trying: a tensor full of NaN in the place of one that is
read makes the logits NaN."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.features.fields import Field, Reading
from tunesmith.module import AUTOCAST

KEY = "trainable.cache_features"
TELLING = ("input_ids", "token_type_ids")


@contextmanager
def replaced(backbone: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Within it the backbone's forward is `forward`."""
    known = backbone.__dict__.get("forward")
    backbone.forward = forward
    try:
        yield
    finally:
        if known is None:
            del backbone.forward
        else:
            backbone.forward = known


def outputs(engine: Engine, batch: Batch) -> Mapping[str, Any]:
    """The whole model's outputs in the run's precision, without gradients."""
    module = engine.train_module
    dtype = AUTOCAST.get(module.precision)
    with torch.no_grad(), torch.autocast(engine.device.type, dtype=dtype, enabled=dtype is not None):
        return module.objective.outputs(module.model, batch)


class Observed:
    """Runs the backbone's own forward, and keeps what came in and what came out of the last one."""

    def __init__(self, backbone: nn.Module) -> None:
        self.own = backbone.forward
        self.signature = inspect.signature(self.own)
        self.arguments: dict[str, Any] = {}
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.arguments = self.signature.bind(*args, **kwargs).arguments
        self.output = self.own(*args, **kwargs)
        return self.output


def find_reading(engine: Engine, backbone: nn.Module, batch: Batch) -> Reading:
    """For the batch of a few rows, in eval mode. Raises UserError where the head reads what cannot be kept row by
    row."""
    seen = Observed(backbone)
    mask = batch.inputs["attention_mask"].bool()
    with replaced(backbone, seen):
        outputs(engine, batch)
    if not isinstance(seen.output, Mapping):
        raise UserError(
            f"{KEY}: {type(backbone).__name__} returns a {type(seen.output).__name__}, no named fields"
        )

    def reads(**changed: Any) -> bool:
        values = {name: value for name, value in seen.output.items() if _tensors(value)}
        altered = type(seen.output)(**values | changed)
        with replaced(backbone, lambda *_, **__: altered):
            return _is_nan(outputs(engine, batch))

    read: list[Field] = []
    unread: list[Field] = []
    for name, value in seen.output.items():
        if not isinstance(value, Tensor):
            # a cache of keys and values is handed through; layers' states and attentions may be used
            if _tensors(value) and reads(**{name: _poisoned(value)}):
                raise UserError(
                    f"{KEY}: the head reads {name} of {type(backbone).__name__}, the states of all layers, which are "
                    "not kept: set cache_features: false"
                )
        elif reads(**{name: _poisoned(value)}):
            field = _field(name, value, mask, backbone)
            # whatever is read of all tokens, is read of the first and of the last one
            smaller = (replace(field, taken="first"), replace(field, taken="last"))
            kept = [
                one
                for one in smaller
                if field.taken == "every" and not reads(**{name: _only(one, value, mask)})
            ]
            read.append(kept[0] if kept else field)
        else:
            unread.append(_field(name, value, mask, backbone))
    if not read:
        raise UserError(f"{KEY}: the logits do not depend on what {type(backbone).__name__} returns")
    telling = tuple(name for name in TELLING if seen.arguments.get(name) is not None)
    if "input_ids" not in telling or seen.arguments.get("attention_mask") is None:
        raise UserError(
            f"{KEY}: the model does not hand input_ids and attention_mask to {type(backbone).__name__}: its rows "
            "cannot be told apart"
        )
    return Reading(type(seen.output), tuple(read), tuple(unread), telling)


def _field(name: str, value: Tensor, mask: Tensor, backbone: nn.Module) -> Field:
    if value.ndim >= 3 and value.shape[:2] == mask.shape:
        return Field(name, "every", tuple(value.shape[2:]), value.dtype)
    if value.ndim == 2 and value.shape[0] == mask.shape[0]:
        return Field(name, "row", tuple(value.shape[1:]), value.dtype)
    raise UserError(
        f"{KEY}: {name} of {type(backbone).__name__} is {list(value.shape)} for rows × tokens {list(mask.shape)}: "
        "neither a state per row nor one per token"
    )


def _only(field: Field, value: Tensor, mask: Tensor) -> Tensor:
    """NaN at the tokens that `field` does not keep, zero at the padding."""
    everything = replace(field, taken="every")
    rows = everything.pad([torch.full_like(everything.pick(value, mask), torch.nan)], mask)
    kept = field.pad([field.pick(value, mask)], mask)
    places = field.pad([torch.ones_like(field.pick(value, mask))], mask).bool()
    return torch.where(places, kept, rows)


def _poisoned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.full_like(value, torch.nan)
    return tuple(_poisoned(one) for one in value)


def _tensors(value: Any) -> bool:
    """Whether it is a tensor of numbers, or a tuple of nothing else."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, tuple) and all(_tensors(one) for one in cast(tuple[Any, ...], value))


def _is_nan(found: Mapping[str, Any]) -> bool:
    logits = [value for name, value in found.items() if name.endswith("logits")]
    assert logits, f"outputs without logits: {list(found)}"
    return any(bool(torch.isnan(value).any()) for value in logits)
