"""Training steps of Llama-3.2-1B's shape (all parameters) and of Llama-3-8B's (LoRA): tokens per second, model FLOP
utilisation and peak memory of a plain loop with this project's loss and optimizer, beside transformers.Trainer plain
and with Liger. Random weights, bf16, packed sequences of 4096, gradient checkpointing."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.device import Machine
from gpu.record import Record
from tunesmith_kernels.adamw import AdamW

LEARNING_RATE, MAX_NORM = 1e-5, 1.0
WARM_UP = 3
# dense bf16 FLOP/s by NVIDIA's data sheets
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}
PUBLISHED_8B_LORA = 12_473  # tokens per second on one H100, published for another trainer


@dataclass(frozen=True)
class Setup:
    """config: of a Llama. rows of `length` tokens per step; steps that count, after the warm-up."""

    name: str
    config: dict[str, Any]
    lora: bool
    rows: int
    length: int
    steps: int


_LLAMA: dict[str, Any] = {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_LLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
_TINY = _LLAMA | {
    "vocab_size": 503,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def setups(machine: Machine) -> tuple[Setup, Setup]:
    """All parameters of 1B; LoRA on 8B."""
    rows, length, steps = machine.pick((2, 4096, 8), (2, 4096, 4), (2, 16, 2))
    full = _LLAMA | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    lora = _LLAMA | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    return (
        Setup(
            "Llama-3.2-1B shape, full fine-tuning", _TINY if machine.dry else full, False, rows, length, steps
        ),
        Setup(
            "Llama-3-8B shape, LoRA r 16 on all linears",
            _TINY if machine.dry else lora,
            True,
            rows,
            length,
            steps,
        ),
    )


def full(machine: Machine, record: Record, text: Path | None) -> None:
    """Part end_to_end_full."""
    _compare(machine, record, setups(machine)[0], text)


def lora(machine: Machine, record: Record, text: Path | None) -> None:
    """Part end_to_end_lora."""
    _compare(machine, record, setups(machine)[1], text)


@dataclass
class Run:
    """seconds of each step; peak: bytes of memory; parameters: without an embedding that is only looked up."""

    seconds: list[float]
    peak: int
    parameters: int


def _compare(machine: Machine, record: Record, setup: Setup, text: Path | None) -> None:
    if setup.lora and importlib.util.find_spec("peft") is None:
        record.fail("peft is not installed: no LoRA")
        return
    tokens, source = token_stream(setup.config["vocab_size"], setup.rows * setup.length * 4, text)
    record.note(
        f"{source}; {setup.rows} × {setup.length} tokens a step, packed without regard to documents, "
        f"gradient checkpointing, bf16 parameters, no accumulation; {setup.steps} steps after {WARM_UP}"
    )
    record.note("tunesmith: its fused head and AdamW in a plain loop; its trainer is part end_to_end_trainer")
    batches = [part.view(setup.rows, setup.length).to(machine.device) for part in tokens.chunk(4)]
    contenders: dict[str, Callable[[], Run]] = {
        "tunesmith": lambda: _loop(machine, setup, batches),
        "transformers.Trainer": lambda: _trainer(machine, setup, tokens, liger=False),
    }
    if importlib.util.find_spec("liger_kernel") is None:
        record.note("liger_kernel: not installed")
    elif not machine.dry:  # last: it patches the model's classes
        contenders["transformers.Trainer with Liger"] = lambda: _trainer(machine, setup, tokens, liger=True)
    speeds: dict[str, float] = {}
    for name, contender in contenders.items():
        with record.attempt(name, needs=8):
            speeds[name] = _recorded(machine, record, setup, name, contender())
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    for name, speed in speeds.items():
        if name != "tunesmith" and "tunesmith" in speeds:
            record.row(setup.name, f"tunesmith ÷ {name}, tokens/s", speeds["tunesmith"] / speed, "×", ">= 1")
    if setup.lora and "tunesmith" in speeds and "H100" in device_name(machine):
        share = speeds["tunesmith"] / PUBLISHED_8B_LORA
        record.row(setup.name, f"tunesmith ÷ published {PUBLISHED_8B_LORA:,} tokens/s", share, "×", ">= 1")


def device_name(machine: Machine) -> str:
    return torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "CPU"


def _recorded(machine: Machine, record: Record, setup: Setup, name: str, run: Run) -> float:
    counted = run.seconds[WARM_UP:]
    tokens = setup.rows * setup.length
    speed = tokens / statistics.median(counted)
    record.row(setup.name, f"{name}: speed", speed, "tokens/s", least=tokens / max(counted))
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in device_name(machine)), None)
    if peak is not None:
        share = speed * flops_per_token(setup, run.parameters) / peak
        record.row(setup.name, f"{name}: model FLOP utilisation", share, "")
    if machine.device.type == "cuda":
        record.row(setup.name, f"{name}: peak memory", run.peak / 1e9, "GB")
    return speed


def flops_per_token(setup: Setup, parameters: int) -> float:
    """6 per parameter that multiplies (4 where it is frozen), and causal attention's 6·layers·width·length (Chowdhery
    et al. 2022, appendix B, with half the scores); what checkpointing computes twice does not count. parameters:
    without an embedding that is only looked up."""
    config = setup.config
    width = config["hidden_size"]
    attention = 6 * config["num_hidden_layers"] * width * setup.length
    return (4 if setup.lora else 6) * parameters + attention


def token_stream(vocab: int, count: int, text: Path | None) -> tuple[Tensor, str]:
    """`count` token ids, int64, and where they come from: a text by a byte-level BPE trained on it; or synthetic."""
    if text is not None and importlib.util.find_spec("tokenizers") is not None:
        from tokenizers import ByteLevelBPETokenizer

        content = text.read_text(encoding="utf-8")[: 16 * count]
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            content.split("\n\n"), vocab_size=min(vocab, 16_384), show_progress=False
        )
        ids = torch.tensor(tokenizer.encode(content).ids)
        repeats = -(-count // len(ids))
        return ids.repeat(repeats)[:count], f"tokens of {text.name}" + (", repeated" if repeats > 1 else "")
    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, count, replacement=True, generator=generator)
    return ids, "synthetic tokens, drawn from Zipf's law"


def _model(machine: Machine, setup: Setup) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {**setup.config, "attn_implementation": "sdpa", "use_cache": False}
    config = LlamaConfig(**settings)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(machine.device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if setup.lora:
        from peft import LoraConfig, get_peft_model

        targets = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model.enable_input_require_grads()
        model = get_peft_model(model, targets)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _multiplying(model: Any, setup: Setup) -> int:
    total = sum(parameter.numel() for parameter in model.parameters())
    looked_up = 0 if setup.config.get("tie_word_embeddings") else model.get_input_embeddings().weight.numel()
    return total - looked_up


def _loop(machine: Machine, setup: Setup, batches: list[Tensor]) -> Run:
    from tunesmith.fused_head import FusedHead, HeadOutput

    model = _model(machine, setup)
    head = FusedHead(model.get_output_embeddings(), machine.loss_backend)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    low = any(parameter.dtype == torch.bfloat16 for parameter in trained)
    optimizer = AdamW(
        trained,
        lr=LEARNING_RATE,
        precision="stochastic" if low else "fp32",
        max_norm=MAX_NORM,
        backend=machine.optimizer_backend,
    )
    normalizer = torch.tensor(float(setup.rows * (setup.length - 1)), device=machine.device)

    def step(batch: Tensor) -> None:
        autocast = torch.autocast(machine.device.type, torch.bfloat16)
        with head.standing_in(), autocast:
            logits = model(input_ids=batch, use_cache=False).logits
        assert isinstance(logits, HeadOutput)
        logits.cross_entropy(batch[:, 1:], normalizer=normalizer, shift=True).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: list[float] = []
    with machine.peak() as peak:
        for index in range(WARM_UP + setup.steps):
            machine.synchronize()
            started = time.perf_counter()
            step(batches[index % len(batches)])
            machine.synchronize()
            seconds.append(time.perf_counter() - started)
    return Run(seconds, peak[0] + _resident(model), _multiplying(model, setup))


def _resident(model: Any) -> int:
    """What was there before the peak was watched."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _trainer(machine: Machine, setup: Setup, tokens: Tensor, *, liger: bool) -> Run:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = _model(machine, setup)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            machine.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            machine.synchronize()
            seconds.append(time.perf_counter() - self.started)

    rows = [{"input_ids": row, "labels": row} for row in tokens.view(-1, setup.length)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setup.rows,
            max_steps=WARM_UP + setup.steps,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=machine.device.type == "cpu",
            use_liger_kernel=liger,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=machine.device.type == "cuda",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])  # pyright: ignore[reportArgumentType]
        with machine.peak() as peak:
            trainer.train()
    return Run(seconds, peak[0] + _resident(model), _multiplying(model, setup))
