"""A training row as `data.augment` makes it, with what is changed marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from tunesmith.commands.preview_samples import Part, Piece, decode, ints, pieces
from tunesmith.data.augment.pairs import PARTNER, SHARE
from tunesmith.data.order import Salt
from tunesmith.data.stream import Stream
from tunesmith.data.table import Encoded
from tunesmith.embedding_noise.cutoff import Cutoff
from tunesmith.recipe import Recipe
from tunesmith.recipe import augment as settings

EPOCHS = 8  # looked at for one that changes the row


def augmented(recipe: Recipe, stream: Stream, row: int) -> list[Part]:
    """The row in the first epoch in which its words change, what it is mixed with and what of it is cut off, each in
    the first epoch in which that happens."""
    asked = recipe.data.augment
    found = list(_words(stream, row)) if any(isinstance(one, settings.OF_WORDS) for one in asked) else []
    for number, one in enumerate(asked):
        match one:
            case settings.Mixup():
                found.append(_mixed(stream, row))
            case settings.Cutoff():
                special = tuple(stream.objective.tokenizer.all_special_ids)
                cut = Cutoff(one, number, special, recipe.objective.type == "sft")
                found.append(_cut(cut, stream, row))
            case _:
                pass
    return found


def _drawn(stream: Stream, row: int, epoch: int) -> Encoded:
    found = stream.dataset.table.row(row)
    for transform in stream.transforms:
        found = transform(found, (stream.order.seed, epoch, row, Salt.TRANSFORM))
    return found


def _words(stream: Stream, row: int) -> Iterator[Part]:
    tokenizer = stream.objective.tokenizer
    before = ints(stream.dataset.table.value("input_ids", row))
    for epoch in range(EPOCHS):
        after = ints(_drawn(stream, row, epoch)["input_ids"])
        if after != before:
            yield Part(
                f"augmented, epoch {epoch + 1}", changes(decode(tokenizer, before), decode(tokenizer, after))
            )
            return
    yield Part("augmented", [(f"unchanged in the first {EPOCHS} epochs", False)])


def changes(before: str, after: str) -> list[Piece]:
    """The text `after`, word by word; what is not as `before` is marked: old→new, +new, −old."""
    old, new = before.split(), after.split()
    found: list[Piece] = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        was, now = " ".join(old[a:b]), " ".join(new[c:d])
        match kind:
            case "equal":
                found.append((now, False))
            case "replace":
                found.append((f"{was}→{now}", True))
            case "insert":
                found.append((f"+{now}", True))
            case _:
                found.append((f"−{was}", True))
        found.append((" ", False))
    return found


def _mixed(stream: Stream, row: int) -> Part:
    objective: Any = stream.objective
    for epoch in range(EPOCHS):
        drawn = _drawn(stream, row, epoch)
        if drawn[SHARE] < 1.0:
            text = decode(objective.tokenizer, ints(drawn[PARTNER]["input_ids"]))
            share = f"{drawn[SHARE]:.2f} × this + {1 - drawn[SHARE]:.2f} × "
            return Part(f"mixed, epoch {epoch + 1}", [(share, False), (text, True)])
    return Part("mixed", [(f"with no row in the first {EPOCHS} epochs", False)])


def _cut(cutoff: Cutoff, stream: Stream, row: int) -> Part:
    for epoch in range(EPOCHS):
        batch = stream.batch([[row]], epoch, row)
        hidden: Sequence[bool] = cutoff.hidden(batch, 1)[0].any(-1).tolist()
        if cutoff.asked.kind == "feature":
            break
        if any(hidden):
            ids = ints(_drawn(stream, row, epoch)["input_ids"])  # without a partner's padding
            shown = pieces(stream.objective.tokenizer, ids, hidden[: len(ids)])
            return Part(f"cut off, epoch {epoch + 1}", shown)
    share = f"{cutoff.asked.fraction:.0%} of the features of every token, where it falls on the row"
    nothing = f"nothing in the first {EPOCHS} epochs"
    return Part("cut off", [(share if cutoff.asked.kind == "feature" else nothing, False)])
