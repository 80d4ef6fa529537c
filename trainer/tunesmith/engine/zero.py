"""DeepSpeed's ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020), launched and prepared through accelerate; forward,
backward and step are DeepSpeed's own.

Parameters stay fp32 and `training.precision` is autocast, as on the other engines: gradients are reduced and
accumulated in fp32. The norm is ours (`gradients`), taken from the reduced slices before the step; clipping and the
suppression of a step reach DeepSpeed's slices through our optimizer, so DeepSpeed's own clipping stays off."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith import optim, update
from tunesmith.batch import Batch
from tunesmith.checkpoint.pieces import Piece, Saved, State
from tunesmith.engine import zero_state
from tunesmith.engine.base import Fill, Rehearsal
from tunesmith.engine.ranks import RankedEngine
from tunesmith.engine.reached import reached
from tunesmith.engine.shards import Shard
from tunesmith.engine.zero_config import config, quiet
from tunesmith.engine.zero_held import HeldBack
from tunesmith.engine.zero_slices import Slice, clear, gathered_again, gradients, slices
from tunesmith.errors import MissingExtra
from tunesmith.gradients import local_square_sum
from tunesmith.module import Loss, TrainModule
from tunesmith.optim import Spec
from tunesmith.recipe.parallel import Zero1, Zero2, Zero3
from tunesmith.shapes import whole_shape


class ZeroEngine(RankedEngine):
    """`stage` 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too."""

    def __init__(self, device_type: str, settings: Zero1 | Zero2 | Zero3) -> None:
        if device_type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
            # with it accelerate trains without DeepSpeed, and says nothing
            os.environ.pop("ACCELERATE_USE_CPU", None)
        quiet()
        try:
            import deepspeed.ops
        except ImportError:
            raise MissingExtra("deepspeed", "deepspeed", f"parallel.strategy: {settings.strategy}") from None
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

        quiet()  # its import has set its logger's level
        if device_type == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce, of which training has no use, before it starts
            cast(Any, deepspeed.ops).__compatible_ops__ = {}
        self.name = settings.strategy
        self.settings = settings
        self.stage = int(settings.strategy[-1])
        self.sharded, self.shards_optimizer = self.stage == 3, True
        # without an explicit backend accelerate takes every rank for a world of its own, and all train the same rows
        backend = "gloo" if device_type == "cpu" else None
        handler = InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=settings.timeout))
        world_size = int(os.environ["WORLD_SIZE"])
        plugin = DeepSpeedPlugin(hf_ds_config=config(self.stage, settings, world_size))
        with redirect_stdout(StringIO()):  # it prints what it has built
            self.accelerator: Any = Accelerator(
                mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=[handler]
            )
        self._take_places(torch.device("cpu") if device_type == "cpu" else self.accelerator.device)

    def prepare(self, module: TrainModule, fill: Fill, spec: Spec) -> None:
        self.train_module = module
        groups = optim.parameter_groups(module, spec)
        self.optimizer = optim.build(spec, groups)
        self._held_back = HeldBack(self.optimizer)
        self._named = dict(module.named_parameters())
        self._last = self._reduced = (
            False  # whether the micro-step is its window's last, and its gradient there
        )
        self._unused: list[nn.Parameter] = []
        self._trained = {name: self._named[name] for group in groups for name in group["names"]}
        self._engine: Any = self.accelerator.prepare(module, self.optimizer)[0]
        self.module = cast(nn.Module, self._engine)
        self._zero: Any = getattr(self._engine, "optimizer", None)
        self._bound_collectives(self.settings.timeout)
        self._agreed(self._fault)

    def _fault(self) -> str | None:
        """What is not as it was asked for."""
        if type(self._engine).__name__ != "DeepSpeedEngine":
            return f"accelerate prepared a {type(self._engine).__name__}"
        if self._engine.zero_optimization_stage() != self.stage:
            return f"DeepSpeed runs stage {self._engine.zero_optimization_stage()}"
        if self._engine.gradient_clipping():
            return "DeepSpeed clips by itself"
        if self._engine.dp_world_size != self.world_size:
            return f"DeepSpeed found {self._engine.dp_world_size} data-parallel ranks"
        if self._zero.optimizer is not self.optimizer:
            return f"DeepSpeed steps a {type(self._zero.optimizer).__name__}, not the recipe's optimizer"
        for name, parameter in self._named.items():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                return f"{name} is {parameter.dtype}, not fp32"
            if self.stage == 3 and not hasattr(parameter, "ds_id"):
                return f"{name} is not partitioned"
        held = sum(flat.numel() for flat in self._flats())
        trained = sum(whole_shape(p).numel() for p in self._trained.values())
        room = 2 * self.world_size * (len(self._named) + 1)  # padding
        if held * self.world_size > trained + self.world_size * room:
            return f"the optimizer holds {held} of {trained} elements on one of {self.world_size} ranks"
        return None

    def _flats(self) -> list[Tensor]:
        """The optimizer's flat fp32 tensors, one per group (stage 3: per sub-group)."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def forward(self, batch: Batch, mode: str, normalizers: Tensor | None = None, **options: Any) -> Any:
        if torch.is_grad_enabled() or self.stage == 3:
            return self.module(batch.to(self.device), mode, normalizers, **options)
        return self.train_module(batch.to(self.device), mode, normalizers, **options)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        self._last = last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        self._reduced = self._last

    def rehearse(self, batch: Batch, normalizers: Tensor) -> Rehearsal:
        # a whole step, suppressed: DeepSpeed's buckets are left as between two steps
        with self.accumulate(last=True):
            loss: Loss = self.forward(batch, "loss", normalizers)
            used = reached(loss.total)
            self.backward(loss.total)
        finite = bool(torch.isfinite(self.gradient_square_sum()))
        self.discard()
        unused = [name for name, p in self._trained.items() if id(p) not in used]
        return Rehearsal(loss.total.detach(), unused, finite, reduced=True)

    def leave_unused(self, names: Sequence[str]) -> None:
        # stages 1 and 2 fill their flat gradients with zeros
        self._unused = [self._trained[name] for name in names] if self.stage == 3 else []
        clear(self._zero, self._unused)

    def train_only(self, names: Collection[str]) -> None:
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name in names)
        closed: list[Tensor] = []
        for index, flat in enumerate(self._flats()):
            number = self._zero.sub_group_to_group_id[index] if self.stage == 3 else index
            opened = {name in names for name in self.optimizer.param_groups[number]["names"]}
            assert len(opened) == 1, "a group of the optimizer is trained as one"
            if not opened.pop():
                closed.append(flat)
        self._held_back.hold(closed)

    def _gradients(self) -> dict[int, dict[int, Tensor]]:
        """Index of a flat tensor → place in it → this rank's reduced slice there, after a window's last backward."""
        if not self._reduced:
            return {}
        offloaded = self.settings.offload_optimizer
        if offloaded and self.stage < 3:
            self._zero._wait_for_offload_copies()
        found: dict[int, dict[int, Tensor]] = {}
        for index, flat in enumerate(self._flats()):
            if flat not in self._held_back:
                whole = {} if flat.grad is None else {0: flat.grad}
                found[index] = whole if offloaded else gradients(self._zero, index)
        return found

    def shards(self) -> list[Shard]:
        flats, found, reduced = self._flats(), dict[str, Shard](), self._gradients()
        for index, parts in self._slices().items():
            for part in parts:
                value = flats[index].detach()[part.at : part.at + part.count]
                gradient = None
                if index in reduced:
                    at = 0 if self.settings.offload_optimizer else part.at
                    gradient = reduced[index][at][part.at - at :][: part.count]
                found[part.name] = Shard(part.name, value, gradient, part.shape, part.start)
        return [found[name] for name in self._trained if name in found]

    @torch.no_grad()
    def wrote(self) -> None:
        gathered_again(self._zero, self.stage)

    def discard(self) -> None:
        one = torch.ones((), device=self.device)
        self.step(one, skip=one)

    def gradient_square_sum(self) -> Tensor:
        slices = [gradient for group in self._gradients().values() for gradient in group.values()]
        total = local_square_sum(slices).to(self.device)
        dist.all_reduce(total)
        return total

    def step(self, coefficient: Tensor, skip: Tensor) -> None:
        device = torch.device("cpu") if self.settings.offload_optimizer else self.device
        with update.scaled(self.optimizer, coefficient.to(device), skip.to(device)):
            self._engine.step()
        self._reduced = False
        clear(self._zero, self._unused)

    # state

    def weights(self) -> State:
        model = self.train_module.model
        if self.stage < 3:
            return super().weights()
        return zero_state.pieces(model, self.rank, self._kept)

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        model = self.train_module.model
        if self.stage < 3:
            super().load_weights(saved)
        else:
            zero_state.load(model, saved, self.rank, self._kept)
        self._zero.refresh_fp32_params()

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return super().whole_weights()
        return zero_state.gather(self.train_module.model, self.rank, self._kept)

    def _slices(self) -> dict[int, list[Slice]]:
        return slices(self._zero, self._trained, self.stage, self.rank)

    def optimizer_state(self) -> dict[str, State]:
        found: dict[str, State] = {}
        for index, flat in enumerate(self._flats()):
            if not (state := self.optimizer.state.get(flat)):
                continue
            for part in self._slices().get(index, []):
                found[part.name] = {
                    key: Piece(value[part.at : part.at + part.count].cpu(), part.shape, part.start)
                    if isinstance(value, Tensor) and value.shape == flat.shape
                    else value
                    for key, value in state.items()
                }
        return found

    @torch.no_grad()
    def load_optimizer_state(self, saved: Saved) -> None:
        parts = self._slices()
        for index, flat in enumerate(self._flats()):
            state: dict[str, Any] = {}
            for part in parts.get(index, []):
                for key in saved.inner(part.name):
                    if not saved.is_tensor(part.name, key) or saved.shape(part.name, key) != part.shape:
                        state[key] = saved.value(part.name, key)
                        continue
                    target = state.setdefault(key, torch.zeros_like(flat))
                    target[part.at : part.at + part.count] = saved.run(part.start, part.count, part.name, key)
            if state:
                self.optimizer.state[flat] = state

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "zero_stage": self.stage,
            "shard_size": self.world_size,
            "offload_optimizer": self.settings.offload_optimizer,
        }

    def close(self) -> None:
        for name in ("module", "_engine", "_zero"):
            vars(self).pop(name, None)
        self.accelerator.free_memory()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
