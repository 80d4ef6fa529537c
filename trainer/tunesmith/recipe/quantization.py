"""`model.quantization`: the frozen base in few bits, by bitsandbytes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import NonNegativeFloat, Section


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
