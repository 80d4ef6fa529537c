"""Quantised bases on two ranks: copies of it (DDP), and shards of it (FSDP2), give the gradients of one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.unit.test_quantization import INT8, NF4, identify, load, save_tiny
from tunesmith import quantization
from tunesmith.recipe.quantization import Quantization

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def build(folder: Path, settings: Quantization) -> Any:
    base = load(folder, AutoModelForCausalLM, settings)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(base, config).train()


def rows() -> torch.Tensor:
    return torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(1))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = whole
    return found


def rank_main(rank: int, folder: Path, settings: Quantization) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = rows()[2 * rank : 2 * rank + 2]
    copied = build(folder, settings)
    bits = [None, None]
    dist.all_gather_object(bits, quantization.fingerprint(copied))
    copies: Any = DistributedDataParallel(copied)
    sharded = build(folder, settings)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found: dict[str, Any] = {"bits": bits}
    for name, model in (("ddp", copies), ("fsdp2", sharded)):
        model(input_ids=own, labels=own).loss.backward()
        found[name] = gradients(model)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [NF4, INT8], ids=identify)
def test_two_ranks_have_the_gradients_of_one(tmp_path: Path, settings: Quantization) -> None:
    save_tiny(tmp_path, "llama")
    model = build(tmp_path, settings)
    model(input_ids=rows(), labels=rows()).loss.backward()
    expected = gradients(model)
    mp.spawn(rank_main, args=(tmp_path, settings), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    assert found["bits"] == [quantization.fingerprint(model)] * 2
    for engine in ("ddp", "fsdp2"):
        assert found[engine].keys() == expected.keys()
        for name, value in expected.items():
            assert "lora_" in name
            assert (found[engine][name] - value).norm() <= 1e-5 * value.norm(), (engine, name)
