"""What each strategy costs a step, beside the plain one of the same recipe, each in processes of its own.

Time: CPU time on one thread, the plain step and the strategy's in turns, after a first of both; the median of the
ratios, and from where to where they go. Memory: the peak of a process that takes three steps, less that of the plain
one. MiniLM-L6 classifies standard-library docstrings; a small Llama reads them as questions and answers.

    python bench/strategy_cost.py [--steps 6] [--only NAME ...] [--write docs/strategies-cost.md]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestant import contestant
from rich.progress import track

from tunesmith.data.rows import read_rows
from tunesmith.memory import peak_memory_bytes
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.recipe.data import Source
from tunesmith.run import Resume, run

ROWS = 16
LOSSES = Path(__file__).parents[1] / "configs/losses.py"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Asked:
    """`base`: the recipe that it is held against; `sections`: what it changes in that, `{section: {key: value}}`."""

    base: str
    sections: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    ratio: float
    low: float
    high: float
    more_bytes: int


def strategies(folder: str) -> dict[str, Asked]:
    old, table = f"{folder}/old", f"{folder}/synonyms.tsv"
    teacher = {"teacher_model_name_or_path": old, "init": "every_k"}
    generates = {"teacher_model_name_or_path": f"{folder}/old_llama"}
    words = [{"type": f"token_{name}", "fraction": 0.1} for name in ("drop", "swap", "insert", "mask")]
    penalties: dict[str, Any] = {
        "l1": {"l1": 1e-6},
        "l2": {"l2": 1e-5},
        "R-Drop": {"r_drop": {"alpha": 1.0}},
        "SAM": {"sharpness": {"type": "sam"}},
        "ASAM": {"sharpness": {"type": "asam"}},
        "FGM": {"adversarial": {"type": "fgm"}},
        "PGD, 3 steps": {"adversarial": {"type": "pgd", "steps": 3}},
        "gradient noise": {"gradient_noise": {"eta": 1e-6}},
        "max-norm": {"max_norm": {"value": 3.0}},
    }
    kept: dict[str, Any] = {
        "L2-SP": {"l2_sp": {}},
        "layer-wise anchor": {"anchor": {}},
        "EWC": {"run": old, "ewc": {"rows": 50}},
        "learning without forgetting": {"run": old, "lwf": {}},
        "WiSE-FT": {"wise_ft": {}},
        "replay, a tenth": {"run": old, "replay": {"ratio": 0.1}},
    }
    losses: dict[str, Any] = {
        "label smoothing": {"label_smoothing_factor": 0.1},
        "focal": {"loss": {"type": "focal"}},
        "class weights": {"loss": {"type": "cross_entropy", "class_weights": "auto"}},
        "class-balanced": {"loss": {"type": "class_balanced"}},
        "LDAM": {"loss": {"type": "ldam"}},
        "ordinal": {"loss": "ordinal"},
        "a function of the user": {"loss": {"type": "function", "function": f"{LOSSES}:hinge"}},
    }
    streams: dict[str, Any] = {
        "words dropped, swapped, inserted, masked": {"augment": words},
        "synonyms": {"augment": [{"type": "synonyms", "table": table}]},
        "cutoff": {"augment": [{"type": "cutoff"}]},
        "mixup": {"augment": [{"type": "mixup"}]},
        "balanced sampling": {"sampling": {"type": "balanced"}},
        "curriculum by length": {"curriculum": {"by": "length"}},
    }
    taught: dict[str, Any] = {
        "distilled: logits": teacher,
        "distilled: logits, offline": teacher | {"offline": {"top_k": 8}},
        "distilled: hidden states": teacher | {"losses": [{"type": "logits"}, {"type": "hidden"}]},
        "distilled: embedding": teacher | {"losses": [{"type": "logits"}, {"type": "embedding"}]},
    }
    language: dict[str, Any] = {
        "language model, distilled: logits": generates,
        "language model, distilled: offline, 32 tokens": generates | {"offline": {"top_k": 32}},
        "language model, distilled: on-policy": generates
        | {
            "losses": [{"type": "logits", "divergence": "jsd", "beta": 0.5}],
            "on_policy": {"max_new_tokens": 32},
        },
        "language model, distilled: other tokens": {"teacher_model_name_or_path": f"{folder}/old_unlike"},
    }
    return {
        **{name: Asked("rows", {"objective": value}) for name, value in losses.items()},
        **{name: Asked("rows", {"data": value}) for name, value in streams.items()},
        "dropout 0.2": Asked("rows", {"model": {"dropout": 0.2}}),
        "stochastic depth": Asked("rows", {"model": {"drop_path": 0.1}}),
        "NEFTune": Asked("rows", {"model": {"neftune_noise_alpha": 5}}),
        **{name: Asked("rows", {"regularization": value}) for name, value in penalties.items()},
        "EMA": Asked("rows", {"averaging": {"type": "ema"}}),
        "SWA": Asked("rows", {"averaging": {"type": "swa", "start": 1}}),
        **{name: Asked("old", {"remember": value}) for name, value in kept.items()},
        **{name: Asked("student", {"distill": value}) for name, value in taught.items()},
        **{name: Asked("language", {"distill": value}) for name, value in language.items()},
    }


def recipe(folder: str, base: str, sections: dict[str, Any]) -> Recipe:
    source = {"path": "builtin:stdlib_docstrings", "format": "classification", "limit": 600}
    values: dict[str, Any] = {
        "model": {"model_name_or_path": "builtin:minilm"},
        "data": {"train": [source], "split": {"eval": 0.1}, "max_length": 64, "cache_dir": folder},
        "objective": {"type": "classification"},
        "training": {
            "max_steps": 20,
            "global_batch_size": ROWS,
            "per_device_train_batch_size": ROWS,
            "precision": "fp32",
        },
        "tracking": {"progress": "off"},
        "output_dir": folder,
        "run_name": base,
    }
    match base:
        case "old":
            values["model"] = {"model_name_or_path": f"{folder}/old/final"}
        case "student":
            values["model"] = {"model_name_or_path": "builtin:minilm", "config": {"num_hidden_layers": 3}}
        case "language":
            chats = {"path": f"{folder}/chats.jsonl", "format": "prompt_answer"}
            values["model"] = {
                "model_name_or_path": f"{folder}/old_llama/final",
                "config": {"num_hidden_layers": 1},
            }
            values |= {"objective": {"type": "sft"}}
            values["data"] = {"train": [chats], "max_length": 128, "cache_dir": folder}
        case _:
            pass
    for section, asked in sections.items():
        values[section] = {**values.get(section, {}), **asked}
    return Recipe.model_validate(values)


def prepare(folder: str) -> None:
    """What strategies begin with: a finished run, and two small Llamas with tokens of their own."""
    source = Source(path="builtin:stdlib_docstrings", format="text", limit=400)
    texts = [str(row.values["text"])[:200] for row in read_rows(source, Path())]
    chats = [{"prompt": text, "answer": text} for text in texts]
    Path(folder, "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    Path(folder, "synonyms.tsv").write_text("return\tgive\nlist\tsequence\nstring\ttext\n", encoding="utf-8")
    ran = {"max_steps": 1}
    run(recipe(folder, "rows", {"training": ran}).model_copy(update={"run_name": "old"}), Path(), Resume())
    for name, size in (("old_llama", 2048), ("old_unlike", 1024)):
        model = {
            "init": "from_config",
            "config": LLAMA,
            "tokenizer": {"type": "train_bpe", "vocab_size": size},
            "chat_template": "chatml",
        }
        made = recipe(folder, "language", {"training": ran}).model_dump(mode="json", exclude_defaults=True)
        run(Recipe.model_validate(made | {"model": model, "run_name": name}), Path(), Resume())


def in_child(work: Callable[[Any], None]) -> Any:
    """What `work` sends, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(theirs,))
    child.start()
    theirs.close()  # so that a child that ends without a word is noticed
    try:
        return ours.recv()
    except EOFError:
        sys.exit("the child failed: its message stands above")
    finally:
        child.join()


def ratios(folder: str, asked: Asked, steps: int) -> list[float]:
    def work(pipe: Any) -> None:
        both = [contestant(recipe(folder, asked.base, s)) for s in ({}, asked.sections)]
        taken = [[one.step(step) for one in both] for step in range(steps + 1)][1:]
        pipe.send([other / plain for plain, other in taken])

    return in_child(work)


def peak(folder: str, base: str, sections: dict[str, Any]) -> int:
    def work(pipe: Any) -> None:
        one = contestant(recipe(folder, base, sections))
        for step in range(3):
            one.step(step)
        pipe.send(peak_memory_bytes(torch.device("cpu")))

    return in_child(work)


def measured(folder: str, steps: int, names: list[str]) -> dict[str, Cost]:
    every = strategies(folder)
    plain: dict[str, int] = {}
    found: dict[str, Cost] = {}
    for name in track(names, "strategies"):
        asked = every[name]
        if asked.base not in plain:
            plain[asked.base] = peak(folder, asked.base, {})
        more = peak(folder, asked.base, asked.sections) - plain[asked.base]
        rows = ratios(folder, asked, steps)
        found[name] = Cost(statistics.median(rows), min(rows), max(rows), more)
        print(f"{name}: {_time(found[name])}, {_memory(found[name])}", flush=True)
    return found


def _time(cost: Cost) -> str:
    return f"× {cost.ratio:.2f} ({cost.low:.2f} to {cost.high:.2f})"


def _memory(cost: Cost) -> str:
    return f"{cost.more_bytes / 2**20:+.0f} MiB"


def page(found: dict[str, Cost], steps: int) -> str:
    lines = [
        "# What strategies cost a step",
        "",
        f"Written by `bench/strategy_cost.py`: {ROWS} rows of at most 64 tokens a step, fp32, AdamW, one thread of "
        "a CPU. Time: CPU time, in turns with the plain step of the same recipe, the median of "
        f"{steps} ratios (and from where to where they go). Memory: the peak of a process that takes three steps, less "
        "the plain one's; a difference below some 20 MiB says nothing. MiniLM-L6 classifies; what remembers goes on "
        "from a run of it, what is distilled is its lower half; the language model is a Llama of one layer with a "
        "teacher of two.",
        "",
        "| strategy | step time | memory |",
        "|---|---|---|",
        *(f"| {name} | {_time(cost)} | {_memory(cost)} |" for name, cost in found.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=list(strategies("")))
    parser.add_argument("--write", type=Path, help="the page to write")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        in_child(lambda pipe: pipe.send(prepare(folder)))
        found = measured(folder, asked.steps, asked.only)
    if asked.write is not None:
        asked.write.write_text(page(found, asked.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
