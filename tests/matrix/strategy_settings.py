"""The strategies of the matrix, each as the sections of a recipe that turn it on, for every case."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.numerics.objective_cases import ADAMW, CASES, WHOLE, Case, recipe
from tests.numerics.tiny_data import ROWS, build_data, write
from tests.numerics.tiny_models import build_models, byte_bpe, llama_config
from tunesmith.recipe.losses import TOKENS, VOCABULARY
from tunesmith.run import Resume, run

Fragment = dict[str, Any]
Sections = Fragment | Callable[[Path, Case], Fragment]

_FUNCTIONS = """
import torch

def far(logits, labels):
    return -torch.log_softmax(logits / 2, -1).gather(-1, labels[:, None])[:, 0]

def powers(logits, labels, mask):
    assert mask.dtype is torch.bool
    return ((logits - labels).abs() ** 1.5).sum(-1)
"""
_SYNONYMS = {
    "amber": ["copper"],
    "river": ["ocean"],
    "stone": ["silver"],
    "road": ["bridge"],
    "north": ["orange"],
}


@dataclass(frozen=True)
class Strategy:
    """`sections`: of a recipe, over those of the case; a function takes the workshop and the case. `beside`: those
    that the plain run has too. `on`: the objective on which the engines are tried. `random`: draws by micro-batch
    (dropout), so that another split of the window gives other numbers."""

    sections: Sections
    on: str = "single label"
    beside: Sections = field(default_factory=dict[str, Any])
    random: bool = False


def build_workshop(workshop: Path) -> None:
    """`models/` and `data/`, and what strategies read beside the rows: `more-KIND.jsonl`, rows with a score, a group
    and votes; a table of synonyms; losses."""
    build_models(workshop / "models", build_data(workshop / "data"))
    for case in CASES.values():
        dice = random.Random(case.file)
        lines = (workshop / "data" / f"{case.file}.jsonl").read_text(encoding="utf-8").splitlines()
        rows: list[Fragment] = [json.loads(line) for line in lines]
        for number, row in enumerate(rows):
            shares = [dice.random() for _ in "abcd"]
            votes = {name: share / sum(shares) for name, share in zip("abcd", shares, strict=True)}
            row |= {"score": dice.random(), "query": number // 2, "votes": votes}
        write(workshop / "data" / f"more-{case.file}.jsonl", rows)
    (workshop / "synonyms.json").write_text(json.dumps(_SYNONYMS), encoding="utf-8")
    (workshop / "losses.py").write_text(_FUNCTIONS, encoding="utf-8")


def source(workshop: Path, case: Case, more: str = "", **settings: Any) -> Fragment:
    path = workshop / "data" / f"{more}{case.file}.jsonl"
    return {"path": str(path), "format": case.format, **settings}


def _more(**settings: Any) -> Sections:
    return lambda workshop, case: {"data": {"train": [source(workshop, case, "more-", **settings)]}}


def _evaluated(workshop: Path, case: Case) -> Fragment:
    return {"data": {"eval": [source(workshop, case, limit=32)]}}


def _finished(workshop: Path, case: Case, config: Mapping[str, Any] | None = None) -> str:
    """The folder of a finished run of the case, trained away from where the cells begin; with `config` of a model of
    that shape."""
    name = f"teacher-{case.name}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:6]}"
    folder = workshop / "runs" / name
    if not (folder / "final").is_dir():
        faster = {**ADAMW, "optim": {**ADAMW["optim"], "learning_rate": 0.01, "max_grad_norm": None}}
        model = {"init": "from_config", "config": dict(config)} if config else {}
        sections = _evaluated(workshop, case) | {"model": model, "run_name": name}
        run(recipe(workshop, case, faster, WHOLE, 6, **sections), workshop, Resume(overwrite=True))
    return str(folder)


def _loss(type: str, **settings: Any) -> Fragment:
    return {"objective": {"loss": {"type": type, **settings}}}


def _class_balanced(workshop: Path, case: Case) -> Fragment:
    base = "binary_cross_entropy" if case.file == "multi" else "cross_entropy"
    return _loss("class_balanced", beta=0.9, base=base)


def _function(workshop: Path, case: Case) -> Fragment:
    name = "powers" if case.file in {"multi", "number"} else "far"
    return _loss("function", function=f"{workshop / 'losses.py'}:{name}")


def _soft_labels(workshop: Path, case: Case) -> Fragment:
    labels = {"objective": {"labels": list("abcd")}} if case.file == "single" else {}
    train = source(workshop, case, "more-", columns={"soft_labels": "votes"})
    return {"data": {"train": [train]}, **labels}


def _corn_model(workshop: Path, case: Case) -> Fragment:
    """Its head has an output less than labels: none that a file has."""
    single = case.file == "single"
    return {"model": {"model_name_or_path": str(workshop / "models" / "bert_mlm")}} if single else {}


def _length_schedule(workshop: Path, case: Case) -> Fragment:
    longer = "cut" if case.name == "causal_lm" else "wait"
    shorter = case.data.get("max_length", 64) * 3 // 4
    return {
        "data": {"max_length_schedule": {"stages": [{"until": 4, "max_length": shorter}], "longer": longer}}
    }


def _by_loss(workshop: Path, case: Case) -> Fragment:
    return _curriculum(by="loss", reference=_finished(workshop, case))


def _curriculum(**settings: Any) -> Fragment:
    return {"data": {"curriculum": {"pace": {"type": "root", "start_fraction": 0.5, "until": 4}, **settings}}}


def _augment(*operations: Fragment) -> Fragment:
    return {"data": {"augment": list(operations)}}


def _synonyms(workshop: Path, case: Case) -> Fragment:
    table = str(workshop / "synonyms.json")
    return _augment({"type": "synonyms", "fraction": 0.5, "table": table, "probability": 1.0})


def _regularization(**parts: Any) -> Fragment:
    return {"regularization": parts}


def _remember(**parts: Any) -> Fragment:
    return {"remember": parts}


def _ewc(workshop: Path, case: Case) -> Fragment:
    """Of a row of many tokens the squared gradient is larger by far."""
    rows = [source(workshop, case, limit=8)]
    weight = 0.3 if case.objective["type"] in {*VOCABULARY, TOKENS} else 30.0
    return _remember(ewc={"weight": weight, "rows": 8, "labels": "data", "data": rows})


def _partner(case: Case) -> Case:
    """Another objective on the same backbone."""
    match case.model:
        case "llama":
            return CASES["sft" if case.name == "causal_lm" else "causal_lm"]
        case "t5":
            return CASES["span_corruption" if case.name == "seq2seq_t5" else "seq2seq_t5"]
        case _:
            return CASES["multi_label" if case.name == "single_label" else "single_label"]


def _lwf(workshop: Path, case: Case) -> Fragment:
    return _remember(run=_finished(workshop, _partner(case)), lwf={"weight": 2.0})


def _replay(workshop: Path, case: Case) -> Fragment:
    return _remember(run=_finished(workshop, _partner(case)), replay={"ratio": 0.25})


def _old_model(workshop: Path, case: Case) -> Fragment:
    return {"model": {"model_name_or_path": f"{_finished(workshop, _partner(case))}/final"}}


def _distill(*losses: Fragment, **settings: Any) -> Sections:
    own = {"losses": list(losses)} if losses else {}

    def sections(workshop: Path, case: Case) -> Fragment:
        teacher = _finished(workshop, case)
        return {"distill": {"teacher_model_name_or_path": teacher, **own, **settings}}

    return sections


def _deeper(*losses: Fragment, width: int = 32, **settings: Any) -> Sections:
    """A teacher of twice as many layers."""
    own = {"losses": list(losses)} if losses else {}

    def sections(workshop: Path, case: Case) -> Fragment:
        config: Fragment = {"hidden_size": width, "num_hidden_layers": 4}
        if case.model == "t5":
            config = {"d_model": width, "num_layers": 4, "num_decoder_layers": 4}
        teacher = _finished(workshop, case, config)
        return {"distill": {"teacher_model_name_or_path": teacher, **own, **settings}}

    return sections


def _other_tokens(workshop: Path, case: Case) -> Fragment:
    folder = workshop / "models" / "unlike"
    if not folder.is_dir():
        texts = [json.loads(line)["text"] for line in (workshop / "data/text.jsonl").read_text().splitlines()]
        tokenizer = byte_bpe([*texts[::3], *["other words"] * 50], ["<pad>", "<eos>"], appends_eos=False)
        torch.manual_seed(5)
        LlamaForCausalLM(llama_config(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"distill": {"teacher_model_name_or_path": str(folder)}}


def _tasks(mixing: Fragment, balancing: str = "fixed", **settings: Any) -> Sections:
    """The case's rows and objective, and those of another one, which are fewer."""

    def sections(workshop: Path, case: Case) -> Fragment:
        tasks = {
            name: {
                "data": {
                    "train": [source(workshop, one, limit=rows)],
                    "max_length": 64,
                    "group_by_length": False,
                    "cache_dir": str(workshop / "cache"),
                    **one.data,
                },
                "objective": one.objective,
            }
            for name, one, rows in (("own", case, ROWS), ("other", _partner(case), 20))
        }
        multitask = {"mixing": mixing, "balancing": {"type": balancing, **settings}}
        return {"data": None, "objective": None, "tasks": tasks, "multitask": multitask}

    return sections


_EAGER: Fragment = {"model": {"attn_implementation": "eager"}}
_DROPOUT: Fragment = {"model": {"dropout": 0.1}}
_TOGETHER: Fragment = {"type": "together"}

STRATEGIES: dict[str, Strategy] = {
    "loss: class weights": Strategy(_loss("cross_entropy", class_weights="auto")),
    "loss: binary cross-entropy": Strategy(
        _loss("binary_cross_entropy", pos_weight="auto"), on="multi label"
    ),
    "loss: focal": Strategy(_loss("focal", gamma=1.5)),
    "loss: class-balanced": Strategy(_class_balanced),
    "loss: LDAM, weights later": Strategy(_loss("ldam", scale=2, reweight_from=4, beta=0.99)),
    "loss: label smoothing": Strategy({"objective": {"label_smoothing_factor": 0.1}}),
    "loss: soft labels": Strategy(_soft_labels, beside=_more()),
    "loss: ordinal": Strategy(_loss("ordinal")),
    "loss: ordinal, corn": Strategy(_loss("ordinal", method="corn"), beside=_corn_model),
    "loss: ranking": Strategy(
        lambda workshop, case: (
            _loss("ranking", method="listnet")
            | {"data": {"train": [source(workshop, case, "more-", columns={"group": "query"})]}}
        ),
        on="regression",
        beside=_more(),
    ),
    "loss: huber": Strategy(_loss("huber", delta=0.5), on="regression"),
    "loss: dice": Strategy(_loss("dice"), on="tokens"),
    "loss: a function": Strategy(_function),
    "sampling: balanced": Strategy({"data": {"sampling": {"type": "balanced"}}}),
    "sampling: oversample": Strategy({"data": {"sampling": {"type": "oversample"}}}),
    "sampling: undersample": Strategy({"data": {"sampling": {"type": "undersample", "ratio": 2.0}}}),
    "thresholds": Strategy({"evaluation": {"tune_thresholds": {}}}, beside=_evaluated),
    "calibration": Strategy({"evaluation": {"calibrate": "temperature"}}, beside=_evaluated),
    "curriculum: length": Strategy(_curriculum(by="length")),
    "curriculum: a column": Strategy(_curriculum(by="column", column="score"), beside=_more()),
    "curriculum: a run's loss": Strategy(_by_loss),
    "length schedule": Strategy(_length_schedule, on="sft"),
    "augment: token mask": Strategy(_augment({"type": "token_mask", "fraction": 0.3})),
    "augment: token drop, swap": Strategy(
        _augment({"type": "token_drop", "fraction": 0.3}, {"type": "token_swap", "swaps": 1})
    ),
    "augment: token insert": Strategy(_augment({"type": "token_insert", "fraction": 0.3})),
    "augment: synonyms": Strategy(_synonyms),
    "augment: cutoff": Strategy(_augment({"type": "cutoff", "fraction": 0.3, "kind": "span"})),
    "augment: mixup": Strategy(_augment({"type": "mixup", "alpha": 0.5})),
    "NEFTune": Strategy({"model": {"neftune_noise_alpha": 5.0}}, on="sft", random=True),
    "dropout": Strategy(_DROPOUT, random=True),
    "stochastic depth": Strategy({"model": {"drop_path": 0.3}}, random=True),
    "L1, L2": Strategy(_regularization(l1=1e-3, l2=1e-2)),
    "R-Drop": Strategy(_regularization(r_drop={}), beside=_DROPOUT, random=True),
    "SAM": Strategy(_regularization(sharpness={"type": "sam"})),
    "ASAM": Strategy(_regularization(sharpness={"type": "asam", "every": 2})),
    "FGM": Strategy(_regularization(adversarial={"type": "fgm", "epsilon": 0.5})),
    "PGD": Strategy(_regularization(adversarial={"type": "pgd", "epsilon": 0.5, "steps": 2})),
    "gradient noise": Strategy(_regularization(gradient_noise={"eta": 1e-4})),
    "max-norm": Strategy(_regularization(max_norm={"value": 0.5})),
    "EMA": Strategy({"averaging": {"type": "ema", "decay": 0.5}}),
    "SWA": Strategy({"averaging": {"type": "swa", "start": 2}}),
    "remember: L2-SP": Strategy(_remember(l2_sp={"weight": 0.5})),
    "remember: anchor": Strategy(_remember(anchor={"weight": 0.5})),
    "remember: EWC": Strategy(_ewc),
    "remember: LwF": Strategy(_lwf, beside=_old_model),
    "remember: replay": Strategy(_replay, beside=_old_model),
    "remember: WiSE-FT": Strategy(_remember(wise_ft={"alpha": 0.5})),
    "distill: logits": Strategy(_distill(temperature=2.0)),
    "distill: hidden states": Strategy(_deeper({"type": "hidden"}, width=48), on="causal_lm"),
    "distill: attention": Strategy(_distill({"type": "attention"}), beside=_EAGER),
    "distill: embedding": Strategy(_distill({"type": "embedding"})),
    "distill: offline": Strategy(_distill(offline={"top_k": 8}), on="causal_lm"),
    "distill: on-policy": Strategy(_distill(on_policy={"max_new_tokens": 6}), on="sft"),
    "distill: sequence level": Strategy(
        _distill(sequence_level={"max_new_tokens": 6, "num_beams": 2}), on="seq2seq"
    ),
    "distill: other tokenizer": Strategy(_other_tokens, on="causal_lm"),
    "distill: every k-th layer": Strategy(_deeper(init="every_k")),
    "tasks: proportional": Strategy(_tasks({"type": "proportional"}), on="tokens"),
    "tasks: annealed": Strategy(_tasks({"type": "annealed"}), on="tokens"),
    "tasks: in turn, DWA": Strategy(_tasks({"type": "round_robin"}, "dwa", every=2), on="tokens"),
    "tasks: together, uncertainty": Strategy(
        _tasks(_TOGETHER, "uncertainty", learning_rate=0.05), on="tokens"
    ),
    "tasks: together, GradNorm": Strategy(_tasks(_TOGETHER, "gradnorm"), on="tokens"),
}
