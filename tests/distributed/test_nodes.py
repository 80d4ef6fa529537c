"""The hosts that other tests are run on (tests/distributed/nodes.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.nodes import Nodes

# waits for a connection; says who called and what it got, as fast as it comes
SERVER = """
import socket, sys, time
listener = socket.create_server(("", 4000))
print("listening", flush=True)
line, (caller, _) = listener.accept()
size, started = 0, time.monotonic()
while data := line.recv(1 << 16):
    size += len(data)
print(caller, size, time.monotonic() - started, flush=True)
"""
CLIENT = "import socket, sys; socket.create_connection((sys.argv[1], 4000)).sendall(bytes(int(sys.argv[2])))"


def exchange(nodes: Nodes, size: int) -> list[str]:
    server = nodes.start(nodes[0], [sys.executable, "-c", SERVER])
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    nodes.run(nodes[1], [sys.executable, "-c", CLIENT, nodes[0].name, str(size)])
    return server.communicate(timeout=60)[0].split()


@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_hosts_know_themselves_and_each_other_and_nobody_else(nodes: Nodes) -> None:
    assert [node.name for node in nodes] == ["nodea", "nodeb", "nodec"]
    for node in nodes:
        assert nodes.run(node, ["hostname"]).strip() == node.name
        assert nodes.run(node, ["hostname", "-i"]).strip() == node.address
    assert exchange(nodes, 10)[:2] == ["10.77.0.2", "10"]
    assert nodes.run(nodes[0], ["ip", "-br", "-4", "route"]).split()[0] == "10.77.0.0/24"


def test_a_pulled_cable_is_silent_and_can_be_plugged_in_again(nodes: Nodes) -> None:
    probe = f"import socket; socket.create_connection(({nodes[0].address!r}, 4000), 1)"
    nodes.link_down(nodes[0])
    for node in nodes:
        assert nodes.run(node, ["ip", "-br", "address", "show", "eth0"]).split()[2].startswith(node.address)
    client = nodes.start(nodes[1], [sys.executable, "-c", probe])
    _, err = client.communicate(timeout=60)
    assert "TimeoutError" in err or "No route to host" in err  # nobody answered, not even "refused"
    nodes.link_up(nodes[0])
    assert exchange(nodes, 10)[1] == "10"


def test_a_slow_network(nodes: Nodes) -> None:
    nodes.slow(8)
    size, seconds = exchange(nodes, 2_000_000)[1:]
    assert 8 * int(size) / float(seconds) < 12e6


def test_a_file_system_of_one_host(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "shared").touch()
    nodes.mount_tmpfs(nodes[1], tmp_path, "1m")
    with pytest.raises(AssertionError, match="No space left"):
        nodes.run(nodes[1], ["dd", "if=/dev/zero", f"of={tmp_path}/full", "bs=2M", "count=1"])
    listed = [nodes.run(node, ["ls", tmp_path]).split() for node in nodes]
    assert listed == [["shared"], ["full"]]
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_nothing_is_left_also_where_the_test_process_was_killed(nodes: Nodes) -> None:
    """A process in a session of its own on a host of a process that is killed: the next hosts sweep it away."""
    program = """
import os, signal, sys
from tests.distributed.nodes import Nodes
with Nodes(1) as nodes:
    nodes.run(nodes[0], ["sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 &"])
    print(nodes[0].namespace, *nodes.pids(nodes[0]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    namespace, pid = done.stdout.split()
    assert runs(pid)
    assert namespace in nodes_of_this_machine()
    with Nodes(1) as more:
        assert namespace not in nodes_of_this_machine()
        assert not runs(pid)
        assert more[0].namespace in nodes_of_this_machine()
    assert more.owner not in nodes_of_this_machine()
    assert nodes[0].namespace in nodes_of_this_machine()  # of a process that lives


def runs(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE  # whose parent may never ask
    except psutil.NoSuchProcess:
        return False


def nodes_of_this_machine() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
