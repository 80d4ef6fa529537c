"""Ranks that tell each other facts and come to one verdict, over the store, without collectives. Nothing here needs
equal clocks or a shared folder, and every wait has an end, at which the missing are named."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.preflight.compare import RANK_FIX, Roll, call_roll, missing_findings, node_name
from tunesmith.preflight.facts import Claim
from tunesmith.preflight.findings import Finding, error, from_json
from tunesmith.preflight.probe import Probe
from tunesmith.preflight.store import Store, bounded

_LATER = 15.0  # seconds that rank 0's verdict may come after its own deadline
_SETTLE = 1.0  # seconds in which more of the same fault may show, once one is seen
_FAREWELL = 5.0
_CLOCK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: after `notice` rank 0 says for whom it waits, after `limit` it names them as missing."""

    limit: float = 600.0
    notice: float = 10.0


class Meeting:
    """One rank among its peers. `roll` is known to rank 0 alone, once all have come."""

    def __init__(self, store: Store, claim: Claim, patience: Patience, probe: Probe) -> None:
        self.store, self.claim, self.patience, self.probe = store, claim, patience, probe
        self.node = node_name(claim)
        self.roll: Roll | None = None
        self.broken = False  # a rank has fallen silent: nothing more can be decided
        self.several = False  # whether the ranks need a network: no one loopback reaches them all
        # many ranks ask one store: the more, the more rarely
        self._poll = min(0.5, 0.02 + claim.world_size / 2000)

    @property
    def is_first(self) -> bool:
        return self.claim.rank == 0

    def call_roll(self) -> list[Finding]:
        """Who has come; the same findings on every rank: missing ones, ranks claimed twice, other world sizes."""
        self._bounded(lambda: self.store.append("claims", json.dumps(asdict(self.claim)) + "\n"))
        findings = self._verdict("roll", self._rolled)
        if findings:
            return findings
        accepted: dict[str, str] = self.hear("roll/accepted")
        if self.claim.uid not in accepted:  # the ranks were complete without this process
            what = f"rank {self.claim.rank} is claimed here and by another process"
            raise MachineError(str(error(self.node, what, RANK_FIX)))
        self.several = len(set(accepted.values())) > 1
        return []

    def decide(
        self,
        name: str,
        value: Any,
        judge: Callable[[dict[int, Any]], list[Finding]],
        ranks: Callable[[Roll], Sequence[int]] | None = None,
    ) -> list[Finding]:
        """Rank 0's judgement of what all ranks (or those that `ranks` chooses: others give any `value`, which nobody
        reads) say, on every rank. `value` is JSON; a name is used once."""
        self._bounded(lambda: self.store.set(f"{name}/{self.claim.rank}", json.dumps(value)))
        return self._verdict(name, lambda: self._judged(name, judge, ranks))

    def leaders(self) -> list[Claim]:
        """On rank 0: who speaks for each node, in the order of ranks."""
        assert self.roll is not None
        return sorted((claim for claim in self.roll.claims if claim.leads), key=lambda claim: claim.rank)

    def measure_clock(self) -> tuple[float, float] | None:
        """How far this node's clock is ahead of rank 0's, in seconds: at least and at most; None on ranks that do
        not lead a node. In each round a leader writes its time before it says that it is here, rank 0 its own once
        all are, and the leader its time once it has read that: so rank 0's moment lies between the leader's two."""
        if not self.claim.leads:
            return None
        return self._bounded(self._measure_clock)

    def tell(self, key: str, value: Any) -> None:
        self._bounded(lambda: self.store.set(key, json.dumps(value)))

    def hear(self, key: str, seconds: float | None = None) -> Any:
        """What another rank tells; MachineError where it does not come."""
        return self._bounded(lambda: self._wait_for(key, seconds), seconds)

    def reach(self, name: str, count: int, seconds: float) -> None:
        """Until `count` ranks have come to `name`, or the time is over: whoever is missing is found elsewhere."""

        def wait() -> None:
            self.store.add(name, 1)
            end = time.monotonic() + seconds
            while self.store.add(name, 0) < count and time.monotonic() < end:
                time.sleep(self._poll / 2)

        self._bounded(wait)

    # rank 0

    def _rolled(self) -> list[Finding]:
        started, said, faulty_since = time.monotonic(), False, None
        while True:
            lines = self.store.get("claims").decode().splitlines()
            roll = call_roll([Claim(**json.loads(line)) for line in lines], self.claim.world_size)
            waited = time.monotonic() - started
            if roll.complete:
                self.roll = roll
                accepted = {claim.uid: claim.place for claim in roll.claims}
                self.store.set("roll/accepted", json.dumps(accepted))
                return []
            if roll.findings:  # waiting longer cannot mend it, but more of it may show
                faulty_since = faulty_since or time.monotonic()
                if time.monotonic() - faulty_since > _SETTLE:
                    return [*roll.findings]
            elif waited > self.patience.limit:
                return missing_findings(roll, waited)
            elif waited > self.patience.notice and not said:
                said = True
                self._say(missing_findings(roll, waited))
            time.sleep(self._poll)

    def _say(self, findings: Sequence[Finding]) -> None:
        for one in findings:
            print(f"waiting: {one}", file=sys.stderr, flush=True)

    def _judged(
        self,
        name: str,
        judge: Callable[[dict[int, Any]], list[Finding]],
        ranks: Callable[[Roll], Sequence[int]] | None,
    ) -> list[Finding]:
        assert self.roll is not None
        asked = list(range(self.claim.world_size)) if ranks is None else list(ranks(self.roll))
        keys = [f"{name}/{rank}" for rank in asked]
        started, said = time.monotonic(), False
        while not self.store.check(keys):
            waited = time.monotonic() - started
            if waited > self.patience.limit:
                self.broken = True
                return self._silent(name, asked, waited)
            if waited > self.patience.notice and not said:
                said = True
                self._say(self._silent(name, asked, waited))
            time.sleep(self._poll)
        values = self.store.multi_get(keys)
        return judge({rank: json.loads(value) for rank, value in zip(asked, values, strict=True)})

    def _silent(self, name: str, asked: Sequence[int], seconds: float) -> list[Finding]:
        assert self.roll is not None
        by_rank = {claim.rank: claim for claim in self.roll.claims}
        lost = [by_rank[rank] for rank in asked if not self.store.check([f"{name}/{rank}"])]
        what = "came, and has said nothing more"
        return [
            error(
                node_name(claim),
                f"rank {claim.rank} {what} for {seconds:.0f} s",
                f"see what process {claim.uid.partition('-')[0]} does there (a slow disk, an overloaded machine)",
            )
            for claim in lost
        ]

    # every rank

    def _verdict(self, name: str, judge: Callable[[], list[Finding]]) -> list[Finding]:
        key = f"{name}/verdict"
        if self.is_first:
            limit = self.patience.limit + _LATER
            found = self._bounded(judge, limit)
            text = json.dumps({"broken": self.broken, "findings": [one.to_json() for one in found]})
            # two processes may believe that they are rank 0: the first word counts
            text = self._bounded(lambda: self.store.compare_set(key, "", text)).decode()
            values = json.loads(text)
        else:
            values = self.hear(key, self.patience.limit + 2 * _LATER)
        self.broken = values["broken"]
        return [from_json(one) for one in values["findings"]]

    def part(self) -> None:
        """Before an end with an error: rank 0, whose process may hold the store, waits until the others have read
        why."""
        try:
            # a rank that did not come is not waited for
            count = self.claim.world_size if self.roll is None else len(self.roll.claims)
            self._bounded(lambda: self.store.add("parted", 1))
            if self.is_first:
                end = time.monotonic() + _FAREWELL
                while self._bounded(lambda: self.store.add("parted", 0)) < count and time.monotonic() < end:
                    time.sleep(self._poll)
        except (MachineError, RuntimeError):
            return

    def _measure_clock(self) -> tuple[float, float]:
        low, high = float("-inf"), float("inf")
        for number in range(_CLOCK_ROUNDS):
            before = self.probe.clock()
            self.store.set(f"clock/{number}/{self.claim.rank}", "here")
            go = f"clock/{number}/go"
            if self.is_first:
                self._wait_all([f"clock/{number}/{claim.rank}" for claim in self.leaders()])
                self.store.set(go, json.dumps(self.probe.clock()))
            moment = self._wait_for(go, None)
            after = self.probe.clock()
            low, high = max(low, before - moment), min(high, after - moment)
        return low, high

    def _wait_all(self, keys: list[str]) -> None:
        end = time.monotonic() + self.patience.limit
        while not self.store.check(keys) and time.monotonic() < end:
            time.sleep(0.005)

    def _wait_for(self, key: str, seconds: float | None) -> Any:
        end = time.monotonic() + (self.patience.limit if seconds is None else seconds)
        while not self.store.check([key]):
            if time.monotonic() >= end:
                raise self._unheard()
            time.sleep(self._poll)
        return json.loads(self.store.get(key))

    def _bounded(self, work: Callable[[], Any], seconds: float | None = None) -> Any:
        limit = (self.patience.limit if seconds is None else seconds) + _LATER
        try:
            return bounded(work, limit, self._unheard)
        except RuntimeError as caught:
            if isinstance(caught, MachineError):
                raise
            raise self._unheard(str(caught).partition("\n")[0]) from None

    def _unheard(self, reason: str = "no answer") -> MachineError:
        return MachineError(
            f"✗ {self.node}: rank {self.claim.rank} has lost rank 0 and its store ({reason}) → see what rank 0 says, "
            "and the network between the two"
        )
