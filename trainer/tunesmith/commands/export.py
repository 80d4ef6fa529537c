"""`tunesmith export`: a Hugging Face folder from a finished run, verified by loading it again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.commands.finished import FinishedRun
from tunesmith.commands.model_card import model_card
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import (
    Answer,
    Chat,
    Example,
    Labelled,
    Message,
    Question,
    SourceTarget,
    Text,
    Tokens,
)
from tunesmith.errors import MachineError, Place, UserError
from tunesmith.export import stop_where_taught
from tunesmith.objectives import Objective

Dtype = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEXTS = ("The quick brown fox.", "Is it 42, or 7?")
_ROOM = 64  # tokens, which the texts need at most
_SAME = 1e-6  # relative: the same weights in the same code
Outputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Exported:
    """`difference` is the largest between an output of the folder, loaded again, and of the trained fp32 weights;
    `scale` the largest output of these."""

    target: Path
    parameters: int
    bytes: int
    difference: float
    scale: float


def export(run: FinishedRun, target: Path, dtype: Dtype = "fp32", max_shard_size: str = "5GB") -> Exported:
    """Writes model, tokenizer and a model card into the new folder `target`. Raises UserError where `target` is in
    use, MachineError where what was written does not load back to the same outputs."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is in use: name a new folder")
    model, batch = run.model.to("cpu"), sample_batch(run.objective)
    trained = _outputs(model, run.objective, batch)
    written = model if dtype == "fp32" else copy.deepcopy(model).to(_DTYPES[dtype])
    _check_range(written, dtype)
    stop_where_taught(written, run.objective)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        written.save_pretrained(temporary, max_shard_size=max_shard_size)
        run.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(run, target.name, dtype), encoding="utf-8")
        loaded = _reload(run, temporary, _DTYPES[dtype])
        _check_weights(loaded, written, target)
        found = _outputs(loaded, run.objective, batch)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise MachineError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    difference = max(float((found[name] - trained[name]).abs().max()) for name in trained)
    scale = max(float(value.abs().max()) for value in trained.values())
    if dtype == "fp32" and not difference <= _SAME * max(1.0, scale):
        raise MachineError(f"{target}: its weights are right, but its outputs differ by {difference:.3g}")
    return Exported(
        target,
        sum(p.numel() for p in written.parameters()),
        sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        difference,
        scale,
    )


def _check_range(model: nn.Module, dtype: Dtype) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            fix = "use bf16" if dtype == "fp16" else "export another checkpoint"
            raise UserError(f"{name} has values that are not finite in {dtype}: {fix}")


def _reload(run: FinishedRun, folder: Path, dtype: torch.dtype) -> Any:
    settings = run.recipe.model
    model, info = run.objective.auto_class.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise MachineError(f"{folder}: written without {', '.join(missing[:5])}")
    return model


def _check_weights(loaded: nn.Module, written: nn.Module, target: Path) -> None:
    found, expected = loaded.state_dict(), written.state_dict()
    # compared as fp32: some classes keep a few layers in fp32 whatever they are loaded as
    wrong = [
        name
        for name, value in expected.items()
        if name not in found or not torch.equal(found[name].float(), value.float())
    ]
    if wrong:
        raise MachineError(f"{target}: loaded again, {', '.join(wrong[:5])} differ from what was written")


def sample_batch(objective: Objective) -> Batch:
    """Two short rows of the kind that the objective takes."""
    roomy = copy.copy(objective)
    roomy.max_length = max(_ROOM, objective.max_length)
    examples = (_example(roomy, text) for text in _TEXTS)
    rows = [roomy.draw(row, (0,)) for _, row in roomy.encode_all(examples) if not isinstance(row, Dropped)]
    assert rows, "the sample texts give no row"
    return roomy.collate(rows, range(len(rows)))


def _example(objective: Objective, text: str) -> Example:
    place, kind = Place("export", 1), objective.accepts[0]
    examples: dict[type, Example] = {
        Text: Text(text, place),
        Chat: Chat((Message("user", text), Message("assistant", text)), place),
        Labelled: Labelled(text, None, place),
        Tokens: Tokens(tuple(text.split()), None, place),
        Question: Question("1", text, text, (Answer(text[:3], 0),), place),
        SourceTarget: SourceTarget(text, (text,), place),
    }
    return examples[kind]


def _outputs(model: Any, objective: Objective, batch: Batch) -> Outputs:
    """Every tensor of floats that the model gives for the batch, in fp32."""
    model.eval()
    with torch.inference_mode():
        found: Mapping[str, Any] = objective.outputs(model, batch)
    values = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: value.float() for name, value in values.items() if value.is_floating_point()}
