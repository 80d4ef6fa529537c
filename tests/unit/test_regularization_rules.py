"""What `regularization` refuses, in one line that names the setting."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.recipe import Recipe

SMALL: dict[str, Any] = {
    "model": {"model_name_or_path": "m"},
    "data": {"train": [{"path": "a.csv", "format": "classification"}]},
    "objective": {"type": "classification"},
    "run_name": "r",
}


def told(**sections: Any) -> str:
    values = {
        name: {**SMALL.get(name, {}), **sections.get(name, {})}
        if isinstance(SMALL.get(name, {}), dict)
        else of
        for name, of in (SMALL | sections).items()
    }
    with pytest.raises(ValueError, match="regularization") as caught:
        Recipe.model_validate(values)
    return str(caught.value)


SAM = {"sharpness": {"type": "sam"}}
FGM = {"adversarial": {"type": "fgm"}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"regularization": {"r_drop": {}}, "model": {"dropout": 0.0}},
            "regularization.r_drop: has no effect with model.dropout: 0",
        ),
        ({"regularization": SAM, "training": {"precision": "bf16_kahan"}}, "less than bf16 can tell"),
        (
            {"regularization": {"sharpness": {"type": "sam", "every": 9}}, "training": {"max_steps": 8}},
            "regularization.sharpness.every: 9 is more than training.max_steps: 8",
        ),
        (
            {"regularization": FGM, "trainable": {"freeze": ["backbone"], "cache_features": True}},
            "regularization.adversarial: perturbs embeddings, which trainable.cache_features",
        ),
        (
            {"regularization": FGM, "parallel": {"strategy": "fsdp2", "tensor_parallel_size": 2}},
            "and parallel.tensor_parallel_size exclude each other",
        ),
        (
            {
                "regularization": {
                    "adversarial": {"type": "pgd", "epsilon": 1.0, "steps": 3, "step_size": 0.3}
                }
            },
            "regularization.adversarial.epsilon: 1 has no effect: 3 steps of 0.3 do not reach beyond it",
        ),
        ({"regularization": {"l1": -1.0}}, "regularization.l1"),
        ({"regularization": {"max_norm": {"value": 0.0}}}, "regularization.max_norm.value"),
    ],
)
def test_it_is_refused_by_name(sections: dict[str, Any], expected: str) -> None:
    assert expected in told(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"regularization": {"r_drop": {}}, "model": {"dropout": 0.0, "drop_path": 0.1}},
        {"regularization": {"r_drop": {}}, "model": {"dropout": 0.1}},
        {"regularization": SAM | FGM, "training": {"precision": "bf16"}},
        {"regularization": {"l1": 0.0, "l2": {"coefficient": 1e-4, "parameters": ["head", "last 2 layers"]}}},
        {"regularization": {"adversarial": {"type": "pgd", "epsilon": 1.0, "steps": 3, "step_size": 0.5}}},
    ],
)
def test_what_goes_together_is_taken(sections: dict[str, Any]) -> None:
    merged = {**SMALL, **sections, "model": {**SMALL["model"], **sections.get("model", {})}}
    Recipe.model_validate(merged)
