"""The parameters of a model, and which of them a recipe's words, layers or patterns mean."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from tunesmith.errors import UserError
from tunesmith.recipe.selectors import Layers, Pattern, Selector, parse, parse_layers
from tunesmith.shapes import whole_numel
from tunesmith.trainable.structure import Place, Structure


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a model, once, however often it is tied. `names`: what a pattern may call it. `adapter`: it is an
    adapter's, not the model's. `spare`: the copy that PEFT keeps of a module which it trains: nothing is computed
    with it."""

    name: str
    value: nn.Parameter
    names: tuple[str, ...]
    places: tuple[Place, ...]
    in_norm: bool
    adapter: bool
    spare: bool

    @property
    def is_head(self) -> bool:
        return any(place.kind == "head" for place in self.places)

    @property
    def place(self) -> Place:
        """The deepest of its places: a head that is tied to the embeddings lies with these."""
        return max(self.places, key=lambda place: place.depth)

    @property
    def can_train(self) -> bool:
        return not self.spare and self.value.dtype.is_floating_point

    @property
    def numel(self) -> int:
        return whole_numel(self.value)


def parameters(model: nn.Module) -> list[Parameter]:
    """All of a model's, in the order of `named_parameters`."""
    structure = Structure(model)
    names: dict[int, list[str]] = {}
    values: dict[int, nn.Parameter] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
        values[id(value)] = value
    return [_parameter(structure, model, names[key], value) for key, value in values.items()]


def _parameter(structure: Structure, model: nn.Module, names: list[str], value: nn.Parameter) -> Parameter:
    found = [_own_name(structure, name) for name in names]
    places = [Place("adapter") if one.inside is None else structure.place(one.inside) for one in found]
    owner = model.get_submodule(names[0].rpartition(".")[0])
    called = [name for one, full in zip(found, names, strict=True) for name in (full, one.inside, one.plain)]
    return Parameter(
        name=names[0],
        value=value,
        names=tuple(dict.fromkeys(name for name in called if name is not None)),
        places=tuple(dict.fromkeys(places)),
        in_norm="norm" in type(owner).__name__.lower(),
        adapter=found[0].adapter,
        spare=found[0].spare,
    )


@dataclass(frozen=True, slots=True)
class _Name:
    """`inside`: relative to the model inside PEFT's. `plain`: as the model has it without adapters."""

    inside: str | None
    plain: str | None
    adapter: bool
    spare: bool


def _own_name(structure: Structure, name: str) -> _Name:
    """PEFT puts a module in place of one that it changes (which is its `base_layer`), and of one that it trains whole
    (an `original_module` beside `modules_to_save`, by adapter)."""
    prefix = f"{structure.prefix}." if structure.prefix else ""
    if not name.startswith(prefix):
        return _Name(None, None, adapter=True, spare=False)
    inside = name[len(prefix) :]
    rest, at, plain = inside.split("."), "", list[str]()
    spare = False
    while len(rest) > 1:
        module, step = structure.modules[at], rest.pop(0)
        at = f"{at}.{step}".lstrip(".")
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            if step != "base_layer":
                return _Name(inside, None, adapter=True, spare=False)
        elif hasattr(module, "original_module") and step == "modules_to_save":
            at = f"{at}.{rest.pop(0)}"
        elif hasattr(module, "original_module") and step in ("original_module", "token_adapter"):
            spare |= step == "original_module"
        else:
            plain.append(step)
    tuned = hasattr(structure.modules[at], "adapter_layer_names") and hasattr(
        structure.modules[at], "base_layer"
    )
    return _Name(inside, None if tuned else ".".join([*plain, *rest]), adapter=tuned, spare=spare)


def select(
    known: list[Parameter], text: str, key: str, *, layers: bool = False, adapters: bool = False
) -> list[Parameter]:
    """The parameters that `text` names (see `tunesmith.recipe.selectors`), which is about layers where `layers`; those
    of adapters only where `adapters`. Raises UserError, which names `key`, where it names none."""
    candidates = [one for one in known if not one.spare and (adapters or not one.adapter)]
    selector = parse_layers(text) if layers else parse(text)
    assert selector is not None, "the recipe was not checked"
    found = _matches(candidates, selector, key)
    if not found:
        raise UserError(f"{key}: {_why_none(known, candidates, text)}")
    return found


def _matches(candidates: list[Parameter], selector: Selector, key: str) -> list[Parameter]:
    match selector:
        case Layers():
            _refuse_missing_layers(candidates, selector, key)
            return [one for one in candidates if any(_in_layers(place, selector) for place in one.places)]
        case Pattern(text):
            return [one for one in candidates if any(fnmatch.fnmatchcase(n, text) for n in one.names)]
        case "all":
            return candidates
        case "backbone":
            return [one for one in candidates if not one.is_head]
        case "head":
            return [one for one in candidates if one.is_head]
        case "embeddings":
            return [one for one in candidates if any(place.kind == "embeddings" for place in one.places)]
        case "norms":
            return [one for one in candidates if one.in_norm]
        case "biases":
            return [one for one in candidates if one.name.endswith("bias")]


def _in_layers(place: Place, wanted: Layers) -> bool:
    number = place.layers - 1 - place.layer if wanted.from_top else place.layer
    return place.kind == "layer" and wanted.start <= number < wanted.stop


def _refuse_missing_layers(candidates: list[Parameter], wanted: Layers, key: str) -> None:
    highest = max((p.layers for one in candidates for p in one.places if p.kind == "layer"), default=0)
    if highest == 0:
        raise UserError(
            f"{key}: the model has no layers that can be told apart: name parameters by a pattern"
        )
    if wanted.stop > highest:
        counted = (
            f"{highest} layers" if wanted.from_top or wanted.start == 0 else f"layers 0 to {highest - 1}"
        )
        raise UserError(f"{key}: the model has {counted}, fewer than asked for")


def _why_none(known: list[Parameter], candidates: list[Parameter], text: str) -> str:
    if any(fnmatch.fnmatchcase(name, text) for one in known if one.adapter for name in one.names):
        return (
            f"{text!r} names an adapter's parameters: adapters are trained from the start, unless they say "
            "trainable: false"
        )
    names = [one.names[-1] for one in candidates]
    parts = {part for name in names for part in name.split(".")}
    for word in re.findall(r"\w+", text):
        if close := [] if word in parts else get_close_matches(word, parts, 1):
            return f"{text!r} matches no parameter; did you mean {text.replace(word, close[0])!r}?"
    return f"{text!r} matches no parameter; the first is {names[0]}"
