"""Which network interface several machines use: the route's, never loopback unasked, never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tunesmith.errors import MachineError, UserError
from tunesmith_launch import interface
from tunesmith_launch.command import Cluster, build
from tunesmith_launch.interface import choose, toward

# no test asks a name server
DRY_RUN = """
import socket
plain = socket.getaddrinfo
def getaddrinfo(host, *rest, **how):
    if host == "nowhere":
        raise socket.gaierror(-2, "Name or service not known")
    return plain(host, *rest, **how)
socket.getaddrinfo = getaddrinfo
from tunesmith_launch.cli import main
main()
"""
HELD = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["192.168.1.5", "fe80::1%eth0"],
    "ib0": ["10.0.0.5", "fd00::5"],
}


@pytest.mark.parametrize(
    ("host", "sources", "name"),
    [
        ("10.0.0.1", ["10.0.0.5"], "ib0"),
        ("node0", ["192.168.1.5"], "eth0"),
        ("node0", ["fd00::5"], "ib0"),
        ("fe80::9", ["fe80::1"], "eth0"),
        ("node0", ["127.0.1.1", "10.0.0.5"], "ib0"),  # the hosts file and the DNS both know the name
        ("127.0.0.1", ["127.0.0.1"], "lo"),
        ("::1", ["::1"], "lo"),
        ("localhost", ["127.0.0.1"], "lo"),
    ],
)
def test_the_interface_is_that_of_the_route(host: str, sources: list[str], name: str) -> None:
    assert choose(host, sources, HELD) == name


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (
            ["127.0.0.1"],
            "node0 is 127.0.0.1 on this machine .see /etc/hosts., which no other machine reaches",
        ),
        (["::1"], "node0 is ::1 on this machine"),
        (["10.9.9.9"], "node0 is reached from 10.9.9.9, which no network interface of this machine holds"),
        ([], "node0 cannot be reached from this machine: there is no route to it"),
    ],
)
def test_no_interface_is_chosen_silently(sources: list[str], words: str) -> None:
    with pytest.raises(MachineError, match=words) as caught:
        choose("node0", sources, HELD)
    assert "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="the probe is Linux's")
def test_the_probe_finds_the_interface_that_has_the_address() -> None:
    """On machine 0 the address is its own."""
    for name, items in psutil.net_if_addrs().items():
        for item in items:
            if item.family.name == "AF_INET":
                assert toward(item.address, 29500, wait=0) == name


@pytest.mark.skipif(sys.platform != "linux", reason="the probe is Linux's")
def test_a_name_is_asked_for_until_it_has_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [OSError(-2, "Name or service not known"), OSError(-3, "Temporary failure"), None]
    plain = interface.socket.getaddrinfo

    def resolve(host: str, port: int, **how: int) -> object:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return plain("127.0.0.1", port, **how)

    monkeypatch.setattr(interface.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(interface.time, "sleep", lambda _: None)
    with pytest.raises(MachineError, match="pod0 is 127"):
        toward("pod0", 29500)
    assert not answers
    assert capsys.readouterr().err == "waiting until pod0 (machine 0) has an address\n"
    answers[:] = [OSError(-2, "Name or service not known")]
    with pytest.raises(MachineError, match="pod0 has no address: Name or service not known"):
        toward("pod0", 29500, wait=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not a host name"):
        toward("a..b", 29500)


def test_what_the_user_chose_is_kept() -> None:
    cluster = Cluster(4, 2, 0, "node0", 29500, interface="ib0")
    variables = interface.VARIABLES

    def chosen(**own: str) -> dict[str, str]:
        env = build(["r.yaml"], cluster, own, "python").env
        return {name: env[name] for name in variables if name in env}

    assert chosen() == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}
    assert chosen(GLOO_SOCKET_IFNAME="eth7") == {"NCCL_SOCKET_IFNAME": "=ib0"}
    assert chosen(NCCL_SOCKET_IFNAME="eth") == {"GLOO_SOCKET_IFNAME": "ib0"}
    one = build(["r.yaml"], Cluster(2), {}, "python")
    assert not set(one.env) & set(variables)


@pytest.mark.skipif(sys.platform != "linux", reason="the probe is Linux's")
def test_a_dry_run_shows_it(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {model_name_or_path: builtin:minilm}\n"
        "data: {train: {path: a.csv, format: classification, columns: {text: text, label: label}}}\n"
        "objective: {type: classification}\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in interface.VARIABLES}

    (tmp_path / "hosts.py").write_text(DRY_RUN)

    def dry_run(address: str) -> subprocess.CompletedProcess[str]:
        options = ["--dry-run", "--num-processes=2", "--num-machines=2", "--machine-rank=1"]
        return subprocess.run(
            [
                sys.executable,
                "hosts.py",
                "train",
                "r.yaml",
                *options,
                f"--main-process-ip={address}",
            ],
            cwd=tmp_path,
            env=environ | {"TUNESMITH_DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    assert " GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME==lo " in dry_run("127.0.0.1").stdout
    unknown = dry_run("nowhere")
    assert "SOCKET_IFNAME" not in unknown.stdout
    assert unknown.stderr.startswith(
        "without GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME: --main-process-ip nowhere"
    )
