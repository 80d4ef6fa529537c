"""The model of a run, put together: from its files, in few bits, with a head of its own, with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.adapters.attach import attach
from tunesmith.errors import UserError
from tunesmith.model import load_model
from tunesmith.module import AUTOCAST
from tunesmith.objectives import Objective
from tunesmith.precision import choose
from tunesmith.quantized import scales
from tunesmith.recipe import Recipe
from tunesmith.recipe.adapters import Adapter, Existing, Lora
from tunesmith.tasks.assemble import assemble_tasks
from tunesmith.tasks.objective import TaskObjective


@dataclass(frozen=True, slots=True)
class Assembled:
    """`fill` gives weights to a model that was built without. `lr_scale`: factors on the learning rates of adapters'
    parameters, by name. `from_files`: the modules' ids, and the names in them, of the parameters that the model's
    files give as they are; PEFT may put another Parameter in a parameter's place."""

    model: Any
    facts: dict[str, Any]
    notes: list[str]
    fill: Callable[[torch.device], None]
    lr_scale: dict[str, float] = field(default_factory=dict[str, float])
    from_files: frozenset[tuple[int, str]] = frozenset()

    def rebuilt(self) -> frozenset[str]:
        """The names of the weights that the files give again, and that no step changes: a checkpoint need not hold
        them. To be asked when it is settled what is trained."""
        known: set[str] = set()
        for prefix, owner in self.model.named_modules(remove_duplicate=False):
            for leaf, parameter in owner.named_parameters(recurse=False):
                if (id(owner), leaf) in self.from_files and not parameter.requires_grad:
                    known.add(f"{prefix}.{leaf}")
        return frozenset(known) | (scales(self.model) if known else frozenset())


def assemble(
    recipe: Recipe,
    base: Path,
    objective: Objective,
    tokenizer: Any,
    device: torch.device,
    *,
    empty: bool = False,
) -> Assembled:
    """The recipe's model on the CPU. `empty`: on the meta device where its files alone fill it, to be sharded;
    `device`: where it will be trained."""
    if isinstance(objective, TaskObjective):
        joined = assemble_tasks(recipe, base, objective, tokenizer, device)
        return Assembled(joined.model, joined.facts, joined.notes, joined.fill)
    settings, seed = recipe.trainable, recipe.training.seed
    precision, _ = choose(recipe.training.precision, device)
    whole = bool(settings.adapters) or settings.head is not None or recipe.model.quantization is not None
    whole = whole or bool(recipe.model.add_tokens)
    distill = recipe.distill
    # projections stand in no file, and the layers that a student begins as in another model's
    whole = whole or (distill is not None and (distill.trains_projections or distill.init is not None))

    def begin(model: Any) -> dict[str, Any]:
        from tunesmith.distill.initial import begin_as_teacher  # which imports the engines

        assert distill is not None
        return begin_as_teacher(model, distill, base, objective, tokenizer, seed).facts()

    loaded = load_model(
        recipe.model,
        base,
        objective,
        tokenizer,
        seed,
        empty=empty and not whole,
        head=settings.head,
        compute_dtype=AUTOCAST.get(precision, torch.float32),
        begin=begin if distill is not None and distill.init is not None else None,
    )
    few_bits = recipe.model.quantization is not None
    from_files = _from_files(loaded.model, loaded.facts) if settings.adapters or few_bits else frozenset()
    if not settings.adapters:
        return Assembled(loaded.model, loaded.facts, loaded.notes, loaded.fill, from_files=from_files)
    attached = attach(
        loaded.model,
        _training_tokens(loaded.model, settings.adapters, recipe.model.add_tokens, tokenizer),
        objective.auto_class.__name__,
        base,
        seed,
        tokenizer=tokenizer,
        new_weights=loaded.facts.get("new_weights", []),
    )
    attached.model.virtual_positions = attached.positions  # which a prompt and its answer cannot have
    return Assembled(
        attached.model,
        loaded.facts | attached.facts,
        [*loaded.notes, *attached.notes],
        loaded.fill,
        attached.lr_scale,
        frozenset() if attached.changes_base else from_files,
    )


def _training_tokens(
    model: Any, adapters: Sequence[Adapter], tokens: Sequence[str], tokenizer: Any
) -> list[Adapter]:
    """The adapters with the rows of `tokens` among what the first LoRA trains and saves, unless it does already with
    the whole embedding."""
    found = list(adapters)
    if not tokens or any(isinstance(one, Existing) or one.path is not None for one in found):
        return found
    embeddings = model.get_input_embeddings()
    place = next(f".{name}" for name, module in model.named_modules() if module is embeddings)
    for at, one in enumerate(found):
        if isinstance(one, Lora) and one.trainable:
            if not any(place.endswith(f".{name}") for name in one.modules_to_save):
                new = {int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
                rows = sorted(new | set(one.trainable_token_indices or []))
                found[at] = one.model_copy(update={"trainable_token_indices": rows})
            return found
    raise UserError(
        f"model.add_tokens: {found[0].type} leaves the rows of new tokens untrained: use lora, which trains them"
    )


def _from_files(model: nn.Module, facts: dict[str, Any]) -> frozenset[tuple[int, str]]:
    if facts["weights"].startswith("random") or "teacher_layers" in facts:
        return frozenset()
    drawn = set(facts.get("new_weights", []))
    return frozenset(
        (id(owner), leaf)
        for prefix, owner in model.named_modules()
        for leaf, _ in owner.named_parameters(recurse=False)
        if f"{prefix}.{leaf}" not in drawn
    )
