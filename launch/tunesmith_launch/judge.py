"""When a job is to end because of one of its ranks or machines, and because of which.

A collective fails by itself at the time-out of the recipe, where the backend notices; what is left here is what it
does not notice, and to say whose fault it was. Nothing else ends a job: a rank may be busy for as long as it likes
while no other waits for it in a collective (tokenising, saving, compiling), and silent too, unless it is stopped."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.culprit import Verdict, Witness, judge
from tunesmith_launch.lease import Lease

_MARGIN = 3.0  # seconds past the time-out, for the backend to say it
_SETTLE = 2.0  # seconds from the first sign to the verdict: what others say meanwhile belongs to it
_DEFER = 7.0  # the same on a machine that is not the judge, which says it sooner if it can be heard


class Judge:
    """Of the whole job on machine 0; on another one only for where machine 0 is not heard. `timeout`: of a
    collective, in seconds."""

    def __init__(self, timeout: float, lease: Lease | None, *, first: bool) -> None:
        self._timeout, self._lease = timeout, lease
        self._settle = _SETTLE if first else _DEFER
        self._due: float | None = None

    @property
    def suspects(self) -> bool:
        """Whether there were signs."""
        return self._due is not None

    def suspect(self, now: float) -> None:
        """There is a sign of something wrong."""
        if self._due is None:
            self._due = now + self._settle

    def review(self, here: Sequence[Witness], now: float) -> Verdict | None:
        """`here`: the ranks of this machine; `now`: monotonic seconds."""
        ranks = list(here)
        if self._lease is not None:
            ranks += [rank for machine in self._lease.machines.values() for rank in machine.ranks]
            ranks.sort(key=lambda rank: rank.rank)
        if any(map(self._is_sign, ranks)):
            self.suspect(now)
        lost = [] if self._lease is None else self._lease.lost(suspicious=self.suspects)
        if lost and self._lease is not None and self._lease.lost():
            self._due = now
        if self._due is None or now < self._due:
            return None
        return judge(ranks, lost, self._timeout)

    def _is_sign(self, rank: Witness) -> bool:
        if rank.state in {"gone", "failed"}:
            return True
        if rank.state == "stopped" and rank.silent > self._timeout:
            return True
        return rank.beat.waits is not None and rank.beat.seconds > self._timeout + _MARGIN
