"""The output head of a language model, met by the loss instead of by the hidden states: no logits.

A model's forward runs unchanged, but for its head (`get_output_embeddings`), which returns a stand-in for the logits.
The stand-in notes what the model does with it (57 of transformers' model files scale or cap their logits, BART's adds a
bias); a term of the loss then computes hidden·weightᵀ, that, and the cross-entropy in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tunesmith_kernels import (
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    linear_cross_entropy,
    linear_distillation,
)
from tunesmith_kernels.linear_loss.backends import Backend


class NotFusable(ValueError):  # noqa: N818
    """The model does something with its logits that the kernel does not; the message says what."""


@dataclass(frozen=True)
class HeadOutput:
    """Stands for the logits [..., V] = outer·tanh(factor·(head(hidden) + extra)), or where they are not `capped` for
    what is inside tanh's brackets. hidden: [..., H], in the dtype that the head computes in. `problem`: what was done
    with it that this formula does not have; nothing raises within the model's forward, whose hooks would be cut off."""

    head: nn.Linear
    backend: Backend | None
    hidden: Tensor
    factor: float = 1.0
    extra: Tensor | None = None
    capped: bool = False
    outer: float = 1.0
    problem: str | None = None

    def cross_entropy(
        self,
        target: Tensor,
        *,
        normalizer: Tensor,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        shift: bool = False,
    ) -> Tensor:
        """Σ over the rows of target [rows, positions] / normalizer: 0-dim fp32. `shift`: target has one position
        less, and position i predicts target i. Raises NotFusable."""
        bias, softcap, scale = self._formula()
        return linear_cross_entropy(
            self.hidden[:, :-1] if shift else self.hidden,
            self.head.weight,
            target,
            bias=bias,
            normalizer=normalizer,
            label_smoothing=label_smoothing,
            focal_gamma=focal_gamma,
            softcap=softcap,
            scale=scale,
            backend=self.backend,
        )

    def distillation(
        self,
        teacher: TeacherHidden | TeacherLogits | TeacherTopK,
        target: Tensor,
        *,
        normalizer: Tensor,
        divergence: Literal["forward_kl", "reverse_kl", "jsd"],
        beta: float,
        temperature: float,
    ) -> Tensor:
        """Σ temperature²·D(teacher, student) over the positions of target [rows, positions] that are not ignored /
        normalizer: 0-dim fp32. Raises NotFusable."""
        bias, softcap, scale = self._formula()
        return linear_distillation(
            self.hidden,
            self.head.weight,
            target,
            teacher=teacher,
            bias=bias,
            normalizer=normalizer,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            softcap=softcap,
            scale=scale,
            backend=self.backend,
        )

    def as_teacher(self, vocab: int | None) -> TeacherHidden:
        """For another's `distillation`. Raises NotFusable."""
        bias, softcap, scale = self._formula()
        return TeacherHidden(self.hidden, self.head.weight, bias, softcap, scale, vocab)

    def at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The logits of some places, as they would have been: [places, V] fp32, with gradient. Raises NotFusable."""
        bias, softcap, scale = self._formula()
        hidden = self.hidden[rows, positions]
        weight = self.head.weight.to(hidden.dtype)
        x = nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
        x = x.float() * scale
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    def without_last(self) -> HeadOutput:
        """Of all positions [rows, positions, …] but the last."""
        return replace(self, hidden=self.hidden[:, :-1])

    def _formula(self) -> tuple[Tensor | None, float | None, float]:
        """(bias, softcap, scale) of the kernels. Raises NotFusable."""
        if self.problem is not None:
            raise NotFusable(self.problem)
        if self.capped and self.outer <= 0:
            raise NotFusable("its logits are capped at a negative number")
        bias = cast(Tensor | None, self.head.bias)
        if self.extra is not None:
            extra = self.extra.reshape(-1)
            bias = extra if bias is None else bias + extra
        return bias, self.outer if self.capped else None, self.factor * self.outer

    # what models do with their logits

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.head.out_features])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def float(self) -> HeadOutput:
        return self

    def contiguous(self) -> HeadOutput:
        return self

    def to(self, *args: Any, **kwargs: Any) -> HeadOutput:
        return self

    def __mul__(self, factor: Any) -> HeadOutput:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return self._spoilt("they are multiplied by a tensor")
        if self.capped:
            return replace(self, outer=self.outer * factor)
        return replace(self, factor=self.factor * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> HeadOutput:
        if isinstance(divisor, bool) or not isinstance(divisor, int | float):
            return self._spoilt("they are divided by a tensor")
        return self * (1.0 / divisor)

    def __add__(self, bias: Any) -> HeadOutput:
        wide = isinstance(bias, Tensor) and bias.numel() == self.head.out_features == bias.shape[-1]
        if not wide or bias.requires_grad or self.capped or self.extra is not None or self.factor != 1.0:
            return self._spoilt("something other than a constant bias is added to them")
        return replace(self, extra=bias)

    __radd__ = __add__

    def __getitem__(self, index: Any) -> HeadOutput:
        return self._spoilt("a part of them is taken")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        stand_in: HeadOutput = next(arg for arg in args if isinstance(arg, HeadOutput))
        if func is torch.tanh and not stand_in.capped:
            return replace(stand_in, capped=True)
        return stand_in._spoilt(f"they go through {getattr(func, '__name__', func)}")

    def __getattr__(self, name: str) -> Any:
        # what a tensor has not, it has not either: engines' hooks ask outputs for marks of their own
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._spoilt(f"they go through {name}")

    def _spoilt(self, what: str) -> HeadOutput:
        return (
            self
            if self.problem is not None
            else replace(self, problem=f"its logits are not only scaled: {what}")
        )


@dataclass(frozen=True)
class FusedHead:
    """The head of one model, to be replaced while `standing_in`."""

    head: nn.Linear
    backend: Backend | None

    @contextmanager
    def standing_in(self) -> Generator[None]:
        """Within it, the head returns HeadOutputs. The head's own hooks run as ever."""
        known = self.head.__dict__.get("forward")
        self.head.forward = self._forward  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            if known is None:
                del self.head.forward
            else:
                self.head.forward = known

    def _forward(self, input: Tensor) -> HeadOutput:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            # the product that autocast would make; the loss is computed outside it
            input = input.to(torch.get_autocast_dtype(device))
        return HeadOutput(self.head, self.backend, input)
