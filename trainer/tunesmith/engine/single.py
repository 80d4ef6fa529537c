"""One process, and what every engine on plain torch gradients shares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith import optim
from tunesmith.batch import Batch
from tunesmith.gradients import local_square_sum
from tunesmith.module import TrainModule


class SingleEngine:
    """The engine protocol on one process, without communication."""

    name = "single"

    def __init__(self, device: torch.device) -> None:
        self.rank = 0
        self.local_rank = 0
        self.world_size = 1
        self.device = torch.device("cpu") if device.type == "cpu" else device  # never "cpu:0"
        self.module: nn.Module
        self.train_module: TrainModule
        self.optimizer: torch.optim.Optimizer

    def prepare(
        self, module: TrainModule, build_optimizer: Callable[[TrainModule], torch.optim.Optimizer]
    ) -> None:
        self.train_module = module.to(self.device)
        self.module = self._wrap(self.train_module)
        self.optimizer = build_optimizer(self.train_module)
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

    def gradient_square_sum(self) -> Tensor:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        return local_square_sum(gradients)

    def step(self, coefficient: Tensor, skip: Tensor) -> None:
        optim.step(self.optimizer, coefficient, skip)
        self.optimizer.zero_grad(set_to_none=True)

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

    def optimizer_state(self) -> dict[str, Any]:
        return {
            name: dict(self.optimizer.state[p]) for name, p in self._parameters() if p in self.optimizer.state
        }

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        # through load_state_dict, which puts each tensor on its parameter's device and keeps 8-bit states as they are
        names = [name for name, _ in self._parameters()]
        own = self.optimizer.state_dict()
        indexed = {i: state[name] for i, name in enumerate(names) if name in state}
        assert set(state) <= set(names), "the optimizer state is of another model"
        self.optimizer.load_state_dict({"state": indexed, "param_groups": own["param_groups"]})

    def facts(self) -> dict[str, Any]:
        return {"engine": self.name, "world_size": self.world_size, "device": str(self.device)}

    def close(self) -> None:
        pass
