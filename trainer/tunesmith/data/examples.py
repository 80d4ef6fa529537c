"""What a data format yields, whatever file it came from: one small frozen class per kind of example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import Place


@dataclass(frozen=True, slots=True)
class Text:
    """A document of plain text."""

    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `train` is None where the data does not say (then: assistant turns are trained)."""

    role: str  # system | user | assistant | tool
    content: str
    train: bool | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; a prompt with its answer is a conversation of two messages."""

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, with its label(s): a name (single-label), a tuple of names (multi-label),
    a number or a tuple of numbers (regression). `soft_labels`: a distribution over the labels, in their order or by
    name. `group`: of the list that the text is ranked in."""

    text: str
    label: str | tuple[str, ...] | float | tuple[float, ...] | None
    place: Place
    text_pair: str | None = None
    soft_labels: tuple[float, ...] | dict[str, float] | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sentence split into words, with one BIO tag per word. `tags` is None at prediction."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    place: Place


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer span: its text, and the character offset of its first character in the context."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """Extractive question answering. No answers means that the context does not answer it (SQuAD 2)."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class SourceTarget:
    """A source text and its target(s): translation, summarisation. Training uses the first target, metrics
    use all. No targets at prediction."""

    source: str
    targets: tuple[str, ...]
    place: Place
    meta: dict[str, Any] = field(default_factory=dict[str, Any])


Example = Text | Chat | Labelled | Tokens | Question | SourceTarget
