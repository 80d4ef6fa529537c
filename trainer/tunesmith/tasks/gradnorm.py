"""GradNorm (Chen et al. 2018, algorithm 1): factors on the tasks' losses that bring their gradients to like norms."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.engine.layers import transformer_layers
from tunesmith.errors import UserError
from tunesmith.parts import ForwardPart, StepPart
from tunesmith.recipe.tasks import GradNorm
from tunesmith.tasks.objective import TaskObjective, TaskTerm
from tunesmith.terms import Term

if TYPE_CHECKING:
    from tunesmith.data.stream import Stream
    from tunesmith.engine import Engine

_LEAST = 1e-3  # a factor that reached 0 would stay there


def last_shared_linear(model: nn.Module) -> nn.Linear:
    """The last matrix of the last layer: W of the paper. Raises UserError where it is not trained."""
    layers = transformer_layers(model)
    found = [module for layer in layers[-1:] for module in layer.modules() if isinstance(module, nn.Linear)]
    if not found or not found[-1].weight.requires_grad:
        raise UserError(
            "multitask.balancing.type: gradnorm needs the last layer's last matrix, which is "
            + ("frozen: unfreeze it" if found else "no Linear: use uncertainty or dwa")
        )
    return found[-1]


def target_gradient(norms: Tensor, factors: Tensor, losses: Tensor, first: Tensor, alpha: float) -> Tensor:
    """d/dλ of Σ_t |λ_t g_t − ḡ r_t^α|, ḡ the mean of λ_t g_t and both it and r held fixed: r_t = (L_t/L_t(0)) over its
    mean. All [tasks] fp64; `norms` g_t are of the gradients of the losses without their factors."""
    weighted = factors * norms
    rate = losses / first
    target = weighted.mean() * (rate / rate.mean()) ** alpha
    return torch.sign(weighted - target) * norms


class Watch(ForwardPart):
    """Sums each task's gradient of `linear`'s weight over a window's micro-batches: Σ over positions of the gradient
    of its output ⊗ its input, which are plain tensors whatever an engine does with the weight: [out, in] fp32."""

    def __init__(self, linear: nn.Linear, tasks: Sequence[str]) -> None:
        self.linear = linear
        self.tasks = list(tasks)
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def around(self, batch: Batch) -> Generator[None]:
        if batch.task not in self.tasks:
            yield
            return

        def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # in the first pass of a layer whose activations are recomputed there is no graph
            if output.requires_grad:
                given = inputs[0].detach()
                output.register_hook(lambda gradient: self._add(batch.task, given, gradient))

        # left on until the backward, which may run the layer again
        self._off()
        self.handle = self.linear.register_forward_hook(seen)
        yield

    def _off(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            handle.remove()

    def _add(self, task: str, given: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            flat = gradient.reshape(-1, gradient.shape[-1]).float()
            own = flat.T @ given.reshape(-1, given.shape[-1]).float()
            self.sums[task] = self.sums[task] + own if task in self.sums else own


class GradientNormalization(StepPart):
    """Factors λ_t, 1 at first and K in all, after every step moved by Adam against the gradient of the paper's loss,
    which g_t = ‖∇_W weight_t·L_t‖ over the global batch gives; L_t(0) is the loss of the first step.

    One more product per micro-batch of the size of W's gradient, one sum of K such matrices over the ranks per step,
    and the host waits for the step."""

    name = "gradnorm"

    def __init__(
        self, objective: TaskObjective, trained: Sequence[str], settings: GradNorm, model: nn.Module
    ) -> None:
        self.objective = objective
        self.tasks = list(trained)
        self.settings = settings
        self.watch = Watch(last_shared_linear(model), self.tasks)
        self.factors = nn.Parameter(torch.ones(len(self.tasks), dtype=torch.float64))
        self.adam = torch.optim.Adam([self.factors], lr=settings.learning_rate)
        self.first: Tensor | None = None  # [tasks] fp64
        self.engine: Engine
        self._scale = 1.0

    def begin(self, engine: Engine, stream: Stream) -> None:
        self.engine = engine
        own = [cast(TaskTerm, term) for term in self.objective.terms]
        mixed = [[term.inner.weight * (term.task == task) for term in own] for task in self.tasks]
        self.mixed = torch.tensor(mixed, dtype=torch.float64)  # [tasks, terms]

    def open(self, step: int) -> None:
        self.watch.sums.clear()

    def weights(self, step: int, terms: Sequence[Term]) -> Mapping[str, float]:
        by_task = dict(zip(self.tasks, self.factors.tolist(), strict=True))
        return {t.name: by_task[t.task] for t in terms if isinstance(t, TaskTerm) and t.task in by_task}

    def penalize(self, step: int, scale: Tensor) -> None:
        self._scale = float(scale)

    def observe(self, step: int, losses: Tensor) -> None:
        linear = self.watch.linear
        zeros = torch.zeros(linear.out_features, linear.in_features, device=losses.device)
        summed = self.engine.sum(torch.stack([self.watch.sums.get(task, zeros) for task in self.tasks]))
        norms = (summed.double() / self.engine.mean_size / self._scale).flatten(1).norm(dim=1).cpu()
        found = (self.mixed @ losses[: self.mixed.shape[1]].cpu()).clamp_min(1e-12)
        with torch.no_grad():
            norms = norms / self.factors  # of the losses with their own weights, without the factors
        if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).all()):
            return  # fp16 overflowed, or a task had no row: nothing to go by
        if self.first is None:
            self.first = found
        gradient = target_gradient(norms, self.factors.detach(), found, self.first, self.settings.alpha)
        self.factors.grad = gradient
        self.adam.step()
        with torch.no_grad():
            self.factors.clamp_(min=_LEAST)
            self.factors.mul_(len(self.tasks) / self.factors.sum())

    def state(self) -> dict[str, Any]:
        inner = self.adam.state.get(self.factors, {})
        return {
            "factors": self.factors.tolist(),
            "first": None if self.first is None else self.first.tolist(),
            "adam": {key: value.tolist() for key, value in inner.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.factors.copy_(torch.tensor(state["factors"], dtype=torch.float64))
        self.first = None if state["first"] is None else torch.tensor(state["first"], dtype=torch.float64)
        if state["adam"]:
            kinds = {"step": torch.float32}
            self.adam.state[self.factors] = {
                key: torch.tensor(value, dtype=kinds.get(key, torch.float64))
                for key, value in state["adam"].items()
            }
