"""What student and teacher both predict: where it stands in the outputs, and over which units it is compared. They are
the units of the objective's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tunesmith.batch import IGNORED, Batch
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.recipe.objective import MaskedLM


@dataclass(frozen=True, slots=True)
class Tokens:
    """Classes of positions: logits [rows, positions, classes], a unit per label of `targets[target]` [rows, positions]
    that is not ignored. `shift`: position i predicts label i + 1."""

    name: str = ""
    logits: str = "logits"
    target: str = "labels"
    shift: bool = False

    def labels(self, batch: Batch) -> Tensor:
        """int64 [rows, positions or one less], where they are predicted."""
        labels = batch.targets[self.target]
        return labels[:, 1:] if self.shift and not batch.aligned else labels

    def shifts(self, batch: Batch) -> bool:
        return self.shift and not batch.aligned

    def units(self, batch: Batch) -> int:
        return int((self.labels(batch) != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Rows:
    """One answer a row: logits [rows, classes]; a unit per row."""

    kind: Literal["one", "several", "numbers"]
    name: str = ""
    logits: str = "logits"

    def units(self, batch: Batch) -> int:
        return int(batch.targets["row_mask"].sum())


@dataclass(frozen=True, slots=True)
class Spans:
    """Start and end of an answer: `start_logits` and `end_logits` [rows, positions]; a unit per row."""

    name: str = ""

    def units(self, batch: Batch) -> int:
        return int(batch.targets["row_mask"].sum())


Reading = Tokens | Rows | Spans


def readings(recipe: Recipe, objective: Objective) -> tuple[Reading, ...]:
    """One for each term of the objective."""
    settings = recipe.objective
    if isinstance(settings, MaskedLM) and settings.next_sentence:
        return (Tokens(logits="prediction_logits"), Rows("one", "next_sentence", "seq_relationship_logits"))
    match settings.type:
        case "causal_lm" | "sft":
            return (Tokens(shift=True),)
        case "masked_lm" | "span_corruption" | "seq2seq" | "token_classification":
            return (Tokens(),)
        case "classification":
            match objective.state()["problem"]:
                case "multi_label":
                    return (Rows("several"),)
                case "regression":
                    return (Rows("numbers"),)
                case _:
                    return (Rows("one"),)
        case "question_answering":
            return (Spans(),)


def real_tokens(batch: Batch, stack: Literal["", "encoder", "decoder"] = "") -> Tensor:
    """What is no padding: bool [rows, positions]; of a filler nothing. `stack`: of an encoder-decoder."""
    if stack == "decoder":
        return batch.targets["labels"] != IGNORED
    if batch.samples == 0:
        return torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    if (mask := batch.inputs.get("attention_mask")) is not None:
        return mask.bool()
    # packed: every row has a label, and the padding, which is a row of its own behind the others, has none
    labelled = batch.targets["labels"] != IGNORED
    rows = (batch.inputs["position_ids"] == 0).cumsum(dim=1)
    # a row is padding where no label stands in it or behind it
    behind = labelled.flip(1).cumsum(dim=1).flip(1) > 0
    counts = torch.zeros_like(rows).scatter_add_(1, rows - 1, labelled.long())
    return behind | (counts.gather(1, rows - 1) > 0)
