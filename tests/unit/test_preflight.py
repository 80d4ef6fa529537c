"""The preflight's judgement: a table of faults, each put into the facts of sound nodes, and the line that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.errors import MachineError, UserError
from tunesmith.preflight.compare import call_roll, compare, missing_findings
from tunesmith.preflight.facts import Claim, Facts, Network
from tunesmith.preflight.findings import Finding, as_error, error, exit_code, warning
from tunesmith.preflight.folder import room_findings
from tunesmith.preflight.probe import Device

GIB = 2**30


def claim(rank: int, here: int = 2, world: int = 6) -> Claim:
    machine = rank // here
    return Claim(f"{rank}-x", rank, rank % here, world, here, machine, f"node{machine}", f"boot{machine}/1")


def facts(rank: int) -> Facts:
    """Of one of six ranks on three sound GPU nodes."""
    own = Facts(
        claim=claim(rank),
        device=Device("cuda", "H100", 2, 80 * GIB, 79 * GIB),
        versions={"python": "3.11.9", "torch": "2.13.0", "numpy": "2.1.0", "NCCL": "2.27.3"},
        environ={"NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "8"},
        limits={"nofile": 65536, "memlock": None, "nproc": None},
    )
    if rank % 2:
        return own
    return replace(
        own,
        recipe={"optim.learning_rate": "0.1", "training.seed": "0"},
        data={"data.train[0] a.csv": "100:aa", "data.eval[0] b.csv": "10:bb"},
        model={"model.model_name_or_path config.json": "5:cc"},
        code={"tunesmith/step.py": "dd", "tunesmith/loop.py": "ee"},
        disks={"/dev/shm": (8 * GIB, 8 * GIB), "the cache (/c)": (100 * GIB, 200 * GIB)},
        network=Network("10.0.0.1", f"10.0.0.{rank}", "eth0", False, "eth0", {}, ("eth0",), 9000, 100_000),
        clock=(-0.01, 0.01),
    )


def found(change: Callable[[Facts], Facts], *ranks: int) -> list[Finding]:
    return compare([change(facts(rank)) if rank in ranks else facts(rank) for rank in range(6)])


def network(**fields: object) -> Callable[[Facts], Facts]:
    def change(sound: Facts) -> Facts:
        assert sound.network is not None
        return replace(sound, network=replace(sound.network, **fields))  # type: ignore[arg-type]

    return change


def device(**fields: object) -> Callable[[Facts], Facts]:
    return lambda sound: replace(sound, device=replace(sound.device, **fields))  # type: ignore[arg-type]


def entry(name: str, key: str, value: object) -> Callable[[Facts], Facts]:
    def change(sound: Facts) -> Facts:
        values = {k: v for k, v in (getattr(sound, name) | {key: value}).items() if v is not None}
        return replace(sound, **{name: values})

    return change


def test_sound_nodes_give_nothing() -> None:
    assert compare([facts(rank) for rank in range(6)]) == []
    assert compare([Facts.from_json(facts(rank).to_json()) for rank in range(6)]) == []


# (the fault, ranks that have it, level, exit code, fact, fix): the node is that of the first of the ranks
FAULTS: dict[str, tuple[Callable[[Facts], Facts], tuple[int, ...], str, int, str, str]] = {
    "recipe": (
        entry("recipe", "optim.learning_rate", "0.2"),
        (2,),
        "error",
        2,
        "optim.learning_rate: 0.2, elsewhere 0.1",
        "copy the recipe",
    ),
    "recipe key": (
        entry("recipe", "training.seed", None),
        (2,),
        "error",
        2,
        "training.seed: not there",
        "copy the recipe",
    ),
    "data byte": (
        entry("data", "data.train[0] a.csv", "100:ab"),
        (4,),
        "error",
        2,
        "a.csv has another content than elsewhere (both 100 bytes)",
        "copy the data",
    ),
    "data size": (
        entry("data", "data.train[0] a.csv", "99:ab"),
        (4,),
        "error",
        2,
        "has 99 bytes, elsewhere 100",
        "copy",
    ),
    "data missing": (
        entry("data", "data.eval[0] b.csv", None),
        (4,),
        "error",
        2,
        "b.csv is not there",
        "copy the data",
    ),
    "data more": (
        entry("data", "data.train[0] c.csv", "1:x"),
        (4,),
        "error",
        2,
        "c.csv is there, elsewhere it is not",
        "",
    ),
    "data unreadable": (
        entry("data", "data.train[0] a.csv", "cannot be read (denied)"),
        (4,),
        "error",
        2,
        "a.csv cannot be read (denied), elsewhere it can",
        "copy the data",
    ),
    "model": (
        entry("model", "model.model_name_or_path config.json", "5:zz"),
        (0,),
        "error",
        2,
        "config.json",
        "model's",
    ),
    "code": (
        entry("code", "tunesmith/step.py", "xx"),
        (2,),
        "error",
        3,
        "tunesmith/step.py",
        "install the same",
    ),
    "torch": (
        entry("versions", "torch", "2.12.0"),
        (2, 3),
        "error",
        3,
        "torch is 2.12.0, elsewhere 2.13.0",
        "pip install torch==2.13.0",
    ),
    "not installed": (
        entry("versions", "torch", None),
        (2, 3),
        "error",
        3,
        "torch is not installed",
        "pip install torch",
    ),
    "only there": (
        entry("versions", "deepspeed", "0.19"),
        (2, 3),
        "error",
        3,
        "deepspeed is 0.19, elsewhere not",
        "uninst",
    ),
    "numpy": (
        entry("versions", "numpy", "2.0.0"),
        (2, 3),
        "warning",
        0,
        "numpy is 2.0.0",
        "pip install numpy==2.1.0",
    ),
    "python": (entry("versions", "python", "3.12.1"), (2, 3), "error", 3, "python is 3.12.1", "same image"),
    "python patch": (
        entry("versions", "python", "3.11.1"),
        (2, 3),
        "warning",
        0,
        "python is 3.11.1",
        "same image",
    ),
    "NCCL": (
        entry("versions", "NCCL", "2.21.5"),
        (4, 5),
        "error",
        3,
        "NCCL is 2.21.5, elsewhere 2.27.3",
        "same image",
    ),
    "rank's torch": (
        entry("versions", "torch", "2.12.0"),
        (3,),
        "error",
        3,
        "rank 3 has torch 2.12.0, rank 2 2.13.0",
        "one interpreter",
    ),
    "variable": (
        entry("environ", "NCCL_ALGO", "Tree"),
        (2, 3),
        "error",
        3,
        "NCCL_ALGO is Tree, elsewhere Ring",
        "export NCCL_ALGO=Ring",
    ),
    "variable set": (
        entry("environ", "NCCL_P2P_DISABLE", "1"),
        (2, 3),
        "error",
        3,
        "NCCL_P2P_DISABLE is 1",
        "unset",
    ),
    "threads": (
        entry("environ", "OMP_NUM_THREADS", "4"),
        (2, 3),
        "warning",
        0,
        "OMP_NUM_THREADS is 4",
        "OMP_NUM_THREADS=8",
    ),
    "kind": (
        device(kind="cpu"),
        (2, 3),
        "error",
        3,
        "computes on cpu, elsewhere on cuda",
        "CUDA_VISIBLE_DEVICES",
    ),
    "rank's kind": (device(kind="cpu"), (3,), "error", 3, "rank 3 computes on cpu", "CUDA_VISIBLE_DEVICES"),
    "name": (device(name="A100"), (2, 3), "warning", 0, "has A100, elsewhere H100", "one kind"),
    "memory": (
        device(total_bytes=40 * GIB, free_bytes=39 * GIB),
        (2, 3),
        "warning",
        0,
        "40.0 GiB, another 80.0",
        "one kind",
    ),
    "busy": (device(free_bytes=10 * GIB), (3,), "warning", 0, "rank 3's H100 has 10 GiB free", "nvidia-smi"),
    "count": (
        device(count=1),
        (2, 3),
        "error",
        3,
        "2 ranks, but 1 cuda device visible",
        "lower --num-processes",
    ),
    "nofile": (entry("limits", "nofile", 256), (2,), "error", 3, "may open 256 files", "ulimit -n"),
    "nproc": (entry("limits", "nproc", 100), (2,), "error", 3, "100 processes", "ulimit -u"),
    "memlock": (
        lambda f: replace(entry("limits", "memlock", 65536)(f), infiniband=True),
        (2,),
        "error",
        3,
        "only 64 KiB",
        "ulimit -l",
    ),
    "shm": (
        entry("disks", "/dev/shm", (2**20, 2**26)),
        (2,),
        "error",
        3,
        "/dev/shm has 1 MiB free",
        "--shm-size",
    ),
    "shm small": (
        entry("disks", "/dev/shm", (2**26, 2**26)),
        (2,),
        "warning",
        0,
        "/dev/shm has 64 MiB free",
        "--shm-size",
    ),
    "cache": (
        entry("disks", "the cache (/c)", (2**20, GIB)),
        (2,),
        "error",
        3,
        "the cache (/c) has 1 MiB",
        "cache_dir",
    ),
    "clock": (
        lambda f: replace(f, clock=(3.0, 3.1)),
        (2,),
        "warning",
        0,
        "3.0 s ahead of rank 0's",
        "chrony",
    ),
    "clock far": (lambda f: replace(f, clock=(-90.0, -80.0)), (2,), "error", 3, "85.0 s behind", "chrony"),
    "loopback": (
        network(loopback=True, address="127.0.1.1", interface=None),
        (2,),
        "error",
        3,
        "127.0.1.1 (of no interface), which is loopback",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    "no such interface": (
        network(wanted={"NCCL_SOCKET_IFNAME": "ib0"}),
        (2,),
        "error",
        3,
        "NCCL_SOCKET_IFNAME=ib0",
        "set",
    ),
    "no address": (
        network(interface="ib0", address=""),
        (2,),
        "error",
        3,
        "ib0, which its ranks are to use, has no address",
        "configure",
    ),
    "not an address": (
        network(interface=None),
        (2,),
        "error",
        3,
        "10.0.0.2, which none of its interfaces has",
        "/etc/hosts",
    ),
    "other interface": (
        network(interface="eth1"),
        (2,),
        "warning",
        0,
        "use eth1, but the way to rank 0 is by eth0",
        "eth0",
    ),
    "MTU": (network(mtu=1500), (2,), "error", 3, "MTU of eth0 is 1500, elsewhere 9000", "mtu 9000"),
    "host name": (
        lambda f: replace(f, claim=replace(f.claim, host="node0")),
        (2, 3),
        "warning",
        0,
        "another node is called node0 too",
        "name of its own",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_node_and_fix(name: str) -> None:
    change, ranks, level, code, fact, fix = FAULTS[name]
    findings = found(change, *ranks)
    machine = f"(machine {ranks[0] // 2})"
    wanted = [f for f in findings if fact in f.what and fix in f.fix and f.node.endswith(machine)]
    assert len(wanted) == 1, [str(one) for one in findings]
    assert (wanted[0].level, wanted[0].exit_code) == (level, code)
    # and nobody else is blamed
    if name != "host name":  # both of one name are
        assert all(one.node.endswith(machine) for one in findings)


def test_clock_bounds_that_allow_no_skew_are_none() -> None:
    """A slow exchange widens the bounds; what they do not exclude is not told."""
    assert found(lambda f: replace(f, clock=(-3.0, 70.0)), 2) == []


def test_on_one_machine_the_network_does_not_matter() -> None:
    def alike(f: Facts) -> Facts:
        moved = replace(f, claim=replace(f.claim, place="boot/1", host="one"))
        return network(loopback=True, address="127.0.0.1", interface="lo")(moved) if f.network else moved

    assert found(alike, *range(6)) == []


def test_of_two_that_differ_the_first_is_right() -> None:
    two = [facts(0), entry("recipe", "training.seed", "7")(facts(2))]
    (one,) = [f for f in compare(two) if "training.seed" in f.what]
    assert one.node == "node1 (machine 1)"


def test_nodes_that_would_have_one_name_are_told_apart() -> None:
    """`torchrun` twice on one host, each of which calls itself machine 0."""
    one, two = (
        facts(0),
        replace(
            entry("recipe", "training.seed", "7")(facts(2)), claim=replace(claim(2), machine=0, host="node0")
        ),
    )
    assert [f.node for f in compare([one, two]) if "seed" in f.what] == ["node0 (machine 0, rank 2)"]


def test_many_different_files_are_a_few_lines() -> None:
    many = {f"data.train[0] {i}.csv": "1:x" for i in range(500)}
    findings = found(lambda f: replace(f, data=many) if f.claim.rank == 2 else f, 2)
    assert len(findings) == 4
    assert "499 more of its files differ" in findings[-1].what


# the roll


def test_a_complete_roll() -> None:
    roll = call_roll([claim(rank) for rank in (3, 0, 1, 2, 5, 4)], 6)
    assert roll.complete
    assert missing_findings(roll, 1.0) == []


def test_missing_ranks_are_named_by_their_machine() -> None:
    roll = call_roll([claim(rank) for rank in (0, 1, 2)], 6)
    assert roll.missing == (3, 4, 5)
    found = missing_findings(roll, 20.0)
    assert [one.node for one in found] == ["node1 (machine 1)", "machine 2"]
    assert "rank 3 did" in found[0].what
    assert "ranks 4, 5 did" in found[1].what


def test_a_rank_that_is_claimed_twice() -> None:
    again = replace(claim(1), uid="other", host="node7", machine=7)
    roll = call_roll([*(claim(rank) for rank in range(6)), again], 6)
    assert not roll.complete
    (one,) = roll.findings
    assert one.node == "node7 (machine 7)"
    assert "rank 1 is claimed here and on node0 (machine 0)" in one.what


def test_other_world_sizes() -> None:
    roll = call_roll([claim(0), replace(claim(1), world_size=8)], 6)
    (one,) = roll.findings
    assert "rank 1 was started for 8 processes, rank 0 for 6" in one.what
    outside = call_roll([claim(0, world=2), replace(claim(3), world_size=2)], 2)
    assert "rank 3 is not one of 2 processes" in outside.findings[0].what


# findings


def test_errors_of_the_user_come_first() -> None:
    machine, user = error("a", "w", "f"), error("b", "w", "f", 2)
    assert exit_code([machine, user, warning("c", "w", "f")]) == 2
    assert exit_code([machine]) == 3
    assert exit_code([warning("c", "w", "f")]) == 0
    assert as_error([warning("c", "w", "f")]) is None
    assert isinstance(as_error([machine]), MachineError)
    both = as_error([machine, user])
    assert isinstance(both, UserError)
    assert str(both).splitlines() == ["✗ a: w → f", "✗ b: w → f"]


def test_room_for_checkpoints() -> None:
    def judged(free: int) -> list[Finding]:
        return list(
            room_findings(
                "n", Path("/out"), {0: {"disk": [free, 1000]}, 2: {"disk": [900, 1000]}}, (100, 200)
            )
        )

    assert judged(200) == []
    assert [one.level for one in judged(150)] == ["warning"]
    (one,) = judged(99)
    assert one.level == "error"
    assert "at least 100 B" in one.what
    assert list(room_findings("n", Path("/out"), {0: {"disk": None}}, None)) == []
