"""The preflight of one rank, in order. The ranks talk over the store that the process group will use; nothing here
can hang."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.preflight.agreement import odd_ones
from tunesmith.preflight.compare import compare, node_name, node_names
from tunesmith.preflight.content import table_digest
from tunesmith.preflight.exchange import Meeting, Patience
from tunesmith.preflight.facts import Facts, claim, gather, new_uid
from tunesmith.preflight.findings import Finding, Level, as_error, error
from tunesmith.preflight.folder import prove
from tunesmith.preflight.links import measure
from tunesmith.preflight.probe import Probe
from tunesmith.preflight.store import open_store
from tunesmith.recipe import Recipe
from tunesmith.recipe.paths import resolve_paths

if TYPE_CHECKING:
    import torch

    from tunesmith.data.prepare import Dataset


class Preflight:
    """One rank's part. Every method is called by all ranks, in the same order, and finds the same on each. Keep it
    until the run ends: it holds the store's connection, on rank 0 perhaps the store itself."""

    def __init__(self, patience: Patience, slow: Level, probe: Probe | None = None) -> None:
        """`slow` is the level of a slow link."""
        self.started = time.perf_counter()
        self.probe = probe or Probe()
        self.slow: Level = slow
        who = claim(self.probe, new_uid())
        self.meeting = Meeting(
            open_store(self.probe, node_name(who), patience.limit, patience.notice), who, patience, self.probe
        )
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}
        self._everyone: list[Facts] = []  # on rank 0

    @property
    def failed(self) -> bool:
        return any(one.level == "error" for one in self.findings)

    def examine(self, recipe: Recipe, base: Path) -> None:
        """Everything that needs no process group; `recipe` as it was read. What could only repeat an error that is
        found already is left out."""
        self.findings += self.meeting.call_roll()
        if self.failed:
            return
        # on every rank: that one names a variable which is not set is its own error
        resolved = resolve_paths(recipe, base)
        clock = self.meeting.measure_clock()
        own = gather(recipe, base, self.meeting.claim, self.probe)
        said = own.to_json() | {"clock": clock}
        self.findings += self.meeting.decide("facts", said, self._compare)
        if self.meeting.broken:
            return
        self.findings += prove(self.meeting, Path(resolved.output_dir), resolved, base)
        if self.meeting.several and not self.failed:
            network = own.network
            address, megabits = (None, None) if network is None else (network.address, network.megabits)
            self.findings += measure(self.meeting, address, megabits, self.slow)
            self.facts["links"] = self.meeting.hear("links/figures")
        self.facts["seconds"] = round(time.perf_counter() - self.started, 2)

    def _compare(self, values: Mapping[int, Any]) -> list[Finding]:
        self._everyone = [Facts.from_json(one) for one in values.values()]
        self.facts["nodes"] = [
            {
                "name": node_name(facts.claim),
                "ranks": facts.claim.local_world_size,
                "device": facts.device.name,
                "clock_seconds": facts.clock,
                "address": None if facts.network is None else facts.network.address,
            }
            for facts in self._everyone
            if facts.claim.leads
        ]
        return compare(self._everyone)

    def tables(self, datasets: Mapping[str, Dataset]) -> None:
        """That every node has prepared the same rows: what is really trained on. Raises UserError."""
        leads = self.meeting.claim.leads
        said = {name: table_digest(d.table.folder) for name, d in datasets.items()} if leads else None
        self.findings += self.meeting.decide("tables", said, self._judge_tables)
        self.enforce()

    def _judge_tables(self, values: Mapping[int, Any]) -> list[Finding]:
        leaders = self.meeting.leaders()
        names = node_names(leaders)
        by_node = {names[leader.rank]: values[leader.rank] for leader in leaders}
        return [
            error(
                odd.node,
                f"the prepared {odd.key} rows are others than elsewhere",
                f"remove the tunesmith cache there ({odd.key}-… in data.cache_dir); if they differ again, its data do",
                2,
            )
            for odd in odd_ones(by_node)
        ]

    def sums(self, device: torch.device) -> None:
        """That an all-reduce on the process group is right. Raises MachineError."""
        from tunesmith.preflight.collectives import check_sums

        self.findings += check_sums(self.meeting, device)
        self.enforce()

    def enforce(self) -> None:
        """Raises what was found, on every rank alike: all errors, a line each."""
        caught = as_error(self.findings)
        if caught is not None:
            self.meeting.part()
            raise caught


def agree(recipe: Recipe, base: Path) -> Preflight | None:
    """Before the process group of a run is made; None where the run is one process. Rank 0 prints the warnings. Raises
    UserError (recipe or data differ) or MachineError, with every error, on every rank."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return None
    preflight = Preflight(Patience(recipe.parallel.timeout), "warning")
    preflight.examine(recipe, base)
    if preflight.meeting.is_first:
        for one in preflight.findings:
            if one.level == "warning":
                print(one, file=sys.stderr, flush=True)
    preflight.facts["warnings"] = [str(one) for one in preflight.findings if one.level == "warning"]
    preflight.enforce()
    return preflight
