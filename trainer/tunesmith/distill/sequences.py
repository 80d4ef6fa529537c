"""Sequence-level distillation (Kim & Rush 2016): the mode of the teacher's distribution over sequences, as beam search
finds it, takes the place of the data's answers. The answers are generated once and kept beside the prepared rows."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
import transformers

from tunesmith import __version__
from tunesmith.data.table import Encoded, Table, finish_table, write_table
from tunesmith.distill.answers import answered, kind_of, prompt_of, up_to_stop
from tunesmith.distill.offline import files_of
from tunesmith.distill.teacher import Known
from tunesmith.engine.companion import CompanionSource
from tunesmith.errors import UserError
from tunesmith.generation import prompt_batch, prompt_room, search_options
from tunesmith.recipe.distill import SequenceLevel
from tunesmith.recipe.evaluation import Generate
from tunesmith.tracking.progress import track
from tunesmith.unpartitioned import unpartitioned

if TYPE_CHECKING:
    from tunesmith.strategies import Building

_CHUNK = 32  # batches whose rows are sorted by length together


def replace_answers(
    building: Building, known: Known, source: CompanionSource, settings: SequenceLevel
) -> None:
    """Gives the stream the training rows with the teacher's answers. Raises UserError for a teacher with other
    tokens."""
    if known.tokenizer is not None:
        raise UserError(
            f"distill.sequence_level: teacher {known.name} has other tokens than the student: write its answers into a "
            "file (tunesmith predict) and train on that"
        )
    table = building.stream.dataset.table
    about = {
        "rows": table.folder.name,
        "objective": building.recipe.objective.type,
        "teacher": files_of(known),
        "dtype": known.settings.dtype,
        "settings": settings.model_dump(exclude={"per_device_teacher_batch_size"}),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]
    folder = table.folder.parent / f"answers-{digest}"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "table.json").is_file():
            _build(building, known, source, settings, folder)
    dataset = replace(building.stream.dataset, table=Table(folder))
    building.stream.dataset = dataset
    building.datasets["train"] = dataset


def _build(
    building: Building, known: Known, source: CompanionSource, settings: SequenceLevel, folder: Path
) -> None:
    # generating asks too whether a model is partitioned, and then waits for the other ranks, which wait on the lock
    with unpartitioned():
        teacher: Any = source.whole()
        teacher.requires_grad_(False).eval().to(building.device)
        table = building.stream.dataset.table
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            rows = track(_rows(building, teacher, settings), f"answers of {known.name}, rows", len(table))
            kinds = write_table(temporary, rows, table.kinds)
            finish_table(temporary, kinds, table.meta)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _rows(building: Building, teacher: Any, settings: SequenceLevel) -> Iterator[Encoded]:
    table, objective, kind = building.stream.dataset.table, building.objective, kind_of(building.recipe)
    room = prompt_room(teacher, settings.max_new_tokens)
    per_batch = settings.per_device_teacher_batch_size
    for start in range(0, len(table), _CHUNK * per_batch):
        rows = {row: table.row(row) for row in range(start, min(start + _CHUNK * per_batch, len(table)))}
        prompts = {row: prompt_of(one, kind) for row, one in rows.items()}
        ordered = sorted(
            (row for row in rows if room is None or len(prompts[row]) <= room),
            key=lambda row: -len(prompts[row]),
        )
        for at in range(0, len(ordered), per_batch):
            batch = ordered[at : at + per_batch]
            answers = _answers(building, teacher, [prompts[row] for row in batch], settings)
            for row, answer in zip(batch, answers, strict=True):
                rows[row] = answered(rows[row], kind, answer, objective.max_length) or rows[row]
        yield from rows.values()


@torch.no_grad()
def _answers(
    building: Building, teacher: Any, prompts: Sequence[Any], settings: SequenceLevel
) -> list[list[int]]:
    objective = building.objective
    options = search_options(
        objective, Generate(max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams)
    )
    left = objective.prompt_padding == "left"
    batch = prompt_batch(prompts, objective.tokenizer.pad_token_id, left=left).to(building.device)
    found = teacher.generate(**batch.inputs, **options)
    start = 1 if teacher.config.is_encoder_decoder else batch.inputs["input_ids"].shape[1]
    return [up_to_stop(row, objective) for row in found[:, start:].tolist()]
