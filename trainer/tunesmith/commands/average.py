"""`tunesmith average`: one set of weights made of several, as a finished run: soups, interpolations, arithmetic."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.commands.evaluate import measure
from tunesmith.commands.finished import Weights, describe_run, open_run, read_recipe
from tunesmith.data.prepare import has_split
from tunesmith.ensemble.answers import digest_of
from tunesmith.ensemble.members import member_digest, split_rows
from tunesmith.ensemble.options import Asked, weights_of
from tunesmith.ensemble.soup import (
    Ingredients,
    average_files,
    base_files,
    copy_others,
    gather,
    interpolate,
    merge_files,
    tuned,
    write_run,
)
from tunesmith.ensemble.task_vectors import Merge
from tunesmith.errors import UserError
from tunesmith.run import best_metric
from tunesmith.tracking.progress import track

Row = dict[str, Any]
_SHOWN = 4  # metrics in a table
_NAME = "on eval"


@dataclass(frozen=True, slots=True)
class Averaged:
    """`how`: what was done, in words. `table`: what members and result reach on eval, empty where that was not
    compared, and `note` why. `folder` is None where only alphas were compared."""

    folder: Path | None
    how: str
    table: list[Row] = field(default_factory=list[Row])
    note: str = ""


def average(given: Sequence[str], asked: Asked, out: Path | None) -> Averaged:
    """Makes the finished run `out` of the weights `given` (RUN or RUN:checkpoint-N; of `wise` the base before the run).
    Only eval rows are looked at. Raises UserError."""
    weights = weights_of(given, asked)
    if out is None and (asked.alphas is None or len(asked.alphas) < 2):
        raise UserError("--out: is missing: the folder of the new run")
    if out is not None:
        _check_folder(out, overwrite=asked.overwrite)
    with tempfile.TemporaryDirectory(
        prefix="tunesmith-", dir=None if out is None else _parent(out)
    ) as folder:
        scratch = Path(folder)
        texts, base = (given[1:], given[0]) if asked.method == "wise" else (given, asked.base)
        found = gather([Weights.parse(text) for text in texts], scratch / "members")
        kitchen = _Kitchen(found, asked, scratch)
        match asked.method:
            case "greedy":
                made, result = kitchen.greedy()
            case "wise":
                made, result = kitchen.wise(base)
            case "uniform" | "weighted":
                made, result = kitchen.plain(weights)
            case _:
                made, result = kitchen.merged(asked.method, weights, base)
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
            made.rename(out)
            write_run(found, out, kitchen.about(result.how))
    notes = [result.note] if result.note else []
    if any(tuned(describe_run(member.run_dir)) for member in found.members):
        notes.append(
            "thresholds and temperatures of the members were left out: they are not those of other weights"
        )
    return Averaged(out, result.how, result.table, "\n".join(notes))


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = (out / "environment.json").is_file() and '"made_of"' in (out / "environment.json").read_text(
        encoding="utf-8"
    )
    if not ours:
        raise UserError(f"{out} is in use: name a new folder with --out")
    if not overwrite:
        raise UserError(
            f"{out} holds an average: replace it with --overwrite, or name a new folder with --out"
        )


class _Kitchen:
    """Where candidates are made and measured, below a folder that goes when it is done."""

    def __init__(self, found: Ingredients, asked: Asked, scratch: Path) -> None:
        self.found, self.asked, self.scratch = found, asked, scratch
        self.kept: list[dict[str, Any]] = []
        self.metric, self.greater = best_metric(found.lead.recipe, found.lead.objective)

    def plain(self, weights: Sequence[float]) -> tuple[Path, Averaged]:
        every = range(len(self.found.members))
        made = self._make("average", lambda final: average_files(self.found, every, weights, final))
        self._used(weights)
        return made, self._compared(made, f"{self.asked.method} average of {len(weights)}")

    def merged(self, method: Merge, weights: Sequence[float], base: str | None) -> tuple[Path, Averaged]:
        found, density, seed = self.found, self.asked.density or 1.0, self.asked.seed or 0
        self._used(weights)
        if found.adapted:
            from tunesmith.adapters.arithmetic import combination, merge_adapters, ranks_of

            if base is not None:
                raise UserError("--base: has no effect: adapters are changes of their base already")
            how = combination(method, ranks_of(found.finals))

            def cook(final: Path) -> None:
                copy_others(found.finals[0], final)
                merge_adapters(found.finals, weights, how, final, density, seed)

            made = self._make("average", cook)
            return made, self._compared(made, f"{method} of {len(weights)} adapters (PEFT's {how})")
        if method == "linear":
            return self.plain(weights)
        self._same_base(base)
        start = base_files(found.lead, base, self.scratch / "base")
        made = self._make("average", lambda f: merge_files(found, start, method, weights, density, seed, f))
        return made, self._compared(made, f"{method} of {len(weights)} task vectors")

    def greedy(self) -> tuple[Path, Averaged]:
        """Wortsman et al. 2022: in the order of their metric, a member stays where the average does not get worse."""
        self._must_compare()
        members = self.found.members
        alone = [
            self._measured_member(i) for i in track(range(len(members)), "measuring members", len(members))
        ]
        sign = 1.0 if self.greater else -1.0
        order = sorted(range(len(members)), key=lambda i: -sign * alone[i][self.metric])
        chosen, best = [order[0]], alone[order[0]]
        made = self._soup(chosen)
        for number in track(order[1:], "adding members", len(order) - 1):
            candidate = self._soup([*chosen, number])
            reached = measure(open_run(candidate), "eval")
            if sign * reached[self.metric] >= sign * best[self.metric]:
                chosen, best = [*chosen, number], reached
                shutil.rmtree(made)
                made = candidate
            else:
                shutil.rmtree(candidate)
        self.kept = [self._entry(i, 1.0 / len(chosen)) for i in chosen]
        notes = ["kept" if i in chosen else "left out" for i in range(len(members))]
        table = self._table(alone, best, f"greedy soup of {len(chosen)}", notes)
        return made, Averaged(
            None, f"greedy soup: {len(chosen)} of {len(members)} kept by eval {self.metric}", table
        )

    def wise(self, base: str | None) -> tuple[Path, Averaged]:
        found, alphas = self.found, self.asked.alphas
        assert alphas is not None
        if found.adapted:
            raise UserError(
                f"--method wise: {found.members[0]} trained adapters, which are zero in the base: write "
                "--method task --weights ALPHA RUN"
            )
        start = base_files(found.lead, base, self.scratch / "base")
        folders: list[Path] = []
        reached: list[dict[str, float]] = []
        compared = has_split(found.lead.recipe.data, "eval")
        if len(alphas) > 1:
            self._must_compare()
        for number, alpha in enumerate(track(alphas, "interpolating", len(alphas))):
            folders.append(self._make(str(number), lambda f, a=alpha: interpolate(found, start, a, f)))
            reached.append(measure(open_run(folders[-1]), "eval") if compared else {})
        best = 0
        if len(alphas) > 1:
            pick = max if self.greater else min
            best = pick(range(len(alphas)), key=lambda i: reached[i][self.metric])
        table = (
            [self._row(f"alpha {a:g}", m) for a, m in zip(alphas, reached, strict=True)] if compared else []
        )
        self.kept = [self._entry(0, alphas[best])]
        return folders[best], Averaged(
            None, f"WiSE-FT between {base} and the run, alpha {alphas[best]:g}", table
        )

    def about(self, how: str) -> dict[str, Any]:
        """What the result is made of, for its environment.json."""
        options = {key: getattr(self.asked, key) for key in ("density", "alphas", "base", "seed")}
        given = {key: value for key, value in options.items() if value is not None}
        return {"method": self.asked.method, "how": how, "members": self.kept, **given}

    # making and measuring

    def _make(self, name: str, cook: Callable[[Path], None]) -> Path:
        folder = self.scratch / f"made-{name}"
        cook(folder / "final")
        write_run(self.found, folder, {})
        return folder

    def _soup(self, chosen: Sequence[int]) -> Path:
        weights = [1.0 / len(chosen)] * len(chosen)
        name = "-".join(map(str, chosen))
        return self._make(name, lambda final: average_files(self.found, chosen, weights, final))

    def _used(self, weights: Sequence[float]) -> None:
        self.kept = [self._entry(i, weight) for i, weight in enumerate(weights)]

    def _entry(self, number: int, weight: float) -> dict[str, Any]:
        member = self.found.members[number]
        return {
            "run": str(member.run_dir.resolve()),
            "checkpoint": member.checkpoint,
            "weight": weight,
            "sha256": member_digest(member),
        }

    def _measured_member(self, number: int) -> dict[str, float]:
        member = self.found.members[number]
        return measure(open_run(member.run_dir, member.checkpoint), "eval")

    def _same_base(self, base: str | None) -> None:
        if base is not None:
            return
        names = {read_recipe(m.run_dir).model.model_name_or_path for m in self.found.members}
        if len(names) > 1:
            raise UserError(
                f"the runs began with {' and '.join(sorted(map(str, names)))}: task vectors are differences to one "
                "base; name it with --base"
            )

    def _other_rows(self) -> str:
        """Why members and result cannot be compared on the first member's eval rows; empty where they can."""
        lead = self.found.lead
        if not has_split(lead.recipe.data, "eval"):
            return f"{lead.run_dir} has no eval rows"
        seen, digest = {lead.run_dir}, digest_of(split_rows(lead, "eval")[0])
        for member in self.found.members:
            if member.run_dir in seen:
                continue
            seen.add(member.run_dir)
            one = describe_run(member.run_dir)
            if not has_split(one.recipe.data, "eval") or digest_of(split_rows(one, "eval")[0]) != digest:
                return f"the eval rows of {member.run_dir} are not those of {lead.run_dir}"
        return ""

    def _must_compare(self) -> None:
        if why := self._other_rows():
            raise UserError(f"--method {self.asked.method}: chooses by eval rows, but {why}")

    def _compared(self, made: Path, how: str) -> Averaged:
        if why := self._other_rows():
            return Averaged(None, how, note=f"not compared: {why}")
        members = len(self.found.members)
        alone = [self._measured_member(i) for i in track(range(members), "measuring members", members)]
        return Averaged(None, how, self._table(alone, measure(open_run(made), "eval"), self.asked.method))

    def _table(
        self, alone: list[dict[str, float]], own: dict[str, float], title: str, notes: Sequence[str] = ()
    ) -> list[Row]:
        pick = max if self.greater else min
        best = pick(range(len(alone)), key=lambda i: alone[i][self.metric])
        rows = [self._row(str(member), alone[i]) for i, member in enumerate(self.found.members)]
        for row, note in zip(rows, notes, strict=False):
            row["in the soup"] = note
        mean = {key: float(np.mean([one[key] for one in alone])) for key in own}
        rows.append(self._row("mean of members", mean))
        rows.append(self._row(f"best member ({self.metric})", alone[best]))
        rows.append(self._row(title, own))
        return rows

    def _row(self, name: str, metrics: dict[str, float]) -> Row:
        shown = list(dict.fromkeys([self.metric, "loss", *metrics]))[:_SHOWN]
        return {_NAME: name} | {key: metrics[key] for key in shown}
