"""Rows with another answer: where the prompt of an encoded row ends, and the row with new tokens behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tunesmith.batch import IGNORED
from tunesmith.data.table import Encoded
from tunesmith.objectives import Objective

Kind = Literal["sft", "causal_lm", "seq2seq"]


def prompt_of(row: Encoded, kind: Kind) -> list[int]:
    """What a model is asked: of a chat all up to its last answer; of a text its first half; what the encoder reads."""
    ids = [int(one) for one in row["input_ids"]]
    match kind:
        case "seq2seq":
            return ids
        case "causal_lm":
            return ids[: max(1, len(ids) // 2)]
        case "sft":
            labelled = np.asarray(row["labels"]) != IGNORED
            last = int(np.flatnonzero(labelled)[-1])
            before = np.flatnonzero(~labelled[:last])
            return ids[: int(before[-1]) + 1]  # the first label is always ignored


def answered(row: Encoded, kind: Kind, answer: Sequence[int], max_length: int) -> Encoded | None:
    """The row with `answer` (its tokens up to the end marker) as what is to be predicted, cut where `max_length` ends;
    None where no token of it has room."""
    if kind == "seq2seq":
        return {**row, "labels": list(answer)} if answer else None
    prompt = prompt_of(row, kind)
    answer = list(answer)[: max_length - len(prompt)]
    if not answer:
        return None
    ids = [*prompt, *answer]
    changed: Encoded = {**row, "input_ids": ids, "labels": [IGNORED] * len(prompt) + answer}
    if "token_type_ids" in row:
        changed["token_type_ids"] = [0] * len(ids)
    return changed


def up_to_stop(ids: Sequence[int], objective: Objective) -> list[int]:
    """Generated tokens up to the first stop token, with it: what follows is padding."""
    stops = set(objective.stop_token_ids())
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return [int(token) for token in ids[: end + 1]]


def kind_of(recipe: Any) -> Kind:
    kind = recipe.objective.type
    assert kind in ("sft", "causal_lm", "seq2seq"), kind
    return kind
