"""8-bit AdamW as a torch optimizer: bitsandbytes' AdamW8bit, its states included, in one pass over the memory, with
the clipping and the finite check in the same pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunesmith_kernels.adamw import paths
from tunesmith_kernels.adamw.local import is_dtensor, local, shard_offset
from tunesmith_kernels.adamw.paths import Backend, check_backend
from tunesmith_kernels.adamw.scaling import scaling
from tunesmith_kernels.adamw.states import Kept
from tunesmith_kernels.adamw8bit.codebook import Books
from tunesmith_kernels.adamw8bit.paths import path
from tunesmith_kernels.adamw8bit.states import books_of, kept, new_state
from tunesmith_kernels.adamw8bit.tensors import Group

_BLOCK_SIZES = tuple(2**power for power in range(6, 13))


@dataclass(frozen=True)
class _Row:
    """One parameter's tensors, as `Group` wants them; `target` is where the parameter goes if it was not contiguous."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    books: Books | None
    stream: int
    offset: int
    target: Tensor | None


class AdamW8bit(Optimizer):
    """AdamW whose moments are 8-bit codes, 2 bytes of state per element (Dettmers et al. 2021, "8-bit Optimizers via
    Block-wise Quantization", arXiv 2110.02861), over fp32 and bf16 parameters.

    lr: a float, or a 0-dim tensor, which is read on the host. All of lr, betas, eps and weight_decay per group.
    min_8bit_size: a tensor of fewer elements keeps fp32 moments.
    block_size: how many elements share a scale: 64, 128, …, 4096. bitsandbytes reads 256 alone.
    stochastic_rounding: whether bf16 parameters are rounded stochastically; else to the nearest, as bitsandbytes does,
        which loses updates of less than half a last place (1/512 to 1/256 of the parameter).
    max_norm: clips the gradients to this 2-norm over all groups, as torch.nn.utils.clip_grad_norm_ does, but in the
        same pass and without writing them. A norm that is not finite suppresses the step: parameters, state and
        counters stay bitwise as they are. Only for whole gradients: an engine that shards them knows the norm alone.
    seed: of the stochastic rounding, which depends on it, on the number of the update, on the parameter (its place
        in the groups, or see `set_keys`) and on the index of the element: resuming changes nothing.
    backend: "cpu" (C++), "triton", "reference" (plain torch) or None for the best on the parameters' device;
        `path_for` says which, and why.

    The state is that of bitsandbytes' AdamW8bit (`state1`, `qmap1`, `absmax1` and the same with 2), and state dicts
    load both ways; `step` is an int in a state dict, a tensor on the parameter's device in `state`. The nearest code
    is exact here, on every path; bitsandbytes' CUDA kernel, to keep a first moment's sign, sometimes takes the next.

    Blocks never cross tensors. Of a sharded parameter (a DTensor, a flat shard) every process encodes its own shard,
    and its state dict is its own: it fits another sharding only where shards begin at multiples of block_size, and
    torch.distributed.checkpoint must not reshard it.

    Inside an engine, the protocol is that of torch's fused optimizers, which GradScaler speaks: where the attribute
    `grad_scale` is set, the gradients are divided by it (an engine that clips sets scale / coefficient), and where
    `found_inf` is set and not 0, the step is suppressed. Both are 0-dim tensors on the parameters' device and are
    not read on the host there. The groups say so by `fused=True`. Together with max_norm they are refused.

    Not offered: amsgrad, percentile clipping, paging, fp16 parameters, sparse gradients. The gradients are only read.
    Raises ValueError for what is refused.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
        max_norm: float | None = None,
        seed: int = 0,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        if block_size not in _BLOCK_SIZES:
            raise ValueError(
                f"block_size must be one of {', '.join(map(str, _BLOCK_SIZES))}, not {block_size}"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, not {max_norm}")
        self.min_8bit_size, self.block_size = min_8bit_size, block_size
        self.stochastic_rounding = stochastic_rounding
        self.max_norm, self.seed = max_norm, seed
        self.backend: Backend | None = backend
        self._keys: dict[Tensor, tuple[int, int]] = {}
        self._books: dict[Tensor, Books] = {}
        self._last_grad_norm: Tensor | None = None
        self._step_supports_amp_scaling = True
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. Raises ValueError for settings and parameters that are refused."""
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
            for param in self.param_groups[-1]["params"]:
                _check(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def set_keys(self, keys: Mapping[Tensor, tuple[int, int]]) -> None:
        """Says which numbers stochastic rounding draws: see `AdamW.set_keys`."""
        self._keys.update(keys)

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The 2-norm of all gradients at the last step, before clipping: 0-dim fp32 on their device. None without
        max_norm."""
        return self._last_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient. closure: computes the loss, which is returned, and the
        gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = self._gathered()
        groups = [_group(settings, rows, self) for settings, rows in gathered]
        if not groups:
            self._last_grad_norm = None if self.max_norm is None else torch.zeros(())
        else:
            device = groups[0].params[0].device
            grads = [grad for group in groups for grad in group.grads]
            by = scaling(self, self.max_norm, grads, paths.path(self.backend, device))
            self._last_grad_norm = by.norm
            path(self.backend, device).update(groups, by.coefficient, by.skip, self.seed)
            for _, rows in gathered:
                for row in rows:
                    if row.target is not None:
                        row.target.copy_(row.param)
        return loss

    def _gathered(self) -> list[tuple[dict[str, Any], list[_Row]]]:
        """The parameters with a gradient: those of a group by dtype and form of their moments."""
        gathered: list[tuple[dict[str, Any], list[_Row]]] = []
        number, devices = 0, set[torch.device]()
        for settings in self.param_groups:
            rows: dict[tuple[torch.dtype, int | None], list[_Row]] = {}
            for param in settings["params"]:
                if param.grad is not None:
                    row = self._row(param, number)
                    key = (param.dtype, id(row.books) if row.books else None)
                    rows.setdefault(key, []).append(row)
                    devices.add(param.device)
                number += 1
            gathered.extend((settings, found) for found in rows.values())
        if len(devices) > 1:
            raise ValueError(f"AdamW8bit: parameters on {' and on '.join(sorted(map(str, devices)))}")
        return gathered

    def _row(self, param: Tensor, number: int) -> _Row:
        """The tensors of one parameter and its key. number: its place over all groups."""
        _check(param)
        if self.max_norm is not None and is_dtensor(param):
            raise ValueError(
                "max_norm: a DTensor parameter shows a shard of its gradient; let the engine clip (grad_scale)"
            )
        here, grad = local(param.detach()), local(cast(Tensor, param.grad))
        if grad.layout != torch.strided or grad.dtype != here.dtype:
            raise ValueError(
                f"AdamW8bit: the gradient of parameter {number} is {grad.dtype}, {grad.layout}; "
                f"it must be {here.dtype}, dense"
            )
        state = self.state[param]
        if not state:
            state.update(new_state(here, self.block_size, here.numel() >= self.min_8bit_size))
        books = self._books_of(param, state) if "qmap1" in state else None
        target = None if here.is_contiguous() else here
        stream, offset = self._key(param, number) if self.stochastic_rounding else (0, 0)
        return _Row(here.contiguous(), grad.contiguous(), state, books, stream, offset, target)

    def _books_of(self, param: Tensor, state: dict[str, Any]) -> Books:
        books = self._books.get(param)
        if books is None:
            books = self._books[param] = books_of(state["qmap1"], state["qmap2"])
            state["qmap1"], state["qmap2"] = books.signed.values, books.unsigned.values
        return books

    def _key(self, param: Tensor, number: int) -> tuple[int, int]:
        key = self._keys.get(param)
        if key is None:
            key = self._keys[param] = (number, shard_offset(param))
        return key

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer; the counters as ints, as bitsandbytes has them. Waits for the device."""
        packed = super().state_dict()
        state = {
            index: {**kept, "step": int(kept["step"])} if "step" in kept else kept
            for index, kept in packed["state"].items()
        }
        groups = [
            {name: value for name, value in group.items() if name != "fused"}
            for group in packed["param_groups"]
        ]
        return {**packed, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer; ours or bitsandbytes' (AdamW8bit, Adam8bit). Codes and scales keep their types
        and bits; as there, tensors that need no move are not copied. Which tensors have codes is as saved. Raises
        ValueError where the state is another optimizer's or has blocks of another size."""
        hooks = (
            self.register_load_state_dict_pre_hook(_keep),
            self.register_load_state_dict_post_hook(_unwrap, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._books.clear()

    def __getstate__(self) -> dict[str, Any]:
        names = ("min_8bit_size", "block_size", "stochastic_rounding", "max_norm", "seed", "backend", "_keys")
        ours = {name: getattr(self, name) for name in names}
        unsaved = {"_books": {}, "_last_grad_norm": None, "_step_supports_amp_scaling": True}
        return {**super().__getstate__(), **ours, **unsaved}


def _keep(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    optimizer = cast(AdamW8bit, optimizer)
    saved_groups = state_dict["param_groups"]
    state = dict(state_dict["state"])
    # torch checks the lengths
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=False):
        for param, saved in zip(group["params"], saved_group["params"], strict=False):
            if saved in state:
                state[saved] = kept(local(param), state[saved], optimizer.block_size, f"parameter {saved}")
    groups = [{**group, "fused": True} for group in saved_groups]
    return {**state_dict, "state": state, "param_groups": groups}


def _unwrap(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Kept):
                state[name] = value.tensor


def _group(settings: dict[str, Any], rows: list[_Row], optimizer: AdamW8bit) -> Group:
    beta1, beta2 = settings["betas"]
    books = rows[0].books
    return Group(
        params=[row.param for row in rows],
        grads=[row.grad for row in rows],
        states1=[row.state["state1"] for row in rows],
        states2=[row.state["state2"] for row in rows],
        absmaxes1=[row.state["absmax1"] for row in rows] if books else (),
        absmaxes2=[row.state["absmax2"] for row in rows] if books else (),
        steps=[row.state["step"] for row in rows],
        books=books,
        block_size=optimizer.block_size,
        stochastic=optimizer.stochastic_rounding,
        streams=[row.stream for row in rows],
        offsets=[row.offset for row in rows],
        lr=float(settings["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )


def _check(param: Tensor) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        hint = "; fp16 training keeps its parameters in fp32" if param.dtype == torch.float16 else ""
        raise ValueError(f"AdamW8bit: parameters must be float32 or bfloat16, not {param.dtype}{hint}")


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < math.inf:
            raise ValueError(f"AdamW8bit: {name} must be 0 or above, not {group[name]}")
    if not all(0.0 <= float(beta) < 1.0 for beta in group["betas"]):
        raise ValueError(f"AdamW8bit: betas must be in [0, 1), not {group['betas']}")
