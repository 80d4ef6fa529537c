"""Augmented training rows: what is learnt stays, max_length holds, and a row is a function of (seed, epoch, row)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from objective_cases import CASES, SGD, Layout, open_stream, recipe
from tunesmith.batch import IGNORED
from tunesmith.data.augment.stored import EXAMPLE, PART
from tunesmith.data.order import Salt
from tunesmith.data.stream import Stream

WORDS: list[dict[str, Any]] = [
    {"type": "token_drop", "fraction": 0.3, "probability": 0.7},
    {"type": "token_swap", "swaps": 2, "probability": 0.7},
    {"type": "token_insert", "fraction": 0.3, "probability": 0.7},
]
CHANGED = ["single_label", "multi_label", "regression", "pairs", "token_classification", "question_answering",
           "seq2seq_t5", "seq2seq_bart", "sft"]  # fmt: skip
COUNTED = 40


def stream_of(workshop: Path, case: str, augment: list[dict[str, Any]], **sections: Any) -> Stream:
    data = {**CASES[case].data, "augment": augment, **sections.pop("data", {})}
    return open_stream(recipe(workshop, CASES[case], SGD, Layout(4), 20, data=data, **sections), workshop)


def drawn(stream: Stream, row: int, epoch: int) -> dict[str, Any]:
    found = stream.dataset.table.row(row)
    for transform in stream.transforms:
        found = transform(found, (stream.order.seed, epoch, row, Salt.TRANSFORM))
    return found


def learnt(row: dict[str, Any]) -> list[Any]:
    labels = np.asarray(row.get("labels", ()))
    answer = row["input_ids"][row["start"] : row["end"] + 1] if "start" in row else ()
    numbers = np.asarray(row.get("numbers", ()), dtype=np.float32)
    return [np.asarray(part).tolist() for part in (labels[labels != IGNORED], numbers, answer)]


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_learnt_stays(workshop: Path, case: str) -> None:
    stream = stream_of(workshop, case, WORDS)
    plain = stream_of(workshop, case, [])
    changed = 0
    for row in range(min(COUNTED, len(stream.dataset))):
        before = plain.dataset.table.row(row)
        for epoch in range(3):
            after = drawn(stream, row, epoch)
            assert not {EXAMPLE, PART} & after.keys()
            assert len(after["input_ids"]) <= stream.objective.max_length
            changed += list(after["input_ids"]) != list(before["input_ids"])
            if case != "token_classification":
                assert learnt(after) == learnt(before)
            else:
                assert len(after["labels"]) == len(after["input_ids"])
                assert {int(x) for x in after["tags"]} <= {int(x) for x in before["tags"]}
                assert [int(after["labels"][at]) for at in after["first_pieces"] if at >= 0] == [
                    int(tag) for tag, at in zip(after["tags"], after["first_pieces"], strict=True) if at >= 0
                ]
    assert changed > COUNTED, "three operations of 70 % change most rows"


def test_an_answers_context_and_a_chats_answers_are_never_touched(workshop: Path) -> None:
    stream = stream_of(workshop, "question_answering", WORDS)
    tokenizer: Any = stream.objective.tokenizer
    for row in range(20):
        before, after = stream.dataset.table.row(row), drawn(stream, row, 1)
        contexts = [
            tokenizer.decode([int(i) for i in found["input_ids"]]).split("[SEP]")[1]
            for found in (before, after)
        ]
        shorter, longer = sorted(contexts, key=len)
        assert shorter[:-8] in longer  # a longer question may push the window's end


def test_rows_are_a_function_of_seed_epoch_and_row(workshop: Path) -> None:
    first, again = (stream_of(workshop, "single_label", WORDS) for _ in range(2))
    other = stream_of(workshop, "single_label", WORDS, training={"seed": 4})
    same_epochs = same_seeds = 0
    for row in range(COUNTED):
        for epoch in (1, 0):
            a, b = drawn(first, row, epoch), drawn(again, row, epoch)
            assert {k: np.asarray(v).tolist() for k, v in a.items()} == {
                k: np.asarray(v).tolist() for k, v in b.items()
            }
        same_epochs += list(drawn(first, row, 0)["input_ids"]) == list(drawn(first, row, 1)["input_ids"])
        same_seeds += list(drawn(first, row, 0)["input_ids"]) == list(drawn(other, row, 0)["input_ids"])
    assert max(same_epochs, same_seeds) < COUNTED / 2


@pytest.mark.parametrize(
    "augment", [WORDS, [*WORDS, {"type": "mixup", "alpha": 0.5}]], ids=["words", "mixup"]
)
def test_batches_do_not_see_how_a_window_is_dealt(workshop: Path, augment: list[dict[str, Any]]) -> None:
    """Bitwise: every row's ids, partner and λ, for 1 and 2 ranks and any micro-batch."""

    def rows(micro_batch: int, world_size: int, step: int) -> dict[int, list[Any]]:
        made = recipe(
            workshop, CASES["single_label"], SGD, Layout(micro_batch), 20, data={"augment": augment}
        )
        stream = open_stream(made, workshop)
        found: dict[int, list[Any]] = {}
        for rank in range(world_size):
            for batch in stream.batches(step, rank, world_size, prefetch=False):
                assert batch.draws is not None
                for i, row in enumerate(batch.rows):
                    if row < 0:
                        continue
                    ids = [
                        tuple(int(x) for x, real in zip(values[i], mask[i], strict=True) if real)
                        for values, mask in _pairs(batch)
                    ]
                    share = batch.targets.get("partner/lambda")
                    labels = [v[i].tolist() for k, v in batch.targets.items() if k.endswith("labels")]
                    found[row] = [
                        ids,
                        None if share is None else float(share[i]),
                        int(batch.draws[i]),
                        labels,
                    ]
        return found

    for step in (0, 7):
        whole = rows(16, 1, step)
        assert len(whole) == 16
        assert rows(3, 1, step) == whole
        assert rows(2, 2, step) == whole


def _pairs(batch: Any) -> list[tuple[Any, Any]]:
    if "partner/own_mask" not in batch.targets:
        return [(batch.inputs["input_ids"], batch.inputs["attention_mask"])]
    partner = (batch.targets["partner/input_ids"], batch.targets["partner/attention_mask"])
    return [(batch.inputs["input_ids"], batch.targets["partner/own_mask"]), partner]


def test_a_longer_row_is_cut_and_an_empty_one_stays(workshop: Path) -> None:
    more = [{"type": "token_insert", "fraction": 1.0, "probability": 1.0}]
    stream = stream_of(workshop, "single_label", more, data={"max_length": 16})
    lengths = [len(drawn(stream, row, 0)["input_ids"]) for row in range(COUNTED)]
    assert max(lengths) == 16
    nothing = [{"type": "token_drop", "fraction": 1.0, "probability": 1.0}]
    stream = stream_of(workshop, "single_label", nothing)
    plain = stream_of(workshop, "single_label", [])
    for row in range(COUNTED):
        assert list(drawn(stream, row, 0)["input_ids"]) == list(plain.dataset.table.value("input_ids", row))


def test_answers_are_kept_where_a_chat_is_cut(workshop: Path) -> None:
    """A longer prompt would push the answer out of max_length: such a row stays as it is."""
    more = [{"type": "token_insert", "fraction": 1.0, "probability": 1.0}]
    stream = stream_of(workshop, "sft", more, data={"max_length": 40})
    for row in range(min(COUNTED, len(stream.dataset))):
        assert learnt(drawn(stream, row, 0)) == learnt(stream.dataset.table.row(row))


@pytest.mark.parametrize("packing", [False, True])
def test_masked_inputs_of_next_token_prediction_keep_their_labels(workshop: Path, packing: bool) -> None:
    added = {"add_tokens": ["[GONE]"]}
    stream = stream_of(workshop, "causal_lm", [], model=added, data={"packing": packing})
    tokenizer: Any = stream.objective.tokenizer
    tokenizer.unk_token = "[GONE]"
    from tunesmith.data.augment.transform import MaskTokens
    from tunesmith.recipe.augment import TokenMask

    mask = MaskTokens(tokenizer, 0, TokenMask(type="token_mask", fraction=0.4, probability=1.0, token="unk"))
    stream.transforms = (mask,)
    hidden = total = 0
    for row in range(COUNTED):
        before, after = stream.dataset.table.row(row), drawn(stream, row, 0)
        assert list(after["labels"]) == list(before["labels"])
        ids, was = np.asarray(after["input_ids"]), np.asarray(before["input_ids"])
        gone = ids == tokenizer.unk_token_id
        assert (ids[~gone] == was[~gone]).all()
        assert not np.isin(was[gone], tokenizer.all_special_ids).any()
        hidden, total = hidden + int(gone.sum()), total + len(ids)
    assert hidden / total == pytest.approx(0.4, abs=0.06)


def test_only_training_tables_keep_examples(workshop: Path, workshop_eval: dict[str, dict[str, Any]]) -> None:
    from tunesmith.data.prepare import prepare
    from tunesmith.objectives import build_objective
    from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

    data = {**workshop_eval["single_label"], "augment": WORDS}
    made = recipe(workshop, CASES["single_label"], SGD, Layout(4), 20, data=data)
    tokenizer, _ = tokenizer_for(made, workshop)
    datasets = prepare(made.data, workshop, build_objective(made, tokenizer), tokenizer_hash(tokenizer))
    assert EXAMPLE in datasets["train"].table.kinds
    assert EXAMPLE not in datasets["eval"].table.kinds
