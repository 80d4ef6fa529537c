"""Extractive question answering (SQuAD). The unit is a window of a context: the mean of its start's and its end's
loss. A window without the answer points at the first token ([CLS]), as Devlin et al. (2019) train it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from tunesmith.batch import Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Question
from tunesmith.data.table import Encoded, Kind, Table
from tunesmith.errors import UserError
from tunesmith.losses.choose import loss_notes, terms_of
from tunesmith.losses.weights import Labels
from tunesmith.metrics.squad import squad_metrics
from tunesmith.objectives.base import Objective, Scores, Truncation, text_inputs
from tunesmith.recipe.objective import QuestionAnswering


@dataclass(frozen=True, slots=True)
class _Best:
    score: float
    text: str


class QuestionAnsweringObjective(Objective):
    accepts = (Question,)
    kinds: ClassVar[dict[str, Kind]] = {"offsets": "ints", "token_type_ids": "ints"}

    def __init__(
        self, settings: QuestionAnswering, tokenizer: Any, max_length: int, truncation: Truncation
    ) -> None:
        super().__init__(tokenizer, max_length, truncation)
        if not tokenizer.is_fast:
            raise UserError(
                "objective: question_answering needs a fast tokenizer, to know where each token stands"
            )
        self.settings = settings
        self.unanswerable = False
        labels = Labels(settings.type)
        self.terms = terms_of(settings.loss, labels, 0.0)
        self.loss_notes = tuple(loss_notes(settings.loss, labels, self.terms))

    def fit(self, examples: Iterable[Example]) -> None:
        """Learns whether there are questions without an answer: only then is none an answer."""
        self.unanswerable = any(isinstance(one, Question) and not one.answers for one in examples)

    def state(self) -> dict[str, Any]:
        return {"unanswerable": self.unanswerable}

    def load_state(self, state: dict[str, Any]) -> None:
        self.unanswerable = state["unanswerable"]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | self.settings.model_dump(include={"doc_stride"})

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        assert isinstance(example, Question)
        question = example.question.strip()
        alone = len(self.tokenizer(question, "")["input_ids"])
        room = self.max_length - alone
        if room < 2:
            yield Dropped("the question leaves no room for its context in max_length")
            return
        if (
            self.truncation == "drop"
            and len(self.tokenizer(question, example.context)["input_ids"]) > self.max_length
        ):
            yield Dropped("longer than max_length")
            return
        windows = self.tokenizer(
            question,
            example.context,
            truncation="only_second",
            max_length=self.max_length,
            stride=min(self.settings.doc_stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        about = {"id": example.id, "context": example.context, "answers": [a.text for a in example.answers]}
        meta = json.dumps(about, ensure_ascii=False)
        for i, ids in enumerate(windows["input_ids"]):
            sequence = windows.sequence_ids(i)
            offsets = [
                edge if part == 1 else (-1, -1)
                for edge, part in zip(windows["offset_mapping"][i], sequence, strict=True)
            ]
            start, end = self._span(example, ids, offsets)
            row: Encoded = {
                "input_ids": ids,
                "start": start,
                "end": end,
                "offsets": [int(edge) for pair in offsets for edge in pair],
                "meta": meta,
                "truncated": 0,
            }
            if "token_type_ids" in windows:
                row["token_type_ids"] = windows["token_type_ids"][i]
            yield row

    def _nothing(self, ids: Sequence[int]) -> int:
        cls = self.tokenizer.cls_token_id
        return ids.index(cls) if cls is not None and cls in ids else 0

    def _span(self, example: Question, ids: list[int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """First and last token of the first answer, or [CLS] twice where the window does not hold all of it."""
        nothing = self._nothing(ids)
        if not example.answers:
            return nothing, nothing
        answer = example.answers[0]
        begin, stop = answer.start, answer.start + len(answer.text)
        inside = [i for i, (a, b) in enumerate(offsets) if a >= 0 and b > a and a < stop and b > begin]
        if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < stop:
            return nothing, nothing
        return inside[0], inside[-1]

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def config_overrides(self) -> dict[str, Any]:
        """A start and an end, whatever the head before was for."""
        return {"num_labels": 2}

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        inputs, tokens = text_inputs(self.tokenizer, rows)
        targets = {end: torch.tensor([row[end] for row in rows]) for end in ("start", "end")}
        return Batch(inputs, targets | {"row_mask": torch.ones(len(rows))}, tuple(places), tokens)

    def predict(self, outputs: Mapping[str, Any], batch: Batch) -> list[Any]:
        both = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1).float().cpu().numpy()
        return list(both)  # [2, positions] per row, padding behind

    def score(self, table: Table, rows: Sequence[int], predictions: Sequence[Any]) -> Scores:
        answers = self.answers(table, rows, predictions)
        references = {}
        for row in rows:
            about = json.loads(table.value("meta", row))
            references[about["id"]] = about["answers"]
        texts = [answers[name].text for name in references]
        return Scores(squad_metrics(texts, list(references.values())))

    def answers(self, table: Table, rows: Sequence[int], predictions: Sequence[Any]) -> dict[str, _Best]:
        """The best answer of each question over its windows: the highest start + end logit of a span of at most
        `max_answer_length` tokens among the `n_best_size` best starts and ends. Where the training data has
        questions without an answer, the empty text wins if the lowest [CLS] score over the windows is higher."""
        best: dict[str, _Best] = {}
        null: dict[str, float] = {}
        for row, logits in zip(rows, predictions, strict=True):
            about = json.loads(table.value("meta", row))
            ids = list(table.value("input_ids", row))
            nothing = self._nothing([int(i) for i in ids])
            score = float(logits[0, nothing] + logits[1, nothing])
            null[about["id"]] = min(score, null.get(about["id"], np.inf))
            found = self._best(
                logits[:, : len(ids)], table.value("offsets", row).reshape(-1, 2), about["context"]
            )
            if about["id"] not in best or found.score > best[about["id"]].score:
                best[about["id"]] = found
        if self.unanswerable:
            return {
                name: _Best(null[name], "") if null[name] > item.score else item
                for name, item in best.items()
            }
        return best

    def _best(self, logits: Any, offsets: Any, context: str) -> _Best:
        context_tokens = offsets[:, 0] >= 0
        start, end = (np.where(context_tokens, side, -np.inf) for side in logits)
        n = self.settings.n_best_size
        starts, ends = np.argsort(-start)[:n], np.argsort(-end)[:n]
        sums = start[starts][:, None] + end[ends][None, :]
        length = ends[None, :] - starts[:, None] + 1
        sums = np.where((length >= 1) & (length <= self.settings.max_answer_length), sums, -np.inf)
        i, j = np.unravel_index(int(sums.argmax()), sums.shape)
        if not np.isfinite(sums[i, j]):
            return _Best(-np.inf, "")
        return _Best(float(sums[i, j]), context[offsets[starts[i], 0] : offsets[ends[j], 1]])

    def presentable(self, table: Table, row: int, prediction: Any) -> dict[str, Any]:
        about = json.loads(table.value("meta", row))
        found = self.answers(table, [row], [prediction])[about["id"]]
        return {"id": about["id"], "answer": found.text, "score": found.score}

    @property
    def default_metric(self) -> tuple[str, bool]:
        return "f1", True
