"""The faults of the preflight's test, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.distributed.nodes import Nodes
from tests.distributed.preflight_jobs import (
    Case,
    Start,
    add_model,
    cuda,
    edit,
    machines,
    other_code,
    other_version,
    ranks,
    with_model,
)

A, B, C = r"nodea \(machine 0\)", r"nodeb \(machine 1\)", r"nodec \(machine 2\)"
OTHER = {1: {"PYTHONPATH": "{folder}/other"}}
MIB = 2**20


def at(rank: int, **variables: str) -> dict[int, dict[str, str]]:
    return {rank: variables}


def with_version(name: str, version: str) -> str:
    return f"found = Probe.versions\nProbe.versions = lambda probe: found(probe) | {{{name!r}: {version!r}}}"


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def append(path: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / path).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def slowed(number: int, mbit: int) -> Callable[[Nodes], list[tuple[int, str, str]]]:
    """What one node sends is limited."""

    def change(nodes: Nodes) -> list[tuple[int, str, str]]:
        queue = f"tc qdisc replace dev eth0 root tbf rate {mbit}mbit burst 256kb latency 50ms"
        return [(number, queue, "tc qdisc del dev eth0 root")]

    return change


def blackhole(number: int, other: int) -> Callable[[Nodes], list[tuple[int, str, str]]]:
    def change(nodes: Nodes) -> list[tuple[int, str, str]]:
        way = f"blackhole {nodes[other].address}/32"
        return [(number, f"ip route add {way}", f"ip route del {way}")]

    return change


def mtu(number: int) -> Callable[[Nodes], list[tuple[int, str, str]]]:
    def change(nodes: Nodes) -> list[tuple[int, str, str]]:
        return [(number, "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500")]

    return change


# another process has the port, and says nothing to whoever calls
HOLD = """
"$PYTHON" -c "import os, socket, time
listener = socket.create_server(('', int(os.environ['PORT'])))
print('held', flush=True)
time.sleep(60)" > held &
while ! grep -q held held; do sleep 0.05; done
"""
AGREEMENT = [
    Case(
        "one byte of the data",
        ranks(),
        B,
        r"data.train\[0\] train.jsonl has another content",
        "copy the data",
        2,
        change=edit("nodeb", "train.jsonl", "w7", "w8"),
    ),
    Case(
        "a row more in the data",
        ranks(),
        B,
        r"train.jsonl has \d+ bytes, elsewhere \d+",
        "copy the data",
        2,
        change=append("nodeb/train.jsonl", '{"text": "w1"}\n'),
    ),
    Case(
        "a data file missing",
        ranks(),
        B,
        "train.jsonl cannot be read",
        "copy the data",
        2,
        change=remove("nodeb/train.jsonl"),
    ),
    Case(
        "the recipe differs",
        ranks(),
        B,
        r"learning_rate: 0.02, elsewhere 0.01",
        "copy the recipe",
        2,
        change=edit("nodeb", "r.yaml", "learning_rate: 0.01", "learning_rate: 0.02"),
    ),
    Case(
        "an override on one node",
        ranks(more={1: ("training.seed=7",)}),
        B,
        "training.seed: 7, elsewhere 0",
        "same overrides",
        2,
    ),
    Case(
        "the tokenizer differs",
        ranks(),
        B,
        "tokenizer.json has another content",
        "copy the model",
        2,
        change=edit("nodeb", "tokenizer/tokenizer.json", "w11", "v11"),
    ),
    Case(
        "the model's config differs",
        ranks(),
        B,
        "config.json has",
        "copy the model",
        2,
        change=with_model(edit("nodeb", "model/config.json", "llama", "gpt2")),
    ),
    Case(
        "the model's weights are missing",
        ranks(),
        B,
        "model.safetensors is not there",
        "copy the model",
        2,
        change=with_model(remove("nodeb/model/model.safetensors")),
    ),
    Case(
        "tunesmith's code differs",
        ranks(env=OTHER),
        B,
        "another code of tunesmith than elsewhere: tunesmith/step.py",
        "install the same",
        change=other_code,
    ),
    Case(
        "transformers is older",
        ranks(env=OTHER),
        B,
        "transformers is 5.17.0, elsewhere",
        "pip install transformers==",
        change=other_version("nodeb", "transformers", "5.17.0"),
    ),
    Case(
        "torch is older",
        ranks(env=OTHER),
        B,
        "torch is 2.11.0, elsewhere",
        "pip install torch==",
        change=other_version("nodeb", "torch", "2.11.0"),
    ),
    Case(
        "another patch of numpy (a warning)",
        ranks(env=OTHER),
        B,
        "numpy is 2.0.1, elsewhere",
        "pip install numpy==",
        0,
        change=other_version("nodeb", "numpy", "2.0.1"),
    ),
    Case(
        "another Python",
        ranks(patch={1: with_version("python", "3.10.4")}),
        B,
        "python is 3.10.4, elsewhere 3",
        "same image",
    ),
    Case(
        "another NCCL",
        ranks(patch={0: with_version("NCCL", "2.27.3"), 1: with_version("NCCL", "2.21.5")}),
        B,
        "NCCL is 2.21.5, elsewhere 2.27.3",
        "same image",
    ),
    Case(
        "a variable of NCCL on one node",
        ranks(env=at(1, NCCL_ALGO="Ring")),
        B,
        "NCCL_ALGO is Ring, elsewhere not set",
        "unset NCCL_ALGO",
    ),
]

FITNESS = [
    Case(
        "a GPU that is not seen",
        ranks(3, patch={0: cuda(), 2: cuda()}),
        B,
        "computes on cpu, elsewhere on cuda",
        "CUDA_VISIBLE_DEVICES",
    ),
    Case(
        "a smaller GPU (a warning)",
        ranks(patch={0: cuda(80), 1: cuda(40)}),
        B,
        "has 40.0 GiB, another 80.0",
        "nodes of one kind",
        0,
    ),
    Case(
        "fewer GPUs than ranks",
        ranks(patch={0: cuda(), 1: cuda(count=0)}),
        B,
        "1 ranks, but 0 cuda devices",
        "CUDA_VISIBLE_DEVICES",
    ),
    Case(
        "a clock 5 minutes ahead",
        ranks(patch={1: "import time\nProbe.clock = lambda s: time.time() + 300"}),
        B,
        "its clock is 300.0 s ahead",
        "chrony",
    ),
    Case(
        "a clock 5 s behind (a warning)",
        ranks(patch={1: "import time\nProbe.clock = lambda s: time.time() - 5"}),
        B,
        "its clock is 5.0 s behind",
        "chrony",
        0,
    ),
    Case("few open files", ranks(shell={1: "ulimit -n 200"}), B, "may open 200 files", "ulimit -n"),
    Case(
        "few processes",
        ranks(shell={1: "prlimit --nproc=40 --pid $$"}),
        B,
        "may have 40 processes",
        "ulimit -u",
    ),
    Case(
        "InfiniBand without locked memory",
        ranks(shell={1: "ulimit -l 64"}, patch={1: "Probe.has_infiniband = lambda s: True"}),
        B,
        "InfiniBand",
        "ulimit -l",
    ),
    Case(
        "/dev/shm full",
        ranks(shell={1: "mount -t tmpfs -o size=20m shm /dev/shm\nhead -c 12m /dev/zero > /dev/shm/x"}),
        B,
        "/dev/shm has .* free",
        "--shm-size",
    ),
    Case(
        "a full temporary folder",
        ranks(shell={1: "mkdir small\nmount -t tmpfs -o size=8m tmpfs small\nexport TMPDIR=$PWD/small"}),
        B,
        "the temporary folder .* has .* free",
        "free space",
    ),
]

FOLDER = [
    Case(
        "an output folder of its own",
        ranks(shell={1: "mount -t tmpfs tmpfs $FOLDER/out"}),
        B,
        "is not the folder that rank 0 sees",
        "mount the same file system",
    ),
    Case(
        "an output folder elsewhere",
        ranks(more=dict.fromkeys((0, 1), ("output_dir=out",))),
        B,
        "/nodeb/out is not the folder that rank 0 sees",
        "mount the same file system",
    ),
    Case(
        "a read-only output folder",
        ranks(shell={1: "mount --bind $FOLDER/out $FOLDER/out\nmount -o remount,ro,bind $FOLDER/out"}),
        B,
        "cannot be written: Read-only",
        "set output_dir",
    ),
    Case(
        "a full output folder",
        ranks(
            shell={
                0: "mount -t tmpfs -o size=1m tmpfs $FOLDER/out\nhead -c 2m /dev/zero > $FOLDER/out/x || true"
            }
        ),
        A,
        "cannot be written: No space left",
        "free space",
    ),
    Case(
        "no room for the checkpoints",
        (Start(0, 0, shell="mount -t tmpfs -o size=9m tmpfs $FOLDER/out"),),
        A,
        "the checkpoints need at least",
        "save_total_limit",
        change=add_model,
    ),
]

NETWORK = [
    Case(
        "loopback is chosen",
        ranks(env=at(1, GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")),
        B,
        "loopback",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    Case(
        "the host's own name is 127.0.1.1",
        ranks(
            env=at(1, GLOO_SOCKET_IFNAME="", NCCL_SOCKET_IFNAME=""),
            shell={
                1: "sed 's/^10.77.0.2 .*/127.0.1.1 nodeb/' /etc/hosts > hosts\nmount --bind hosts /etc/hosts"
            },
        ),
        B,
        "127.0.1.1 .* loopback",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    Case(
        "an interface that is not there",
        ranks(env=at(1, GLOO_SOCKET_IFNAME="ib0")),
        B,
        "GLOO_SOCKET_IFNAME=ib0: it has no such interface, but eth0",
        "set GLOO_SOCKET_IFNAME",
    ),
    Case("another MTU", ranks(3), B, "MTU of eth0 is 1400, elsewhere 1500", "mtu 1500", nodes=mtu(1)),
    Case(
        "a link slowed ten times",
        ranks(3),
        B,
        "→ node.*bit/s; the median of all links",
        "ethtool",
        nodes=slowed(1, 400),
    ),
    Case(
        "a link slowed, of two nodes",
        ranks(2),
        B,
        r"→ nodea .*bit/s; the way back has",
        "ethtool",
        nodes=slowed(1, 400),
    ),
    Case(
        "two nodes that do not reach each other",
        ranks(3),
        B,
        r"→ nodec \(machine 2\): 10.77.0.3 is not reached",
        "firewall",
        nodes=blackhole(1, 2),
    ),
    Case(
        "a sum that is wrong",
        ranks(
            3,
            patch={
                1: (
                    "import tunesmith.preflight.collectives as c\nk = c.known_values\n"
                    "c.known_values = lambda r, d, v: k(r, d, v) + (r == 1)"
                )
            },
        ),
        B,
        "rank 1 sends other values .* wrong sums",
        "leave the node out",
    ),
    Case(
        "the name of rank 0 has no address",
        ranks(env=at(1, MASTER_ADDR="nodex")),
        B,
        "the name has no address",
        "/etc/hosts",
    ),
    Case(
        "rank 0 is not there",
        (Start(1, 1),),
        B,
        r"rank 0 is not reached at nodea:\d+",
        "firewall",
    ),
]

RANKS = [
    Case(
        "a rank twice",
        (Start(0, 0), Start(1, 1), Start(2, 1)),
        "node. .machine 1.",
        "rank 1 is claimed here and",
        "--machine-rank",
    ),
    Case(
        "another world size",
        ranks(env=at(1, WORLD_SIZE="4")),
        B,
        "was started for 4 processes, rank 0 for 2",
        "--num-processes",
    ),
    Case(
        "a rank that does not come",
        ranks(2, env={0: {"WORLD_SIZE": "3"}, 1: {"WORLD_SIZE": "3"}}),
        "machine 2",
        "rank 2 did not come",
        "launcher",
    ),
    Case(
        "a rank that hangs at start",
        ranks(patch={1: "import time\nProbe.limits = lambda s: time.sleep(40)"}),
        B,
        "has said nothing more",
        "process",
    ),
    Case(
        "another service at rank 0's port",
        (Start(1, 1, env={"MASTER_ADDR": "nodeb", "WORLD_SIZE": "2"}, shell=HOLD),),
        B,
        "is not the store of a run",
        "--main-process-port",
    ),
    Case(
        "rank 0's port is taken",
        ranks(shell={0: HOLD}),
        A,
        r"port \d+ is taken by process \d+",
        "--main-process-port",
    ),
]

MACHINES = [
    Case(
        "the same machine rank twice",
        machines(3, machine_rank={2: ("1",)}),
        "node. .machine 1.",
        "machine rank 1 is claimed here and on node",
        "--machine-rank",
    ),
    Case(
        "two machines of rank 0",
        machines(machine_rank={1: ("0",)}),
        "nodeb",
        "machine rank 0 is claimed here",
        "--machine-rank",
    ),
    Case(
        "no machine of rank 0",
        machines(machine_rank={0: ("1",)}),
        "node. .machine 1.",
        "machine 0 does not answer",
        "--machine-rank 0",
    ),
    Case("a machine that does not come", machines(3)[:2], "machine 2", "did not come", "--machine-rank 2"),
    Case(
        "another number of machines",
        machines(num_machines={1: ("3",)}, num_processes={1: ("3",)}),
        B,
        "--num-machines is 3, on machine 0 2",
        "alike",
    ),
    Case(
        "another number of processes",
        machines(num_processes={1: ("4",)}),
        B,
        "--num-processes is 4, on machine 0 2",
        "alike",
    ),
    Case(
        "the port is taken",
        (Start(0, 0, cli=machines()[0].cli, shell=HOLD), machines()[1]),
        A,
        r"port \d+ is taken by process \d+",
        "--main-process-port",
    ),
    Case(
        "the address of another machine",
        machines(main_process_ip={0: ("nodeb",), 1: ("nodeb",)}),
        A,
        "machine 0 does not answer at nodeb",
        "exchange the machine ranks",
    ),
    Case(
        "127.0.0.1 as the address",
        machines(main_process_ip={0: ("127.0.0.1",), 1: ("127.0.0.1",)}),
        B,
        "machine 0 does not answer at 127.0.0.1",
        "loopback",
    ),
    Case(
        "an address that has no machine",
        machines(main_process_ip={1: ("nodex",)}),
        B,
        "the name has no address",
        "/etc/hosts",
    ),
    Case(
        "a byte of the data, by the launcher",
        machines(),
        B,
        "train.jsonl has another content",
        "copy the data",
        2,
        change=edit("nodeb", "train.jsonl", "w7", "w8"),
    ),
]

CASES = [*AGREEMENT, *FITNESS, *FOLDER, *NETWORK, *RANKS, *MACHINES]
CLEAN = [
    Case("two ranks", ranks(2), code=0),
    Case("three ranks", ranks(3), code=0),
    Case("two machines, by the launcher", machines(2), code=0),
]
