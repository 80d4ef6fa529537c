"""Texts as words that can be moved, and the examples that they stand in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.data.examples import Chat, Example, Labelled, Question, SourceTarget, Tokens

# in scripts without blanks (Han, kana) a character is a word, as BERT's tokenizers have it
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"(\s*)([{_ALONE}]|[^\s{_ALONE}]+)")
_CORE = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Word:
    """A word, what stands between it and the word before, and its tag where words have tags."""

    text: str
    before: str = " "
    tag: str | None = None

    @property
    def core(self) -> str:
        """The word without the punctuation around it."""
        found = _CORE.match(self.text)
        assert found is not None
        return found[2]

    def with_core(self, core: str) -> Word:
        """The punctuation stays."""
        found = _CORE.match(self.text)
        assert found is not None
        return replace(self, text=found[1] + core + found[3])


Unit = tuple[Word, ...]
"""What is moved as a whole: a word, or all words of an entity, so that its tags stay valid."""


def split(text: str) -> list[Unit]:
    return [(Word(found[2], found[1]),) for found in _WORD.finditer(text)]


def join(units: Sequence[Unit]) -> str:
    return "".join(word.before + word.text for unit in units for word in unit)


def fields(example: Example) -> list[list[Unit]]:
    """The texts of an example that may be changed without changing what is learnt of it: all that is read, but no
    context with an answer in it, no target, and of a chat the user's turns that are not trained."""
    match example:
        case Labelled():
            return [split(text) for text in (example.text, example.text_pair) if text is not None]
        case Tokens():
            return [_entities(example)]
        case Question():
            return [split(example.question)]
        case SourceTarget():
            return [split(example.source)]
        case Chat():
            return [split(turn.content) for turn in example.messages if _asks(turn.role, turn.train)]
        case _:
            raise AssertionError(f"{type(example).__name__} has no text beside what is learnt")


def with_fields(example: Example, changed: Sequence[Sequence[Unit]]) -> Example:
    """The example with other texts in the places of `fields`."""
    match example:
        case Labelled():
            texts = [join(units) for units in changed]
            return replace(example, text=texts[0], text_pair=texts[1] if len(texts) > 1 else None)
        case Tokens():
            words = [word for unit in changed[0] for word in unit]
            tags = None if example.tags is None else tuple(word.tag or "O" for word in words)
            return replace(example, tokens=tuple(word.text for word in words), tags=tags)
        case Question():
            return replace(example, question=join(changed[0]))
        case SourceTarget():
            return replace(example, source=join(changed[0]))
        case Chat():
            texts = iter([join(units) for units in changed])
            turns = [
                replace(turn, content=next(texts)) if _asks(turn.role, turn.train) else turn
                for turn in example.messages
            ]
            return replace(example, messages=tuple(turns))
        case _:
            raise AssertionError(f"{type(example).__name__} has no text beside what is learnt")


def _asks(role: str, train: bool | None) -> bool:
    return role == "user" and train is not True


def _entities(example: Tokens) -> list[Unit]:
    """Words tagged O alone, an entity's words together (an I- belongs to what stands before it)."""
    if example.tags is None:
        return [(Word(token),) for token in example.tokens]
    units: list[Unit] = []
    for token, tag in zip(example.tokens, example.tags, strict=True):
        word = Word(token, tag=tag)
        if units and tag.startswith("I-") and units[-1][-1].tag not in (None, "O"):
            units[-1] = (*units[-1], word)
        else:
            units.append((word,))
    return units
