"""What an objective is: how examples become rows, rows become batches, outputs become a loss, predictions and
metrics. Each objective has a file of its own; the loop knows none of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example
from tunesmith.data.table import Encoded, Kind, Table
from tunesmith.losses.choose import loss_notes, vocabulary_term
from tunesmith.losses.weights import Labels
from tunesmith.recipe import objective as recipes
from tunesmith.terms import Term

Truncation = Literal["cut", "drop"]


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found: numbers by name, and tables for the report."""

    metrics: dict[str, float]
    tables: dict[str, Any] = field(default_factory=dict[str, Any])


class Objective(ABC):
    """One objective of one run. Built from the recipe and the tokenizer; `fit` (or `load_state`) completes it with
    what the training data say (the labels), before any row is encoded or the model is built."""

    accepts: ClassVar[tuple[type, ...]]
    kinds: ClassVar[dict[str, Kind]] = {}
    prompt_padding: ClassVar[Literal["left", "right"]] = "left"
    task: str = ""  # its name in a run of several
    terms: tuple[Term, ...]
    reweighted: Term | None = None  # what takes the place of the objective's term later in the run
    loss_notes: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any, max_length: int, truncation: Truncation) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation: Truncation = truncation

    def use_loss(
        self,
        settings: recipes.CausalLM
        | recipes.SFT
        | recipes.MaskedLM
        | recipes.SpanCorruption
        | recipes.Seq2Seq,
        smoothing: float = 0.0,
        *,
        name: str = "loss",
        logits: str = "logits",
        shift: bool = False,
    ) -> None:
        """The recipe's loss over the tokens of the vocabulary."""
        chosen = settings.loss
        term = vocabulary_term(chosen, settings.type, smoothing, name=name, logits=logits, shift=shift)
        self.terms, self.loss_notes = (term,), tuple(loss_notes(chosen, Labels(settings.type), (term,)))

    # before training

    def fit(self, examples: Iterable[Example]) -> None:  # noqa: B027 — most objectives have nothing to learn
        """Learns the label set from the training examples."""

    def state(self) -> dict[str, Any]:
        """What `fit` learnt, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what `fit` learnt."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Every setting that shapes encoded rows, for the cache's key."""
        return {
            "objective": type(self).__name__,
            "max_length": self.max_length,
            "truncation": self.truncation,
        }

    @abstractmethod
    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        """The rows of one example (windows of a long context are several), or why there is none. `truncated: 1`
        in a row says that it was cut, `changed: reason` that it is otherwise not what the file says. Raises
        DataError for a label that the training data does not have."""

    def encode_all(self, examples: Iterator[Example]) -> Iterator[tuple[Example, Encoded | Dropped]]:
        """The rows of all examples in their order; an objective that combines examples overrides this."""
        for example in examples:
            for row in self.encode(example):
                yield example, row

    def notes(self) -> list[str]:
        """Lines for the start-up report."""
        return list(self.loss_notes)

    # the model

    @property
    @abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class whose head this objective trains."""

    def config_overrides(self) -> dict[str, Any]:
        """Fields of the model's config that the data decide: the labels."""
        return {}

    def of(self, task: str) -> Objective:
        """What a batch of this task is for: itself, unless the run has several."""
        return self

    # a batch

    def draw(self, row: Encoded, key: tuple[int, ...]) -> Encoded:
        """The row as it is seen in one epoch (masking and the like), a pure function of row and key."""
        return row

    @abstractmethod
    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        """Rows to tensors, padded to the longest."""

    def collate_packed(self, rows: Sequence[Sequence[Encoded]], places: Sequence[Sequence[int]]) -> Batch:
        """Sequences of several rows each, which must not see each other."""
        raise AssertionError(f"{type(self).__name__} does not pack")

    # the forward

    def outputs(self, model: nn.Module, batch: Batch, **options: Any) -> Mapping[str, Any]:
        """The model's outputs for a batch. `options`: more keyword arguments of its forward."""
        return model(**batch.inputs, return_dict=True, **options)

    def predict(self, outputs: Mapping[str, Any], batch: Batch) -> list[Any]:
        """One prediction per row, of plain Python or NumPy values; [] where the metrics need none."""
        return []

    # generation

    def prompt(self, table: Table, row: int) -> Sequence[int]:
        """The tokens that generation continues (encoder-decoders: that the encoder reads)."""
        raise AssertionError(f"{type(self).__name__} does not generate")

    def stop_token_ids(self) -> list[int]:
        """The tokens that end a generated text."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    def stop_strings(self) -> list[str]:
        """The texts that end a generated text, where a template ends an answer with ordinary text."""
        return []

    # evaluation

    def score(self, table: Table, rows: Sequence[int], predictions: Sequence[Any]) -> Scores:
        """Metrics of the predictions for `rows` of the table (in that order). The loss is not among them."""
        return Scores({})

    def presentable(self, table: Table, row: int, prediction: Any) -> dict[str, Any]:
        """A row's prediction as JSON for `tunesmith predict`."""
        return {"prediction": prediction}

    def loss_metrics(self, loss: float) -> dict[str, float]:
        """Metrics that follow from the evaluation loss alone: perplexity."""
        return {}

    @property
    def default_metric(self) -> tuple[str, bool]:
        """The metric that chooses the best checkpoint where the recipe names none, and whether greater is better."""
        return "loss", False

    def baseline(self, tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
        """What answering without a model reaches on each split but train."""
        return {}


def pad(rows: Sequence[Any], value: int, multiple: int = 1) -> Tensor:
    """Lists of ints to an int64 tensor [rows, longest], padded on the right with `value`."""
    longest = max(1, max(len(row) for row in rows))
    longest = -(-longest // multiple) * multiple
    out = np.full((len(rows), longest), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def text_inputs(tokenizer: Any, rows: Sequence[Encoded]) -> tuple[dict[str, Tensor], int]:
    """`input_ids`, `attention_mask` and, where the rows have them, `token_type_ids`; and the number of tokens."""
    ids = pad([row["input_ids"] for row in rows], tokenizer.pad_token_id or 0)
    mask = pad([np.ones(len(row["input_ids"]), dtype=np.int64) for row in rows], 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in rows[0]:
        inputs["token_type_ids"] = pad([row["token_type_ids"] for row in rows], 0)
    return inputs, int(mask.sum())


def pad_labels(rows: Sequence[Any]) -> Tensor:
    return pad(rows, IGNORED)
