"""AdamW on DTensors, as FSDP2 shards parameters: each rank's update has the bits of its part of the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamw_cases import KINDS, Kind, gradients, parameters, run, same, values
from tunesmith_kernels.adamw import AdamW

# One process plays rank RANK of 2: torch's fake process group answers its collectives.
_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from adamw_cases import KINDS, values, gradients, run
from torch import nn
from torch.distributed import init_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from tunesmith_kernels.adamw import AdamW
rank, out = int(sys.argv[2]), sys.argv[3]
init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
mesh = DeviceMesh("cpu", [0, 1])

def placed(tensor, placement):
    # no communication: the local part is cut out by hand
    local = tensor
    if isinstance(placement, Shard):
        chunks = tensor.chunk(2, placement.dim)
        local = chunks[rank].contiguous() if rank < len(chunks) else tensor[:0]
    return DTensor.from_local(
        local.clone(), mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride())

results = {}
for name, kind in KINDS.items():
    whole = [value.view(13, -1) for value in values(kind.dtype, [13 * 11, 13 * 7])]
    places = [Shard(0), Replicate()]
    params = [nn.Parameter(placed(value, place)) for value, place in zip(whole, places)]
    optimizer = AdamW(params, precision=kind.precision, state_dtype=kind.state_dtype)
    for of_step in gradients(3, kind.dtype, [13 * 11, 13 * 7]):
        for param, grad, place in zip(params, of_step, places):
            param.grad = placed(grad.view(13, -1), place)
        optimizer.step()
    assert all(isinstance(v, DTensor) for k, v in optimizer.state[params[0]].items() if k != "step")
    twin = AdamW(params, precision=kind.precision, state_dtype=kind.state_dtype)
    twin.load_state_dict(optimizer.state_dict())
    for param in params:
        assert all(v is twin.state[param][k] for k, v in optimizer.state[param].items())
    results[name] = [param.to_local().detach() for param in params]

refusals = []
columns = nn.Parameter(placed(torch.zeros(4, 6, dtype=torch.bfloat16), Shard(1)))
columns.grad = placed(torch.ones(4, 6, dtype=torch.bfloat16), Shard(1))
for options in ({"precision": "stochastic"}, {"precision": "master", "max_norm": 1.0}):
    try:
        AdamW([columns], **options).step()
    except ValueError as error:
        refusals.append(str(error))
AdamW([columns], precision="master").step()
keyed = AdamW([columns], precision="stochastic")
keyed.set_keys({columns: (0, 0)})
keyed.step()
torch.save([results, refusals], out)
"""


def whole_run(kind: Kind) -> list[torch.Tensor]:
    params = parameters([value.view(13, -1) for value in values(kind.dtype, [13 * 11, 13 * 7])])
    optimizer = AdamW(params, precision=kind.precision, state_dtype=kind.state_dtype)
    run(
        optimizer,
        params,
        [[grad.view(13, -1) for grad in of] for of in gradients(3, kind.dtype, [13 * 11, 13 * 7])],
    )
    return [param.detach() for param in params]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_is_updated_as_a_part_of_the_whole(rank: int, tmp_path: Path) -> None:
    out = tmp_path / "results.pt"
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, folder, str(rank), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results, refusals = torch.load(out)
    for name, kind in KINDS.items():
        sharded, replicated = whole_run(kind)
        assert same(results[name], [sharded.chunk(2)[rank], replicated]), name
    assert "Shard(dim=1)" in refusals[0]
    assert "set_keys" in refusals[0]
    assert "max_norm" in refusals[1]
    assert "DTensor" in refusals[1]
