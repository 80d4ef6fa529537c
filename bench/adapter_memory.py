"""Peak memory of full fine-tuning, LoRA and QLoRA on the CPU: what the start-up report predicts beside what is
measured, for the allocator (every allocation recorded) and for the whole process (its resident set).

    python bench/adapter_memory.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from measure_memory import Case, alone, measure, resident

from tunesmith.planning.predict import Built, predict_peak

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LORA = ({"type": "lora", "r": 16},)
CLASSES = {"type": "classification", "problem": "single_label"}
MIB = 2**20


def cases() -> list[Case]:
    models: list[Case] = [
        Case("llama, 30 M", LLAMA, rows=4, length=128),
        Case("minilm", "builtin:minilm", objective=CLASSES, rows=8, length=64),
    ]
    found: list[Case] = []
    for model in models:
        found += [
            replace(model, name=f"{model.name}: full"),
            replace(model, name=f"{model.name}: lora", adapters=LORA),
            replace(model, name=f"{model.name}: qlora (nf4)", adapters=LORA, quantization="nf4"),
        ]
    return found


def main() -> None:
    import torch
    import transformers  # noqa: F401 — once, for all children

    from tunesmith.quiet import quiet_libraries

    quiet_libraries()
    os.environ |= {"TUNESMITH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    print(f"{'':26}{'allocator, MiB':>34}{'process, MiB':>34}")
    print(f"{'':26}" + f"{'predicted':>12}{'measured':>12}{'error':>10}" * 2)
    for case in cases():
        peak = alone(lambda case=case: {"peak": measure(case)[0]})["peak"]
        so_far, process = alone(lambda case=case: {"resident": resident(case)})["resident"]
        built = Built(None, 1, "cpu", case.rows, case.length, so_far)
        told = alone(lambda case=case, built=built: predict_peak(case.recipe(), Path(), built))
        line = f"{case.name:26}"
        for predicted, measured in ((sum(told["parts"].values()), peak), (told["bytes"], process)):
            line += f"{predicted / MIB:12.1f}{measured / MIB:12.1f}{predicted / measured - 1:10.1%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
