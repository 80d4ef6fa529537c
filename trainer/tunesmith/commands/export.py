"""`tunesmith export`: a Hugging Face folder from a finished run, verified by loading it again: the model, or of a run
with adapters the adapters, or their merger with the base."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
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
from tunesmith.model import load_model
from tunesmith.objectives import Objective
from tunesmith.quantized import is_quantized
from tunesmith.tokenizer import save_tokenizer

Dtype = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEXTS = ("The quick brown fox.", "Is it 42, or 7?")
_ROOM = 64  # tokens, which the texts need at most
Outputs = dict[str, Tensor]

# relative to the largest output
_SAME = 1e-6  # the same weights in the same code
_ADDED = 1e-4  # W + s·B·A in place of W and s·B·A, in fp32; what initialisations took out of W put back
_ROUNDED = 5e-2  # weights in 16 bits, products of a quantised base in 16 bits or int8


@dataclass(frozen=True, slots=True)
class Exported:
    """`difference` is the largest between an output of the folder, loaded again, and of the trained fp32 weights;
    `scale` the largest output of these, `tolerance` the most by which they may differ. `what`: the whole model, the
    adapters alone, or the model that they were merged into."""

    target: Path
    parameters: int
    bytes: int
    difference: float
    scale: float
    tolerance: float
    what: Literal["model", "adapter", "merged"]


def export(
    run: FinishedRun, target: Path, dtype: Dtype = "fp32", max_shard_size: str = "5GB", *, merge: bool = False
) -> Exported:
    """Writes model (of a run with adapters these, or with `merge` the model that they are merged into), tokenizer and a
    model card into the new folder `target`. The run's model is used up. Raises UserError where `target` is in use or
    the adapters cannot be merged, MachineError where what was written does not load back to the same outputs."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is in use: name a new folder")
    adapted = hasattr(run.model, "peft_config")
    if merge and not adapted:
        raise UserError("--merge: the run trained no adapter: leave it out")
    what = "model" if not adapted else "merged" if merge else "adapter"
    model, batch = run.model.to("cpu"), sample_batch(run.objective)
    trained = _outputs(model, run.objective, batch)
    scale = max(float(value.abs().max()) for value in trained.values())
    tolerance = _tolerance(model, what, dtype) * max(1.0, scale)
    card = model_card(run, target.name, dtype)  # before a merger takes the model apart
    if what == "adapter":
        write, reload, parameters = _adapter_files(run, dtype)
    else:
        write, reload, parameters = _model_files(run, model, dtype, max_shard_size, merge)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        save_tokenizer(run.tokenizer, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        found = _outputs(reload(temporary, target), run.objective, batch)
        difference = max(float((found[name] - trained[name]).abs().max()) for name in trained)
        if not difference <= tolerance and (dtype == "fp32" or adapted):
            raise MachineError(
                f"{target}: loaded again, its outputs differ from the trained model's by {difference:.3g} (the largest "
                f"output is {scale:.3g}, the tolerance {tolerance:.3g})"
            )
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise MachineError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Exported(target, parameters, size, difference, scale, tolerance, what)


def _tolerance(model: Any, what: str, dtype: Dtype) -> float:
    if what == "model" and dtype == "fp32":
        return _SAME
    return _ROUNDED if dtype != "fp32" or is_quantized(model) else _ADDED


Write = Callable[[Path], None]
Reload = Callable[[Path, Path], Any]  # (folder, what to call it) → the model


def _model_files(
    run: FinishedRun, model: Any, dtype: Dtype, max_shard_size: str, merge: bool
) -> tuple[Write, Reload, int]:
    if merge:
        from tunesmith.adapters.merge import merge as merged

        model = merged(model)
    written = model if dtype == "fp32" else copy.deepcopy(model).to(_DTYPES[dtype])
    _check_finite({name: p.detach() for name, p in written.named_parameters()}, dtype)
    stop_where_taught(written, run.objective)

    def reload(folder: Path, target: Path) -> Any:
        loaded = _reload(run, folder, _DTYPES[dtype])
        _check_weights(loaded, written, target)
        return loaded

    return (
        lambda folder: written.save_pretrained(folder, max_shard_size=max_shard_size),
        reload,
        sum(p.numel() for p in written.parameters()),
    )


def _adapter_files(run: FinishedRun, dtype: Dtype) -> tuple[Write, Reload, int]:
    from tunesmith.adapters.attach import attach
    from tunesmith.adapters.save import adapter_state, save
    from tunesmith.recipe.adapters import Existing

    kind = _DTYPES[dtype]
    state: dict[str, Tensor] = run.model.state_dict()
    whole = {name: v.to(kind) if v.is_floating_point() else v for name, v in state.items()}
    for tensors in adapter_state(run.model, whole).values():
        _check_finite(tensors, dtype)
    names = list(run.model.peft_config)

    def reload(folder: Path, target: Path) -> Any:
        settings, seed = run.recipe.model, run.recipe.training.seed
        loaded = load_model(settings, run.run_dir, run.objective, run.tokenizer, seed)
        again = [
            Existing(
                type="existing",
                name=name,
                path=str((folder if name == "default" else folder / name).resolve()),
                trainable=False,
            )
            for name in names
        ]
        new: list[str] = loaded.facts.get("new_weights", [])
        task = run.objective.auto_class.__name__
        return attach(loaded.model, again, task, folder, seed, new_weights=new).model

    numbers = sum(v.numel() for tensors in adapter_state(run.model, whole).values() for v in tensors.values())
    return lambda folder: save(run.model, folder, whole), reload, numbers


def _check_finite(tensors: Mapping[str, Tensor], dtype: Dtype) -> None:
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
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
