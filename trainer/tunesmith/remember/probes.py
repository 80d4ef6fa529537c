"""What a model could do before, measured before and after: a finished run's own rows, objective and head, on the
backbone that was trained since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.adapters.merge import merge
from tunesmith.commands.finished import (
    FinishedRun,
    describe_run,
    open_run,
    read_recipe,
    weights_folder,
)
from tunesmith.data.prepare import Dataset, prepare
from tunesmith.errors import UserError
from tunesmith.evaluator import predict_rows
from tunesmith.recipe.remember import Probe, Remember
from tunesmith.tokenizer import tokenizer_hash
from tunesmith.tracking.progress import track
from tunesmith.unpartitioned import unpartitioned

_SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OLD_HEAD = "old"
"""The folder in a run's that holds the old head, where it was trained along."""


@dataclass(frozen=True, slots=True)
class Probed:
    """The metrics of `rows` old rows by the weights that the old run ended with, and by those of this run."""

    run: str
    split: str
    rows: int
    before: dict[str, float]
    after: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "split": self.split,
            "rows": self.rows,
            "before": self.before,
            "after": self.after,
        }


def probes_of(settings: Remember | None) -> dict[str, Probe]:
    """The probes of a recipe: those named, and the run that is to be remembered."""
    if settings is None:
        return {}
    known = {probe.run for probe in settings.probes.values()}
    own = {} if settings.run is None or settings.run in known else {"old": Probe(run=settings.run)}
    return {**own, **settings.probes}


def check_probes(settings: Remember, config: Any) -> None:
    """Raises UserError where a probe has nothing to be measured on, or is of another backbone than that of `config`,
    before the training rather than after it."""
    for name, probe in probes_of(settings).items():
        key = f"remember.probes.{name}" if name in settings.probes else "remember.run"
        try:
            _check(Path(probe.run), probe, config)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def _check(run: Path, probe: Probe, config: Any) -> None:
    if read_recipe(run).trainable.adapters:
        raise UserError(
            f"{run} trained adapters, and what is remembered is a whole model: train the run without them"
        )
    weights_folder(run)
    split_of(describe_run(run).recipe.data, probe.split)
    stored = json.loads((run / "final" / "config.json").read_text(encoding="utf-8"))
    changed = [f for f in _SHAPES if f in stored and getattr(config, f, None) not in (None, stored[f])]
    if changed:
        raise UserError(
            f"another backbone than that of {run}: its {', '.join(changed)} "
            f"{'is' if len(changed) == 1 else 'are'} not this model's (model.config)"
        )


def split_of(data: Any, asked: Literal["eval", "test"] | None) -> Literal["eval", "test"]:
    from tunesmith.data.prepare import has_split

    there: list[Literal["eval", "test"]] = [name for name in ("test", "eval") if has_split(data, name)]
    if asked is not None and asked not in there:
        raise UserError(f"the run has no {asked} rows")
    if not there:
        raise UserError("the run has neither eval nor test rows")
    return asked or there[0]


def probe_all(probes: Mapping[str, Probe], run_dir: Path) -> dict[str, dict[str, Any]]:
    """Each probe before and after the run in `run_dir`, whose final/ is written: what `Probed.as_json` says, by name,
    and written to probes.json. A probe's run that is a task of this one has the head that was trained along. On one
    process."""
    with unpartitioned():
        tasks = read_recipe(run_dir).tasks
        trained: dict[str, Tensor] = {}
        for task in tasks or (None,):  # a task's model has what its class has: some have no pooler
            trained |= backbone_state(run_dir, task)
        along = {task.run: name for name, task in tasks.items() if task.run is not None}
        found = {
            name: _probe(name, probe, run_dir, trained, along.get(probe.run)).as_json()
            for name, probe in probes.items()
        }
    (run_dir / "probes.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def backbone_state(run_dir: Path, task: str | None = None) -> dict[str, Tensor]:
    """The backbone of final/, adapters merged into it: on the CPU. Of a run of several tasks that of `task`."""
    run = open_run(run_dir, task=task)
    model: nn.Module = run.model
    if run.recipe.trainable.adapters:
        model = merge(model)
    base: nn.Module = getattr(model, "base_model", model)
    found = {name: value.detach().cpu() for name, value in base.state_dict().items()}
    run.engine.close()
    return found


def _probe(name: str, probe: Probe, run_dir: Path, trained: Mapping[str, Tensor], task: str | None) -> Probed:
    run = open_run(Path(probe.run))
    split = split_of(run.recipe.data, probe.split)
    datasets = prepare(run.recipe.data, run.run_dir, run.objective, tokenizer_hash(run.tokenizer))
    dataset = datasets[split]
    rows = min(len(dataset), probe.limit or len(dataset))
    before = _metrics(run, dataset, rows, f"probe {name}, before")
    if task is None:
        _put(name, run.model, trained, run_dir / OLD_HEAD)
    else:
        along = open_run(run_dir, task=task)
        run.model.load_state_dict(along.model.state_dict())
        along.engine.close()
    after = _metrics(run, dataset, rows, f"probe {name}, after")
    run.engine.close()
    return Probed(probe.run, split, rows, before, after)


@torch.no_grad()
def _put(name: str, model: nn.Module, trained: Mapping[str, Tensor], head: Path) -> None:
    """The trained backbone under the old head, or under the old head as it was trained along. What the trained one has
    not (the pooler, after a masked language model) stays the old run's."""
    base: nn.Module = getattr(model, "base_model", model)
    own = base.state_dict()
    there = {key: trained[key] for key in own if key in trained}
    wrong = [key for key, value in there.items() if value.shape != own[key].shape]
    if wrong or not there:
        told = f" ({', '.join(wrong[:3])})" if wrong else ""
        raise UserError(f"remember.probes.{name}: its backbone is another one than that of this run{told}")
    base.load_state_dict(own | there)
    if head.is_dir():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(head / "head.safetensors"), strict=False)


def _metrics(run: FinishedRun, dataset: Dataset, rows: int, what: str) -> dict[str, float]:
    per_device = run.recipe.evaluation.per_device_eval_batch_size
    bar = iter(track(iter(range(rows)), what))

    def advance(count: int) -> None:
        for _ in range(count):
            next(bar, None)

    sums, units, predictions = predict_rows(
        run.engine, run.objective, dataset, range(rows), per_device, run.recipe.training.seed, advance
    )
    weights = torch.tensor([term.weight for term in run.objective.terms], dtype=torch.float64)
    loss = float((weights.to(sums.device) * (sums / units.clamp(min=1))).sum())
    found = {"loss": loss} | run.objective.loss_metrics(loss)
    if predictions:
        found |= run.objective.score(dataset.table, range(rows), predictions).metrics
    return found
