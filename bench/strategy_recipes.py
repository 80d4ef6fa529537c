"""Each strategy's recipe beside the plain one that it is held against, on the same rows where that can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategy_bases import ROWS, Bases, Values, changed

LOSSES = Path(__file__).parents[1] / "configs/losses.py"


@dataclass(frozen=True)
class Asked:
    """`page`: in docs/strategies, or none; `plain`, `chosen`: two whole recipes."""

    page: str
    plain: Values
    chosen: Values


def asked(page: str, plain: Values, **sections: Any) -> Asked:
    return Asked(page, plain, changed(plain, **sections))


def strategies(folder: str) -> dict[str, Asked]:
    """By the name that the table gives them."""
    bases = Bases(folder)
    return {
        "the plain step once more": Asked("", bases.rows(), bases.rows()),
        **_losses(bases),
        **_streams(bases),
        **_regularization(bases),
        **_remembering(bases),
        **_tasks(bases),
        **_distillation(bases),
    }


def _losses(bases: Bases) -> dict[str, Asked]:
    rows, language, numbers = bases.rows(), bases.language(), bases.numbers(label="number")
    weighted = {"type": "cross_entropy", "class_weights": "auto"}
    each = {"type": "binary_cross_entropy", "pos_weight": "auto"}
    votes = changed(rows, data={"train": [bases.source(soft_labels="votes")]})
    pairs = {"text": "question", "text_pair": "text", "label": "number"}
    lists = bases.numbers(ROWS // 4, **pairs, group="group")

    def loss(page: str, plain: Values, value: Any) -> Asked:
        return asked(page, plain, objective={"loss": value})

    def ranked(method: str) -> Asked:
        made = changed(lists, objective={"loss": {"type": "ranking", "method": method}})
        return Asked("ranking", bases.numbers(**pairs), made)

    return {
        "label smoothing": asked("label-smoothing", rows, objective={"label_smoothing_factor": 0.1}),
        "label smoothing, language model": asked(
            "label-smoothing", language, objective={"label_smoothing_factor": 0.1}
        ),
        "focal": loss("focal", rows, "focal"),
        "focal, language model": loss("focal", language, "focal"),
        "class weights": loss("class-weights", rows, weighted),
        "positive weights of binary cross-entropy": loss("class-weights", rows, each),
        "class-balanced": loss("class-balanced", rows, {"type": "class_balanced"}),
        "LDAM": loss("ldam", rows, {"type": "ldam"}),
        "LDAM, re-weighted": loss("ldam", rows, {"type": "ldam", "reweight_from": 1}),
        "ordinal, cumulative": loss("ordinal", rows, {"type": "ordinal"}),
        "ordinal, emd": loss("ordinal", rows, {"type": "ordinal", "method": "emd"}),
        "ordinal, corn": loss("ordinal", rows, {"type": "ordinal", "method": "corn"}),
        "a function of the user": loss(
            "custom-loss", rows, {"type": "function", "function": f"{LOSSES}:hinge"}
        ),
        "soft labels": Asked("soft-labels", rows, votes),
        "dice, of tokens": loss("dice", bases.tokens(), "dice"),
        "Huber": loss("regression-losses", numbers, "huber"),
        "absolute error": loss("regression-losses", numbers, "mean_absolute_error"),
        "ranking in fours, ranknet": ranked("ranknet"),
        "ranking in fours, listnet": ranked("listnet"),
    }


def _streams(bases: Bases) -> dict[str, Asked]:
    rows = bases.rows()
    as_they_are = changed(rows, data={"train": [bases.source(text="short")]})
    words = [{"type": f"token_{name}", "fraction": 0.1} for name in ("drop", "swap", "insert", "mask")]
    synonyms = {"type": "synonyms", "table": f"{bases.folder}/synonyms.tsv"}
    mixup = {"augment": [{"type": "mixup"}]}
    return {
        "words dropped, swapped, inserted, masked": asked(
            "token-augmentation", rows, data={"augment": words}
        ),
        "synonyms": asked("synonyms", rows, data={"augment": [synonyms]}),
        "cutoff": asked("cutoff", rows, data={"augment": [{"type": "cutoff"}]}),
        "mixup": asked("mixup", rows, data=mixup),
        "mixup, rows of any length": asked("mixup", as_they_are, data=mixup),
        "balanced sampling": asked("sampling", rows, data={"sampling": {"type": "balanced"}}),
        "curriculum by length": asked("curriculum", rows, data={"curriculum": {"by": "length"}}),
    }


def _regularization(bases: Bases) -> dict[str, Asked]:
    rows = bases.rows()
    penalties: dict[str, tuple[str, Values]] = {
        "L1": ("l1-l2", {"l1": 1e-6}),
        "L2": ("l1-l2", {"l2": 1e-5}),
        "R-Drop": ("r-drop", {"r_drop": {"alpha": 1.0}}),
        "SAM": ("sam", {"sharpness": {"type": "sam"}}),
        "ASAM": ("sam", {"sharpness": {"type": "asam"}}),
        "FGM": ("adversarial", {"adversarial": {"type": "fgm"}}),
        "PGD, 3 steps": ("adversarial", {"adversarial": {"type": "pgd", "steps": 3}}),
        "gradient noise": ("gradient-noise", {"gradient_noise": {"eta": 1e-6}}),
        "max-norm": ("max-norm", {"max_norm": {"value": 3.0}}),
    }
    return {
        "dropout 0.2": asked("dropout", rows, model={"dropout": 0.2}),
        "stochastic depth": asked("stochastic-depth", rows, model={"drop_path": 0.1}),
        "NEFTune": asked("neftune", rows, model={"neftune_noise_alpha": 5}),
        **{name: asked(page, rows, regularization=value) for name, (page, value) in penalties.items()},
        "EMA": asked("ema", rows, averaging={"type": "ema"}),
        "SWA": asked("swa", rows, averaging={"type": "swa", "start": 1}),
    }


def _remembering(bases: Bases) -> dict[str, Asked]:
    old, run_of = bases.old(), {"run": f"{bases.folder}/old"}
    kept: dict[str, tuple[str, Values]] = {
        "L2-SP": ("l2-sp", {"l2_sp": {}}),
        "layer-wise anchor": ("anchors", {"anchor": {}}),
        "EWC": ("ewc", run_of | {"ewc": {"rows": 50}}),
        "learning without forgetting": ("lwf", run_of | {"lwf": {}}),
        "WiSE-FT": ("wise-ft", {"wise_ft": {}}),
        "replay, a tenth": ("replay", run_of | {"replay": {"ratio": 0.1}}),
    }
    return {name: asked(page, old, remember=value) for name, (page, value) in kept.items()}


def _tasks(bases: Bases) -> dict[str, Asked]:
    fixed = bases.three_tasks()
    return {
        "three tasks together": Asked("multi-task", bases.one_task(), fixed),
        **{
            f"losses balanced by {name}": Asked("loss-balancing", fixed, bases.three_tasks(name))
            for name in ("uncertainty", "dwa", "gradnorm")
        },
        "masked words of half as many rows": Asked("auxiliary-pretraining", bases.rows(), bases.auxiliary()),
    }


def _distillation(bases: Bases) -> dict[str, Asked]:
    folder, student, language, chats = bases.folder, bases.student(), bases.language(), bases.chats()
    rows: Values = {"teacher_model_name_or_path": f"{folder}/old", "init": "every_k"}
    tokens: Values = {"teacher_model_name_or_path": f"{folder}/old_language"}
    generates: Values = {"teacher_model_name_or_path": f"{folder}/old_chats"}
    unlike: Values = {"teacher_model_name_or_path": f"{folder}/old_unlike"}
    logits: Values = {"type": "logits"}
    jsd = logits | {"divergence": "jsd", "beta": 0.5}
    pages = ("distillation", "offline-distillation", "hidden-state-distillation")

    def layers(kind: str, plain: Values) -> Asked:
        return asked(pages[2], plain, distill=rows | {"losses": [logits, {"type": kind}]})

    # without which no probabilities are kept, or what is compared is noise
    eager = changed(student, model={"attn_implementation": "eager", "dropout": 0.0})

    return {
        "distilled: logits": asked(pages[0], student, distill=rows),
        "distilled: top 8, offline": asked(pages[1], student, distill=rows | {"offline": {"top_k": 8}}),
        "distilled: logits and hidden states": layers("hidden", student),
        "distilled: logits and attention, without dropout": layers("attention", eager),
        "distilled: logits and embedding": layers("embedding", student),
        "language model, distilled: logits": asked(pages[0], language, distill=tokens),
        "language model, distilled: whole logits": asked(
            pages[0], language, distill=tokens, kernels="reference"
        ),
        "language model, distilled: top 32": asked(
            pages[0], language, distill=tokens | {"losses": [logits | {"top_k": 32}]}
        ),
        "language model, distilled: top 32, offline": asked(
            pages[1], language, distill=tokens | {"offline": {"top_k": 32}}
        ),
        "language model, distilled: on-policy, 32 tokens": asked(
            "on-policy-distillation",
            chats,
            distill=generates | {"losses": [jsd], "on_policy": {"max_new_tokens": 32}},
        ),
        "language model, distilled: other tokens": asked("cross-tokenizer", chats, distill=unlike),
    }
