"""The Triton row kernel of the linear cross-entropy by the accuracy rule: the public function in triton's interpreter,
which wants a process of its own, since triton reads TRITON_INTERPRET when a kernel is defined:

    TRITON_INTERPRET=1 python test_linear_loss_triton.py OUT.pt
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import hold, within
from head_cases import Case, case, certain, fused, naive, targetless
from tunesmith_kernels import linear_cross_entropy
from tunesmith_kernels.linear_loss.rows import RowInputs, RowOptions, RowOutputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# one block, several rows of a program, the last of them not whole; several blocks and the last not whole; with and
# without whole loads
SHAPES = {
    "2 classes": (37, 8, 2),
    "7 classes": (37, 8, 7),
    "64 classes": (33, 16, 64),
    "1003": (13, 24, 1003),
}
WIDE = {"6007": (16, 16, 6007), "50304": (5, 16, 50304), "128256": (2, 16, 128256)}
ROWS, FEATURES, VOCAB = 64, 16, 304
ZERO = ("all ignored", "p is 1")  # cases of neither loss nor gradient
STATS = ("log_prob", "entropy", "lse", "correct", "counted")


def _positive(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2


def _soft(rows: int, vocab: int) -> Tensor:
    return torch.softmax(2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4)), 1)


HARD: dict[str, dict[str, Any]] = {
    "class weights": {"class_weight": _positive(VOCAB)},
    "class weights of zero": {"class_weight": _positive(VOCAB).round()},
    "token weights": {"token_weight": _positive(ROWS) - 0.5},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and class weights": {"label_smoothing": 0.3, "class_weight": _positive(VOCAB)},
    "z-loss": {"z_loss": 1e-2},
    "focal": {"focal_gamma": 2.0},
    "focal below 1": {"focal_gamma": 0.5},
    "soft-cap": {"softcap": 2.0},
    "scale": {"scale": -1.7},
    "soft-cap and scale": {"softcap": 3.0, "scale": 2.5},
    "normalizer": {"normalizer": torch.tensor(41.5)},
}
HARD["all"] = {
    **{name: value for options in HARD.values() for name, value in options.items()},
    "label_smoothing": 0.1,
    "focal_gamma": 1.5,
    "scale": 1.3,
}
SOFT: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{name: given for name, given in HARD.items() if "focal_gamma" not in given},
    "all": {name: value for name, value in HARD["all"].items() if name != "focal_gamma"},
}


def _cases() -> Iterator[tuple[str, Case]]:
    for name, shape in {**SHAPES, **WIDE}.items():
        yield name, replace(case(*shape, ignored=0.2 if name in SHAPES else 0.0), upstream=-2.5)
        yield f"{name}, soft", replace(case(*shape), target=_soft(shape[0], shape[2]))
    for name, options in HARD.items():
        yield f"hard, {name}", case(ROWS, FEATURES, VOCAB, ignored=0.2).given(**options)
    for name, options in SOFT.items():
        yield (
            f"soft, {name}",
            replace(case(ROWS, FEATURES, VOCAB), target=_soft(ROWS, VOCAB)).given(**options),
        )
    for name in ("hard, all", "soft, all"):
        made = case(ROWS, FEATURES, VOCAB, ignored=0.2).given(**HARD["all"])
        if name.startswith("soft"):
            made = replace(case(ROWS, FEATURES, VOCAB), target=_soft(ROWS, VOCAB)).given(**SOFT["all"])
        yield f"{name}, each", made.given(reduction="none")
    for probability in (0.9, 0.999, 0.9999):
        yield f"certain {probability}", certain(9, probability)
    yield "certain, focal and z-loss", certain(9, 0.999).given(focal_gamma=2.0, z_loss=1e-3)
    wide = {"class_weight": _positive(6016), "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0}
    yield "wide, all but focal", case(16, 16, 6016).given(**wide)
    masked = case(9, FEATURES, VOCAB)
    bias = torch.zeros(VOCAB)
    bias[::3] = -torch.inf
    yield "masked classes", replace(masked, bias=bias, target=masked.target // 3 * 3 + 1)
    sure = Case(
        torch.ones(2, 2), torch.tensor([[90.0, 90.0], [-90.0, 0.0], [0.0, -90.0]]), torch.zeros(2).long()
    )
    for gamma in (0.5, 1.0, 2.0):  # the limit, not 0 · ∞
        yield f"p is 1, focal {gamma}", sure.given(focal_gamma=gamma)
    yield "all ignored", replace(case(6, FEATURES, VOCAB), target=torch.full((6,), -100))


CASES = dict(_cases())
# fp16 differs from bf16 in its loads and stores alone, and the widest rows from wide ones in their length
KEYS = [
    (name, dtype)
    for name in CASES
    for dtype in DTYPES
    if (dtype != "fp16" or name in SHAPES or "all" in name) and (dtype == "bf16" or "128256" not in name)
]
STATS_KEYS = [
    (name, dtype) for name, dtype in KEYS if not name.startswith(("hard, ", "soft, ")) or "all" in name
]


def _upstream(made: Case) -> Tensor | None:
    if made.options.get("reduction") != "none":
        return None
    return torch.randn(made.hidden.shape[0], generator=torch.Generator().manual_seed(5))


def _with_stats(made: Case, backend: str) -> dict[str, Tensor]:
    options: dict[str, Any] = {**made.options, "reduction": "none", "backend": backend}
    with torch.no_grad():
        loss, stats = linear_cross_entropy(
            made.hidden,
            made.weight,
            made.target,
            bias=made.bias,
            **options,
            return_stats=True,
        )
    return {"loss": loss, **{name: getattr(stats, name) for name in STATS}}


# rows of logits that are not all finite, or whose target is no class: each must give a loss that is not finite
ILL = {
    "nan": (torch.nan, 5, 1),
    "+inf": (torch.inf, 5, 1),
    "nan at the target": (torch.nan, 1, 1),
    "+inf at the target": (torch.inf, 1, 1),
    "no such class": (0.0, 0, 300),
    "negative": (0.0, 0, -7),
    "target masked": (-torch.inf, 1, 1),
}


def _ill(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses and gradients of two rows, the second of which is sound, by what is wrong with the first."""
    from tunesmith_kernels.linear_loss.triton_rows import triton_rows

    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (value, place, target) in ILL.items():
        logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
        logits[0, place] += value
        zero = torch.zeros(2)
        outputs = RowOutputs(zero, zero.clone(), zero.clone(), zero.clone(), zero.bool())
        inputs = RowInputs(torch.tensor([target, 7]), None, None, torch.ones(2))
        triton_rows(logits, inputs, RowOptions(), outputs)
        found[name] = outputs.loss, logits
    return found


def run() -> dict[str, Any]:
    out: dict[str, Any] = {"gradients": {}, "stats": {}, "ill": {}}
    for name, dtype in KEYS:
        made = CASES[name].to(DTYPES[dtype])
        out["gradients"][name, dtype] = fused(made, "triton", _upstream(made))
        if (name, dtype) in STATS_KEYS:
            out["stats"][name, dtype] = _with_stats(made, "triton")
    out["ill"] = {dtype: _ill(DTYPES[dtype]) for dtype in DTYPES}
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernel computed, all cases in one process of its own."""
    out = tmp_path_factory.mktemp("triton") / "found.pt"
    done = subprocess.run(
        [sys.executable, __file__, str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("name", "dtype"), KEYS)
def test_loss_and_gradients(found: dict[str, Any], name: str, dtype: str) -> None:
    made = CASES[name].to(DTYPES[dtype])
    values, upstream = found["gradients"][name, dtype], _upstream(made)
    if name.startswith(ZERO):
        assert all(bool((value == 0).all()) for value in values.values())
        return
    exact, own = naive(made.to(torch.float64), upstream), naive(made, upstream)
    assert values.keys() == exact.keys()
    wrong = {f"without {option}": naive(lacking, upstream) for option, lacking in _lacking(made)}
    if name != "masked classes":  # where a logit is −inf, torch can't say what its own term is
        wrong["target term dropped"] = targetless(made, exact, upstream)
    for part, value in values.items():
        dropped = {what: result[part].to(value.dtype) for what, result in wrong.items() if part in result}
        hold(value, exact[part], own[part], part, **dropped)


def _lacking(made: Case) -> Iterator[tuple[str, Case]]:
    """The case without each of its options."""
    for option in made.options:
        if option != "reduction":
            rest = {name: value for name, value in made.options.items() if name != option}
            yield option, replace(made, options=rest)


@pytest.mark.parametrize(("name", "dtype"), STATS_KEYS)
def test_statistics(found: dict[str, Any], name: str, dtype: str) -> None:
    made = CASES[name].to(DTYPES[dtype])
    values = found["stats"][name, dtype]
    exact, own = _with_stats(made.to(torch.float64), "reference"), _with_stats(made, "reference")
    assert torch.equal(values["counted"], exact["counted"])
    assert torch.equal(values["correct"], own["correct"])
    if name.startswith(ZERO):
        return
    for part in ("loss", "log_prob", "entropy", "lse"):
        if name.startswith(
            "certain"
        ):  # the rows' probabilities are the same, and so are rows that are rolled
            assert within(values[part], exact[part].double(), own[part]), part
        else:
            hold(values[part], exact[part].double(), own[part], part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ILL)
def test_an_ill_row_is_not_finite_and_alone(found: dict[str, Any], name: str, dtype: str) -> None:
    losses, gradients = found["ill"][dtype][name]
    assert not losses[0].isfinite()
    assert losses[1].isfinite()
    assert bool(gradients[1].isfinite().all())
    assert bool(gradients[0].isnan().all()) or name == "target masked"


if __name__ == "__main__":
    torch.save(run(), sys.argv[1])
