"""Who held up a job: what every rank last said of itself, compared. Pure, and without torch: the launcher judges too.

Ranks number their collectives (torch's flight recorder does), and all ranks of a group call the same ones in the same
order. So where some wait in collective n and another's last one was n - 1, the other is late: stopped, stuck in code
of its own, or past a collective that it skipped. A rank that skipped one goes on to the next, which then meets the
others' earlier one: NCCL hangs, gloo kills the process whose buffer is too small for what it is sent, be it the
skipper or not. Such a rank is known by its own history, which repeats itself step by step and lacks a piece once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

STEP = "step"  # the mark of a finished optimizer step among a rank's recent collectives
SILENCE = 4.0  # seconds without a beat, of which one comes each second, that mean something

_CONTEXT = 4  # equal entries before a place that make it the same place

State = Literal["running", "stopped", "gone", "failed"]


@dataclass(frozen=True, slots=True)
class Collective:
    """`sequence` counts the collectives of a process group from 1; 0 with op STEP is no collective but its mark."""

    group: str
    sequence: int
    op: str  # "all_reduce of 3 Double"

    def __str__(self) -> str:
        return f"collective {self.sequence} ({self.op})"


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself. `step`: optimizer steps done, None before the first; `waits`: the oldest
    collective that is not done, `seconds`: for how long; `reached`: group → the last collective called; `recent`:
    the last ones of the group of all ranks, oldest first, with marks; empty unless it waits."""

    step: int | None = None
    waits: Collective | None = None
    seconds: float = 0.0
    reached: Mapping[str, int] | None = None
    recent: tuple[Collective, ...] = ()

    def to_json(self) -> dict[str, Any]:
        def plain(c: Collective) -> list[Any]:
            return [c.group, c.sequence, c.op]

        return {
            "step": self.step,
            "waits": None if self.waits is None else plain(self.waits),
            "seconds": round(self.seconds, 1),
            "reached": dict(self.reached or {}),
            "recent": [plain(c) for c in self.recent],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Beat:
        """Raises KeyError, TypeError or ValueError where it is none."""

        def collective(c: Sequence[Any]) -> Collective:
            group, sequence, op = c
            return Collective(str(group), int(sequence), str(op))

        step, waits = values["step"], values["waits"]
        return cls(
            None if step is None else int(step),
            None if waits is None else collective(waits),
            float(values["seconds"]),
            {str(group): int(sequence) for group, sequence in values["reached"].items()},
            tuple(collective(c) for c in values["recent"]),
        )


@dataclass(frozen=True, slots=True)
class Witness:
    """A rank as it is seen from outside. `node` is None where there is only one; `silent`: seconds since its last
    beat; "failed": it noticed itself that a peer is lost; `words`: its last, the error that it raised or, where it
    is gone and could still say so, how Python names its crash ("Aborted")."""

    rank: int
    pid: int
    node: str | None = None
    state: State = "running"
    silent: float = 0.0
    beat: Beat = Beat()
    words: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank}{f' on {self.node}' if self.node else ''} (process {self.pid})"


@dataclass(frozen=True, slots=True)
class Lost:
    """A machine that is not heard any more; `silent` in seconds, None where it never called; `closed`: its
    own end of the connection is closed, without a farewell."""

    machine: int
    node: str
    silent: float | None
    first_rank: int
    closed: bool = False

    def __str__(self) -> str:
        if self.silent is None:
            return f"machine {self.machine} never called"
        silence = f"nothing was heard from it for {self.silent:.0f} s"
        how = "it has closed the connection" if self.closed else silence
        return f"machine {self.machine} ({self.node}) is lost: {how}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rank` is the culprit; `step`: the optimizer steps done, None before the first."""

    reason: str
    rank: int
    step: int | None


def judge(ranks: Sequence[Witness], lost: Sequence[Lost], timeout: float) -> Verdict:
    """The likeliest culprit. `timeout` is that of a collective, in seconds."""
    step = max((w.beat.step for w in ranks if w.beat.step is not None), default=None)
    waiting = _waiting(ranks)

    def verdict(what: str, rank: int) -> Verdict:
        place = "before the first step" if step is None else f"in step {step + 1}"
        waits = ""
        if waiting is not None and waiting.rank != rank:
            waits = f" rank {waiting.rank} was in {waiting.beat.waits},"
        return Verdict(f"{what};{waits} {place}; continue with --resume", rank, step)

    met = any(w.beat.reached for w in ranks)  # all have come: one that never called does without the lease
    if gone := [machine for machine in lost if machine.silent is not None or not met]:
        return verdict(str(gone[0]), gone[0].first_rank)
    for w in ranks:
        victim = w.words.startswith("Abort") or (w.beat.waits is not None and w.beat.seconds > timeout - 3.0)
        if w.state == "gone" and not victim:
            how = (
                f"crashed ({w.words})"
                if w.words
                else "killed, perhaps by the system for lack of memory, or crashed"
            )
            return verdict(f"{w} is gone: {how}", w.rank)
    if found := _skipped(ranks):
        w, called, due = found
        return verdict(f"{w} skipped {due}: it called {called.op}", w.rank)
    if found := _behind(ranks, waiting):
        return verdict(*found)
    for w in ranks:
        if w.state == "stopped":
            return verdict(f"{w} is stopped (SIGSTOP) since {w.silent:.0f} s", w.rank)
    for w in ranks:
        if w.state == "gone":
            return verdict(f"{w} is gone: it aborted", w.rank)
    for w in ranks:
        if w.silent > SILENCE:
            return verdict(f"{w} has not answered for {w.silent:.0f} s", w.rank)
    failed = next((w for w in ranks if w.state == "failed" and w.words), waiting)
    if failed is None:
        return verdict("a peer was lost", 0)
    if failed.state == "failed":
        return verdict(failed.words, failed.rank)
    assert waiting is not None
    return verdict("every rank waits for the others: the network between them is stuck", waiting.rank)


def _waiting(ranks: Sequence[Witness]) -> Witness | None:
    """Who waits for the others: of those in the collective with the highest number, the longest."""
    waiting = [w for w in ranks if w.beat.waits is not None and w.state != "stopped"]
    return max(waiting, key=lambda w: (w.beat.waits.sequence, w.beat.seconds), default=None)  # pyright: ignore[reportOptionalMemberAccess]


def _behind(ranks: Sequence[Witness], waiting: Witness | None) -> tuple[str, int] | None:
    """A rank that has not come to the collective in which another waits."""
    if waiting is None or waiting.beat.waits is None:
        return None
    awaited = waiting.beat.waits
    late = [w for w in ranks if w is not waiting and _reached(w, awaited) < awaited.sequence]
    # one that itself waits for somebody is the least suspicious
    late.sort(key=lambda w: (w.beat.waits is not None, w.state == "running", -w.silent))
    if not late:
        return None
    w = late[0]
    last = _reached(w, awaited)
    match w.state:
        case "stopped":
            how = f"is stopped (SIGSTOP) since {w.silent:.0f} s"
        case "gone":
            how = "is gone: it aborted"
        case _ if w.silent > SILENCE:
            how = f"has not answered for {w.silent:.0f} s (stuck in code that lets no Python run)"
        case _:
            how = "is in no collective: stuck in code of its own, or past one that it skipped"
    told = "the last it told of was" if w.silent > SILENCE or w.state == "gone" else "its last was"
    others = f", as are {len(late) - 1} others" if len(late) > 1 else ""
    return f"{w} {how}, {told} number {last}{others}", w.rank


def _reached(witness: Witness, awaited: Collective) -> int:
    """The last collective of the group that the rank has called. A rank that never named the group is no member,
    unless it has named none at all."""
    reached = witness.beat.reached or {}
    return reached.get(awaited.group, awaited.sequence if reached else 0)


def _skipped(ranks: Sequence[Witness]) -> tuple[Witness, Collective, Collective] | None:
    """(the rank, what it called, what was due), where the rank's history lacks what nobody else's does."""
    for w in ranks:
        found = missing(w.beat.recent)
        if found is None:
            continue
        called, _ = found
        if not any(called in other.beat.recent for other in ranks if other is not w):
            return w, *found
    return None


def missing(recent: Sequence[Collective]) -> tuple[Collective, Collective] | None:
    """(what was called, what was due), where a history that repeats itself leaves a piece out: in the step that is
    not done, for what was left out before would have ended the job before; or a whole step, which goes unnoticed
    until something else is called.

    What was due is what followed twice at least on the longest passage equal to the one before the place. It was
    left out where the history goes on as that passage did a little later; else something was put in between (an
    evaluation, a save)."""
    ops = [c.op for c in recent]
    marks = [i for i, op in enumerate(ops) if op == STEP]
    begun = marks[-1] + 1 if marks else 0
    empty = [i for i in marks if i + 1 in marks]
    for at in [*range(len(ops) - 1, max(begun, 5) - 1, -1), *(i + 1 for i in empty if len(empty) == 1)]:
        support = sorted(((_common(ops, at, earlier), earlier) for earlier in range(1, at)), reverse=True)[:2]
        if len(support) < 2 or support[1][0] < _CONTEXT or len({ops[earlier] for _, earlier in support}) > 1:
            continue
        then = support[1][1]  # the older: the later one may run into the place itself
        if ops[then] == ops[at]:
            continue
        after = ops[at : at + 3]
        end = next((i for i in range(then, at) if ops[i] == STEP), at)
        left_out = any(ops[i : i + len(after)] == after for i in range(then + 1, end + 1))
        called = next((c for c in recent[at:] if c.op != STEP), None)
        if left_out and called is not None:
            return called, Collective(called.group, called.sequence, ops[then])
    return None


def _common(ops: Sequence[str], a: int, b: int) -> int:
    """How many entries before a and before b are alike."""
    length = 0
    while length < b and ops[a - 1 - length] == ops[b - 1 - length]:
        length += 1
    return length
