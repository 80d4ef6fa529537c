"""Packed rows give the gradients of the rows alone; a model that lets packed rows see each other is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from objective_cases import (
    CASES,
    SGD,
    TOLERANCE,
    WHOLE,
    Run,
    assert_same_curves,
    assert_same_weights,
    open_stream,
    recipe,
    weights_apart,
)
from tiny_models import llama_config
from tunesmith.engine.single import SingleEngine
from tunesmith.errors import UserError
from tunesmith.module import TrainModule
from tunesmith.optim import Spec
from tunesmith.recipe import optim
from tunesmith.run import Resume, run
from tunesmith.startup import check_packing

PACKED = {"packing": True, "max_length": 64}
LEAK = "lets packed rows see each other"


class LeakyConfig(LlamaConfig):
    model_type = "leaky_llama"


class LeakyLlama(LlamaForCausalLM):
    """Numbers the positions itself: nothing tells packed rows apart."""

    config_class = LeakyConfig

    def forward(self, *args: Any, position_ids: Any = None, **options: Any) -> Any:
        return super().forward(*args, **options)


AutoConfig.register(LeakyConfig.model_type, LeakyConfig)
AutoModelForCausalLM.register(LeakyConfig, LeakyLlama)


@pytest.fixture
def gradients(workshop: Path) -> Callable[[str, bool, Sequence[int]], dict[str, Tensor]]:
    """gradients(case, packing, steps): d/dθ of the loss over those windows, by name."""

    def of(case: str, packing: bool, steps: Sequence[int]) -> dict[str, Tensor]:
        stream = open_stream(
            recipe(workshop, CASES[case], SGD, WHOLE, 3, data={"packing": packing}), workshop
        )
        model = AutoModelForCausalLM.from_pretrained(workshop / "models" / CASES[case].model)
        module = TrainModule(model, stream.objective, "fp32")
        batches = [batch for step in steps for batch in stream.batches(step, 0, 1, prefetch=False)]
        (term,) = stream.objective.terms
        units = torch.tensor([sum(term.units(batch) for batch in batches)])
        for batch in batches:
            module(batch, "loss", units).total.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return of


@pytest.mark.parametrize("case", ["causal_lm", "sft", "causal_lm_gpt2"])
def test_packed_rows_give_the_gradients_of_the_rows_alone(
    gradients: Callable[..., dict[str, Tensor]], case: str
) -> None:
    packed, alone = gradients(case, True, range(3)), gradients(case, False, range(3))
    differences = weights_apart(packed, alone)
    assert max(differences.values()) <= TOLERANCE, max(differences, key=differences.__getitem__)


@pytest.mark.parametrize("case", ["causal_lm", "sft"])
def test_packing_changes_no_curve(train: Run, case: str) -> None:
    packed, alone = (train(case, SGD, WHOLE, 20, data={"packing": packing}) for packing in (True, False))
    assert packed.facts["packing_difference"] < 1e-5
    assert_same_curves(packed, alone)
    assert_same_weights(packed, alone)


def test_sequences_are_filled(workshop: Path) -> None:
    stream = open_stream(recipe(workshop, CASES["causal_lm"], SGD, WHOLE, 3, data=PACKED), workshop)
    lengths = stream.dataset.table.lengths()
    for step in range(stream.steps_per_epoch):
        sequences = [sequence for ranks in stream.cells(step, 1) for cell in ranks for sequence in cell]
        tokens = [int(lengths[sequence].sum()) for sequence in sequences]
        assert max(tokens) <= 64
        assert sorted(row for sequence in sequences for row in sequence) == sorted(stream.window(step))
        # no two sequences would fit into one
        assert sum(sorted(tokens)[:2]) > 64 or len(tokens) == 1


@pytest.fixture(params=[0.02, 0.15], ids=["near_uniform", "spread"])
def leaky(workshop: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with the leaky model, its weights drawn with this deviation: as fresh ones are, and larger."""
    folder = workshop / "models" / f"leaky-{request.param}"
    tokenizer = workshop / "models" / "llama"
    config = LeakyConfig(**llama_config(300).to_dict() | {"initializer_range": request.param})
    config.vocab_size = AutoConfig.from_pretrained(tokenizer).vocab_size
    torch.manual_seed(0)
    LeakyLlama(config).save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(("case", "max_length"), [("causal_lm", 64), ("causal_lm", 400), ("sft", 64)])
def test_a_model_that_leaks_is_refused(workshop: Path, leaky: Path, case: str, max_length: int) -> None:
    """Also a fresh model with long rows, whose summed loss hardly tells."""
    model = {"model_name_or_path": str(leaky)}
    data = {"packing": True, "max_length": max_length}
    asked = recipe(workshop, CASES[case], SGD, WHOLE, 3, model=model, data=data)
    named = asked.model_copy(update={"run_name": f"leaky-{case}-{max_length}-{leaky.name}"})
    with pytest.raises(UserError, match=LEAK):
        run(named, workshop, Resume())
    unpacked = recipe(workshop, CASES[case], SGD, WHOLE, 1, model=model)
    run(unpacked.model_copy(update={"run_name": named.run_name}), workshop, Resume(overwrite=True))


def test_a_mask_that_isolates_nothing_is_refused(workshop: Path) -> None:
    """Llama itself, where the objective hands it a mask: transformers then believes the mask, not the positions."""
    stream = open_stream(recipe(workshop, CASES["causal_lm"], SGD, WHOLE, 3, data=PACKED), workshop)
    model = AutoModelForCausalLM.from_pretrained(workshop / "models" / "llama")
    engine = SingleEngine(torch.device("cpu"))
    engine.prepare(
        TrainModule(model, stream.objective, "fp32"), lambda device: None, Spec(optim.SGD(name="sgd"))
    )
    assert check_packing(stream, engine) < 1e-5
    outputs = stream.objective.outputs

    def with_mask(model: nn.Module, batch: Any) -> Any:
        batch.inputs.setdefault("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        return outputs(model, batch)

    stream.objective.outputs = with_mask  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=LEAK):
        check_packing(stream, engine)


@pytest.mark.parametrize("case", ["masked_lm", "single_label", "seq2seq_t5"])
def test_other_objectives_do_not_pack(workshop: Path, case: str) -> None:
    with pytest.raises(ValueError, match=r"data\.packing: packs causal_lm and sft only"):
        recipe(workshop, CASES[case], SGD, WHOLE, 3, data=PACKED)
