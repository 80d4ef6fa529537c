"""The models of several tasks on one backbone."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tunesmith.checkpoint.pieces import Saved
from tunesmith.checkpoint.run_state import WEIGHTS
from tunesmith.errors import UserError

HEAD_OF = "head_of_"
"""The children of TaskModels beside its backbone: this and the name of the task."""


class TaskModels(nn.Module):
    """`backbone`, once, and for every task the transformers model with its head, whose backbone it is. Tasks that train
    a model's own output (a language model's) may be of one model.

    A task's model reaches the backbone by an attribute that is no child: every module has one place here, so that
    engines wrap, shard and count it once. `names` are the entries of the task's own state: of a backbone with a pooler,
    a task that has none saves none."""

    backbone: nn.Module

    def __init__(self, models: Mapping[str, Any]) -> None:
        """`models`: by task; the backbone is the first one's, with what only others have (a pooler)."""
        super().__init__()
        self.tasks = {name: _first(models, model) for name, model in models.items()}
        self.names = {name: frozenset(model.state_dict()) for name, model in models.items()}
        own = {name: models[name] for name in dict.fromkeys(self.tasks.values())}
        self.one_model = len(own) == 1
        if self.one_model:
            self.backbone = next(iter(own.values()))
            return
        backbones = {name: _backbone(name, model) for name, model in own.items()}
        _refuse_others(backbones)
        self.backbone = next(iter(backbones.values()))
        for other in backbones.values():
            for name, child in other.named_children():
                if getattr(self.backbone, name, None) is None:
                    setattr(self.backbone, name, child)
        for name, model in own.items():
            self._share(name, model)

    def _share(self, name: str, model: Any) -> None:
        setattr(model, model.base_model_prefix, self.backbone)
        model.tie_weights()  # a head that is tied to the embeddings is so to those that it now has
        self._part(model)
        self.add_module(f"{HEAD_OF}{name}", model)

    def _part(self, model: Any) -> None:
        del model._modules[model.base_model_prefix]
        model.__dict__[model.base_model_prefix] = self.backbone

    def of(self, task: str) -> Any:
        """The model of a task."""
        if self.one_model:
            return self.backbone
        return getattr(self, f"{HEAD_OF}{self.tasks[task]}")

    @contextmanager
    def whole(self, task: str) -> Generator[Any]:
        """The model of a task with the backbone for its child, as transformers saves it."""
        model = self.of(task)
        if self.one_model:
            yield model
            return
        del model.__dict__[model.base_model_prefix]
        model.add_module(model.base_model_prefix, self.backbone)
        try:
            yield model
        finally:
            self._part(model)

    def _prefix(self, task: str) -> str:
        """Of the backbone's names in the task's model."""
        return "" if self.one_model else f"{self.of(task).base_model_prefix}."

    def names_of(self, task: str, own: Iterable[str]) -> list[str]:
        """The names here of what the task's model calls so."""
        prefix, head = self._prefix(task), f"{HEAD_OF}{self.tasks[task]}."
        return [f"backbone.{n.removeprefix(prefix)}" if n.startswith(prefix) else head + n for n in own]

    def state_of(self, task: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the state of all, the task's, under its own names."""
        head, prefix = f"{HEAD_OF}{self.tasks[task]}.", self._prefix(task)
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.startswith("backbone."):
                found[prefix + name.removeprefix("backbone.")] = value
            elif name.startswith(head):
                found[name.removeprefix(head)] = value
        return {name: value for name, value in found.items() if name in self.names[task]}

    # what whoever knows one model asks

    @property
    def base_model(self) -> nn.Module:
        return cast(Any, self.backbone).base_model

    @property
    def config(self) -> Any:
        return self.backbone.config

    def get_input_embeddings(self) -> Any:
        return cast(Any, self.backbone).get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Of the tasks that train a model's own output; None where there are none, or several."""
        found = [head for task in dict.fromkeys(self.tasks.values()) if (head := _output(self.of(task)))]
        return found[0] if len(found) == 1 else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a forward is one task's: of(task)")


def _first(models: Mapping[str, Any], model: Any) -> str:
    return next(name for name, other in models.items() if other is model)


def _output(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _backbone(name: str, model: Any) -> nn.Module:
    backbone = getattr(model, model.base_model_prefix, None)
    if not isinstance(backbone, nn.Module) or model.base_model_prefix not in dict(model.named_children()):
        raise UserError(
            f"tasks.{name}: {type(model).__name__} has its head in its backbone, which no other task can share: use "
            "another model, or tasks whose objectives train the model's own output"
        )
    return backbone


def _refuse_others(backbones: Mapping[str, nn.Module]) -> None:
    (first, one), *others = backbones.items()
    for name, other in others:
        if type(other) is not type(one):
            raise UserError(
                f"tasks.{name}: its head sits on a {type(other).__name__}, that of {first} on a {type(one).__name__}: "
                "they cannot share a backbone"
            )


def load_task(model: Any, path: Path, task: str) -> dict[str, str]:
    """The weights that a checkpoint of TaskModels has of a task into that task's model, whole on one device. Returns
    what the checkpoint calls each of the model's. Raises UserError where it lacks some."""
    saved, prefix = Saved(path, WEIGHTS), f"{model.base_model_prefix}."
    names = saved.names()
    heads = {name.removeprefix(HEAD_OF).partition(".")[0] for name in names if name.startswith(HEAD_OF)}
    # a task that trains a model's own output may have that of another one
    owners = [task] if task in heads else [*sorted(heads)]
    found: dict[str, Tensor] = {}
    called: dict[str, str] = {}
    for own in model.state_dict():
        places = [f"{HEAD_OF}{owner}.{own}" for owner in owners] + [f"backbone.{own}"]
        if own.startswith(prefix):
            places.insert(0, f"backbone.{own.removeprefix(prefix)}")
        place = next((name for name in places if name in names), None)
        if place is not None:
            found[own] = saved.whole(place)
            called[own] = place
    missing = model.load_state_dict(found, strict=False).missing_keys
    values = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(values[name]) for name in found if name in values}
    if left := [name for name in missing if name not in values or id(values[name]) not in filled]:
        raise UserError(f"{path} lacks weights of the task {task}: {', '.join(left[:5])}")
    return called
