"""How far `tunesmith plan` is from the allocator: every configuration is planned from its config and measured in real
processes (bench/measure_memory.py), and both are printed side by side.

    python bench/plan_accuracy.py [--worlds 1 2 4] [--only NAME …] [--json FILE]

On a machine with GPUs the same configurations run there, against max_memory_allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure_memory import Case

from tunesmith.planning.inspect import inspect
from tunesmith.planning.memory import Breakdown, Setup, estimate

LORA = ({"type": "lora", "r": 16},)  # on all linear layers but the head
ATTENTION = {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}
NF4 = {"type": "nf4", "compute_dtype": "bf16"}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
DEEP = LLAMA | {"num_hidden_layers": 10, "vocab_size": 1000, "tie_word_embeddings": True}
VOCABULARY = LLAMA | {"num_hidden_layers": 3, "vocab_size": 16000}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "vocab_size": 4000,
}
BART: dict[str, Any] = {
    "model_type": "bart",
    "d_model": 192,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 256,
    "vocab_size": 4000,
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": 4000,
    "sliding_window": 64,
}
QWEN: dict[str, Any] = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "num_hidden_layers": 6}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "vocab_size": 3000,
    "n_positions": 512,
}
VERY = LLAMA | {"num_hidden_layers": 2, "vocab_size": 64000}
T5: dict[str, Any] = {
    "model_type": "mt5",
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 4,
    "num_heads": 6,
    "vocab_size": 8000,
    "decoder_start_token_id": 0,
}
CLASSES = {"type": "classification", "problem": "single_label"}
SEQ2SEQ = {"type": "seq2seq", "max_target_length": 48}


def _one() -> list[Case]:
    def case(name: str, config: dict[str, Any], **settings: Any) -> Case:
        return Case(f"1 {name}", config, **settings)

    return [
        case("llama", LLAMA),
        case("llama unpadded", LLAMA, padded=False),
        case("llama bf16", LLAMA, precision="bf16"),
        case("llama bf16 packed", LLAMA, precision="bf16", packing=True),
        case("llama 2 micro-steps", LLAMA, accumulation=2),
        case("llama checkpointing", LLAMA, checkpointing=True),
        case("llama one long row", LLAMA, rows=1, length=512),
        case("deep checkpointing packed", DEEP, checkpointing=True, packing=True),
        case("deep checkpointing bf16", DEEP, checkpointing=True, precision="bf16", rows=8),
        case("deep one row", DEEP, rows=1),
        case("large vocabulary", VOCABULARY),
        case("large vocabulary bf16", VOCABULARY, precision="bf16", rows=8),
        case("qwen3", QWEN, rows=3),
        case("gemma3", GEMMA),
        case("gemma3 checkpointing bf16", GEMMA, checkpointing=True, precision="bf16"),
        case("gpt2", GPT2),
        case("gpt2 bf16", GPT2, precision="bf16", rows=8),
        case("t5", T5, objective=SEQ2SEQ, rows=8),
        case("t5 bf16", T5, objective=SEQ2SEQ, precision="bf16"),
        case("bert masked_lm", BERT, objective={"type": "masked_lm"}, rows=8),
        case("llama whole logits", LLAMA, kernels="reference"),
        case("large vocabulary whole logits", VOCABULARY, kernels="reference"),
        case("large vocabulary bf16 whole logits", VOCABULARY, precision="bf16", kernels="reference", rows=8),
        case("very large vocabulary", VERY, rows=8),
        case("very large vocabulary bf16", VERY, precision="bf16", rows=8),
        case("very large vocabulary whole logits", VERY, kernels="reference", rows=8),
        case("head frozen", VOCABULARY, freeze=("lm_head*",)),
        case(
            "bert classification",
            BERT,
            objective={"type": "classification", "problem": "single_label"},
            rows=8,
        ),
        case("bert masked_lm bf16", BERT, objective={"type": "masked_lm"}, precision="bf16", rows=8),
        case("bart", BART, objective=SEQ2SEQ),
        case("bart checkpointing", BART, objective=SEQ2SEQ, checkpointing=True, rows=8),
        case("sgd", LLAMA, optim={"name": "sgd", "momentum": 0.9}),
        case("adafactor one row", DEEP, optim={"name": "adafactor"}, rows=1, length=64),
        case("8-bit adamw one row", DEEP, optim={"name": "adamw_8bit"}, rows=1, length=64),
        case("8-bit lion one row", DEEP, optim={"name": "lion_8bit"}, rows=1, length=64),
        case("rmsprop one row", DEEP, optim={"name": "rmsprop"}, rows=1, length=64),
        case("lower half frozen", LLAMA, freeze=("model.embed_tokens*", "model.layers.[01].*")),
        case("lora", LLAMA, adapters=LORA),
        case("lora bf16 checkpointing", DEEP, adapters=LORA, precision="bf16", checkpointing=True),
        case("lora dropout", LLAMA, adapters=(ATTENTION | {"lora_dropout": 0.1},)),
        case("qlora", LLAMA, adapters=LORA, quantization=NF4),
        case("qlora bf16", LLAMA, adapters=LORA, quantization=NF4, precision="bf16"),
        case("qlora checkpointing", DEEP, adapters=LORA, quantization=NF4, checkpointing=True),
        case("qlora in fp32", LLAMA, adapters=LORA, quantization="nf4"),
        case("int8 lora", LLAMA, adapters=LORA, quantization="int8"),
        case("int8 lora bf16", LLAMA, adapters=LORA, quantization="int8", precision="bf16"),
        case("dora", LLAMA, adapters=({"type": "lora", "r": 16, "use_dora": True},)),
        case("dora nf4", LLAMA, adapters=({"type": "lora", "r": 16, "use_dora": True},), quantization="nf4"),
        case("lora and a whole head", LLAMA, adapters=({"type": "lora", "modules_to_save": ["lm_head"]},)),
        case("ia3", LLAMA, adapters=({"type": "ia3"},)),
        case("prompt tuning", LLAMA, adapters=({"type": "prompt_tuning"},)),
        case("prefix tuning", LLAMA, adapters=({"type": "prefix_tuning"},)),
        case("p-tuning", LLAMA, adapters=({"type": "p_tuning"},)),
        case("gpt2 lora", GPT2, adapters=LORA),
        case("gpt2 qlora", GPT2, adapters=LORA, quantization="nf4"),
        case("t5 lora", T5, objective=SEQ2SEQ, adapters=LORA, rows=8),
        case("bert lora", BERT, objective=CLASSES, adapters=LORA, rows=8),
        case(
            "bert qlora bf16",
            BERT,
            objective=CLASSES,
            adapters=LORA,
            quantization="nf4",
            precision="bf16",
            rows=8,
        ),
    ]


def _several(world: int) -> list[Case]:
    def case(name: str, strategy: str, config: dict[str, Any] = LLAMA, **settings: Any) -> Case:
        return Case(f"{world} {strategy} {name}", config, world, {"strategy": strategy}, **settings)

    cases = [
        case("llama", "ddp"),
        case("lora bf16", "ddp", adapters=LORA, precision="bf16"),
        case("llama", "fsdp2"),
        case("deep checkpointing bf16", "fsdp2", DEEP, checkpointing=True, precision="bf16"),
        case("vocabulary bf16", "fsdp2", VOCABULARY, precision="bf16"),
        case("vocabulary bf16 whole logits", "fsdp2", VOCABULARY, precision="bf16", kernels="reference"),
    ]
    for stage in ("zero1", "zero2", "zero3"):
        cases.append(case("llama", stage, bucket=1_000_000))
        cases.append(
            case(
                "deep checkpointing bf16", stage, DEEP, checkpointing=True, precision="bf16", bucket=2_000_000
            )
        )
    if world == 4:
        return cases
    cases += [
        case("bf16 2 micro-steps", "ddp", precision="bf16", accumulation=2),
        case("bert", "ddp", BERT, objective={"type": "classification", "problem": "single_label"}, rows=8),
        case("vocabulary", "ddp", VOCABULARY),
        case("vocabulary bf16 whole logits", "ddp", VOCABULARY, precision="bf16", kernels="reference"),
        case("bf16", "fsdp2", precision="bf16"),
        case("tied 2 micro-steps", "fsdp2", LLAMA | {"tie_word_embeddings": True}, accumulation=2),
        case("packed checkpointing", "fsdp2", DEEP, checkpointing=True, packing=True),
        case("vocabulary", "fsdp2", VOCABULARY),
        case("gpt2 bf16", "fsdp2", GPT2, precision="bf16"),
        case("t5", "fsdp2", T5, objective=SEQ2SEQ),
        case("bart", "fsdp2", BART, objective=SEQ2SEQ),
        case("bert", "fsdp2", BERT, objective={"type": "classification", "problem": "single_label"}, rows=8),
        case("gemma3 bf16", "fsdp2", GEMMA, precision="bf16"),
    ]
    for stage in ("zero1", "zero2", "zero3"):
        cases.append(case("bf16 2 micro-steps", stage, precision="bf16", accumulation=2, bucket=1_000_000))
        cases.append(case("packed, a bucket for all", stage, packing=True, rows=2, bucket=8_000_000))
        cases.append(case("vocabulary bf16", stage, VOCABULARY, precision="bf16", bucket=4_000_000))
        cases.append(
            case("vocabulary whole logits", stage, VOCABULARY, kernels="reference", bucket=4_000_000)
        )
    return cases


def cases() -> list[Case]:
    return [*_one(), *_several(2), *_several(4)]


@dataclass(frozen=True)
class Result:
    case: Case
    planned: Breakdown
    measured: int | None
    fault: str = ""

    @property
    def error(self) -> float:
        assert self.measured is not None
        return self.planned.total / self.measured - 1


def plan(case: Case, device: str) -> Breakdown:
    """The closed form for a case: what `tunesmith plan` prints for the row."""
    recipe = case.recipe()
    found = inspect(recipe, Path(), precision=case.precision)
    shape = replace(found.workload.shape, padded=case.padded and not case.packing)
    found.workload = replace(found.workload, shape=shape)
    bucket = {} if case.bucket is None else {"bucket": case.bucket}
    setup = Setup(recipe.parallel, case.world_size, case.rows, case.checkpointing, device, **bucket)
    profile = found.profile(found.variant(recipe.parallel, case.checkpointing, device))
    return estimate(found.workload, setup, profile)


def measured(some: list[Case]) -> dict[str, dict[str, Any]]:
    """By name: {"peak": the largest of the ranks', in bytes} or {"error": …}."""
    (world,) = {case.world_size for case in some}
    script = str(Path(__file__).with_name("measure_memory.py"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps([dataclasses.asdict(case) for case in some]), encoding="utf-8")
        start = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *start, script, str(path)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    found: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            before = found.setdefault(one["case"], {"peak": 0})
            if "error" in one:
                found[one["case"]] = {"error": one["error"]}
            elif "peak" in before:
                before["peak"] = max(before["peak"], one["peak"])
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    return found


def _line(result: Result) -> str:
    if result.measured is None:
        return f"{result.case.name:36} {result.fault}"
    planned = result.planned
    return (
        f"{result.case.name:36} measured {result.measured / 1e6:8.2f} MB  planned {planned.total / 1e6:8.2f}  "
        f"{result.error:+7.2%}  {planned.moment}, mostly {planned.dominating}"
    )


def summary(results: list[Result]) -> str:
    errors = sorted(abs(result.error) for result in results if result.measured is not None)
    if not errors:
        return "nothing was measured"
    at = min(len(errors) - 1, round(0.95 * (len(errors) - 1)))
    return (
        f"{len(errors)} configurations: median error {statistics.median(errors):.2%}, "
        f"95th percentile {errors[at]:.2%}, "
        f"worst {errors[-1]:.2%}; {sum(r.measured is None for r in results)} did not run"
    )


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--only", nargs="+", default=[""], help="Parts of the names.")
    options.add_argument("--json", type=Path, help="Where to write the results.")
    options.add_argument("--reuse", type=Path, help="Results whose measurements are taken as they are.")
    given = options.parse_args()
    import torch

    from tunesmith.quiet import quiet_libraries

    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known: dict[str, dict[str, Any]] = {}
    if given.reuse:
        known = {
            row["case"]: {"peak": row["measured"], "error": row["fault"]}
            for row in json.loads(given.reuse.read_text(encoding="utf-8"))
        }
    results: list[Result] = []
    for world in given.worlds:
        some = [
            case
            for case in cases()
            if case.world_size == world and any(part in case.name for part in given.only)
        ]
        peaks = known or (measured(some) if some else {})
        for case in some:
            peak = peaks.get(case.name, {"error": "the process died"})
            result = Result(case, plan(case, device), peak.get("peak"), peak.get("error", ""))
            print(_line(result), flush=True)
            results.append(result)
    print(summary(results))
    if given.json:
        rows = [
            {"case": r.case.name, "measured": r.measured, "planned": r.planned.total, "fault": r.fault}
            for r in results
        ]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
