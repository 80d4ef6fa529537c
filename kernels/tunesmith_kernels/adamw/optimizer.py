"""AdamW as a torch optimizer: what torch.optim.AdamW(fused=True) does, with the clipping, the finite check and three
ways to train bf16 parameters in the same pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunesmith_kernels.adamw.local import in_memory_order, is_dtensor, local, shard_offset
from tunesmith_kernels.adamw.paths import Backend, check_backend, path
from tunesmith_kernels.adamw.scaling import scaling
from tunesmith_kernels.adamw.states import Kept, adopted_group, dtypes, kept, new_state, precision_of
from tunesmith_kernels.adamw.tensors import Group, Precision

# parameter, gradient, moments, extra, step, stream, offset
_Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, int, int]


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) over fp32 and bf16 parameters.

    lr: a float, or a 0-dim tensor, which is read on the host. All of lr, betas, eps and weight_decay per group.
    precision: how bf16 parameters are updated; those of fp32 are updated in fp32 beside them. There is no default for
        bf16, since torch's, plain bf16, loses small updates.
        "master": an fp32 copy is updated, the parameter is it rounded. 12 bytes of state per element.
        "stochastic": rounded stochastically. 4 bytes (8 with state_dtype=torch.float32).
        "kahan": what rounding left out is kept in bf16. 6 bytes.
    state_dtype: of the moments of "stochastic", torch.bfloat16 (default) or torch.float32; the other precisions have
        theirs, and no other is accepted.
    max_norm: clips the gradients to this 2-norm over all groups, as torch.nn.utils.clip_grad_norm_ does, but in the
        same pass and without writing them. A norm that is not finite suppresses the step: parameters, state and
        counters stay bitwise as they are. Only for whole gradients: an engine that shards them knows the norm alone.
    seed: of the stochastic rounding, which depends on it, on the number of the update, on the parameter (its place
        in the groups, or see `set_keys`) and on the index of the element: resuming and resharding change nothing.
    backend: "cpu" (C++), "triton", "reference" (plain torch) or None for the best on the parameters' device;
        `path_for` says which, and why.

    The state is torch.optim.AdamW's (`step` on the parameter's device, `exp_avg`, `exp_avg_sq`), with `master` or
    `compensation` beside it: state dicts of fp32 runs load both ways. DTensor parameters (Shard(0) or replicated)
    have DTensor states.

    Inside an engine, the protocol is that of torch's fused optimizers, which GradScaler speaks: where the attribute
    `grad_scale` is set, the gradients are divided by it (an engine that clips sets scale / coefficient), and where
    `found_inf` is set and not 0, the step is suppressed. Both are 0-dim tensors on the parameters' device and are
    not read on the host there. The groups say so by `fused=True`. Together with max_norm they are refused.

    Not offered: amsgrad, maximize, sparse or complex gradients, fp16 parameters. The gradients are only read.
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
        precision: Precision | None = None,
        state_dtype: torch.dtype | None = None,
        max_norm: float | None = None,
        seed: int = 0,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        if precision is not None and precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, not {max_norm}")
        self.precision: Precision = precision or "fp32"
        self.state_dtype = _state_dtype(self.precision, state_dtype)
        self.max_norm, self.seed = max_norm, seed
        self.backend: Backend | None = backend
        self._keys: dict[Tensor, tuple[int, int]] = {}
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
                self._check(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def set_keys(self, keys: Mapping[Tensor, tuple[int, int]]) -> None:
        """Says which numbers stochastic rounding draws: {parameter: (stream, offset)}, where `stream` names the whole
        parameter within the model, and `offset` is the index in it of the first element here. For an engine that
        hands flat shards; by default the running number of the parameter over all groups, and 0, or what a
        DTensor's placement says."""
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
        groups = self._gathered()
        if not groups:
            self._last_grad_norm = None if self.max_norm is None else torch.zeros(())
        else:
            way = path(self.backend, groups[0].params[0].device)
            by = scaling(self, self.max_norm, [grad for group in groups for grad in group.grads], way)
            self._last_grad_norm = by.norm
            way.update(groups, by.coefficient, by.skip, self.seed)
        return loss

    def _gathered(self) -> list[Group]:
        """The parameters with a gradient; two groups where bf16 and fp32 parameters share one."""
        gathered: list[Group] = []
        number = 0
        device = None
        for settings in self.param_groups:
            rows: dict[Precision, list[_Row]] = {}
            for param in settings["params"]:
                if param.grad is not None:
                    device = device or param.device
                    if param.device != device:
                        raise ValueError(f"AdamW: parameters on {device} and on {param.device}")
                    self._check(param)
                    precision = precision_of(param, self.precision)
                    rows.setdefault(precision, []).append(self._row(param, precision, number))
                number += 1
            gathered.extend(_group(settings, precision, found) for precision, found in rows.items())
        return gathered

    def _row(self, param: Tensor, precision: Precision, number: int) -> _Row:
        """The tensors of one parameter, contiguous, and its key. number: its place over all groups."""
        kinds = dtypes(precision, self.state_dtype)
        state = self.state[param]
        if not state:
            state.update(new_state(param, kinds))
        stream, offset = self._key(param, number) if precision in ("stochastic", "kahan") else (0, 0)
        here, grad, states = param, cast(Tensor, param.grad), [state[name] for name in kinds]
        if type(param) is not nn.Parameter and is_dtensor(param):
            if self.max_norm is not None:
                raise ValueError(
                    "max_norm: a DTensor parameter shows a shard of its gradient; let the engine clip (grad_scale)"
                )
            here, grad, states = local(here), local(grad), [local(tensor) for tensor in states]
        if grad.layout != torch.strided or grad.dtype != here.dtype:
            raise ValueError(
                f"AdamW: the gradient of parameter {number} is {grad.dtype}, {grad.layout}; "
                f"it must be {here.dtype}, dense"
            )
        if not (here.is_contiguous() and grad.is_contiguous()):
            here, grad, states = in_memory_order(here, grad, states)
        numel, device = here.numel(), here.device
        for tensor, (name, dtype) in zip(states, kinds.items(), strict=True):
            # a kernel walks over all of them with one index
            fits = tensor.dtype == dtype and tensor.numel() == numel and tensor.is_contiguous()
            if not fits or tensor.device != device:
                raise RuntimeError(
                    f"AdamW: the {name} of parameter {number} is not the one that was made for it"
                )
        extra = states[2] if len(states) > 2 else None
        return here, grad, states[0], states[1], extra, state["step"], stream, offset

    def _key(self, param: Tensor, number: int) -> tuple[int, int]:
        key = self._keys.get(param)
        if key is None:
            key = self._keys[param] = (number, shard_offset(param))
        return key

    def _check(self, param: Tensor) -> None:
        if param.dtype not in (torch.float32, torch.bfloat16):
            hint = "; fp16 training keeps its parameters in fp32" if param.dtype == torch.float16 else ""
            raise ValueError(f"AdamW: parameters must be float32 or bfloat16, not {param.dtype}{hint}")
        if param.dtype == torch.bfloat16 and self.precision == "fp32":
            raise ValueError("AdamW: bfloat16 parameters need precision='master', 'stochastic' or 'kahan'")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer; masters and moments keep their types and bits. As there, tensors that need
        no move are not copied. Raises ValueError where the state is of another precision or optimizer."""
        hooks = (
            self.register_load_state_dict_pre_hook(_keep),
            self.register_load_state_dict_post_hook(_unwrap, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        names = ("precision", "state_dtype", "max_norm", "seed", "backend", "_keys", "_last_grad_norm")
        ours = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **ours, "_step_supports_amp_scaling": True}


def _keep(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    optimizer = cast(AdamW, optimizer)
    saved_groups = state_dict["param_groups"]
    state = dict(state_dict["state"])
    for group, saved_group in zip(
        optimizer.param_groups, saved_groups, strict=False
    ):  # torch checks the lengths
        for param, saved in zip(group["params"], saved_group["params"], strict=False):
            if saved in state:
                kinds = dtypes(precision_of(param, optimizer.precision), optimizer.state_dtype)
                state[saved] = kept(param, state[saved], kinds, f"parameter {saved}")
    return {**state_dict, "state": state, "param_groups": [adopted_group(group) for group in saved_groups]}


def _unwrap(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Kept):
                state[name] = value.tensor


def _group(settings: dict[str, Any], precision: Precision, rows: list[_Row]) -> Group:
    params, grads, exp_avgs, exp_avg_sqs, extras, steps, streams, offsets = zip(*rows, strict=True)
    beta1, beta2 = settings["betas"]
    return Group(
        precision,
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        extras if precision in ("master", "kahan") else (),
        steps,
        streams,
        offsets,
        lr=float(settings["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )


def _state_dtype(precision: Precision, asked: torch.dtype | None) -> torch.dtype:
    offered = {
        "fp32": [torch.float32],
        "master": [torch.float32],
        "stochastic": [torch.bfloat16, torch.float32],
        "kahan": [torch.bfloat16],
    }[precision]
    if asked is not None and asked not in offered:
        raise ValueError(f"state_dtype {asked} with precision {precision!r}: it keeps {offered[0]}")
    return asked or offered[0]


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < math.inf:
            raise ValueError(f"AdamW: {name} must be 0 or above, not {group[name]}")
    if not all(0.0 <= float(beta) < 1.0 for beta in group["betas"]):
        raise ValueError(f"AdamW: betas must be in [0, 1), not {group['betas']}")
