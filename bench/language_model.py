"""A language model of 100 M parameters with a vocabulary of 50,304 on the CPU: tunesmith's own run, with its kernels
and without (`kernels: reference`), beside transformers.Trainer and TRL's SFTTrainer on the same rows.

Each contestant lives in a process of its own and does a few steps of a round when it is its turn, all from the same
weights, on the same rows in the same batches, with the same AdamW (fused), clipping and precision; the losses of the
first steps are held against each other. The ratios count, not the seconds. Then the loss of 200 steps, with the
kernels and without.

Memory is the process's ru_maxrss less its resident set right before the model is built: weights, gradients, AdamW's
state, activations and logits. The model: Llama's architecture, 12 layers of 768, tied embeddings, random weights. The
tokenizer is a byte-level BPE of the data's own text, which gives fewer tokens than the model has classes.

Real text comes from the folder in TUNESMITH_DATA: dolly_hhrlhf_small (task `sft`: the loss is on the answers) and
classic_books (task `text`: on every token). Needs 12 GB of memory. TRL is skipped unless a Python that has it is named.

    OMP_NUM_THREADS=2 python bench/language_model.py [--quick] [--trl-python PATH] [--task sft text]
        [--precision fp32 bf16] [--rounds 5] [--steps 3] [--curve-steps 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language_model_peers import LEARNING_RATE, WEIGHT_DECAY

from tunesmith.batch import IGNORED
from tunesmith.data.prepare import prepare
from tunesmith.model import train_bpe
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

VOCABULARY, WARM_UP, ROWS, LENGTH = 50_304, 2, 8, 256
CURVE_ROWS, CURVE_LENGTH, CURVE_END = 4, 64, 20
SAME_LOSS = {"fp32": 1e-4, "bf16": 1e-2}  # relative, of the first steps
NAMES = {
    "auto": "tunesmith",
    "reference": "tunesmith, kernels: reference",
    "trainer": "transformers.Trainer",
    "trl": "TRL SFTTrainer",
}
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SOURCES = {
    "sft": {
        "path": "dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl",
        "format": "prompt_answer",
        "columns": {"answer": "response"},
    },
    "text": {"path": "classic_books/books", "format": "text"},
}
OBJECTIVES = {"sft": "sft", "text": "causal_lm"}

Windows = Sequence[Sequence[dict[str, list[int]]]]
"""The rows of every step: `input_ids` and `labels`."""


@dataclass(frozen=True)
class Bench:
    """What all contestants of a run of this script share. `work`: a folder for the model, the rows and the runs."""

    work: Path
    data: Path
    pythons: dict[str, str]  # by contestant

    @property
    def model(self) -> Path:
        return self.work / "model"

    def make_model(self) -> tuple[int, int]:
        """(parameters, tokens of the tokenizer)"""
        from transformers import LlamaConfig, LlamaForCausalLM

        files = [
            self.data / str(SOURCES["sft"]["path"]),
            *sorted((self.data / "classic_books").rglob("*.md")),
        ]
        tokenizer = train_bpe((file.read_text(encoding="utf-8") for file in files), VOCABULARY)
        tokenizer.save_pretrained(self.model)
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, **ids))
        model.save_pretrained(self.model)
        return model.num_parameters(), len(tokenizer)

    def recipe(
        self, task: str, precision: str, rows: int, length: int, steps: int, **optim: Any
    ) -> dict[str, Any]:
        source = SOURCES[task]
        return {
            "model": {"model_name_or_path": str(self.model)},
            "data": {
                "train": [source | {"path": str(self.data / str(source["path"]))}],
                "max_length": length,
                "cache_dir": str(self.work / "cache"),
            },
            "objective": {"type": OBJECTIVES[task]},
            "optim": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, **optim},
            "schedule": {"lr_scheduler_type": "constant"},
            "training": {
                "max_steps": steps,
                "global_batch_size": rows,
                "per_device_train_batch_size": rows,
                "precision": precision,
            },
            "parallel": {"strategy": "single"},
            "tracking": {"progress": "off"},
            "output_dir": str(self.work / "runs"),
            "run_name": "bench",
        }

    def setup(self, recipe: dict[str, Any], windows: Windows = ()) -> Path:
        """The file for the contestants."""
        rows = self.work / "rows.json"
        rows.write_text(json.dumps([row for window in windows for row in window]), encoding="utf-8")
        training = recipe["training"]
        setup = {
            "model": str(self.model),
            "rows": str(rows),
            "rows_per_step": training["global_batch_size"],
            "steps": training["max_steps"],
            "precision": training["precision"],
            "recipe": recipe,
            "scratch": str(self.work / "peers"),
        }
        file = self.work / "setup.json"
        file.write_text(json.dumps(setup), encoding="utf-8")
        return file


def choose_seed(recipe: dict[str, Any]) -> Windows:
    """The rows of every step, in tunesmith's order, by a seed (left in the recipe) with which no step is short of rows
    (Trainer has none such within an epoch) and the last of the warm-up has the longest batch there is: the peak of the
    memory is then everyone's own on the same rows."""
    whole = Recipe.model_validate(recipe)
    tokenizer, _ = tokenizer_for(whole, Path())
    objective = build_objective(whole, tokenizer)
    dataset = prepare(whole.data, Path(), objective, tokenizer_hash(tokenizer))["train"]
    for seed in range(1000):
        recipe["training"]["seed"] = seed
        stream = build_stream(Recipe.model_validate(recipe), dataset, objective)
        cells = [stream.cells(step, 1) for step in range(recipe["training"]["max_steps"])]
        windows = [[dataset.table.row(row) for (row,) in micro_steps[0][0]] for micro_steps in cells]
        shortest = min(len(row["input_ids"]) for row in windows[WARM_UP - 1])
        if shortest == whole.data.max_length and all(len(window) == ROWS for window in windows):
            return [[{k: r[k].tolist() for k in ("input_ids", "labels")} for r in w] for w in windows]
    raise SystemExit("no order of the rows begins with a longest batch")


class Contestant:
    """A process that waits at the beginning of a step."""

    def __init__(self, python: str, name: str, setup: Path) -> None:
        script = Path(__file__).with_name("language_model_peers.py")
        environment = os.environ | {
            "OMP_WAIT_POLICY": "passive",  # contestants that wait must not spin
            "TUNESMITH_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        self.name = name
        self.errors = setup.parent / f"{name}.log"
        with self.errors.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [python, str(script), name, str(setup)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.ready = self.answer()

    def steps(self, number: int) -> dict[str, Any]:
        self.begin(number)
        return self.answer()

    def begin(self, steps: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            end = self.errors.read_text(encoding="utf-8")[-4000:]
            raise SystemExit(f"{NAMES[self.name]} ended with {self.process.wait()}:\n{end}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(bench: Bench, task: str, precision: str, rounds: int, steps: int) -> dict[str, Any]:
    """Rounds of one untimed step and `steps` timed ones, the contestants in turns."""
    total = WARM_UP + rounds * (1 + steps) + 1
    recipe = bench.recipe(task, precision, ROWS, LENGTH, total)
    windows = choose_seed(recipe)
    setup = bench.setup(recipe, windows)
    contestants: list[Contestant] = []
    try:
        for name, python in bench.pythons.items():
            contestants.append(Contestant(python, name, setup))
        firsts = {each.name: each.steps(WARM_UP)["losses"] for each in contestants}
        _same_training(firsts, SAME_LOSS[precision])
        found: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contestants}
        for turn in range(rounds):
            # who begins a round changes, so that none always follows the same other
            for each in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
                found[each.name].append(each.steps(1 + steps))
    finally:
        for each in contestants:
            each.close()
    # rows of the timed steps, by rounds
    begins = [WARM_UP + turn * (1 + steps) + 1 for turn in range(rounds)]
    timed = [[row for step in range(at, at + steps) for row in windows[step]] for at in begins]
    tokens = [sum(len(row["input_ids"]) for row in rows) for rows in timed]
    # nothing predicts a row's first token
    labelled = [sum(label != IGNORED for row in rows for label in row["labels"][1:]) for rows in timed]
    widths = [
        max(len(row["input_ids"]) for row in windows[at + step]) for at in begins for step in range(steps)
    ]
    own = [sum(each["seconds"][1:]) for each in found["auto"]]
    own_cpu = [sum(each["cpu_seconds"][1:]) for each in found["auto"]]
    result: dict[str, Any] = {
        "tokens_per_step": sum(tokens) / len(widths),
        "labelled_share": sum(labelled) / sum(tokens),
        "positions_per_step": ROWS * statistics.mean(widths),
    }
    for each in contestants:
        seconds = [sum(one["seconds"][1:]) for one in found[each.name]]
        cpu = [sum(one["cpu_seconds"][1:]) for one in found[each.name]]
        ratios = [a / b for a, b in zip(own, seconds, strict=True)]
        result[each.name] = {
            "tokens_per_second": statistics.median(a / b for a, b in zip(tokens, seconds, strict=True)),
            "labelled_tokens_per_second": statistics.median(
                a / b for a, b in zip(labelled, seconds, strict=True)
            ),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "cpu_ratio": statistics.median(a / b for a, b in zip(own_cpu, cpu, strict=True)),
            "baseline_mib": each.ready["baseline"] / 2**20,
            "peak_mib": (found[each.name][-1]["peak"] - each.ready["baseline"]) / 2**20,
            "first_losses": firsts[each.name],
            "about": each.ready["about"],
        }
    return result


def _same_training(losses: dict[str, list[float]], tolerance: float) -> None:
    for name, values in losses.items():
        apart = [abs(a / b - 1) for a, b in zip(values, losses["auto"], strict=True)]
        if max(apart) > tolerance:
            raise SystemExit(
                f"not the same training: {NAMES[name]} has losses {values}, tunesmith {losses['auto']}"
            )


def report(task: str, precision: str, found: dict[str, Any]) -> None:
    print(
        f"\n{task}, {precision}: {ROWS} rows a step, {found['tokens_per_step']:.0f} tokens "
        f"({found['positions_per_step']:.0f} with padding), {found['labelled_share']:.0%} of them labelled\n"
        f"{'':30} tokens/s  labelled/s  tunesmith takes × of its time  of its CPU time  memory MiB  × of its memory"
    )
    for name in (name for name in NAMES if name in found):
        row = found[name]
        print(
            f"{NAMES[name]:30} {row['tokens_per_second']:8.1f}  {row['labelled_tokens_per_second']:10.1f}  "
            f"{row['ratio']:10.3f} ({min(row['ratios']):.3f} to {max(row['ratios']):.3f})  "
            f"{row['cpu_ratio']:15.3f}  {row['peak_mib']:10.0f}  {found['auto']['peak_mib'] / row['peak_mib']:15.3f}"
        )
    for name in (name for name in NAMES if name in found):
        print(f"  {NAMES[name]}: {found[name]['about']}")
    print(flush=True)


def curve(bench: Bench, task: str, precision: str, steps: int) -> dict[str, Any]:
    """The loss of every step with the kernels and without."""
    recipe = bench.recipe(task, precision, CURVE_ROWS, CURVE_LENGTH, steps + 1, learning_rate=3e-4)
    recipe["schedule"] |= {"warmup_steps": min(20, steps)}
    setup = bench.setup(recipe)
    both = [Contestant(sys.executable, name, setup) for name in ("auto", "reference")]
    for each in both:
        each.begin(steps)
    losses = {each.name: each.answer()["losses"] for each in both}
    for each in both:
        each.close()
    ends = [statistics.mean(losses[name][-CURVE_END:]) for name in ("auto", "reference")]
    apart = [abs(a / b - 1) for a, b in zip(losses["auto"], losses["reference"], strict=True)]
    print(
        f"{task}, {precision}, {steps} steps of {CURVE_ROWS} rows of at most {CURVE_LENGTH} tokens: loss "
        f"{losses['auto'][0]:.4f} → {ends[0]:.4f} with the kernels, {losses['reference'][0]:.4f} → {ends[1]:.4f} "
        f"without (mean of the last {CURVE_END}); apart {abs(ends[0] / ends[1] - 1):.2e} at the end, at most "
        f"{max(apart):.2e} in any step",
        flush=True,
    )
    return {"ends": ends, "end_apart": abs(ends[0] / ends[1] - 1), "apart": max(apart), "losses": losses}


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="2 rounds of 1 step and a curve of 20 steps")
    options.add_argument("--trl-python", help="a Python with trl, and the same torch and transformers")
    options.add_argument("--task", nargs="+", default=["sft"], choices=list(SOURCES))
    options.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    options.add_argument(
        "--contestants", nargs="+", default=["reference", "trainer"], choices=list(NAMES)[1:3]
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=3, help="timed ones of a round")
    options.add_argument("--curve-steps", type=int, default=200, help="0: no curve")
    options.add_argument("--json", type=Path)
    given = options.parse_args(arguments)
    if given.quick:
        given.rounds, given.steps, given.curve_steps = 2, 1, 20
    if "TUNESMITH_DATA" not in os.environ:
        raise SystemExit("TUNESMITH_DATA must name the folder of the real data sets")
    quiet_libraries()
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    pythons = dict.fromkeys(["auto", *given.contestants], sys.executable)
    if given.trl_python:
        pythons["trl"] = given.trl_python
    else:
        print("TRL's SFTTrainer is skipped: --trl-python names no Python that has it", flush=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), Path(os.environ["TUNESMITH_DATA"]), pythons)
        parameters, tokens = bench.make_model()
        print(f"{parameters / 1e6:.1f} M parameters, {VOCABULARY} classes, {tokens} tokens in the tokenizer")
        for task in given.task:
            for precision in given.precision:
                at: dict[str, Any] = {}
                found[f"{task} {precision}"] = at
                if given.rounds:
                    at["speed"] = compare(bench, task, precision, given.rounds, given.steps)
                    report(task, precision, at["speed"])
                if given.curve_steps:
                    at["curve"] = curve(bench, task, precision, given.curve_steps)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
