"""Computes what a frozen backbone makes of each row once, and puts that in the backbone's place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from tunesmith import __version__
from tunesmith.batch import Batch
from tunesmith.data.prepare import Dataset, cache_root
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.features.fields import Reading
from tunesmith.features.lookup import Lookup, StandIn
from tunesmith.features.reading import KEY, Observed, find_reading, outputs, replaced
from tunesmith.features.refusals import refuse
from tunesmith.features.store import FeatureStore
from tunesmith.module import Predicted
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.tracking.progress import track

_PROBED = 8  # rows by which it is found out what the head reads
_COMPARED = 32  # rows by which the loss from the cache is held against the whole model's
_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 2e-3}  # relative, of that loss


def cache_features(
    engine: Engine, recipe: Recipe, objective: Objective, datasets: Mapping[str, Dataset]
) -> dict[str, Any]:
    """From here on the backbone's forward returns what the disk has of the rows of `datasets`, and computes nothing.
    Returns facts. To be called by all ranks, when the engine has prepared the model and nothing has been trained.
    Raises UserError where the features are no function of the row, MachineError where the disk has no room."""
    started = time.perf_counter()
    refuse(recipe, engine, objective)
    backbone: nn.Module = engine.train_module.model.base_model  # pyright: ignore[reportAssignmentType]
    engine.module.eval()
    train = datasets["train"]
    reading = find_reading(engine, backbone, _batch(engine, objective, train, _spread(train, _PROBED)))
    digest = _digest(engine, backbone, reading)
    stores = {
        name: FeatureStore(
            cache_root(recipe.data) / f"features-{digest}-{dataset.table.folder.name}",
            dataset.table.lengths(),
            reading.read,
        )
        for name, dataset in datasets.items()
    }
    for store in stores.values():
        store.folder.mkdir(parents=True, exist_ok=True)
        store.check_room()
    per_batch = recipe.evaluation.per_device_eval_batch_size
    computed = sum(
        _fill(engine, objective, backbone, reading, datasets[name], store, per_batch)
        for name, store in stores.items()
    )
    engine.wait_for_all("features")
    lookup = Lookup([(datasets[name].table, store) for name, store in stores.items()], reading.inputs)
    stand_in = StandIn(backbone, reading, lookup)
    differences = _compare(engine, objective, backbone, stand_in, train)
    engine.module.train()
    backbone.forward = stand_in
    return {
        "cached_features": {
            field.name: f"{field.taken} {[*field.inner]} {field.dtype}" for field in reading.read
        },
        "cached_features_rows": {name: len(store) for name, store in stores.items()},
        "cached_features_bytes": sum(store.bytes for store in stores.values()),
        "cached_features_computed_rows": int(engine.sum(torch.tensor(float(computed)))),
        "cached_features_seconds": time.perf_counter() - started,
        **differences,
    }


def _spread(dataset: Dataset, count: int) -> list[int]:
    """Rows of all lengths, the longest one first."""
    order = dataset.table.lengths().argsort(kind="stable")[::-1]
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[place]) for place in dict.fromkeys(places.tolist())]


def _batch(engine: Engine, objective: Objective, dataset: Dataset, rows: Sequence[int]) -> Batch:
    return objective.collate([dataset.table.row(row) for row in rows], rows).to(engine.device)


def _digest(engine: Engine, backbone: nn.Module, reading: Reading) -> str:
    """Of all that decides the numbers: the weights as they are held (quantised or not), the config, the precision,
    the kind of device and the versions. What the head alone is made of is left out."""
    config: Any = backbone.config
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if "drop" not in name and name not in {"id2label", "label2id", "problem_type", "_name_or_path"}
    }
    about = {
        "config": fields,
        "attention": getattr(config, "_attn_implementation", None),
        "class": type(backbone).__name__,
        "precision": engine.train_module.precision,
        "device": engine.device.type,
        "reading": [[f.name, f.taken, f.inner, str(f.dtype)] for f in reading.read],
        "inputs": reading.inputs,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            raw: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:24]


def _fill(
    engine: Engine, objective: Objective, backbone: nn.Module, reading: Reading, dataset: Dataset,
    store: FeatureStore, per_batch: int,
) -> int:  # fmt: skip
    """Computes this rank's share of what is missing; the number of rows."""
    seen = Observed(backbone)

    def compute(rows: Sequence[int]) -> dict[str, Tensor]:
        batch = _batch(engine, objective, dataset, rows)
        mask = batch.inputs["attention_mask"].bool()
        outputs(engine, batch)
        return {field.name: field.pick(seen.output[field.name], mask).cpu() for field in reading.read}

    total = sum(-(-len(store.rows_of(shard)) // per_batch) for shard in store.missing())
    with replaced(backbone, seen):
        batches = store.fill(compute, per_batch, engine.rank / engine.world_size)
        if engine.rank == 0:
            batches = track(batches, f"computing features of {dataset.name}, batches", total)
        done = 0
        for rows in batches:
            done += rows
    return done


def _compare(
    engine: Engine, objective: Objective, backbone: nn.Module, stand_in: StandIn, dataset: Dataset
) -> dict[str, float]:
    """The cache held against the model, on a batch whose padding is not that of the cached rows. Raises UserError
    where the loss is another."""
    batch = _batch(engine, objective, dataset, _spread(dataset, _COMPARED))
    mask = batch.inputs["attention_mask"].bool()
    seen = Observed(backbone)
    with torch.no_grad():
        with replaced(backbone, seen):
            expected: Predicted = engine.forward(batch, "predict")
        own, ours = seen.output, stand_in(**seen.arguments)
        with replaced(backbone, stand_in):
            found: Predicted = engine.forward(batch, "predict")
    apart = float(((found.sums - expected.sums).abs() / expected.sums.abs().clamp_min(1e-6)).max())
    if not apart <= _TOLERANCE[engine.train_module.precision]:
        raise UserError(
            f"{KEY}: the loss from the features is not the whole model's ({apart:.1e} apart on "
            f"{batch.samples} rows): the head of {type(engine.train_module.model).__name__} uses more of its backbone "
            "than it reads of the rows' own tokens; set cache_features: false"
        )
    differences = [
        _apart(field.pick(own[field.name], mask), field.pick(ours[field.name], mask))
        for field in stand_in.reading.read
    ]
    return {"cached_features_difference": max(differences), "cached_features_loss_difference": apart}


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float(
        (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30)
    )
