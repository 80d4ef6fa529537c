"""Noise while a model trains, as its recipe has it: dropout, stochastic depth, noisy embeddings."""

from __future__ import annotations

from typing import Any

from tunesmith.drop_path import add_drop_path, check_drop_path, override_drop_path
from tunesmith.errors import UserError
from tunesmith.neftune import add_neftune
from tunesmith.recipe.model import Model


def configure(config: Any, settings: Model) -> dict[str, Any]:
    """Sets what the model's config has fields for, before the model is built, and returns facts."""
    facts: dict[str, Any] = {}
    if settings.dropout is not None:
        facts["dropout"] = override_dropout(config, settings.dropout)
    if settings.drop_path is not None:
        override_drop_path(config, settings.drop_path)
    return facts


def attach(model: Any, settings: Model) -> dict[str, Any]:
    """Hooks onto the built model what its config has no field for, and returns facts."""
    facts: dict[str, Any] = {}
    if (rate := settings.drop_path) is not None:
        facts["drop_path"] = check_drop_path(model, rate) or add_drop_path(model, rate)
    if (alpha := settings.neftune_noise_alpha) is not None:
        add_neftune(model, alpha)
        facts["neftune_noise_alpha"] = alpha
    return facts


def override_dropout(config: Any, rate: float) -> dict[str, float]:
    """Sets every dropout probability that the config has (text and nested configs) and returns their names. Leaving
    out whole layers (layerdrop) or paths (`model.drop_path`) is something else."""
    changed: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        if _is_dropout(name) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, rate)
            changed[name] = rate
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            changed |= {f"{name}.{inner}": rate for inner in override_dropout(value, rate)}
    if not changed:
        raise UserError(f"model.dropout: {type(config).__name__} has no dropout to set")
    return changed


def _is_dropout(field: str) -> bool:
    name = field.lower()
    return "drop" in name and not any(
        other in name for other in ("layerdrop", "layer_drop", "path", "connect")
    )
