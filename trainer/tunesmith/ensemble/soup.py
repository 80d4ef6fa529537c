"""Sets of weights made one: what they must have in common, and the folder of a run that holds the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.assemble import assemble
from tunesmith.commands.finished import (
    Described,
    Weights,
    describe_run,
    open_run,
    read_recipe,
    weights_folder,
)
from tunesmith.ensemble.members import objective_name
from tunesmith.ensemble.task_vectors import Merge, merge, weighted_sum
from tunesmith.ensemble.weight_files import WeightFiles, refuse_other_layout, write_like
from tunesmith.environment import versions
from tunesmith.errors import UserError
from tunesmith.export import export_final
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe.adapters import Existing
from tunesmith.recipe.load import dump_recipe
from tunesmith.recipe.paths import resolve_paths

_TOLD = {"counts", "rows", "soft", "decisions"}
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache"}


@dataclass(frozen=True, slots=True)
class Ingredients:
    """`finals` are folders in the form of a run's final/, one per member; `lead` is the first member's run."""

    members: tuple[Weights, ...]
    finals: tuple[Path, ...]
    lead: Described

    @property
    def adapted(self) -> bool:
        """Whether the members are adapters."""
        return bool(self.lead.recipe.trainable.adapters)


def gather(members: Sequence[Weights], scratch: Path) -> Ingredients:
    """The members' weights as files; those of a checkpoint are written below `scratch`. Raises UserError naming the
    member whose model, labels or vocabulary are not the first's."""
    for number, member in enumerate(members):
        if member in members[:number]:
            raise UserError(f"{member} is named twice: give it more weight with --method weighted --weights")
    every = [describe_run(member.run_dir) for member in members]
    lead = every[0]
    for one in every[1:]:
        _check_alike(lead, one)
    finals = tuple(_final(member, scratch / str(number)) for number, member in enumerate(members))
    found = Ingredients(tuple(members), finals, lead)
    if not found.adapted:
        _check_files(found)
    return found


def _check_alike(lead: Described, one: Described) -> None:
    a, b = lead.recipe, one.recipe
    if objective_name(lead) != objective_name(one):
        raise UserError(
            f"{one.run_dir}: objective {objective_name(one)} is not {objective_name(lead)} of {lead.run_dir}"
        )
    ours, theirs = (_meaning(described.objective.state()) for described in (lead, one))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{one.run_dir}: its {key} are not those of {lead.run_dir}, in the same order: the outputs of the two "
                "models mean different things"
            )
    if lead.tokenizer.get_vocab() != one.tokenizer.get_vocab():
        raise UserError(f"{one.run_dir}: its tokenizer has another vocabulary than that of {lead.run_dir}")
    if bool(a.trainable.adapters) != bool(b.trainable.adapters):
        raise UserError(
            f"{one.run_dir} and {lead.run_dir}: one trained adapters, the other the model: export --merge the adapter"
        )
    if a.trainable.adapters and _base_of(a) != _base_of(b):
        raise UserError(f"{one.run_dir}: its adapter is of the base {_base_of(b)[0]}, not {_base_of(a)[0]}")


def _meaning(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an objective learnt of the labels, without what says how many rows there were, and what was tuned."""
    return {
        key: _meaning(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
        if key not in _TOLD
    }


def tuned(described: Described) -> bool:
    """Whether a temperature or thresholds were fitted to the run's probabilities."""
    return "decisions" in described.objective.state()


def _base_of(recipe: Any) -> tuple[str | None, Any]:
    return recipe.model.model_name_or_path, recipe.model.quantization


def _final(member: Weights, scratch: Path) -> Path:
    if member.checkpoint is None:
        return weights_folder(member.run_dir)
    run = open_run(member.run_dir, member.checkpoint)
    scratch.mkdir(parents=True)
    return export_final(run.engine, run.recipe, run.tokenizer, scratch)


def _check_files(found: Ingredients) -> None:
    names = [str(member) for member in found.members]
    configs = [_config(final) for final in found.finals]
    for name, config in zip(names[1:], configs[1:], strict=True):
        differ = [key for key in configs[0].keys() | config.keys() if configs[0].get(key) != config.get(key)]
        if differ:
            key = min(differ)
            raise UserError(
                f"{name}: its config has {key} = {config.get(key)!r}, that of {names[0]} {configs[0].get(key)!r}"
            )
    with ExitStack() as stack:
        files = [stack.enter_context(WeightFiles(final)) for final in found.finals]
        for name, one in zip(names[1:], files[1:], strict=True):
            refuse_other_layout(files[0], one, (names[0], name))


def _config(final: Path) -> dict[str, Any]:
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in _VOLATILE}


Part = Callable[[str, Sequence[Tensor]], Tensor]
"""(name, that tensor of each folder) → the combined one, in fp64."""


def combine_files(folders: Sequence[Path], names: Sequence[str], target: Path, part: Part) -> None:
    """Writes to `target` the files of the first folder with combined values. What is not of floats must agree in all.
    Raises UserError."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folders[0].iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copyfile(path, target / path.name)
    with ExitStack() as stack:
        files = [stack.enter_context(WeightFiles(folder)) for folder in folders]

        def make(name: str) -> Tensor:
            values = [one[name] for one in files if name in one]
            if not values[0].is_floating_point():
                for value, who in zip(values, names, strict=False):
                    if not torch.equal(value, values[0]):
                        raise UserError(
                            f"{who}: {name}, which is no number to be averaged, is not that of {names[0]}"
                        )
                return values[0]
            return part(name, values).to(values[0].dtype)

        write_like(folders[0], target, make)


def average_files(found: Ingredients, chosen: Sequence[int], weights: Sequence[float], target: Path) -> None:
    """Σ w θ over the members `chosen`, of adapters Σ w ΔW; the sums are in fp64."""
    finals = [found.finals[i] for i in chosen]
    if found.adapted:
        from tunesmith.adapters.arithmetic import merge_adapters

        copy_others(finals[0], target)
        merge_adapters(finals, weights, "cat", target)
        return
    names = [str(found.members[i]) for i in chosen]
    combine_files(finals, names, target, lambda _, values: weighted_sum(values, weights))


def copy_others(final: Path, target: Path) -> None:
    """Tokenizer and the like."""
    target.mkdir(parents=True, exist_ok=True)
    for path in final.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "adapter_config.json":
            shutil.copyfile(path, target / path.name)


@dataclass(frozen=True, slots=True)
class Base:
    """The model that members began with, as files; `drawn` are the weights that no file gave, such as a new head."""

    folder: Path
    drawn: frozenset[str]


def base_files(lead: Described, base: str | None, scratch: Path) -> Base:
    """`base` is a run or a pretrained model; None: what the run `lead` began with. Raises UserError."""
    if base is not None and (":checkpoint-" in base or (Path(base) / "recipe.yaml").is_file()):
        weights = Weights.parse(base)
        _check_alike(lead, describe_run(weights.run_dir))
        return Base(_final(weights, scratch), frozenset())
    recipe = resolve_paths(read_recipe(lead.run_dir), lead.run_dir)
    changes: dict[str, Any] = {
        "dropout": None,
        "drop_path": None,
        "neftune_noise_alpha": None,
        "quantization": None,
    }
    if base is not None:
        changes["model_name_or_path"] = base
    elif recipe.model.init == "from_config":
        raise UserError(f"{lead.run_dir} began with random weights: there is no base; name one with --base")
    sections = {"model": recipe.model.model_copy(update=changes), "distill": None}
    recipe = recipe.model_copy(update=sections)
    quiet_libraries()
    built = assemble(recipe, lead.run_dir, lead.objective, lead.tokenizer, torch.device("cpu"))
    built.fill(torch.device("cpu"))
    scratch.mkdir(parents=True)
    built.model.save_pretrained(scratch)
    return Base(scratch, frozenset(built.facts.get("new_weights", ())))


def interpolate(found: Ingredients, base: Base, alpha: float, target: Path) -> None:
    """WiSE-FT (Wortsman et al. 2022): (1 − α) θ₀ + α θ. What the base has not is the run's."""

    def part(name: str, values: Sequence[Tensor]) -> Tensor:
        if name in base.drawn or len(values) == 1:
            return values[0].double()
        return weighted_sum(values, (alpha, 1.0 - alpha))

    _with_base(found, base, target, part)


def merge_files(
    found: Ingredients,
    base: Base,
    method: Merge,
    weights: Sequence[float],
    density: float,
    seed: int,
    target: Path,
) -> None:
    """θ₀ + the merge of the members' task vectors. What the base has not is the members' mean, in the proportion of
    the weights."""
    total = sum(weights) or 1.0

    def part(name: str, values: Sequence[Tensor]) -> Tensor:
        members = len(found.finals)
        if name in base.drawn or len(values) == members:
            return weighted_sum(values[:members], [weight / total for weight in weights])
        start = values[-1].double()
        vectors = [value.double() - start for value in values[:members]]
        return start + merge(method, vectors, weights, density, (seed, name))

    _with_base(found, base, target, part)


def _with_base(found: Ingredients, base: Base, target: Path, part: Part) -> None:
    with WeightFiles(found.finals[0]) as ours, WeightFiles(base.folder) as theirs:
        a, b = ours.layout(), theirs.layout()
        for name in b.keys() & a.keys():
            if a[name][1] != b[name][1]:
                raise UserError(
                    f"the base: {name} has shape {list(b[name][1])}, that of the run {list(a[name][1])}"
                )
        if not (b.keys() - base.drawn) & a.keys():
            raise UserError(f"the base shares no weight with {found.members[0]}")
    names = [*map(str, found.members), "the base"]
    combine_files([*found.finals, base.folder], names, target, part)


def write_run(found: Ingredients, folder: Path, about: Mapping[str, Any]) -> None:
    """What makes `folder`, which has a final/, a finished run: the first member's recipe and what its objective learnt,
    and an environment that says what it is made of."""
    recipe = resolve_paths(read_recipe(found.lead.run_dir), found.lead.run_dir)
    changes: dict[str, Any] = {"run_name": folder.name, "output_dir": str(folder.resolve().parent)}
    if found.adapted:
        adapter = Existing(type="existing", path="final")
        changes["trainable"] = recipe.trainable.model_copy(update={"adapters": [adapter]})
    recipe = recipe.model_copy(update=changes)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    state = json.loads((found.lead.run_dir / "objective.json").read_text(encoding="utf-8"))
    state.pop("decisions", None)  # they were fitted to the probabilities of other weights
    (folder / "objective.json").write_text(json.dumps(state, ensure_ascii=False) + "\n", encoding="utf-8")
    made = {"versions": versions(), "facts": {}, "made_of": dict(about)}
    text = json.dumps(made, indent=1, ensure_ascii=False, default=str)
    (folder / "environment.json").write_text(text + "\n", encoding="utf-8")
