"""The cells of the matrix: what is trained, on which model, spread how; and their recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.numerics.objective_cases import CASES, Case, Layout, recipe
from tunesmith.recipe import Recipe

STEPS, MIDDLE = 10, 5

FAMILIES = {
    "BERT, classification": CASES["single_label"],
    "GPT-2, causal_lm": CASES["causal_lm_gpt2"],
    "Llama, sft": CASES["sft"],
    "T5, seq2seq": CASES["seq2seq_t5"],
}
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
ENGINE_FAMILY = "Llama, sft"
RANKS = 2

EMBEDDINGS = {
    "bert_single": ["word_embeddings"],
    "gpt2": ["wte"],  # tied to the head
    "llama": ["embed_tokens", "lm_head"],
    "t5": ["shared"],
}


@dataclass(frozen=True)
class Method:
    """`trainable` and `model` are sections of a recipe, `by_model` more of `trainable`'s adapter for each model.
    `merges`: how far the merged model's outputs may be from the adapter's, relative to the largest; None where there
    is nothing to merge. The learning rate is one at which the loss falls within ten steps."""

    trainable: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict[str, Any])
    by_model: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    learning_rate: float = 1e-2
    merges: float | None = 5e-5

    @property
    def has_adapter(self) -> bool:
        return "adapters" in self.trainable

    @property
    def quantization(self) -> str | None:
        return self.model.get("quantization")


def _adapter(type_: str, **settings: Any) -> dict[str, Any]:
    return {"adapters": [{"type": type_, **settings}]}


def _lora(**settings: Any) -> dict[str, Any]:
    return _adapter("lora", r=4, lora_alpha=8, **settings)


def _peft(peft_type: str, **config: Any) -> dict[str, Any]:
    return _adapter("peft", peft_type=peft_type, config={"target_modules": "all-linear", **config})


NF4, INT8 = {"quantization": "nf4"}, {"quantization": "int8"}

METHODS = {
    "lora": Method(_lora()),
    "rslora": Method(_lora(use_rslora=True)),
    "dora": Method(_lora(use_dora=True)),
    "lora+": Method(_lora(loraplus_lr_ratio=4), learning_rate=5e-3),
    "pissa": Method(_lora(init_lora_weights="pissa")),
    "olora": Method(_lora(init_lora_weights="olora")),
    "lora, modules_to_save": Method(
        _lora(), by_model={model: {"modules_to_save": names} for model, names in EMBEDDINGS.items()}
    ),
    "lora, trainable_token_indices": Method(_lora(trainable_token_indices=[5, 20, 21])),
    "ia3": Method(_adapter("ia3"), learning_rate=5e-2),
    "prompt_tuning": Method(_adapter("prompt_tuning", num_virtual_tokens=4), learning_rate=1e-1, merges=None),
    "prefix_tuning": Method(_adapter("prefix_tuning", num_virtual_tokens=4), learning_rate=5e-2, merges=None),
    "p_tuning": Method(_adapter("p_tuning", num_virtual_tokens=4), merges=None),
    "qlora, nf4": Method(_lora(), NF4),
    "qlora, int8": Method(_lora(), INT8),
    "loftq, nf4": Method(_lora(init_lora_weights="loftq"), NF4),
    "vera": Method(_peft("VERA", r=8), learning_rate=5e-2),
    "oft": Method(_peft("OFT", oft_block_size=4)),
    "boft": Method(_peft("BOFT", boft_block_size=4)),
    "adalora": Method(_peft("ADALORA")),
    "head only": Method({"freeze": ["backbone"]}, merges=None),
    "last layer and head": Method({"freeze": ["all"], "unfreeze": ["last 1 layers", "head"]}, merges=None),
    "biases and head (BitFit)": Method({"freeze": ["all"], "unfreeze": ["biases", "head"]}, merges=None),
    "norms and head": Method({"freeze": ["all"], "unfreeze": ["norms", "head"]}, merges=None),
    "gradual unfreezing, layer decay": Method({"unfreeze": {"every": 3}, "layer_lr_decay": 0.8}, merges=None),
}


@dataclass(frozen=True)
class Cell:
    """One method on one model: a family of FAMILIES on one process, or an engine on ENGINE_FAMILY."""

    method: str
    column: str

    @property
    def engine(self) -> str:
        return self.column if self.column in ENGINES else "single"

    @property
    def case(self) -> Case:
        return FAMILIES[ENGINE_FAMILY if self.column in ENGINES else self.column]

    def __str__(self) -> str:
        return f"{self.method} | {self.column}"


CELLS = [Cell(method, column) for column in (*FAMILIES, *ENGINES) for method in METHODS]


def cell_recipe(cell: Cell, workshop: Path, run_name: str) -> Recipe:
    """Ten steps of AdamW over the same 16 rows, so that the losses can be compared. Raises pydantic's ValidationError
    where the recipe's own rules refuse the cell."""
    method = METHODS[cell.method]
    trainable = dict(method.trainable)
    if more := method.by_model.get(cell.case.model):
        trainable["adapters"] = [{**trainable["adapters"][0], **more}]
    wide = "" if method.quantization is None else "wide"
    layout = Layout(8) if cell.engine == "single" else Layout(4, world_size=RANKS)
    source = {
        "path": str(workshop / "data" / f"{cell.case.file}.jsonl"),
        "format": cell.case.format,
        "limit": 16,
    }
    optimizer = {
        "optim": {"name": "adamw", "learning_rate": method.learning_rate},
        "schedule": {"lr_scheduler_type": "constant"},
    }
    return recipe(
        workshop,
        cell.case,
        optimizer,
        layout,
        STEPS,
        model={**method.model, "model_name_or_path": str(workshop / "models" / wide / cell.case.model)},
        data={"train": [source]},
        trainable=trainable,
        parallel={"strategy": cell.engine},
        checkpoint={"save_steps": MIDDLE, "save_total_limit": None, "final": "last"},
        run_name=run_name,
    )
