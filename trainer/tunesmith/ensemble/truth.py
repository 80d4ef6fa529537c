"""What is right, in the form of members' answers: targets to fit on, likelihoods, losses and metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.commands.finished import Described
from tunesmith.data.adhoc import Encoding, encode_examples
from tunesmith.data.examples import Example, Question, Tokens
from tunesmith.ensemble.answers import Answer, Floats, Spans
from tunesmith.ensemble.combine import best_span
from tunesmith.ensemble.members import Kind, kind_of, labels_of
from tunesmith.metrics.spans import entity_metrics, entity_table
from tunesmith.metrics.squad import normalize_answer, squad_metrics
from tunesmith.objectives.base import Scores

_SMALLEST = 1e-12  # a probability's, before its logarithm is taken


@dataclass(frozen=True, slots=True)
class Truth:
    """The right answers to `examples`, as the run `lead` reads them. `encoding` are their rows, for the metrics that an
    objective computes from them."""

    lead: Described
    kind: Kind
    labels: list[str]
    examples: Sequence[Example]
    encoding: Encoding

    def target(self, number: int) -> Floats:
        """Of texts [1, classes]: 1 where a label is right, or the numbers; of words [words, classes]."""
        if self.kind == "tags":
            example = self.examples[number]
            assert isinstance(example, Tokens)
            ids = [self.labels.index(tag) for tag in example.tags or ()]
            return np.eye(len(self.labels))[ids]
        table, row = self.encoding.dataset.table, self.encoding.rows[number][0]
        if self.kind == "regression":
            return np.asarray(table.value("numbers", row), np.float64)[None]
        found = np.zeros((1, len(self.labels)))
        found[0, np.asarray(table.value("labels", row), np.int64)] = 1.0
        return found

    def likelihood(self, number: int, answer: Answer) -> Floats:
        """What an answer gives to what is right: one probability per text, label, word or question; NaN for a word
        without an answer."""
        if isinstance(answer, dict):
            return np.array([self._of_spans(number, answer)])
        target = self.target(number)
        answer = answer.reshape(target.shape)
        if self.kind == "multi_label":
            return np.where(target > 0, answer, 1.0 - answer)[0]
        return np.where(np.isnan(answer[:, 0]), np.nan, (answer * target).sum(-1))

    def _of_spans(self, number: int, spans: Spans) -> float:
        example = self.examples[number]
        assert isinstance(example, Question)
        right = {normalize_answer(answer.text) for answer in example.answers} or {""}
        return sum(p for text, p in spans.items() if normalize_answer(text) in right)

    def loss(self, numbers: Sequence[int], answers: Sequence[Answer]) -> float:
        """The mean log-loss over texts (labels averaged within), words or questions; of numbers the mean squared
        error. Probabilities below 1e-12 count as that."""
        if self.kind == "regression":
            errors = [
                float(np.square(np.ravel(np.asarray(a)) - self.target(n)[0]).mean())
                for n, a in zip(numbers, answers, strict=True)
            ]
            return float(np.mean(errors))
        parts = [self.likelihood(n, a) for n, a in zip(numbers, answers, strict=True)]
        return float(-np.log(np.clip(np.nan_to_num(np.concatenate(parts)), _SMALLEST, None)).mean())

    def score(self, numbers: Sequence[int], answers: Sequence[Answer]) -> Scores:
        """The metrics of the objective."""
        match self.kind:
            case "tags":
                predicted = [self.tags(np.asarray(answer)) for answer in answers]
                given = [list(e.tags or ()) for e in self._chosen(numbers) if isinstance(e, Tokens)]
                return Scores(entity_metrics(predicted, given), {"entities": entity_table(predicted, given)})
            case "spans":
                texts = [best_span(answer) for answer in answers if isinstance(answer, dict)]
                right = [
                    [a.text for a in e.answers] for e in self._chosen(numbers) if isinstance(e, Question)
                ]
                return Scores(squad_metrics(texts, right))
            case _:
                rows = [self.encoding.rows[number][0] for number in numbers]
                table = self.encoding.dataset.table
                return self.lead.objective.score(table, rows, [np.asarray(answer) for answer in answers])

    def tags(self, answer: Floats) -> list[str]:
        """The best tag of each word; O where no member saw it."""
        return ["O" if np.isnan(word[0]) else self.labels[int(word.argmax())] for word in answer]

    def _chosen(self, numbers: Sequence[int]) -> list[Example]:
        return [self.examples[number] for number in numbers]


@contextmanager
def truth_of(lead: Described, examples: Sequence[Example]) -> Generator[Truth]:
    """Raises UserError for a label that the training did not have."""
    kind = kind_of(lead)
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        # also where the rows are not needed: what is wrong with a row is said by its objective
        encoding = encode_examples(examples, lead.objective, Path(folder) / "rows", "ensemble")
        yield Truth(lead, kind, labels_of(lead), examples, encoding)
