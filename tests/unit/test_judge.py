"""When a job is ended by its watchdog, and when it is left alone (tunesmith_launch.judge)."""

from __future__ import annotations

import pytest

from tunesmith.culprit import Beat, Collective, State, Witness
from tunesmith_launch.judge import Judge

TIMEOUT = 10.0


def rank(number: int, seconds: float = 0.0, state: State = "running", silent: float = 0.5) -> Witness:
    waits = Collective("0", 7, "barrier") if seconds else None
    return Witness(
        number, 100 + number, None, state, silent, Beat(3, waits, seconds, {"0": 7 if seconds else 6})
    )


@pytest.mark.parametrize(
    "ranks",
    [
        [rank(0), rank(1)],
        [rank(0, 10.5), rank(1)],  # the backend has the first word
        [rank(0), rank(1, silent=500.0)],  # in code that lets no Python run: nobody waits for it
        [rank(0, 5.0), rank(1, silent=500.0)],
        [rank(0, 1.0, silent=500.0), rank(1)],  # what it waited for may have come long ago
        [rank(0), rank(1, 0.0, "stopped", 9.0)],
    ],
)
def test_a_job_that_is_left_alone(ranks: list[Witness]) -> None:
    judge = Judge(TIMEOUT, None, first=True)
    assert all(judge.review(ranks, now) is None for now in (0.0, 100.0, 1000.0))


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        ([rank(0, 13.5), rank(1)], 1),
        ([rank(0), rank(1, 0.0, "stopped", 10.5)], 1),
        ([rank(0), rank(1, 0.0, "gone")], 1),
        ([rank(0, 10.0, "failed"), rank(1)], 1),
    ],
)
def test_a_job_that_is_ended(ranks: list[Witness], culprit: int) -> None:
    """Two seconds after the first sign: what others say meanwhile belongs to the verdict."""
    judge = Judge(TIMEOUT, None, first=True)
    assert judge.review(ranks, 100.0) is None
    assert judge.review([rank(0), rank(1)], 101.9) is None
    verdict = judge.review(ranks, 102.0)
    assert verdict is not None
    assert verdict.rank == culprit


def test_another_machine_leaves_it_to_machine_0_while_that_can_say_it() -> None:
    judge = Judge(TIMEOUT, None, first=False)
    ranks = [rank(0, 13.5), rank(1)]
    assert judge.review(ranks, 100.0) is None
    assert judge.review(ranks, 106.0) is None
    assert judge.review(ranks, 107.0) is not None
