"""Several trained LoRA adapters of one base as one: sums of their changes ΔW = s·B·A, and merges of them, from their
files alone. The combinations have PEFT's names (`add_weighted_adapter`): `cat` and `…_svd` work on ΔW, the others on
A and on B, each by itself, which is rough but keeps the rank."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters.state import FILE
from tunesmith.ensemble.task_vectors import Merge, low_rank, merge, signed_roots, weighted_sum
from tunesmith.errors import MachineError, UserError

_CONFIG = "adapter_config.json"
_A = re.compile(r"\.lora_A\.|\.lora_embedding_A")


@dataclass(frozen=True, slots=True)
class LoraFiles:
    """One adapter: its config, its tensors, and the names of its A's."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def downs(self) -> list[str]:
        return sorted(name for name in self.tensors if _A.search(name))

    def scale(self, down: str) -> float:
        """s of ΔW = s·B·A: alpha / r, or alpha / √r (Kalajdzievski 2023)."""
        module = module_of(down)
        alpha = float(self.config["lora_alpha"])
        for pattern, own in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(own)
                break
        r = self.tensors[down].shape[0]
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)


def up_of(down: str) -> str:
    """The name of B beside that of A."""
    return down.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")


def module_of(down: str) -> str:
    """The name that PEFT's patterns know the module by."""
    return re.split(r"\.lora_", down, maxsplit=1)[0].removeprefix("base_model.model.")


def read_lora(folder: Path) -> LoraFiles:
    """Raises UserError for an adapter whose changes are no plain s·B·A."""
    from safetensors.torch import load_file

    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"{folder}: holds no adapter called default: runs with several adapters cannot be combined"
        )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder}: is of {kind}; arithmetic is defined on LoRA's ΔW = s·B·A alone")
    tensors = load_file(folder / FILE)
    for name, value in tensors.items():
        if "lora_magnitude_vector" in name:
            raise UserError(
                f"{folder}: use_dora: its change is not linear in B·A; export --merge it, and average that"
            )
        if ("lora_A" in name or "lora_B" in name) and value.ndim != 2:
            raise UserError(f"{folder}: {name} is of a convolution, on which no arithmetic is defined here")
    return LoraFiles(folder, config, tensors)


def combination(method: Merge, ranks: Sequence[int]) -> str:
    """PEFT's name of what is done: on ΔW where ranks differ."""
    if method == "task":
        return "cat"
    if len(set(ranks)) == 1:
        return method
    return "cat" if method == "linear" else f"{method}_svd"


def merge_adapters(
    folders: Sequence[Path],
    weights: Sequence[float],
    how: str,
    target: Path,
    density: float = 1.0,
    seed: int = 0,
) -> None:
    """Writes the adapter that combines those in `folders` into `target`: `how` is a name that `combination` gives.
    Its alpha is its rank, so that its scale is 1. What else was trained (heads, rows of the embedding) is their mean,
    in the proportion of the weights. Raises UserError where the adapters do not change the same modules."""
    from safetensors.torch import save_file

    every = [read_lora(folder) for folder in folders]
    _check_alike(every)
    lead = every[0]
    made: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for down in lead.downs:
        pairs = [(one.tensors[down], one.tensors[up_of(down)]) for one in every]
        scaled = [w * one.scale(down) for w, one in zip(weights, every, strict=True)]
        a, b = _pair(how, pairs, scaled, [one.scale(down) for one in every], weights, density, (seed, down))
        made[down], made[up_of(down)] = a, b
        ranks[module_of(down)] = a.shape[0]
    proportions = _proportions(weights)
    for name, value in lead.tensors.items():
        if name not in made:
            made[name] = _rest(name, [one.tensors[name] for one in every], proportions, every)
        made[name] = made[name].to(value.dtype).contiguous()
    config = dict(lead.config) | {
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "use_rslora": False,
        "rank_pattern": _pattern(ranks),
        "alpha_pattern": _pattern(ranks),
        "init_lora_weights": True,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(made, target / FILE, metadata={"format": "pt"})
        (target / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{target}: cannot be written: {error.strerror or error}") from None


def _pair(
    how: str, pairs: Sequence[tuple[Tensor, Tensor]], scaled: Sequence[float], scales: Sequence[float],
    weights: Sequence[float], density: float, key: tuple[object, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A and B of the combination, in fp64."""
    if how == "cat":  # Σ w s B A = [B₁ B₂ …] [w₁s₁A₁; w₂s₂A₂; …]
        downs = [s * a.double() for s, (a, _) in zip(scaled, pairs, strict=True)]
        return torch.cat(downs, 0), torch.cat([b.double() for _, b in pairs], 1)
    if how.endswith("_svd"):
        method: Any = how.removesuffix("_svd")
        deltas = [s * (b.double() @ a.double()) for s, (a, b) in zip(scales, pairs, strict=True)]
        return low_rank(merge(method, deltas, weights, density, key), max(a.shape[0] for a, _ in pairs))
    method = how
    roots = [signed_roots(s) for s in scaled]
    down = merge(method, [a for a, _ in pairs], [root for root, _ in roots], density, (*key, "A"))
    return down, merge(method, [b for _, b in pairs], [root for _, root in roots], density, (*key, "B"))


def _rest(
    name: str, values: Sequence[Tensor], proportions: Sequence[float], every: Sequence[LoraFiles]
) -> Tensor:
    for value, one in zip(values, every, strict=True):
        if value.shape != values[0].shape:
            shapes = f"{list(value.shape)} and {list(values[0].shape)}"
            raise UserError(f"{one.folder}: {name} has another shape than in {every[0].folder}: {shapes}")
    return weighted_sum(values, proportions)


def _proportions(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    if abs(total) < 1e-12:
        return [1.0 / len(weights)] * len(weights)
    return [weight / total for weight in weights]


def _check_alike(every: Sequence[LoraFiles]) -> None:
    lead = every[0]
    for one in every[1:]:
        if differ := sorted(lead.tensors.keys() ^ one.tensors.keys()):
            holder = lead.folder if differ[0] in lead.tensors else one.folder
            raise UserError(
                f"{one.folder}: does not change what {lead.folder} does: {holder} alone has {differ[0]}"
            )
        for down in lead.downs:
            for name, side in ((down, 1), (up_of(down), 0)):
                if one.tensors[name].shape[side] != lead.tensors[name].shape[side]:
                    raise UserError(f"{one.folder}: {name} is of another model than {lead.folder}")


def ranks_of(folders: Sequence[Path]) -> list[int]:
    """Every rank that occurs in the adapters."""
    return [one.tensors[down].shape[0] for one in map(read_lora, folders) for down in one.downs]


def _pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """The modules whose rank is not the greatest."""
    most = max(ranks.values())
    return {re.escape(module): rank for module, rank in ranks.items() if rank != most}
