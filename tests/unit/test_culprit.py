"""Who is named, from what ranks last said of themselves (tunesmith.culprit)."""

from __future__ import annotations

import json

import pytest

from tunesmith.culprit import STEP, Beat, Collective, Lost, State, Verdict, Witness, judge, missing

COUNTS, GRADIENT, PARTS = "all_reduce of 4 Double", "all_reduce of 21856 Float", "all_reduce of 1 Double"
A_STEP = [COUNTS, GRADIENT, PARTS, STEP]


def history(*ops: str, first: int = 1) -> tuple[Collective, ...]:
    found: list[Collective] = []
    sequence = first
    for op in ops:
        found.append(Collective("", 0, STEP) if op == STEP else Collective("0", sequence, op))
        sequence += op != STEP
    return tuple(found)


def waits(sequence: int, seconds: float = 10.0, op: str = COUNTS, group: str = "0") -> Beat:
    return Beat(12, Collective(group, sequence, op), seconds, {group: sequence})


def reached(sequence: int, group: str = "0") -> Beat:
    return Beat(12, None, 0.0, {group: sequence})


def rank(number: int, beat: Beat, state: State = "running", silent: float = 0.5, words: str = "") -> Witness:
    return Witness(number, 100 + number, "nodeb" if number else "nodea", state, silent, beat, words)


def named(*ranks: Witness, lost: tuple[Lost, ...] = ()) -> Verdict:
    return judge(ranks, lost, 10.0)


def test_a_beat_survives_its_way() -> None:
    beat = Beat(12, Collective("0", 62, COUNTS), 3.5, {"0": 62, "7": 3}, history(*A_STEP))
    assert Beat.from_json(json.loads(json.dumps(beat.to_json()))) == beat
    assert Beat.from_json(Beat().to_json()) == Beat(reached={})


@pytest.mark.parametrize(
    ("culprit", "how"),
    [
        (rank(1, reached(61)), "is in no collective"),
        (rank(1, reached(61), "stopped", 9.0), "is stopped (SIGSTOP) since 9 s"),
        (rank(1, reached(61), silent=9.0), "has not answered for 9 s"),
        (rank(1, reached(61), "gone"), "is gone: killed"),
        (rank(1, reached(61), "gone", words="Segmentation fault"), "is gone: crashed (Segmentation fault)"),
        (rank(1, reached(61), "gone", words="Aborted"), "is gone: it aborted"),
        (rank(1, waits(62), "stopped", 9.0), "is stopped"),  # within the same collective
        (rank(1, waits(62), silent=9.0), "has not answered"),
    ],
)
def test_a_rank_that_others_wait_for(culprit: Witness, how: str) -> None:
    found = named(rank(0, waits(62), "failed", words="timed out"), culprit, rank(2, waits(62)))
    assert found.reason.startswith(f"rank 1 on nodeb (process 101) {how}")
    assert "rank 0 was in collective 62 (all_reduce of 4 Double), in step 13; continue" in found.reason
    assert (found.rank, found.step) == (1, 12)


def test_who_waited_past_the_time_out_and_was_aborted_is_no_culprit() -> None:
    """NCCL aborts the processes that waited; the one that they waited for may still run."""
    found = named(rank(0, waits(62, 9.5), "gone", words="Aborted"), rank(1, reached(60)))
    assert found.rank == 1
    assert "is in no collective" in found.reason


def test_of_several_behind_the_one_that_waits_for_nobody() -> None:
    middle = Beat(12, Collective("tp", 5, PARTS), 10.0, {"0": 61, "tp": 5})
    found = named(rank(0, waits(62)), rank(1, middle), rank(2, Beat(12, None, 0, {"0": 60, "tp": 4})))
    assert found.rank == 2
    assert "as are 1 others" in found.reason


def test_a_rank_outside_the_group_is_not_behind_it() -> None:
    waiting = Beat(12, Collective("pair", 9, PARTS), 10.0, {"0": 5, "pair": 9})
    outside, late = reached(5), Beat(12, None, 0, {"0": 5, "pair": 8})
    found = named(rank(0, waiting), rank(1, outside), rank(2, late))
    assert found.rank == 2
    assert "others" not in found.reason


def test_a_machine_that_is_silent() -> None:
    found = named(rank(0, waits(62)), rank(1, waits(62), silent=9.0), lost=(Lost(1, "nodeb", 10.2, 1),))
    assert found.reason.startswith(
        "machine 1 (nodeb) is lost: nothing was heard from it for 10 s; rank 0 was in"
    )


def test_a_machine_that_never_called() -> None:
    never = Lost(1, "?", None, 1)
    assert named(rank(0, Beat(), "failed", words="store"), lost=(never,)).reason.startswith(
        "machine 1 never called"
    )
    # its ranks have met the others': it was started by other means
    assert named(rank(0, waits(62), "failed", words="store"), lost=(never,)).reason.startswith("store;")


def test_where_nothing_is_known_the_rank_has_the_word() -> None:
    assert (
        named(rank(0, Beat(), "failed", words="no route")).reason
        == "no route; before the first step; continue with --resume"
    )
    assert named(rank(0, waits(62)), rank(1, waits(62))).reason.startswith("every rank waits for the others")


# skipped collectives


def test_a_collective_that_was_left_out() -> None:
    found = missing(history(*A_STEP * 5, GRADIENT, first=50))
    assert found is not None
    assert str(found[0]) == f"collective 65 ({GRADIENT})"
    assert str(found[1]) == f"collective 65 ({COUNTS})"


def test_a_step_that_was_left_out_is_noticed_at_the_next_save() -> None:
    found = missing(history(*A_STEP * 5, STEP, *A_STEP * 2, "all_gather of 1 Long"))
    assert found is not None
    assert found[1].op == COUNTS


@pytest.mark.parametrize(
    "ops",
    [
        A_STEP * 6,
        [*A_STEP * 6, COUNTS],
        [*A_STEP * 6, "all_gather of 1 Long", "all_reduce of 9 Double"],  # the first evaluation
        [*A_STEP * 3, "all_gather of 1 Long", *A_STEP * 3, "all_gather of 1 Long"],  # the second
        [*[COUNTS, GRADIENT, GRADIENT, PARTS, STEP] * 5, COUNTS, GRADIENT],  # two buckets alike
        [*A_STEP, COUNTS, "broadcast of 22 Int", GRADIENT, PARTS, STEP, *A_STEP * 3],  # DDP's second step
        [*A_STEP, COUNTS, "broadcast of 22 Int", GRADIENT, PARTS, STEP, COUNTS, GRADIENT],
        [COUNTS, GRADIENT],
        [],
    ],
)
def test_an_ordinary_history_lacks_nothing(ops: list[str]) -> None:
    assert missing(history(*ops)) is None


def test_a_skip_is_the_fault_of_who_skipped_and_not_of_who_dies_of_it() -> None:
    """gloo kills the process whose buffer is too small for what it is sent: here the one that did nothing wrong."""
    skipper = Beat(
        12, Collective("0", 65, GRADIENT), 0.0, {"0": 65}, history(*A_STEP * 5, GRADIENT, first=50)
    )
    found = named(rank(0, reached(64), "gone", words="Aborted"), rank(1, skipper, "failed", words="reset"))
    assert found.rank == 1
    assert f"skipped collective 65 ({COUNTS}): it called {GRADIENT}" in found.reason


def test_what_all_ranks_left_out_was_not_due() -> None:
    """A short last window has fewer collectives, on every rank."""
    same = Beat(12, Collective("0", 65, GRADIENT), 9.0, {"0": 65}, history(*A_STEP * 5, GRADIENT, first=50))
    found = named(rank(0, same), rank(1, same), rank(2, reached(64)))
    assert found.rank == 2
