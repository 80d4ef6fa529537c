"""torch's fully_shard (FSDP2), on CUDA and on the CPU alike: parameters, gradients and optimizer state are sharded,
whole layers exist only while they are computed."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from tunesmith import optim, update
from tunesmith.batch import Batch
from tunesmith.checkpoint.pieces import Saved, State
from tunesmith.engine import dtensor_state
from tunesmith.engine.adopt import deal_weights, take_weights
from tunesmith.engine.base import Fill, Rehearsal
from tunesmith.engine.layers import transformer_layers
from tunesmith.engine.mesh import shard_mesh
from tunesmith.engine.ranks import RankedEngine
from tunesmith.engine.sequence_parallel import SequenceParallel, share_sequences
from tunesmith.engine.shards import Shard
from tunesmith.engine.tensor_parallel import split_layers
from tunesmith.gradients import local_square_sum
from tunesmith.module import Loss, TrainModule
from tunesmith.optim import Spec
from tunesmith.recipe.parallel import FSDP2
from tunesmith_kernels.adamw import AdamW
from tunesmith_kernels.adamw.local import shard_offset

_REDUCED_IN = torch.float32
_COMPUTED_IN = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class FSDP2Engine(RankedEngine):
    """The optimizer works on the ranks' own slices as plain tensors: what it does elementwise is what it would do to
    the whole, and it needs to know of no sharding."""

    name = "fsdp2"
    builds_empty = True
    sharded = True
    shards_optimizer = True

    def __init__(self, device_type: str, settings: FSDP2) -> None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(device_type, local_rank) if device_type != "cpu" else torch.device("cpu")
        backend = "gloo"
        if device_type != "cpu":
            torch.accelerator.set_device_index(local_rank)
            # objects and offloaded tensors travel on the CPU
            backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout))
        self._take_places(device)
        self.settings = settings
        self._unused: tuple[str, ...] = ()
        self._trained: Collection[str] | None = None  # of those that are ever trained; None: all
        self._places: dict[str, Shard] = {}  # by name, without gradients
        self._split = 0  # parameters that tensor parallelism cuts
        self.mesh, self.tensor_mesh = shard_mesh(device_type, self.world_size, settings)
        tensor_size, sequence_size = settings.tensor_parallel_size, settings.sequence_parallel_size
        self._tensor_rank = self.rank % tensor_size
        self.draw_rank, self.mean_size = self.rank // tensor_size, self.world_size // tensor_size
        self.data_rank, self.data_size = self.draw_rank // sequence_size, self.mean_size // sequence_size
        self._sequence: SequenceParallel | None = None

    def prepare(
        self,
        module: TrainModule,
        fill: Fill,
        spec: Spec,
    ) -> None:
        self.train_module = module
        self.module = cast(nn.Module, module)
        if self.settings.sequence_parallel_size > 1:
            self._sequence = share_sequences(module, self.world_size, self.settings.sequence_parallel_size)
        self._dtype = spec.parameter_dtype
        whole = not any(p.is_meta for p in module.parameters())
        taken = take_weights(module) if whole else {}
        self._shard(module)
        device = torch.device("cpu") if self.settings.offload else self.device
        if whole:
            deal_weights(module, taken, device, self.device)
        else:
            fill(device)
        # tells fully_shard of the weights that stand there now: it pads uneven slices, in memory of its own
        module.to(device)
        for part in module.modules():  # buffers are computed with, wherever the shards are
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, buffer.to(self.device))
        self._bound_collectives(self.settings.timeout)
        self._agreed(self._fault)
        # views of the shards' memory: where the optimizer writes is what the next gather reads
        self._locals = {
            name: nn.Parameter(cast(DTensor, p).to_local().detach())
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        groups = optim.parameter_groups(module, spec)
        for group in groups:
            group["params"] = [self._locals[name] for name in group["names"]]
        self.optimizer = optim.build(spec, groups)
        if isinstance(self.optimizer, AdamW) and self._dtype != torch.float32:
            names = [name for group in groups for name in group["names"]]
            shards = self._sharded_parameters()
            self.optimizer.set_keys(
                {self._locals[name]: (i, shard_offset(shards[name])) for i, name in enumerate(names)}
            )
        self._names = {id(local): name for name, local in self._locals.items()}

    def part(self, batch: Batch) -> Batch:
        return batch if self._sequence is None else self._sequence.part(batch)

    def _shard(self, module: TrainModule) -> None:
        dtype = _COMPUTED_IN[module.precision]
        if self.tensor_mesh is not None:
            self._split = split_layers(module.model, self.tensor_mesh)
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
            if self.settings.offload
            else OffloadPolicy()
        )
        for layer in transformer_layers(module.model):
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=_REDUCED_IN if dtype else None)
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        # the root takes what is left: embeddings, norm and head, which so are whole wherever the terms of the loss
        # meet them. Its inputs are counts and normalizers, which must not be rounded to bf16.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=_REDUCED_IN if dtype else None, cast_forward_inputs=False
        )
        fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        if self.world_size > 1:
            cast(Any, module.model)._is_fsdp_managed_module = True  # generate() then keeps the ranks in step

    def _fault(self) -> str | None:
        """What is not as it was asked for."""
        if not isinstance(self.module, FSDPModule):
            return "the module was not sharded"
        shards = self._shards()
        for name, parameter in self.module.named_parameters():
            if not isinstance(parameter, DTensor):
                return f"{name} is not sharded"
            local = parameter.to_local()
            if local.is_meta:
                return f"{name} has no weights"
            if parameter.is_floating_point() and parameter.dtype != self._dtype:
                return f"{name} is {parameter.dtype}, not {self._dtype}"
            cut = parameter.shape[0] if parameter.dim() else 1
            if local.numel() > -(-cut // shards) * max(1, parameter.numel() // max(1, cut)):
                return f"{name} has {local.numel()} of {parameter.numel()} elements on one of {shards} ranks"
        return None

    def _shards(self) -> int:
        return self.mesh.size(self.mesh.ndim - 1)

    def forward(self, batch: Batch, mode: str, normalizers: Tensor | None = None, **options: Any) -> Any:
        with self._whole_sequences() if mode == "generate" else nullcontext():
            found = self.module(batch.to(self.device), mode, normalizers, **options)
        if not torch.is_grad_enabled():
            # without a backward the root stays whole, and would not see weights that change before the next forward
            cast(FSDPModule, self.module).reshard()
        return found

    @contextmanager
    def _whole_sequences(self) -> Generator[None]:
        if self._sequence is None:
            yield
            return
        self._sequence.exchange(self.train_module.model, on=False)
        try:
            yield
        finally:
            self._sequence.exchange(self.train_module.model, on=True)

    def _gradients(self) -> list[tuple[str, DTensor, Tensor]]:
        """(name, parameter, this rank's slice of its gradient)"""
        return [
            (name, cast(DTensor, p), cast(DTensor, p.grad).to_local())
            for name, p in self.train_module.named_parameters()
            if p.grad is not None
        ]

    def gradient_square_sum(self) -> Tensor:
        by_copies: dict[int, list[Tensor]] = {}
        for _, parameter, gradient in self._gradients():
            by_copies.setdefault(dtensor_state.copies(parameter, self.world_size), []).append(gradient)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for copies, gradients in by_copies.items():
            total += local_square_sum(gradients).to(self.device) / copies
        dist.all_reduce(total)
        return total

    def _fill_unused(self) -> None:
        """The gradient of zeros that other engines have where the loss uses no part of a parameter."""
        parameters = self._sharded_parameters()
        for name in self._unused:
            if parameters[name].grad is None and (self._trained is None or name in self._trained):
                parameters[name].grad = torch.zeros_like(parameters[name])

    def shards(self) -> list[Shard]:
        if self._gradients():
            self._fill_unused()
        if not self._places:  # they cost more than all the rest
            self._places = {
                name: dtensor_state.shard(name, parameter, self.world_size, self._tensor_rank)
                for name, parameter in self._sharded_parameters().items()
            }
        masters = self._masters()
        gradients = {name: gradient for name, _, gradient in self._gradients()}
        return [
            replace(
                self._places[name], value=masters.get(local, local.detach()), gradient=gradients.get(name)
            )
            for name, local in self._parameters()
            if local.numel() > 0
        ]

    def step(self, coefficient: Tensor, skip: Tensor) -> None:
        device = torch.device("cpu") if self.settings.offload else self.device
        self._fill_unused()
        for name, _, gradient in self._gradients():
            self._locals[name].grad = gradient
        update.step(self.optimizer, coefficient.to(device), skip.to(device))
        self.optimizer.zero_grad(set_to_none=True)
        self.train_module.zero_grad(set_to_none=True)

    def rehearse(self, batch: Batch, normalizers: Tensor) -> Rehearsal:
        loss: Loss = self.forward(self.part(batch), "loss", normalizers)
        loss.total.backward()
        present = {name for name, _, _ in self._gradients()}
        finite = bool(torch.isfinite(self.gradient_square_sum()))
        self.train_module.zero_grad(set_to_none=True)
        return Rehearsal(loss.total.detach(), sorted(set(self._locals) - present), finite, reduced=True)

    def leave_unused(self, names: Sequence[str]) -> None:
        self._unused = tuple(names)

    def train_only(self, names: Collection[str]) -> None:
        # torch gives what a layer gathers the flags of its shards
        for name, parameter in self._sharded_parameters().items():
            parameter.requires_grad_(name in names)
        self._trained = frozenset(names)

    def weights(self) -> State:
        return dtensor_state.pieces(self.train_module.model, self.rank, self._tensor_rank, self._kept)

    def load_weights(self, saved: Saved) -> None:
        dtensor_state.load(self.train_module.model, saved, self._kept)
        self._copy_masters()

    def whole_weights(self) -> dict[str, Tensor]:
        return dtensor_state.gather(self.train_module.model, self.device, self.rank, self._kept)

    def _sharded_parameters(self) -> dict[str, DTensor]:
        return {
            name: cast(DTensor, p) for name, p in self.train_module.named_parameters() if name in self._locals
        }

    def optimizer_state(self) -> dict[str, State]:
        states = {name: self.optimizer.state.get(local) or {} for name, local in self._locals.items()}
        return dtensor_state.optimizer_pieces(self._sharded_parameters(), states, self._tensor_rank)

    def load_optimizer_state(self, saved: Saved) -> None:
        state = dtensor_state.read_optimizer(self._sharded_parameters(), saved)
        names = [name for name, _ in self._parameters()]
        indexed = {i: state[name] for i, name in enumerate(names) if name in state}
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": indexed, "param_groups": own["param_groups"]})

    def facts(self) -> dict[str, Any]:
        sharded = self._shards()
        return super().facts() | {
            "shard_size": sharded,
            "replicas": self.data_size // sharded,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            "sequence_parallel_size": self.settings.sequence_parallel_size,
            "tensor_parallel_parameters": self._split,
            "offload": self.settings.offload,
            "layers_sharded": len(transformer_layers(self.train_module.model)),
        }

    def close(self) -> None:
        vars(self).pop("module", None)
        vars(self).pop("train_module", None)
        if dist.is_initialized():
            dist.destroy_process_group()
