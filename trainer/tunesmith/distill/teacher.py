"""A teacher: what is known of it before its weights are read, and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith import quantization
from tunesmith.engine.companion import CompanionSource
from tunesmith.errors import UserError
from tunesmith.hub import resolve_path
from tunesmith.objectives import Objective
from tunesmith.recipe.distill import Teacher
from tunesmith.shapes import whole_numel
from tunesmith.weights import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Known:
    """`order`: for each class of the student, the teacher's; None where they are the same, or no labels. `vocab`: of
    language models, how many leading classes are the same tokens; None where all are. `tokenizer`: its own, where its
    tokens are not the student's."""

    settings: Teacher
    path: str
    config: Any
    order: tuple[int, ...] | None = None
    vocab: int | None = None
    tokenizer: Any = None

    @property
    def name(self) -> str:
        folder = Path(self.path)
        return folder.parent.name if folder.name == "final" else folder.name


def teacher_folder(name: str, base: Path) -> str:
    """The folder (of a run: its final/), or the hub id. Raises UserError for a folder without a model."""
    path = resolve_path(name, base, "distill: teacher")
    folder = Path(path)
    if folder.is_dir() and (folder / "recipe.yaml").is_file():
        folder = folder / "final"
        if not folder.is_dir():
            raise UserError(f"distill: teacher {name}: the run has no final/: it did not end")
    if folder.is_dir() and not (folder / "config.json").is_file():
        fix = (
            "write the whole model first: tunesmith export RUN --merge"
            if (folder / "adapter_config.json").is_file()
            else "it has no config.json"
        )
        raise UserError(f"distill: teacher {name}: {folder} is no model: {fix}")
    return str(folder) if folder.is_dir() else path


def know(settings: Teacher, base: Path, objective: Objective, tokenizer: Any, student: Any) -> Known:
    """`student`: the student's config. Raises UserError where it is no teacher of this student."""
    from transformers import AutoConfig

    path = teacher_folder(settings.model_name_or_path, base)
    try:
        config: Any = AutoConfig.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"distill: teacher {settings.model_name_or_path} does not load: {_line(error)}"
        ) from None
    if bool(config.is_encoder_decoder) != bool(student.is_encoder_decoder):
        raise UserError(
            f"distill: teacher {settings.model_name_or_path} is a {config.model_type}, the student a "
            f"{student.model_type}: both must be encoder-decoders, or neither"
        )
    known = Known(settings, path, config)
    labels: list[str] | None = objective.state().get("labels")
    if labels is not None:
        return replace(known, order=_order(known, labels, objective.config_overrides()))
    if predicts_tokens(objective):
        return _vocabulary(known, tokenizer, student)
    return known


def predicts_tokens(objective: Objective) -> bool:
    """Whether its classes are those of a vocabulary."""
    name: str = objective.auto_class.__name__
    return name in {
        "AutoModelForCausalLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForMaskedLM",
        "AutoModelForPreTraining",
    }


def _order(known: Known, labels: list[str], wanted: dict[str, Any]) -> tuple[int, ...] | None:
    name = known.settings.model_name_or_path
    if not labels:  # numbers
        width = wanted.get("num_labels")
        if width is not None and known.config.num_labels != width:
            raise UserError(
                f"distill: teacher {name} gives {known.config.num_labels} numbers, the data {width}"
            )
        return None
    theirs = {str(label): int(place) for place, label in known.config.id2label.items()}
    lacking = [label for label in labels if label not in theirs]
    more = sorted(set(theirs) - set(labels))
    if lacking or more:
        told = f"has no label {lacking[0]!r}" if lacking else f"has a label that the data lack: {more[0]!r}"
        raise UserError(
            f"distill: teacher {name} {told} ({len(theirs)} labels, the data {len(labels)}): fine-tune the teacher on "
            "these labels, or give objective.labels"
        )
    order = tuple(theirs[label] for label in labels)
    return None if order == tuple(range(len(labels))) else order


def _vocabulary(known: Known, tokenizer: Any, student: Any) -> Known:
    """Tokens are the same where the texts of both vocabularies are."""
    from transformers import AutoTokenizer

    ours, theirs = _width(student), _width(known.config)
    try:
        other: Any = AutoTokenizer.from_pretrained(
            known.path, revision=known.settings.revision, trust_remote_code=known.settings.trust_remote_code
        )
    except (OSError, ValueError):
        if ours != theirs:
            raise UserError(
                f"distill: teacher {known.settings.model_name_or_path} has {theirs} classes, the student {ours}, and "
                "no tokenizer that says which are the same: save its tokenizer beside it"
            ) from None
        return known
    if other.get_vocab() != tokenizer.get_vocab():
        return replace(known, tokenizer=other)
    return known if ours == theirs else replace(known, vocab=min(ours, theirs, len(tokenizer)))


def _width(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def source(known: Known, objective: Objective, attention: str, seed: int) -> CompanionSource:
    """What builds the teacher with the student's kind of head."""
    settings, dtype = known.settings, DTYPES[known.settings.dtype]
    made = Source(
        objective.auto_class,
        known.config,
        known.path,
        settings.revision,
        attention,
        settings.trust_remote_code,
        seed,
        settings.quantization,
        torch.float32,
    )

    def whole() -> nn.Module:
        if settings.quantization is not None:
            try:
                quantization.require()
                model, found = made.whole()
            except UserError as error:
                told = str(error).replace("model.quantization", "distill.teachers.quantization")
                raise UserError(told) from None
        else:
            model, found = _attempt(known, objective, lambda: _read(made, dtype))
        _refuse_missing(known, found)
        return model

    def empty() -> tuple[nn.Module, Callable[[torch.device], Any]]:
        model = _attempt(known, objective, made.empty).to(dtype)

        def fill(device: torch.device) -> None:
            _refuse_missing(known, _attempt(known, objective, lambda: made.fill(model, device)))

        return model, fill

    return CompanionSource(whole, empty)


def _read(made: Source, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    # in its own dtype from the start: a large teacher is not to be held in fp32 first
    return made.auto_class.from_pretrained(
        made.path,
        config=made.config,
        revision=made.revision,
        attn_implementation=made.attn_implementation,
        trust_remote_code=made.trust_remote_code,
        dtype=dtype,
        output_loading_info=True,
    )


def _attempt(known: Known, objective: Objective, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        name = objective.auto_class.__name__
        raise UserError(
            f"distill: teacher {known.settings.model_name_or_path} does not load as {name}: {_line(error)}"
        ) from None


def teacher_facts(module: nn.Module, known: Known) -> dict[str, Any]:
    """What the start-up report and the model card say of it."""
    settings = known.settings
    return {
        "name": known.name,
        "class": type(module).__name__,
        "parameters": sum(whole_numel(p) for p in module.parameters()),
        "dtype": settings.dtype if settings.quantization is None else settings.quantization.type,
        "placement": settings.placement,
        "weight": settings.weight,
    }


def _refuse_missing(known: Known, found: dict[str, Any]) -> None:
    """A head drawn at random teaches noise."""
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"distill: teacher {known.settings.model_name_or_path} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more weights" if len(missing) > 1 else "")
            + ": fine-tune it for this objective first"
        )
