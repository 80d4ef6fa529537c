"""The parts of a model, found by its own structure: its layers, what lies before and after them, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["embeddings", "layer", "after", "head", "adapter"]


@dataclass(frozen=True, slots=True)
class Place:
    """`layer` counts from 0, the lowest; `layers` is how many its stack has (for embeddings: the highest stack above
    them). An encoder and a decoder are two stacks."""

    kind: Kind
    layer: int = 0
    layers: int = 0

    @property
    def depth(self) -> int:
        """Layers below the head: 0 is the head and what follows the layers, 1 the top layer; the embeddings lie one
        below the lowest layer."""
        match self.kind:
            case "layer":
                return self.layers - self.layer
            case "embeddings":
                return self.layers + 1
            case "after" | "head" | "adapter":
                return 0

    def __str__(self) -> str:
        match self.kind:
            case "layer":
                return f"layer {self.layer}"
            case "after":
                return "what follows the layers"
            case "adapter":
                return "adapter"
            case "embeddings" | "head":
                return self.kind


class Structure:
    """Where the modules and parameters of `model` lie; names are relative to it. A model inside PEFT's is looked at
    itself: what PEFT holds beside it (`prefix` is where it lies) is its adapters'."""

    def __init__(self, model: nn.Module) -> None:
        # the engines import the optimizer, which imports this package
        from tunesmith.engine.layers import transformer_layers

        own: Any = model
        self.model: Any = own.get_base_model() if hasattr(own, "peft_config") else own
        names = {id(module): name for name, module in model.named_modules()}
        self.prefix = names[id(self.model)]
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))
        by_id = {id(module): name for name, module in self.model.named_modules()}
        self._layers: dict[str, tuple[int, int]] = {}
        stacks: dict[str, list[str]] = {}
        for layer in transformer_layers(self.model):
            name = by_id[id(layer)]
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
        for stack in stacks.values():
            self._layers |= {name: (index, len(stack)) for index, name in enumerate(stack)}
        base = getattr(self.model, "base_model", self.model)
        self._base = by_id.get(id(base), "")
        self._outputs = by_id.get(id(_embeddings(self.model, "get_output_embeddings")))
        self._inputs = by_id.get(id(_embeddings(self.model, "get_input_embeddings")))

    @property
    def has_layers(self) -> bool:
        return bool(self._layers)

    def place(self, name: str) -> Place:
        """Where a module or parameter of the model lies; `name` may be one of a module that holds layers."""
        parts = name.split(".")
        ancestors = [".".join(parts[:i]) for i in range(len(parts) + 1)]
        for ancestor in ancestors:
            if ancestor in self._layers:
                return Place("layer", *self._layers[ancestor])
        if self._base and not _inside(name, self._base):
            return Place("head")
        if _inside(name, self._outputs) and not _inside(name, self._inputs):
            return Place("head")
        holder = max((one for one in ancestors if self._above(one)), key=len, default="")
        layers = max((self._layers[one][1] for one in self._above(holder)), default=0)
        if _inside(name, self._inputs):
            return Place("embeddings", layers=layers)
        return self._beside(name, holder, layers)

    def unit(self, name: str) -> str:
        """What a module that holds no layers is computed with: its layer's name, or the kind of its place."""
        within = [layer for layer in self._layers if _inside(name, layer)]
        return within[0] if within else self.place(name).kind

    def holds_layers(self, name: str) -> bool:
        return bool(self._above(name))

    def _above(self, module: str) -> list[str]:
        """The layers that lie in a module."""
        return [layer for layer in self._layers if _inside(layer, module) and layer != module]

    def _beside(self, name: str, holder: str, layers: int) -> Place:
        """Of what lies in `holder`, the module that holds layers, beside these."""
        child = name[len(holder) :].lstrip(".").split(".")[0]
        children = list(self.modules[holder]._modules)  # pyright: ignore[reportPrivateUsage]
        root = holder == self._base == ""  # a class that adds its head beside its layers: T5
        if child not in children:
            return Place("head") if root else Place("embeddings", layers=layers)
        at = children.index(child)
        holding = [i for i, one in enumerate(children) if self._above(f"{holder}.{one}".lstrip("."))]
        # modules stand in the order of their use, but for some norms: BART's of the embeddings, OPT's last one
        called = child if layers else name
        if "embed" in called or (at < min(holding, default=0) and "final" not in child):
            return Place("embeddings", layers=layers)
        return Place("head" if root and at > max(holding, default=at) else "after")


def _inside(name: str, module: str | None) -> bool:
    return module is not None and (module == "" or name == module or name.startswith(f"{module}."))


def _embeddings(model: Any, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one without them
        return None
