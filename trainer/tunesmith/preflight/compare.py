"""The ranks' facts compared: pure functions from facts to findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.preflight.agreement import agreement_findings
from tunesmith.preflight.facts import Claim, Facts
from tunesmith.preflight.findings import Finding, error, warning
from tunesmith.preflight.fitness import fitness_findings

CLOCK_WARNING, CLOCK_ERROR = 2.0, 60.0  # seconds
RANK_FIX = "give each machine another --machine-rank (0 to N-1), and each process another RANK"


def compare(everyone: Sequence[Facts]) -> list[Finding]:
    """The findings about all ranks' facts, in the order in which they are best mended."""
    names = node_names([facts.claim for facts in everyone])
    leaders = sorted((f for f in everyone if f.claim.leads), key=lambda f: f.claim.rank)
    named = {names[f.claim.rank]: f for f in leaders}
    found = [*agreement_findings(named)]
    for facts in sorted(everyone, key=lambda f: f.claim.rank):
        found += rank_findings(facts, named, names[facts.claim.rank])
    for name, facts in named.items():
        here = [f for f in everyone if names[f.claim.rank] == name]
        found += fitness_findings(name, facts, here)
        found += clock_findings(name, facts)
    found += host_findings(leaders, names)
    found += network_findings(named)
    return list(dict.fromkeys(found))


def node_base(claim: Claim) -> int:
    """The first rank of the claim's node, by which nodes are told apart whatever they are called."""
    return claim.rank - claim.local_rank


def node_names(claims: Sequence[Claim]) -> dict[int, str]:
    """For each rank the name of its node: the host's, with the launcher's number of the machine. Nodes that would
    have one name (each process a launcher's first) are told apart by their first rank."""
    bases = {node_base(claim): node_name(claim) for claim in claims}
    counts = Counter(bases.values())
    return {
        claim.rank: name if counts[name] == 1 else f"{name[:-1]}, rank {node_base(claim)})"
        for claim in claims
        for name in (bases[node_base(claim)],)
    }


def node_name(claim: Claim) -> str:
    number = f"machine {claim.machine}" if claim.machine >= 0 else f"rank {node_base(claim)}"
    return f"{claim.host} ({number})"


def several_places(leaders: Sequence[Facts]) -> bool:
    """Whether the ranks need a network: one kernel's loopback does not reach them all."""
    return len({facts.claim.place for facts in leaders}) > 1


def rank_findings(facts: Facts, named: Mapping[str, Facts], name: str) -> Iterator[Finding]:
    """A rank that differs from the one that leads its node: another environment on the same machine."""
    leader = named.get(name)
    if leader is None or leader is facts:
        return
    rank = facts.claim.rank
    pairs: list[tuple[str, Mapping[str, str], Mapping[str, str]]] = [
        ("version", facts.versions, leader.versions),
        ("variable", facts.environ, leader.environ),
    ]
    for kind, own, usual in pairs:
        for key in sorted(own.keys() | usual.keys()):
            if own.get(key) != usual.get(key):
                what = (
                    f"rank {rank} has {key} {own.get(key, 'not at all')}, rank {leader.claim.rank} "
                    f"{usual.get(key, 'not at all')}"
                )
                fix = (
                    "start all ranks by one interpreter"
                    if kind == "version"
                    else f"set {key} alike for all ranks"
                )
                yield error(name, what, fix)
    if facts.device.kind != leader.device.kind:
        what = (
            f"rank {rank} computes on {facts.device.kind}, rank {leader.claim.rank} on {leader.device.kind}"
        )
        yield error(name, what, "see CUDA_VISIBLE_DEVICES and TUNESMITH_DEVICE of that rank")


def clock_findings(name: str, facts: Facts) -> Iterator[Finding]:
    """`facts.clock` are bounds: only what is certainly apart is told."""
    if facts.clock is None:
        return
    low, high = facts.clock
    apart = max(0.0, low, -high)
    if apart <= CLOCK_WARNING:
        return
    middle = (low + high) / 2
    what = f"its clock is {abs(middle):.1f} s {'ahead of' if middle > 0 else 'behind'} rank 0's"
    fix = "let chrony or ntpd set it (chronyc makestep)"
    yield error(name, what, fix) if apart > CLOCK_ERROR else warning(name, what, fix)


def host_findings(leaders: Sequence[Facts], names: Mapping[int, str]) -> Iterator[Finding]:
    """Two nodes of one name are told apart by number, but not in host files, logs or by their own launcher."""
    places: dict[str, set[str]] = {}
    for facts in leaders:
        places.setdefault(facts.claim.host, set()).add(facts.claim.place)
    for facts in leaders:
        if len(places[facts.claim.host]) > 1 and places[facts.claim.host] != {facts.claim.place}:
            name = names[facts.claim.rank]
            yield warning(
                name, f"another node is called {facts.claim.host} too", "give each host a name of its own"
            )


def network_findings(named: Mapping[str, Facts]) -> Iterator[Finding]:
    """Interfaces that the others cannot reach; on one machine any will do."""
    several = several_places(list(named.values()))
    usual_mtu = Counter(f.network.mtu for f in named.values() if f.network is not None).most_common(1)
    for name, facts in named.items():
        network = facts.network
        if network is None:
            continue
        known = ", ".join(network.available) or "none that is up"
        for variable, wanted in network.wanted.items():
            yield error(
                name, f"{variable}={wanted}: it has no such interface, but {known}", f"set {variable} there"
            )
        if not several or network.wanted:
            continue
        if not network.address:
            what = f"{network.interface}, which its ranks are to use, has no address"
            yield error(name, what, f"configure it, or set GLOO_SOCKET_IFNAME to one of {known}")
        elif network.loopback:
            use = (
                network.toward
                if network.toward not in (None, "lo")
                else next(iter(network.available), "eth0")
            )
            on = f"{network.address} ({network.interface or 'of no interface'})"
            what = f"its ranks would be reached at {on}, which is loopback: no other node comes there"
            yield error(name, what, f"export GLOO_SOCKET_IFNAME={use} NCCL_SOCKET_IFNAME={use} there")
        elif network.interface is None:
            what = f"its ranks would be reached at {network.address}, which none of its interfaces has"
            yield error(name, what, f"repair its /etc/hosts, or set GLOO_SOCKET_IFNAME to one of {known}")
        elif network.toward is not None and network.interface != network.toward:
            what = f"its ranks use {network.interface}, but the way to rank 0 is by {network.toward}"
            yield warning(name, what, f"set GLOO_SOCKET_IFNAME={network.toward}, unless this is meant")
        if network.mtu is not None and usual_mtu and network.mtu != usual_mtu[0][0]:
            what = f"the MTU of {network.toward} is {network.mtu}, elsewhere {usual_mtu[0][0]}: large packets are lost"
            yield error(name, what, f"ip link set {network.toward} mtu {usual_mtu[0][0]}")


@dataclass(frozen=True, slots=True)
class Roll:
    """What the claims say. `complete`: each rank of the world once, and nothing else."""

    claims: tuple[Claim, ...]
    missing: tuple[int, ...]
    findings: tuple[Finding, ...]

    @property
    def complete(self) -> bool:
        return not self.missing and not self.findings


def call_roll(claims: Sequence[Claim], world_size: int) -> Roll:
    """`claims` in the order in which they came; `world_size` is rank 0's."""
    found: list[Finding] = []
    first: dict[int, Claim] = {}
    for claim in claims:
        other = first.setdefault(claim.rank, claim)
        if other is not claim:
            what = f"rank {claim.rank} is claimed here and on {node_name(other)}"
            found.append(error(node_name(claim), what, RANK_FIX))
    for claim in claims:
        if claim.world_size != world_size:
            what = f"rank {claim.rank} was started for {claim.world_size} processes, rank 0 for {world_size}"
            found.append(
                error(node_name(claim), what, "give --num-processes and --num-machines alike everywhere")
            )
            break
    for claim in claims:
        if claim.world_size == world_size and not claim.rank < world_size:
            what = f"rank {claim.rank} is not one of {world_size} processes (0 to {world_size - 1})"
            found.append(error(node_name(claim), what, "see --machine-rank and --num-processes there"))
    missing = tuple(rank for rank in range(world_size) if rank not in first)
    return Roll(tuple(claims), missing, tuple(found))


def missing_findings(roll: Roll, seconds: float) -> list[Finding]:
    """For each node that has not come, by what is known of the others."""
    if not roll.missing:
        return []
    here = max(roll.claims, key=lambda claim: claim.local_world_size).local_world_size
    came = {node_base(claim): claim for claim in roll.claims}
    absent: dict[int, list[int]] = {}
    for rank in roll.missing:
        absent.setdefault(rank // here * here, []).append(rank)
    found: list[Finding] = []
    for base, ranks in absent.items():
        claim = came.get(base)
        name = node_name(claim) if claim is not None else f"machine {base // here}"
        which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        what = f"{which} did not come within {seconds:.0f} s"
        fix = "see what its launcher says; is it started, with this address, port and machine rank?"
        found.append(error(name, what, fix))
    return found
