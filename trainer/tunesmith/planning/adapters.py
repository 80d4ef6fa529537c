"""Adapters on a model without weights, by the run's own code; what their initialisation computes is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.adapters.attach import attach
from tunesmith.errors import UserError
from tunesmith.planning.quantised import mark_adapted
from tunesmith.recipe.adapters import Adapter, Lora, OtherPeft, PromptTuning


def attached(model: Any, settings: list[Adapter], auto_class_name: str, base: Path) -> Any:
    """The model on the meta device with the recipe's adapters. Raises UserError as the run would, and for methods of
    PEFT that compute with the weights as they are made."""
    try:
        made = attach(model, [_drawn(one) for one in settings], auto_class_name, base, 0).model
    except NotImplementedError as error:
        others = [one.peft_type for one in settings if isinstance(one, OtherPeft)]
        raise UserError(
            f"trainable.adapters: {', '.join(others)} cannot be planned: without weights PEFT does not make it "
            f"({str(error).splitlines()[0]})"
        ) from None
    mark_adapted(made)
    return made


def _drawn(settings: Adapter) -> Adapter:
    """PiSSA, OLoRA and LoftQ decompose weights, virtual tokens may start as a text's: there are none of either here,
    and the sizes are those of any other start."""
    match settings:
        case Lora():
            return settings.model_copy(update={"init_lora_weights": True})
        case PromptTuning():
            return settings.model_copy(update={"prompt_tuning_init_text": None})
        case _:
            return settings
