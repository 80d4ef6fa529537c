"""A teacher's likeliest classes of every labelled unit of the training rows, written to disk once; the training then
runs without the teacher.

A folder beside the prepared rows, named by the hash of all that shapes the numbers: the rows, the teacher's files, its
dtype, the temperature and k. It is built under a lock by whichever process of a machine comes first; the others wait on
the lock, which is no collective and has no time-out. Of each unit it holds k classes (int32) and their log softmax(t/T)
(fp32), so 8·k bytes a unit."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith import __version__
from tunesmith.batch import IGNORED, Batch
from tunesmith.data.prepare import Dataset
from tunesmith.data.table import Encoded, Table, finish_table, write_table
from tunesmith.distill.divergence import TopK
from tunesmith.distill.readings import Rows, Tokens
from tunesmith.distill.teacher import Known
from tunesmith.distill.terms import PAIRS, TEACHERS
from tunesmith.engine import Engine
from tunesmith.engine.companion import CompanionSource, companion
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective
from tunesmith.parts import ForwardPart
from tunesmith.preflight.content import digest_file
from tunesmith.recipe.distill import Offline
from tunesmith.tracking.progress import track

_CHUNK = 32  # batches whose rows are sorted by length together


@dataclass
class OfflinePart(ForwardPart):
    """Puts what the disk has of a batch's rows beside the student's outputs. `bucket`: see `TopK`."""

    objective: Objective
    dataset: Dataset
    teachers: Sequence[tuple[Known, CompanionSource]]
    reading: Tokens | Rows
    settings: Offline
    temperature: float
    bucket: bool
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    _tables: list[Table] = field(default_factory=list[Table])

    def begin(self, engine: Engine) -> None:
        for number, (known, source) in enumerate(self.teachers):
            folder = self._folder(known)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{folder}.lock"):
                if not (folder / "table.json").is_file():
                    self._build(engine, known, source, folder)
            engine.wait_for_all(f"distill-{number}")
            self._tables.append(Table(folder))
        self.facts["offline"] = [
            {"name": known.name, "top_k": self._k(table), "bytes": _bytes(table.folder)}
            for (known, _), table in zip(self.teachers, self._tables, strict=True)
        ]

    def add(self, module: TrainModule, outputs: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
        given = tuple({self.reading.logits: self._of(table, batch)} for table in self._tables)
        return {TEACHERS: given, PAIRS: {}}

    def _of(self, table: Table, batch: Batch) -> TopK:
        """What the batch's units have, where they stand; at all other places any classes, which count nothing."""
        k = self._k(table)
        if isinstance(self.reading, Rows):
            units = batch.targets["row_mask"] > 0
        else:
            units = self.reading.labels(batch) != IGNORED
        rows = [row for row in batch.rows if row >= 0]
        found = [(table.value("indices", row), table.value("log_probs", row)) for row in rows]
        device = units.device
        indices = torch.arange(k, device=device).repeat(*units.shape, 1)
        log_probs = torch.full((*units.shape, k), -1.0, device=device)
        if found:
            classes = np.concatenate([one for one, _ in found]).astype(np.int64).reshape(-1, k)
            values = np.concatenate([one for _, one in found]).reshape(-1, k)
            indices[units] = torch.from_numpy(classes).to(device)
            log_probs[units] = torch.from_numpy(values).to(device)
        return TopK(indices, log_probs, self.bucket)

    @staticmethod
    def _k(table: Table) -> int:
        return int(table.meta["k"])

    # written once

    def _folder(self, known: Known) -> Path:
        settings = known.settings
        about = {
            "rows": self.dataset.table.folder.name,
            "reading": repr(self.reading),
            "teacher": files_of(known),
            "dtype": settings.dtype,
            "quantization": None if settings.quantization is None else settings.quantization.model_dump(),
            "order": known.order,
            "vocab": known.vocab,
            "temperature": self.temperature,
            "k": self.settings.top_k,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]
        root = self.dataset.table.folder.parent if self.settings.path is None else Path(self.settings.path)
        return root / f"teacher-{digest}"

    def _build(self, engine: Engine, known: Known, source: CompanionSource, folder: Path) -> None:
        teacher = companion(engine, source, sharded=False)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            rows = self._rows(teacher, known, engine.device)
            told = f"writing what {known.name} predicts, rows"
            kinds = write_table(
                temporary,
                track(rows, told, len(self.dataset)),
                {"indices": "ints", "log_probs": "floats"},
            )
            k = min(self.settings.top_k, self._classes)
            finish_table(temporary, kinds, {"k": k, "teacher": known.name, "temperature": self.temperature})
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _rows(self, teacher: nn.Module, known: Known, device: torch.device) -> Iterator[Encoded]:
        per_batch, lengths = self.settings.per_device_teacher_batch_size, self.dataset.table.lengths()
        for start in range(0, len(self.dataset), _CHUNK * per_batch):
            chunk = range(start, min(start + _CHUNK * per_batch, len(self.dataset)))
            ordered = sorted(chunk, key=lambda row: -int(lengths[row]))
            found: dict[int, Encoded] = {}
            for at in range(0, len(ordered), per_batch):
                found |= self._batch(teacher, known, ordered[at : at + per_batch], device)
            yield from (found[row] for row in chunk)

    @torch.no_grad()
    def _batch(
        self, teacher: nn.Module, known: Known, rows: Sequence[int], device: torch.device
    ) -> dict[int, Encoded]:
        batch = self.objective.collate([self.dataset.table.row(row) for row in rows], rows).to(device)
        with torch.autocast(device.type, enabled=False):
            logits: Tensor = self.objective.outputs(teacher, batch)[self.reading.logits]
        logits = logits[..., : known.vocab]
        if known.order is not None:
            logits = logits[..., torch.tensor(known.order, device=device)]
        self._classes = logits.shape[-1]
        found: dict[int, Encoded] = {}
        for i, row in enumerate(rows):
            if isinstance(self.reading, Rows):
                own = logits[i : i + 1]
            else:
                own = logits[i, :-1] if self.reading.shifts(batch) else logits[i]
                own = own[self.reading.labels(batch)[i] != IGNORED]
            top = TopK.of(own, self.settings.top_k, self.temperature, bucket=self.bucket)
            found[row] = {"indices": _flat(top.indices), "log_probs": _flat(top.log_probs)}
        return found


def files_of(known: Known) -> list[str]:
    """The files that a teacher is read from, by their content; a hub id by its name and revision."""
    folder = Path(known.path)
    if not folder.is_dir():
        return [known.path, str(known.settings.revision), str(known.config._commit_hash)]
    wanted = (".safetensors", ".bin", ".json")
    return [f"{file.name} {digest_file(file)}" for file in sorted(folder.iterdir()) if file.suffix in wanted]


def _flat(values: Tensor) -> NDArray[Any]:
    return values.reshape(-1).cpu().numpy()


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
