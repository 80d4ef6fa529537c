"""From a recipe to a `Workload`: the model is built on the meta device from its config alone; weights, data and
tokenizer are not needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from tunesmith.errors import UserError
from tunesmith.fused_head import FusedHead
from tunesmith.fusing import choose_head
from tunesmith.hub import resolve_path
from tunesmith.planning.activations import Profile, Variant, profile, traced, vocabulary_of
from tunesmith.planning.adapters import attached
from tunesmith.planning.beside import beside
from tunesmith.planning.layers import cut, find_stacks, uncut
from tunesmith.planning.quantised import quantise
from tunesmith.planning.tasks import Shape, source_length, target_length, task_of
from tunesmith.planning.workload import Workload, units_of
from tunesmith.recipe import Recipe
from tunesmith.recipe.model import TrainTokenizer
from tunesmith.recipe.parallel import FSDP2, Parallel, Zero3
from tunesmith.regularize import override_dropout
from tunesmith.terms import TokenCrossEntropy
from tunesmith.trainable import apply_trainable


@dataclass(slots=True)
class Inspected:
    """A recipe's workload, its config, and what was assumed. Profiles are traced when they are asked for, once."""

    workload: Workload
    recipe: Recipe
    config: Any
    attention: str
    notes: list[str]
    base: Path
    whole_logits: str | None = None  # why the loss needs them, as far as is known
    _profiles: dict[Variant, Profile] = field(default_factory=dict[Variant, Profile])

    def model(self, *, cuda: bool = True) -> Any:
        """A new model on the meta device, without weights: quantised, with adapters and frozen as the recipe says,
        with everything open that is ever trained."""
        with torch.device("meta"):
            model = self.workload.task.auto_class.from_config(
                copy.deepcopy(self.config),
                attn_implementation=self.attention,
                trust_remote_code=self.recipe.model.trust_remote_code,
            ).float()
        quantization, trainable = self.recipe.model.quantization, self.recipe.trainable
        if quantization is not None:
            quantise(model, quantization, self.workload.precision, cuda=cuda)
        if trainable.adapters:
            model = attached(model, trainable.adapters, self.workload.task.auto_class_name, self.base)
        apply_trainable(model, trainable)
        return model

    def variant(self, parallel: Parallel, checkpointing: bool, device: str) -> Variant:
        """The arithmetic of a strategy: FSDP2 computes on parameters in the precision asked for, the others by
        autocast from fp32 ones."""
        precision = self.workload.precision
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        parameters = half if isinstance(parallel, FSDP2) else torch.float32
        zero3 = isinstance(parallel, Zero3)
        return Variant(parameters, precision, checkpointing, zero3=zero3, cuda=device != "cpu")

    def profile(self, variant: Variant) -> Profile:
        if variant not in self._profiles:
            work = self.workload

            def of(model: Any, head: FusedHead | None) -> Profile:
                cut(model, work.stacks)
                return profile(model, work.stacks, work.task, work.shape, variant, head)

            self._profiles[variant] = self._with_the_head(of, variant)
        return self._profiles[variant]

    def traced(self, variant: Variant, rows: int) -> Profile:
        """The whole depth at exactly so many rows."""
        work = self.workload
        shape = Shape(rows, work.shape.length, work.shape.target_length, work.shape.padded, work.shape.packed)
        stacks = uncut(work.stacks)

        def of(model: Any, head: FusedHead | None) -> Profile:
            return traced(model, stacks, work.task, shape, variant, head)

        return self._with_the_head(of, variant)

    def head(self, model: Any) -> FusedHead | str:
        """Whether the run would compute the loss of `model` without logits; why not."""
        return self.whole_logits or choose_head(self.recipe, model, cast(Any, self.workload.task))

    def _with_the_head(self, trace: Callable[[Any, FusedHead | None], Profile], variant: Variant) -> Profile:
        """What `trace` makes of a model, and of its head where the loss is computed without logits. The run would find
        at its start what cannot be (tunesmith.fusing), and use the model's own logits."""
        model = self.model(cuda=variant.cuda)
        head = self.head(model)
        if isinstance(head, FusedHead):
            try:
                return trace(model, head)
            except ValueError as error:
                why, model = str(error), self.model(cuda=variant.cuda)
                found = trace(model, None)
                self.whole_logits = why
                self.notes.append(f"the loss is computed from whole logits: {why}")
                return found
        return trace(model, None)


def inspect(recipe: Recipe, base: Path, *, precision: str | None = None, config: Any = None) -> Inspected:
    """`base`: the folder that the recipe's paths are relative to; `config`: the model's, where it is known already.
    Raises UserError where there is none to be had, or the recipe names what the model does not have."""
    notes: list[str] = []
    config = _config(recipe, base, notes) if config is None else _plain(config)
    attention = recipe.model.attn_implementation
    if attention not in {"eager", "sdpa"}:
        notes.append(f"attention: {attention} counted as sdpa, whose fused kernels keep the same tensors")
        attention = "sdpa"
    objective, length = recipe.objective, recipe.data.max_length
    shape = Shape(
        recipe.training.per_device_train_batch_size,
        source_length(objective, length),
        target_length(objective, length),
        padded=not recipe.data.packing,
        packed=recipe.data.packing,
    )
    notes.append(f"every row is taken to be data.max_length = {length} tokens long")
    chosen = precision or recipe.training.precision
    if chosen == "auto":
        chosen = "bf16"
        notes.append("training.precision: auto counted as bf16")
    if chosen.startswith("bf16_"):
        notes.append(f"training.precision: {chosen} counted as bf16, which needs as much or more")
        chosen = "bf16"
    task = task_of(objective)
    empty = Workload(
        _name(recipe), task, shape, chosen, recipe.optim, recipe.each_kernel, recipe.training.global_batch_size,
        root=units_of(torch.nn.Module(), [])[0], layers=(), stacks=(), buffers=0, can_checkpoint=False, vocabulary=0,
    )  # fmt: skip
    found = Inspected(empty, recipe, config, attention, notes, base)
    model = found.model()
    if any(isinstance(term, TokenCrossEntropy) for term in task.terms):
        head = found.head(model)
        notes.append(
            "every position is taken to have a label"
            if isinstance(head, FusedHead)
            else f"the loss is computed from whole logits: {head}"
        )
    held = beside(recipe, base)
    notes += held.notes
    stacks = find_stacks(model)
    root, layers = units_of(model, stacks)
    found.workload = Workload(
        empty.name,
        task,
        shape,
        chosen,
        recipe.optim,
        recipe.each_kernel,
        recipe.training.global_batch_size,
        root,
        layers,
        tuple(stacks),
        sum(b.numel() * b.element_size() for b in model.buffers()),
        bool(model.supports_gradient_checkpointing),
        vocabulary_of(config),
        held,
    )
    return found


def _plain(config: Any) -> Any:
    """Without what transformers notes in it of a quantised model: the plan quantises itself."""
    found = copy.deepcopy(config)
    vars(found).pop("quantization_config", None)
    return found


def _name(recipe: Recipe) -> str:
    return recipe.model.model_name_or_path or str(recipe.model.config.get("model_type"))


def _config(recipe: Recipe, base: Path, notes: list[str]) -> Any:
    from transformers import AutoConfig

    settings = recipe.model
    fields = {name: value for name, value in settings.config.items() if name != "model_type"}
    labels = getattr(recipe.objective, "labels", None)
    if labels:
        fields["num_labels"] = len(labels)
    elif recipe.objective.type in {"classification", "token_classification"}:
        notes.append("the number of labels is the config's: the head's width is nothing beside the rest")
    name = settings.model_name_or_path
    if name is None:
        if isinstance(settings.tokenizer, TrainTokenizer):
            fields.setdefault("vocab_size", settings.tokenizer.vocab_size)
        elif "vocab_size" not in fields:
            notes.append("the vocabulary is as large as the config's default, not as the tokenizer")
        config = AutoConfig.for_model(settings.config["model_type"], **fields)
    else:
        path = _config_path(name, base)
        try:
            config = AutoConfig.from_pretrained(
                path, revision=settings.revision, trust_remote_code=settings.trust_remote_code, **fields
            )
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(
                f"model.model_name_or_path: there is no config for {name}: not a folder here, and not to be had "
                f"from the hub ({why}); a folder with a config.json, or the file itself, is enough for a plan"
            ) from None
    if settings.dropout is not None:
        override_dropout(config, settings.dropout)
    return config


def _config_path(name: str, base: Path) -> str:
    """A config.json as it stands, else what the trainer would load."""
    for candidate in (Path(name).expanduser(), base / name):
        if candidate.is_file():
            return str(candidate)
    try:
        return resolve_path(name, base)
    except UserError as error:
        raise UserError(
            f"{error}; a folder with a config.json, or the file itself, is enough for a plan"
        ) from None
