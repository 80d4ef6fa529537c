"""Several ways of training, beside each other on the same seeds: mean and spread of what the test rows say.

Each variant is a recipe with overrides; every seed draws other new weights, another order and another split.

    python bench/compare_recipes.py --seeds 5 "full=configs/medical_abstracts_gradual.yaml trainable={}" \\
        "gradual=configs/medical_abstracts_gradual.yaml"
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    recipe: str
    overrides: tuple[str, ...]


def variant(text: str) -> Variant:
    """`name=RECIPE key=value …`"""
    name, _, rest = text.partition("=")
    recipe, *overrides = shlex.split(rest)
    return Variant(name, recipe, tuple(overrides))


def measured(variant: Variant, seed: int, folder: Path) -> dict[str, float]:
    """The metrics of the test rows, the training seconds and the share of parameters that were trained."""
    name = f"{variant.name}-{seed}"
    command = [str(Path(sys.executable).with_name("tunesmith")), "train", variant.recipe, *variant.overrides]
    command += [f"training.seed={seed}", f"output_dir={folder}", f"run_name={name}", "tracking.progress=off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stderr}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    tested = next(row for row in reversed(rows) if "test_loss" in row)
    trained = next(row for row in reversed(rows) if "seconds" in row)
    facts = json.loads((folder / name / "environment.json").read_text("utf-8"))["facts"]
    found = {key.removeprefix("test_"): value for key, value in tested.items() if key.startswith("test_")}
    share = facts["trainable_parameters"] / facts["total_parameters"]
    return found | {"training seconds": trained["seconds"], "trained share": share}


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", type=variant, metavar="NAME=RECIPE [KEY=VALUE …]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--metrics", nargs="+", default=["accuracy", "macro_f1", "training seconds", "trained share"]
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {one.name: [] for one in args.variants}
    # seed by seed: what the machine does meanwhile falls on all variants alike
    runs = [(one, seed) for seed in range(args.seeds) for one in args.variants]
    with tempfile.TemporaryDirectory() as folder:
        for one, seed in track(runs, "runs", console=Console(stderr=True)):
            found[one.name].append(measured(one, seed, Path(folder)))
    table = Table("", *args.metrics, title=f"test rows, mean ± standard deviation over {args.seeds} seeds")
    for name, rows in found.items():
        table.add_row(name, *(shown([row[metric] for row in rows]) for metric in args.metrics))
    Console(width=120).print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
