"""The preflight's parts by themselves: digests, the folder's proof, links, the store's deadlines, the probe."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.support import tiny_recipe
from tunesmith.errors import MachineError
from tunesmith.preflight.collectives import judge_heard, known_sum, known_values
from tunesmith.preflight.compare import Roll
from tunesmith.preflight.content import code_digests, data_digests, digest_file, model_digests, recipe_values
from tunesmith.preflight.facts import Claim, compared, network
from tunesmith.preflight.folder import room, try_folder
from tunesmith.preflight.links import Link, best, link_findings, schedule, send, slow_links, summary
from tunesmith.preflight.probe import Interface, Probe
from tunesmith.preflight.store import bounded, port_taken
from tunesmith_launch.command import Cluster, build
from tunesmith_launch.muster import Hello, disagreements, missing

# digests


def test_a_byte_anywhere_changes_a_digest(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(5000))
    whole = digest_file(file)
    assert whole.startswith("5000:")
    file.write_bytes(bytes(4999) + b"\1")
    assert digest_file(file) != whole


def test_a_large_file_is_known_by_its_size_and_blocks(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with file.open("wb") as opened:
        opened.truncate(600 * 2**20)
    before = digest_file(file, whole_bytes=2**20)
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\1")
    assert digest_file(file, whole_bytes=2**20) != before


def test_data_and_tokenizer_and_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert recipe_values(recipe)["optim.learning_rate"] == "0.01"
    assert recipe_values(recipe)["model.config.hidden_size"] == "32"
    data = data_digests(recipe, tmp_path)
    assert list(data) == ["data.train[0] train.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    assert "no such file" in data_digests(recipe, tmp_path)["data.train[0] " + str(tmp_path / "train.jsonl")]
    assert "model.tokenizer tokenizer.json" in model_digests(recipe, tmp_path)


def test_weights_are_known_by_their_header(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.zeros(1000, 1000)}, model / "model.safetensors")
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"model_name_or_path": str(model)})}
    )
    before = model_digests(recipe, tmp_path)
    least, most = room(recipe, tmp_path) or (0, 0)
    # AdamW: 12 bytes a parameter in a checkpoint, 4 in final/; 10 steps, one save every 5, and the last
    assert least == 3 * (12_000_000 + 4) + 4_000_000
    assert most == 4 * (12_000_000 + 4) + 4_000_000
    for precision, state in (("bf16_master", 12), ("bf16_stochastic", 4), ("bf16_kahan", 6)):
        training = recipe.training.model_copy(update={"precision": precision})
        least, _ = room(recipe.model_copy(update={"training": training}), tmp_path) or (0, 0)
        assert least == (3 * (2 + state) + 2) * 1_000_000
    save_file({"w": torch.zeros(1000, 1000, dtype=torch.int32)}, model / "model.safetensors")
    assert model_digests(recipe, tmp_path) != before


def test_our_own_code_is_ours() -> None:
    digests = code_digests()
    assert "tunesmith/step.py" in digests
    assert "tunesmith_kernels/__init__.py" in digests


# the folder


def test_the_folder_is_proved_by_the_nonce(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "nonce").write_text("abc")
    said = try_folder(tmp_path, "t", "abc")
    assert said["shared"] is True
    assert (tmp_path / "t" / said["left"]).is_file()
    assert try_folder(tmp_path, "t", "other")["shared"] is False


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.preflight.folder._SEEN_WITHIN", 0.2)
    assert try_folder(tmp_path, "t", "abc") == {"shared": False}


# links


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_every_pair_meets_once(count: int) -> None:
    rounds = schedule(range(count), 15)
    pairs = [frozenset(pair) for one in rounds for pair in one]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for one in rounds:
        assert len({rank for pair in one for rank in pair}) == 2 * len(one)


def test_many_nodes_meet_some() -> None:
    rounds = schedule(range(100), 15)
    assert len(rounds) == 15
    assert all(len(one) == 50 for one in rounds)


def full(speeds: dict[tuple[int, int], float], nodes: int = 3, usual: float = 9000.0) -> list[Link]:
    return [Link(a, b, speeds.get((a, b), usual), 0.1) for a in range(nodes) for b in range(nodes) if a != b]


def test_slow_links() -> None:
    assert slow_links(full({}), {}) == []
    assert slow_links(full({(0, 1): 3000.0}), {}) == []  # a third of the others: noise
    ((link, why),) = slow_links(full({(0, 1): 900.0}), {})
    assert (link.source, link.target, why) == (0, 1, "the median of all links is 9.00 Gbit/s")
    ((link, why),) = slow_links(full({(0, 1): 900.0}, nodes=2), {})
    assert why == "the way back has 9.00 Gbit/s"
    both = {(0, 1): 900.0, (1, 0): 900.0}
    assert slow_links(full(both, nodes=2), {}) == []  # nothing to compare it with
    assert [why for _, why in slow_links(full(both, nodes=2), {0: 25_000.0, 1: 25_000.0})] == [
        "the interface says 25.00 Gbit/s"
    ] * 2
    assert len(slow_links(full({(0, 1): 90.0, (1, 0): 90.0}, nodes=2), {})) == 2


def test_the_fastest_measurement_counts() -> None:
    links = [Link(0, 1, 10.0), Link(0, 1, 9000.0), Link(0, 1, fault="no"), Link(1, 0, 9000.0)]
    assert slow_links(links, {}) == []
    assert {link.megabits for link in best(links)} == {9000.0}


def test_findings_name_both_ends() -> None:
    links = [Link(0, 1, fault="10.0.0.2 is not reached: No route to host"), Link(1, 0, 9000.0)]
    (one,) = link_findings(links, {0: "a", 1: "b"}, {}, "error")
    assert str(one).startswith("✗ a → b: 10.0.0.2 is not reached: No route to host → open all ports")
    (slow,) = link_findings(full({(0, 1): 90.0}, nodes=2), {0: "a", 1: "b"}, {}, "warning")
    assert (slow.level, slow.exit_code, slow.node) == ("warning", 0, "a → b")
    assert summary(links) == {
        "links": 1, "slowest_megabits": 9000.0, "median_megabits": 9000.0, "median_milliseconds": 0.0
    }  # fmt: skip


def test_a_link_that_answers_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "not reached" in send(0, 1, "127.0.0.1", port).fault


# the store's deadlines


def test_work_that_hangs_is_given_up() -> None:
    gate = threading.Event()

    def hang() -> None:
        gate.wait(60)

    with pytest.raises(MachineError, match="late"):
        bounded(hang, 0.05, lambda: MachineError("late"))
    gate.set()
    assert bounded(lambda: 7, 10, lambda: MachineError("late")) == 7
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 10, lambda: MachineError("late"))


def test_who_has_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = str(port_taken("node (machine 0)", listener.getsockname()[1]))
    assert f"is taken by process {os.getpid()}" in text
    assert "--main-process-port" in text


# what is asked of the machine


class Fake(Probe):
    """A node with two interfaces, in whose /etc/hosts its own name is Debian's 127.0.1.1."""

    def __init__(self, **environ: str) -> None:
        self.variables = {"MASTER_ADDR": "head"} | environ

    def environ(self) -> dict[str, str]:
        return self.variables

    def host(self) -> str:
        return "me"

    def interfaces(self) -> list[Interface]:
        return [
            Interface("lo", ("127.0.0.1", "::1"), True, 65536, None),
            Interface("eth0", ("10.0.0.2",), True, 1500, None),
            Interface("ib0", ("10.9.0.2",), True, 4092, 100_000),
        ]

    def addresses(self, name: str) -> list[str]:
        return {"head": ["10.0.0.1"], "me": ["127.0.1.1"]}.get(name, [])

    def route(self, address: str) -> str | None:
        return "10.0.0.2"


def test_gloo_takes_the_address_of_the_hosts_own_name() -> None:
    found = network(Fake())
    assert (found.address, found.interface, found.loopback, found.toward) == ("127.0.1.1", None, True, "eth0")


@pytest.mark.parametrize(
    ("variables", "address", "wanted"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "10.9.0.2", {}),
        ({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1", {}),
        ({"NCCL_SOCKET_IFNAME": "=ib0,eth0"}, "10.9.0.2", {}),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "10.9.0.2", {}),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, "127.0.1.1", {}),
        ({"GLOO_SOCKET_IFNAME": "eth7"}, "127.0.1.1", {"GLOO_SOCKET_IFNAME": "eth7"}),
    ],
)
def test_interfaces_of_the_environment(
    variables: dict[str, str], address: str, wanted: dict[str, str]
) -> None:
    found = network(Fake(**variables))
    assert (found.address, found.wanted) == (address, wanted)


def test_variables_that_are_a_nodes_own_are_not_compared() -> None:
    given = {
        "NCCL_ALGO": "Ring",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "mlx5",
        "HOME": "/",
    }
    given |= {"TUNESMITH_CACHE": "/c", "OMP_NUM_THREADS": "8", "ACCELERATE_TOKEN": "secret"}
    assert compared(Fake(**given)) == {"NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "8"}


def test_the_probe_answers_here() -> None:
    probe = Probe()
    assert probe.disk(Path("/no/such/place")) == probe.disk(Path("/"))
    assert probe.addresses("no-such-host.invalid") == []
    assert probe.route("127.0.0.1") == "127.0.0.1"
    assert abs(probe.clock() - time.time()) < 60
    assert probe.versions()["torch"]


def test_known_values_sum_to_what_is_known() -> None:
    for dtype in (torch.int64, torch.float32):
        for world in (2, 3, 64):
            cpu = torch.device("cpu")
            total = sum(
                (known_values(rank, dtype, cpu) for rank in range(world)), torch.zeros(1, dtype=dtype)
            )
            assert torch.equal(total, known_sum(world, dtype, cpu))


def test_who_is_to_blame_for_a_wrong_sum() -> None:
    claims = tuple(Claim(str(rank), rank, 0, 3, 1, rank, f"n{rank}", "p") for rank in range(3))
    meeting = SimpleNamespace(roll=Roll(claims, (), ()))

    def blamed(values: dict[int, list[int]]) -> list[str]:
        return [f"{one.node} {one.what}"[:26] for one in judge_heard(meeting, values)]  # type: ignore[arg-type]

    assert blamed({0: [], 1: [], 2: []}) == []
    assert blamed({0: [1], 1: [], 2: [1]}) == ["n1 (machine 1) rank 1 send"]
    assert blamed({0: [1], 1: [1], 2: [1]}) == ["n1 (machine 1) rank 1 send"]
    assert blamed({0: [1], 1: [], 2: []}) == ["n0 (machine 0) rank 0 rece"]


# the muster of machines


def hello(machine: int, **fields: object) -> Hello:
    values = {
        "machine": machine,
        "machines": 3,
        "processes": 6,
        "host": f"n{machine}",
        "version": "1",
        "uid": f"u{machine}",
    }
    return Hello(**(values | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda: hello(1, uid="x", host="n2"),
            "✗ n2 (machine 1): machine rank 1 is claimed here and on n1 →",
        ),
        (
            lambda: hello(0, uid="x", host="n2"),
            "✗ n2 (machine 0): machine rank 0 is claimed here and on n0 →",
        ),
        (lambda: hello(2, machines=4), "✗ n2 (machine 2): --num-machines is 4, on machine 0 3 →"),
        (lambda: hello(2, processes=8), "✗ n2 (machine 2): --num-processes is 8, on machine 0 6 →"),
        (lambda: hello(2, version="2"), "✗ n2 (machine 2): tunesmith is 2, on machine 0 1 →"),
    ],
)
def test_machines_that_disagree(change: Callable[[], Hello], line: str) -> None:
    (found,) = disagreements(hello(0), [hello(0), hello(1), change()])
    assert found.startswith(line)


def test_machines_that_agree() -> None:
    assert disagreements(hello(0), [hello(0), hello(1), hello(2)]) == []
    assert missing(hello(0), [hello(0), hello(2)]) == [1]
    assert missing(hello(0), [hello(1), hello(2)]) == [0]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_ranks_of_a_check_are_started_as_those_of_a_run(processes: int) -> None:
    cluster = Cluster(num_processes=processes)
    run, check = (build(["r"], cluster, {}, "python", module=m) for m in ("tunesmith", "tunesmith.preflight"))
    assert run.argv[-3:] == ("-m", "tunesmith", "r")
    assert check.argv == (*run.argv[:-2], "tunesmith.preflight", "r")
    assert (check.env, check.has_agent) == (run.env, run.has_agent)
