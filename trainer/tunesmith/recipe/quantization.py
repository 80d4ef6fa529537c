"""`model.quantization`: the frozen base in few bits, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tunesmith.recipe import selectors
from tunesmith.recipe.base import NonNegativeFloat, Section
from tunesmith.recipe.faults import Problem

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe


class _Quantization(Section):
    """`skip_modules` are the linear layers, by the ends of their names, that stay as they are, beside heads and
    embeddings, which always do."""

    skip_modules: list[str] = Field(default_factory=list[str])


class FourBit(_Quantization):
    """Blocks of 64 weights in 4 bits and a scale (Dettmers et al. 2023): nf4 has the quantiles of a normal
    distribution, fp4 floating-point numbers. `double_quant` quantises the scales too. Products are computed in
    `compute_dtype`; auto: that of training.precision."""

    type: Literal["nf4", "fp4"]
    double_quant: bool = True
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class EightBit(_Quantization):
    """LLM.int8() (Dettmers et al. 2022): rows of int8 and a scale; input features above `threshold` are multiplied in
    16 bits (on a GPU: a CPU multiplies by the weights that the 8 bits stand for)."""

    type: Literal["int8"]
    threshold: NonNegativeFloat = 6.0


Quantization = Annotated[FourBit | EightBit, Field(discriminator="type")]

_SHARDED = {
    "zero3": "zero3 partitions parameters and leaves the scales of quantised weights behind: use zero2, or ddp",
    "fsdp2": "fsdp2 shards parameters and leaves the scales of quantised weights behind: use ddp, or zero2",
}
_FROM_FLOATS = ("pissa", "olora", "loftq", "orthogonal")


def refusals(recipe: Recipe) -> Iterator[Problem]:
    """What excludes `model.quantization`: engines that cut the weights, and whatever would train or change them."""
    quantization = recipe.model.quantization
    if quantization is None:
        return
    key = ("model", "quantization")
    if (reason := _SHARDED.get(recipe.parallel.strategy)) is not None:
        yield Problem(key, reason)
    yield from _trained(recipe, quantization.type)
    for index, adapter in enumerate(recipe.trainable.adapters):
        init = getattr(adapter, "init_lora_weights", None)
        if isinstance(init, str) and init.startswith(_FROM_FLOATS):
            yield Problem(
                ("trainable", "adapters", index, "init_lora_weights"),
                f"{init} computes with the base's floating-point weights, or rewrites them; model.quantization has "
                f"{quantization.type}: use true or gaussian",
            )


def _trained(recipe: Recipe, kind: str) -> Iterator[Problem]:
    trainable = recipe.trainable
    if not trainable.adapters and not trainable.freeze and not trainable.unfreeze:
        yield Problem(
            ("model", "quantization"),
            f"{kind} weights cannot be trained: add trainable.adapters, or freeze the backbone",
        )
    if not isinstance(trainable.unfreeze, list):
        yield Problem(("trainable", "unfreeze"), f"reaches layers, whose weights are {kind}: use adapters")
        return
    for index, entry in enumerate(trainable.unfreeze):
        names = [entry] if isinstance(entry, str) else entry.parameters or []
        whole = [
            n for n in names if n in {"all", "backbone"} or isinstance(selectors.parse(n), selectors.Layers)
        ]
        if whole or (not isinstance(entry, str) and entry.layers is not None):
            yield Problem(
                ("trainable", "unfreeze", index),
                f"names weights that are {kind} and cannot be trained: name head, norms or biases, or use adapters",
            )
