"""One process, and what every engine on plain torch gradients shares."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith import optim, update
from tunesmith.batch import Batch
from tunesmith.checkpoint.pieces import Saved, State
from tunesmith.engine.base import Fill, Rehearsal
from tunesmith.engine.shards import Shard
from tunesmith.gradients import local_square_sum
from tunesmith.module import Loss, TrainModule
from tunesmith.optim import Spec


class SingleEngine:
    """The engine protocol on one process, without communication."""

    name = "single"
    builds_empty = False
    sharded = False
    shards_optimizer = False
    rebuilt: frozenset[str] = frozenset()

    def __init__(self, device: torch.device) -> None:
        self.rank = 0
        self.local_rank = 0
        self.world_size = 1
        self.data_rank = 0
        self.data_size = 1
        self.mean_size = 1
        self.draw_rank = 0
        self.device = torch.device("cpu") if device.type == "cpu" else device  # never "cpu:0"
        self.module: nn.Module
        self.train_module: TrainModule
        self.optimizer: torch.optim.Optimizer

    def prepare(
        self,
        module: TrainModule,
        fill: Fill,
        spec: Spec,
    ) -> None:
        self.train_module = module.to(self.device)
        self.module = self._wrap(self.train_module)
        self.optimizer = optim.build(spec, optim.parameter_groups(self.train_module, spec))
        self._names = {id(p): name for name, p in self.train_module.named_parameters()}

    def _wrap(self, module: TrainModule) -> nn.Module:
        return module

    def forward(self, batch: Batch, mode: str, normalizers: Tensor | None = None, **options: Any) -> Any:
        # without gradients there is nothing to reduce: the module itself runs, also where ranks' batches differ
        called = self.module if mode == "loss" and torch.is_grad_enabled() else self.train_module
        return called(batch.to(self.device), mode, normalizers, **options)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def part(self, batch: Batch) -> Batch:
        return batch

    def rehearse(self, batch: Batch, normalizers: Tensor) -> Rehearsal:
        # on the module itself: DDP would wait for the gradients of the parameters that are not used
        loss: Loss = self.train_module(batch.to(self.device), "loss", normalizers)
        loss.total.backward()
        trained = [(name, p) for name, p in self.train_module.named_parameters() if p.requires_grad]
        unused = [name for name, p in trained if p.grad is None]
        gradients = [p.grad for _, p in trained if p.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        self.train_module.zero_grad(set_to_none=True)
        return Rehearsal(loss.total.detach(), unused, finite, reduced=False)

    def leave_unused(self, names: Sequence[str]) -> None:
        # DDP waits for the gradient of every parameter: the module gives these a zero one
        self.train_module.untouched = tuple(names)

    def train_only(self, names: Collection[str]) -> None:
        for name, parameter in self._parameters():
            parameter.requires_grad_(name in names)

    def gradient_square_sum(self) -> Tensor:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        return local_square_sum(gradients)

    def step(self, coefficient: Tensor, skip: Tensor) -> None:
        update.step(self.optimizer, coefficient, skip)
        self.optimizer.zero_grad(set_to_none=True)

    def shards(self) -> list[Shard]:
        masters = self._masters()
        return [
            Shard(
                name,
                masters.get(parameter, parameter.detach()),
                parameter.grad,
                tuple(parameter.shape),
                0,
                copies=self.world_size,
                writes=self.rank == 0,
            )
            for name, parameter in self._parameters()
        ]

    def _masters(self) -> dict[Tensor, Tensor]:
        """Parameter → the fp32 copy that the optimizer updates in its place."""
        states = self.optimizer.state.items()
        return {parameter: state["master"] for parameter, state in states if "master" in state}

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in self._masters().items():
            master.copy_(parameter)

    @torch.no_grad()
    def wrote(self) -> None:
        for parameter, master in self._masters().items():
            parameter.copy_(master)

    def discard(self) -> None:
        self.train_module.zero_grad(set_to_none=True)

    def sum(self, values: Tensor) -> Tensor:
        return values.to(self.device)

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        return obj

    def barrier(self) -> None:
        pass

    def wait_for_all(self, name: str) -> None:
        pass

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(self._names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]

    def _kept(self, name: str) -> bool:
        """Whether checkpoints hold this entry of the model's state. What a quantised weight needs lies below its
        name."""
        parts = name.split(".")
        return not any(".".join(parts[:end]) in self.rebuilt for end in range(1, len(parts) + 1))

    def weights(self) -> State:
        return {
            name: value for name, value in self.train_module.model.state_dict().items() if self._kept(name)
        }

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        state = {name: saved.whole(name) for name in saved.names()}
        found = self.train_module.model.load_state_dict(state, strict=not self.rebuilt)
        missing = [name for name in found.missing_keys if self._kept(name)]
        assert not missing, f"the checkpoint lacks {missing[:3]}"
        assert not found.unexpected_keys, f"the checkpoint is of another model: {found.unexpected_keys[:3]}"
        self._copy_masters()

    def whole_weights(self) -> dict[str, Tensor]:
        return self.weights() if self.rank == 0 else {}

    def optimizer_state(self) -> dict[str, State]:
        return {
            name: dict(self.optimizer.state[p]) for name, p in self._parameters() if p in self.optimizer.state
        }

    def load_optimizer_state(self, saved: Saved) -> None:
        # through load_state_dict, which puts each tensor on its parameter's device and keeps 8-bit states as they are
        names = [name for name, _ in self._parameters()]
        assert saved.names() <= set(names), "the optimizer state is of another model"
        state = saved.nested(lambda name, key: saved.value(name, key))
        indexed = {i: state[name] for i, name in enumerate(names) if name in state}
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": indexed, "param_groups": own["param_groups"]})

    def facts(self) -> dict[str, Any]:
        return {"engine": self.name, "world_size": self.world_size, "device": str(self.device)}

    def close(self) -> None:
        pass
