"""The accuracy rule that every kernel is held to, and the mutants that show that the rule has teeth."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLACK = 1.5
# Errors that pass however near torch is, which on few numbers is luck: in units of the last place of the result's
# dtype, over exact's norm and at its largest value. bf16 and fp16 results: of one rounding.
_FLOOR = {torch.float32: (2.0, 2.0), torch.bfloat16: (0.5, 1.0), torch.float16: (0.5, 1.0)}


def within(found: Tensor, exact: Tensor, own: Tensor) -> bool:
    """Whether found's error against `exact` is at most 1.5 times that of `own`, in norm and at its largest.

    exact: fp64. own: what torch's plain operators give in the dtype under test. found: fp32, bf16 or fp16.
    """
    assert exact.dtype == torch.float64
    assert found.dtype in _FLOOR, found.dtype
    assert found.shape == exact.shape == own.shape, (found.shape, exact.shape, own.shape)
    if exact.numel() == 0:
        return True
    assert bool(own.isfinite().all()), "torch's own result is not finite: it says nothing about the error"
    mine, theirs = found.double() - exact, own.double() - exact
    over_norm, at_largest = (units * torch.finfo(found.dtype).eps for units in _FLOOR[found.dtype])
    norm = mine.norm() <= torch.maximum(_SLACK * theirs.norm(), over_norm * exact.norm())
    largest = mine.abs().amax() <= torch.maximum(
        _SLACK * theirs.abs().amax(), at_largest * exact.abs().amax()
    )
    return bool(norm & largest)


def mutants(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Wrong results that look like `tensor`, by name. What is particular to an op (a dropped term) its test adds."""
    yield "zero", torch.zeros_like(tensor)
    yield "negated", -tensor
    yield "doubled", 2 * tensor
    yield "halved", tensor / 2
    if tensor.ndim and tensor.shape[0] > 1:
        yield "rows rolled", tensor.roll(1, 0)
    elif tensor.ndim > 1 and tensor.shape[-1] > 1:
        yield "columns rolled", tensor.roll(1, -1)


def hold(found: Tensor, exact: Tensor, own: Tensor, name: str = "", **dropped: Tensor) -> None:
    """Asserts that `found` is within the rule and that each of its mutants, and each tensor of `dropped` (the result
    without one of its terms), is not."""
    assert within(found, exact, own), f"{name}: {report(found, exact, own)}"
    for mutation, mutant in (*mutants(found), *dropped.items()):
        assert not within(mutant, exact, own), f"{name}: the mutant '{mutation}' passes"


def report(found: Tensor, exact: Tensor, own: Tensor) -> str:
    """The errors, for a person."""
    mine, theirs = found.double() - exact, own.double() - exact
    return (
        f"norm {mine.norm():.3e} against {theirs.norm():.3e} (exact {exact.norm():.3e}), "
        f"largest {mine.abs().amax():.3e} against {theirs.abs().amax():.3e} (exact {exact.abs().amax():.3e})"
    )
