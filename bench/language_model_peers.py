"""One contestant of bench/language_model.py, in a process of its own, which does steps on command: tunesmith (auto or
reference), transformers.Trainer, or TRL's SFTTrainer under a Python of its own, which need not have tunesmith.

Every contestant trains through its own public entry; only the beginning of a step is hooked, where a gate tells the
steps' times and waits for the next command. Commands come as JSON lines on stdin, answers go out on stdout; what the
libraries print goes to stderr."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


class Gate:
    """Called at the beginning of every step: a round is the steps between two commands."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.left = 0
        self.marks: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self.baseline = 0
        self.about: dict[str, Any] = {}

    def model_follows(self) -> None:
        """To be called when all is imported, right before the model is built."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.baseline = pages * resource.getpagesize()

    def step_begins(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))
        if self.left == 0:
            self._tell()
            self.left = self._told()
            self.marks = [(time.perf_counter(), time.process_time())]
            self.losses.clear()
        self.left -= 1

    def _tell(self) -> None:
        if not self.losses:
            found = {"baseline": self.baseline, "about": self.about}
        else:
            wall, cpu = zip(*self.marks, strict=True)
            found = {
                "seconds": [b - a for a, b in pairwise(wall)],
                "cpu_seconds": [b - a for a, b in pairwise(cpu)],
                "losses": self.losses,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            # contestants wait side by side: what the allocator keeps of a step's activations goes back meanwhile
            ctypes.CDLL(None).malloc_trim(0)
        print(json.dumps(found), file=self.answers, flush=True)

    @staticmethod
    def _told() -> int:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return int(json.loads(line)["steps"])


def tunesmith(setup: dict[str, Any], gate: Gate) -> None:
    from transformers.models.llama import modeling_llama  # noqa: F401  # no part of the model's memory

    from tunesmith import loop, run
    from tunesmith.recipe import Recipe
    from tunesmith.run_dir import Resume

    load_model, train_step, write_environment = run.load_model, loop.train_step, run.write_environment

    def loading(*args: Any, **kwargs: Any) -> Any:
        gate.model_follows()
        return load_model(*args, **kwargs)

    def writing(run_dir: Path, recipe: Any, base: Path, objective: Any, facts: dict[str, Any]) -> None:
        gate.about = {"kernels": facts["kernels"], "precision": facts["precision"]}
        write_environment(run_dir, recipe, base, objective, facts)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        gate.step_begins()
        result = train_step(*args, **kwargs)
        gate.losses.append(float(result.loss))
        return result

    run.load_model, run.write_environment, loop.train_step = loading, writing, stepping
    run.run(Recipe.model_validate(setup["recipe"]), Path(), Resume(overwrite=True))


def hugging_face(setup: dict[str, Any], gate: Gate, trl: bool) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()
    settings: dict[str, Any] = {
        "output_dir": setup["scratch"],
        "per_device_train_batch_size": setup["rows_per_step"],
        "max_steps": setup["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": setup["precision"] == "bf16",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows: Any = json.loads(Path(setup["rows"]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(setup["model"])
    more: dict[str, Any] = {}
    gate.about = {"transformers": transformers.__version__}
    if trl:
        import trl as library
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        base: Any = SFTTrainer
        rows = Dataset.from_list(rows)
        arguments: Any = SFTConfig(
            **settings,
            gradient_checkpointing=False,  # its default is to checkpoint: nobody else here does
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        gate.about |= {"trl": library.__version__, "loss_type": arguments.loss_type}
    else:
        base = transformers.Trainer
        arguments = transformers.TrainingArguments(**settings)
        more["data_collator"] = DataCollatorForSeq2Seq(tokenizer)

    class Marks(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.step_begins()

    class Told(base):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            gate.losses.append(float(loss))
            return loss

    gate.model_follows()
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype="float32", attn_implementation="sdpa")
    Told(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Marks()], **more
    ).train()  # fmt: skip


def main() -> None:
    gate = Gate()
    contestant, setup = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    match contestant:
        case "auto" | "reference":
            setup["recipe"] |= {"kernels": contestant, "run_name": contestant}
            tunesmith(setup, gate)
        case _:
            hugging_face(setup, gate, trl=contestant == "trl")


if __name__ == "__main__":
    main()
