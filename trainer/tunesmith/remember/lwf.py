"""Learning without forgetting (Li & Hoiem 2016): on the new rows, the old head on the model that is trained keeps to
what the old model answers. The old head is trained along."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunesmith.batch import Batch
from tunesmith.commands.finished import describe_run, open_model
from tunesmith.distill.divergence import Divergence
from tunesmith.errors import UserError
from tunesmith.objectives import Objective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective
from tunesmith.parts import EXTRAS, ForwardPart, Strategies
from tunesmith.recipe.remember import LwF
from tunesmith.unpartitioned import unpartitioned

if TYPE_CHECKING:
    from tunesmith.engine import Engine
    from tunesmith.module import TrainModule
    from tunesmith.strategies import Building

NAME = "lwf"
_KEY = "remember.lwf"
Kind = Literal["single_label", "multi_label", "regression", "tokens"]


class Read(nn.Module):
    """Stands for the backbone: returns what the trained one has returned."""

    output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.output is not None, "the trained backbone has not run"
        return self.output


@dataclass(frozen=True, slots=True)
class KeepsTo:
    """Σ over units of T²·KL(p‖q) / normalizer, p the old model's answers at temperature T, q the old head's on the
    model that is trained. A unit is a row, or for an old head on tokens a real token. Several labels: the mean of the
    Bernoulli divergences over them; numbers: the mean squared difference.

    `outputs[lwf]`: (old, own) logits, [rows, classes] or [rows, positions, classes]."""

    kind: Kind
    divergence: Divergence
    weight: float
    name: str = NAME

    def units(self, batch: Batch) -> int:
        if self.kind == "tokens":
            return int(batch.inputs["attention_mask"].sum()) if batch.samples else 0
        return batch.samples

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        old, own = (logits.float() for logits in outputs[NAME])
        match self.kind:
            case "single_label" | "tokens":
                losses = self.divergence(own, old)
            case "multi_label":
                losses = self.divergence.bernoulli(own, old)
            case "regression":
                losses = (own - old).square().mean(-1)
        real = torch.tensor([float(row >= 0) for row in batch.rows], device=losses.device)
        if self.kind == "tokens":
            real = real.unsqueeze(-1) * batch.inputs["attention_mask"]
        return (losses * real).sum() / normalizer


class OldHead(ForwardPart):
    """The old run's model, frozen, and its head once more on what the trained backbone returns."""

    def __init__(self, old: nn.Module, objective: Objective) -> None:
        self._teacher = old.eval().requires_grad_(False)
        self._objective = objective
        self._model: Any = None
        self._output: Any = None

    def modules(self, model: nn.Module) -> Mapping[str, nn.Module]:
        self._model = model
        old: Any = self._teacher
        backbone, prefix = old.base_model, old.base_model_prefix
        trained = _backbone(model)
        if type(backbone) is not type(trained):
            raise UserError(
                f"{_KEY}: the old run's backbone is a {type(backbone).__name__}, and this run's a "
                f"{type(trained).__name__}: set model.model_name_or_path to the final/ of remember.run"
            )
        if _pools(backbone) and not _pools(trained):
            raise UserError(
                f"{_KEY}: the old head reads the pooled output of {type(backbone).__name__}, which "
                f"{type(model).__name__} does not compute: hold on to the weights instead (remember.ewc or l2_sp)"
            )
        setattr(old, prefix, Read())
        head = copy.deepcopy(old)
        setattr(old, prefix, backbone)
        return {NAME: head.requires_grad_(True)}

    def begin(self, engine: Engine) -> None:
        self._teacher.to(engine.device)
        handle: RemovableHandle = _backbone(self._model).register_forward_hook(self._keep)
        del handle  # for as long as the model lives

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output

    @contextmanager
    def around(self, batch: Batch) -> Generator[None]:
        self._output = None
        yield

    def add(self, module: TrainModule, outputs: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
        head: Any = getattr(module.model, EXTRAS)[NAME]
        reading: Read = head.base_model
        reading.output, self._output = self._output, None
        own = self._objective.outputs(head, batch)["logits"]
        reading.output = None
        with torch.no_grad():
            old = self._objective.outputs(self._teacher, batch)["logits"]
        return {NAME: (old, own)}

    def export(self, state: Mapping[str, Tensor], run_dir: Path) -> None:
        """Writes the old head as it was trained along, for probes."""
        from safetensors.torch import save_file

        from tunesmith.remember.probes import OLD_HEAD

        prefix = f"{NAME}."
        folder = run_dir / OLD_HEAD
        folder.mkdir(exist_ok=True)
        own = {k.removeprefix(prefix): v.contiguous() for k, v in state.items() if k.startswith(prefix)}
        save_file(own, folder / "head.safetensors")


def _backbone(model: nn.Module) -> nn.Module:
    inner: Any = model
    if hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    return inner.base_model


def _pools(backbone: Any) -> bool:
    return getattr(backbone, "pooler", None) is not None


def build_lwf(building: Building, settings: LwF, run: Path) -> Strategies:
    """Raises UserError where the old run has no head on rows or tokens, or the new rows are packed."""
    described = describe_run(run)
    if (kind := _kind(described.objective)) is None:
        raise UserError(
            f"{_KEY}: keeps to the answers of a classifier of rows or tokens; for {described.recipe.objective.type} "
            "set distill with the old model as the teacher"
        )
    if building.recipe.data.packing:
        raise UserError(f"{_KEY}: a packed sequence has no rows for the old head: set data.packing: false")
    with unpartitioned():
        old = open_model(described, torch.device("cpu"))
        old.fill(torch.device("cpu"))
    divergence = Divergence("forward_kl", temperature=settings.temperature)
    return Strategies(
        terms=(KeepsTo(kind, divergence, settings.weight),),
        forward=(OldHead(old.model, described.objective),),
        facts={"lwf": {"run": str(run), "head": kind}},
    )


def _kind(objective: Objective) -> Kind | None:
    match objective:
        case ClassificationObjective(problem=problem):
            return problem
        case TokenClassificationObjective():
            return "tokens"
        case _:
            return None
