"""What linear_cross_entropy refuses: one line each, that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith_kernels import linear_cross_entropy

HIDDEN, WEIGHT, TARGET = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
SOFT = torch.full((5, 11), 1 / 11)


class _Sharded(torch.Tensor):
    """What a DTensor is told by."""

    def to_local(self) -> torch.Tensor:
        return torch.zeros(1)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weight": WEIGHT.as_subclass(_Sharded)}, "weight is a DTensor: gather it"),
    ({"hidden": HIDDEN.as_subclass(_Sharded)}, "hidden is a DTensor: gather it"),
    ({"weight": torch.zeros(44, 1, dtype=torch.uint8)}, "weight is uint8: a quantised head"),
    ({"weight": torch.zeros(11, 8, dtype=torch.int8)}, "weight is int8: a quantised head"),
    ({"weight": torch.zeros(11, 8, dtype=torch.float8_e4m3fn)}, "weight is float8_e4m3fn: a quantised head"),
    ({"weight": torch.zeros(11)}, r"weight is \[classes, features\]"),
    ({"weight": torch.zeros(1, 8)}, "2 classes or more"),
    ({"weight": torch.zeros(0)}, r"weight is \[classes, features\].*not \[0\]"),
    ({"weight": torch.zeros(11, 9)}, r"hidden is \[..., 9\] for this weight, not \[5, 8\]"),
    ({"hidden": torch.zeros(8)}, r"hidden is \[..., 8\]"),
    ({"weight": WEIGHT.to("meta")}, "weight is on meta, hidden on cpu"),
    ({"bias": torch.zeros(8)}, r"bias is \[11\]"),
    ({"bias": torch.zeros(11, 1)}, r"bias is \[11\]"),
    ({"target": torch.arange(4)}, r"target is \[4\], hidden \[5, 8\] asks for \[5\]"),
    ({"target": SOFT[:, :8]}, r"target is \[5, 8\].*asks for \[5, 11\]"),
    ({"target": TARGET.int()}, "target is int64 or floating, not int32"),
    ({"target": SOFT.clone().requires_grad_()}, "target requires a gradient"),
    ({"target": TARGET.to("meta")}, "target is on meta"),
    ({"class_weight": torch.ones(8)}, r"class_weight is \[11\], not \[8\]"),
    ({"class_weight": torch.ones(11, requires_grad=True)}, "class_weight requires a gradient"),
    ({"token_weight": torch.ones(1)}, r"token_weight is \[5\], not \[1\]"),
    ({"token_weight": torch.ones(5, requires_grad=True)}, "token_weight requires a gradient"),
    ({"normalizer": torch.ones(1)}, r"normalizer is \[\], not \[1\]"),
    ({"normalizer": torch.tensor(2.0, requires_grad=True)}, "normalizer requires a gradient"),
    ({"label_smoothing": 1.0}, r"label_smoothing lies in \[0, 1\)"),
    ({"label_smoothing": -0.1}, r"label_smoothing lies in \[0, 1\)"),
    ({"label_smoothing": float("nan")}, r"label_smoothing lies in \[0, 1\)"),
    ({"z_loss": -1e-4}, "z_loss is finite and not negative"),
    ({"focal_gamma": float("inf")}, "focal_gamma is finite and not negative"),
    ({"focal_gamma": 2.0, "target": SOFT}, "focal_gamma needs class targets"),
    ({"softcap": 0.0}, "softcap is finite and positive, or None"),
    ({"softcap": -30.0}, "softcap is finite and positive, or None"),
    ({"scale": 0.0}, "scale is finite and not 0"),
    ({"scale": float("nan")}, "scale is finite and not 0"),
    ({"reduction": "mean"}, 'reduction is "sum" or "none", not \'mean\''),
    ({"backend": "cuda"}, "no backend 'cuda': one of reference, torch, cpu, triton"),
    ({"backend": "triton"}, "backend triton cannot run here"),
    ({"backend": "cpu", "hidden": HIDDEN.half()}, "backend cpu cannot run here: .*not float16"),
    ({"backend": "torch", "hidden": HIDDEN.double()}, "backend torch cannot run here: fp64"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(given: dict[str, Any], message: str) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, **given}
    with pytest.raises(ValueError, match=message) as error:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("wrong", [11, -1, 2**40])
def test_a_target_that_is_no_class(wrong: int, reduction: str, backend: str) -> None:
    target = TARGET.clone()
    target[3] = wrong
    with pytest.raises(IndexError, match=f"target {wrong} is not a class, 0 to 10"):
        linear_cross_entropy(HIDDEN, WEIGHT, target, reduction=reduction, backend=backend)
    assert linear_cross_entropy(HIDDEN, WEIGHT, target, ignore_index=wrong, backend=backend).isfinite()
