"""The cases of test_linear_distillation_triton, and the program that runs them in triton's interpreter: it wants a
process of its own, since triton reads TRITON_INTERPRET when a kernel is defined.

    TRITON_INTERPRET=1 python distillation_triton_runs.py OUT.pt
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from distillation_cases import DIVERGENCES, TEACHERS, Case, case, distilled
from tunesmith_kernels.linear_loss.distillation import TeacherHidden

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cases() -> Iterator[tuple[str, Case, bool]]:
    """Name, case, and whether student and teacher are alike."""
    for (divergence, given), teacher in itertools.product(DIVERGENCES.items(), TEACHERS):
        for name, dtype in DTYPES.items():
            if teacher not in {"fp16": ("hidden",), "bf16": ("hidden", *TEACHERS[2:])}.get(name, TEACHERS):
                continue
            temperature = 2.0 if (teacher == "logits") == (name == "bf16") else 1.0
            made = case(40, 40, 203, teacher=teacher, ignored=0.1, temperature=temperature, **given)
            yield f"{divergence}, {teacher}, {name}", made.to(dtype), False
        made = case(60, 40, 203, teacher=teacher, temperature=2.0, softcap=2.0, scale=-1.5, **given)
        made = made.given(token_weight=2.0 ** (torch.arange(60) % 3), normalizer=torch.tensor(8.0))
        if isinstance(made.teacher, TeacherHidden):
            made = replace(made, teacher=replace(made.teacher, softcap=3.0, scale=1.2))
        yield f"{divergence}, {teacher}, options", made, False
        made = case(40, 40, 203, teacher=teacher, bias=False, ce_weight=0.0, reduction="none", **given)
        yield f"{divergence}, {teacher}, without target", replace(made, target=None), False
        if teacher in ("hidden", "top k with tail"):
            yield (
                f"{divergence}, {teacher}, wide",
                case(8, 24, 5003, teacher=teacher, bias=False, **given),
                False,
            )
    for divergence, given in DIVERGENCES.items():
        made = case(60, 40, 303, ce_weight=0.0, bias=False, reduction="none", **given)
        near = made.weight * (
            1 + 0.01 * torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(7))
        )
        yield f"{divergence}, near", replace(made, teacher=TeacherHidden(made.hidden, near)), True


def upstream(made: Case) -> torch.Tensor | None:
    return torch.ones(len(made.hidden)) if made.options.get("reduction") == "none" else None


if __name__ == "__main__":
    torch.save({name: distilled(made, "triton", upstream(made)) for name, made, _ in cases()}, sys.argv[1])
