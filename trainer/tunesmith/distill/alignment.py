"""Places where two tokenizers have read the same text: there, and only there, both models say what comes next of the
same beginning.

A row's tokens are decoded to their text (without the end marker), which the teacher's tokenizer encodes anew. With
end(i) the number of characters that the tokens up to i cover, student's position s and teacher's position t are paired
where end(s) = end(t), for every s whose next token is labelled. Where several tokens end at one character (a character
in several tokens), only the last one has read it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from tunesmith import __version__
from tunesmith.batch import IGNORED
from tunesmith.data.table import Encoded, Table, finish_table, write_table
from tunesmith.errors import UserError
from tunesmith.tokenizer import tokenizer_hash
from tunesmith.tracking.progress import track


def aligned_rows(table: Table, student: Any, teacher: Any, room: int | None) -> Table:
    """A row for each of the table's: `teacher_ids`, at most `room` of them, and the paired positions `student_at`,
    `teacher_at`. Made once, beside the table. Raises UserError where nothing aligns."""
    if not teacher.is_fast:
        raise UserError(
            "distill: the teacher's tokenizer has no fast version, which tells where its tokens lie"
        )
    about = [table.folder.name, tokenizer_hash(student), tokenizer_hash(teacher), room, __version__]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    folder = table.folder.parent / f"aligned-{digest}"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "table.json").is_file():
            _build(table, student, teacher, room, folder)
    made = Table(folder)
    if made.meta["places"] == 0:
        raise UserError("distill: no place of the training rows is one in both tokenizers")
    return made


def _build(table: Table, student: Any, teacher: Any, room: int | None, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    places = 0

    def rows() -> Iterator[Encoded]:
        nonlocal places
        for row in track(range(len(table)), "aligning tokens, rows", len(table)):
            found = align(table.value("input_ids", row), table.value("labels", row), student, teacher, room)
            places += len(found["student_at"])
            yield found

    try:
        kinds = write_table(
            temporary, rows(), {"teacher_ids": "ints", "student_at": "ints", "teacher_at": "ints"}
        )
        finish_table(temporary, kinds, {"places": places})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def align(
    ids: Sequence[int], labels: Sequence[int], student: Any, teacher: Any, room: int | None = None
) -> Encoded:
    """One row: see `aligned_rows`."""
    own = [int(one) for one in ids]
    if own and own[-1] == student.eos_token_id:
        own = own[:-1]
    text: str = student.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    encoded = teacher(text, return_offsets_mapping=True, verbose=False)
    theirs: list[int] = encoded["input_ids"][:room]
    special = set(teacher.all_special_ids)
    ends: dict[int, int] = {}
    for place, (start, end) in enumerate(encoded["offset_mapping"][:room]):
        if end > start or (
            theirs[place] in special and not ends
        ):  # what stands before the text has read nothing
            ends[int(end)] = place
    pairs = [
        (place, ends[end])
        for end, place in sorted(_ends(own, text, student).items())
        if end in ends and place + 1 < len(labels) and labels[place + 1] != IGNORED
    ]
    return {
        "teacher_ids": theirs or [0],
        "student_at": [place for place, _ in pairs],
        "teacher_at": [place for _, place in pairs],
    }


def _ends(ids: list[int], text: str, tokenizer: Any) -> dict[int, int]:
    """The number of characters that are read → the last token with which they are."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if encoded["input_ids"] == ids:
            return {int(end): place for place, (_, end) in enumerate(encoded["offset_mapping"])}
    # not what the tokenizer would make of the text: what the tokens so far decode to
    found: dict[int, int] = {}
    for place in range(len(ids)):
        read: str = tokenizer.decode(
            ids[: place + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if text.startswith(read):
            found[len(read)] = place
    return found
