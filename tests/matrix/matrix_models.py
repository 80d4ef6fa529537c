"""The models and data of the matrix: the tiny ones of the numerical proofs, and wider ones to hold in few bits."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.numerics.tiny_data import build_data
from tests.numerics.tiny_models import build_models

# 4 bits come in blocks of 64 inputs
_WIDER = {
    "bert_single": (AutoModelForSequenceClassification, {"hidden_size": 64, "intermediate_size": 128}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 64}),
    "llama": (AutoModelForCausalLM, {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 64, "d_ff": 128, "d_kv": 16}),
}


def build_workshop(root: Path) -> None:
    """`models/` and `data/` in `root`, and `models/wide/` with the families again."""
    build_models(root / "models", build_data(root / "data"))
    for name, (auto_class, changes) in _WIDER.items():
        config = AutoConfig.from_pretrained(root / "models" / name, **changes)
        torch.manual_seed(0)
        model = auto_class.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
        model.save_pretrained(root / "models" / "wide" / name)
        AutoTokenizer.from_pretrained(root / "models" / name).save_pretrained(root / "models" / "wide" / name)
