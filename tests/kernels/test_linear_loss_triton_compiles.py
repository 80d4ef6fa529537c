"""The Triton row kernel of the linear cross-entropy as machine code, for GPUs that are not here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from aot import CAPABILITIES, Compiled, assert_fits, compile_kernel
from tunesmith_kernels.linear_loss import triton_rows


@dataclass(frozen=True)
class Options:
    """What the kernel is compiled for."""

    soft: bool = False
    smoothed: bool = False
    capped: bool = False
    scaled: bool = False
    class_weight: bool = False
    token_weight: bool = True
    gradient: bool = True


# z-loss and the focal γ are numbers of a row: the same code computes them with and without
OPTIONS = {
    "plain": Options(token_weight=False),
    "no gradient": Options(gradient=False),
    "class weight": Options(class_weight=True),
    "scale": Options(scaled=True),
    "softcap": Options(capped=True),
    "smoothing": Options(smoothed=True),
    "smoothing, class weight": Options(smoothed=True, class_weight=True),
    "soft": Options(soft=True),
    "soft, class weight": Options(soft=True, class_weight=True),
    "soft, smoothing, class weight, softcap": Options(
        soft=True, smoothed=True, class_weight=True, capped=True
    ),
    "smoothing, class weight, softcap": Options(smoothed=True, class_weight=True, capped=True),
    "smoothing, class weight, scale": Options(smoothed=True, class_weight=True, scaled=True),
}
DTYPES = {"bf16": "*i16", "fp16": "*fp16", "fp32": "*fp32"}
# whole 16-byte loads and not; several rows of a program, one row of one block, of several
VOCABS = (2, 1000, 1024, 50257, 128256)
# ptxas leaves a word or four in memory rather than have fewer blocks on a multiprocessor
_SPILLS = 16
OUTPUTS = ("loss_out", "log_prob_out", "entropy_out", "lse_out")
NUMBERS = ("smoothing", "z_loss", "gamma", "softcap", "scale")


def compiled(dtype: str, vocab: int, options: Options, capability: int) -> Compiled:
    itemsize = 4 if dtype == "fp32" else 2
    chosen = triton_rows.config(vocab, itemsize, options.soft or options.smoothed)
    pointers = {
        "logits": DTYPES[dtype],
        "target": "*fp32" if options.soft else "*i64",
        "class_weight": "*fp32",
        "token_weight": "*fp32",
        "factor": "*fp32",
        **dict.fromkeys(OUTPUTS, "*fp32"),
    }
    absent = {"class_weight": options.class_weight, "token_weight": options.token_weight}
    constexprs = {name: None for name, here in {**absent, "factor": options.gradient}.items() if not here}
    # the outputs of a chunk may begin anywhere in the batch's
    aligned = [name for name in pointers if name not in constexprs and name not in OUTPUTS]
    return compile_kernel(
        triton_rows.rows_kernel,
        {
            **pointers,
            "correct_out": "*u8",
            "count": "i32",
            "vocab": "i32",
            **dict.fromkeys(NUMBERS, "fp32"),
        },
        {
            **constexprs,
            "soft": options.soft,
            "smoothed": options.smoothed,
            "capped": options.capped,
            "scaled": options.scaled,
            "rows": chosen.rows,
            "block": chosen.block,
            "group": chosen.group,
            "stages": triton_rows.stage_count(options.soft),
            "interpreted": False,
        },
        num_warps=chosen.num_warps,
        num_stages=3,
        capability=capability,
        divisible_by_16=(*aligned, *(("vocab",) if vocab % 16 == 0 else ())),
    )


def check(dtype: str, vocab: int, options: Options, capability: int) -> Compiled:
    kernel = compiled(dtype, vocab, options, capability)
    assert_fits(kernel, capability, _SPILLS)
    assert ".f64" not in kernel.ptx
    if options.gradient:
        assert ("cvt.rn.bf16" in kernel.ptx) == (dtype == "bf16"), (
            "bfloat16 is not rounded to the nearest even"
        )
    return kernel


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_language_model_in_bf16_compiles(options: Options):
    kernel = check("bf16", 128256, options, 90)
    assert "cp.async.cg.shared.global" in kernel.ptx  # 16 bytes a time, under way while others are in use
    if options.gradient:
        assert "st.global.v4.b32" in kernel.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_kernel_compiles(dtype: str, capability: int):
    for vocab in (7, 50257, 128256):
        kernel = check(dtype, vocab, OPTIONS["plain"], capability)
        assert_fits(kernel, capability, spills=0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_case_compiles(options: Options, dtype: str, capability: int):
    for vocab in VOCABS:
        check(dtype, vocab, options, capability)
