"""Parameter groups, the recipe's settings in the built optimizers, and the step that can be suppressed."""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith import optim, update
from tunesmith.errors import MachineError, MissingExtra, UserError
from tunesmith.recipe import optim as recipe
from tunesmith.recipe.kernels import Kernels

LR, DECAY = 3e-2, 0.07
# unusual values everywhere: a setting that does not arrive changes the result
SETTINGS: list[recipe.Optim] = [
    recipe.AdamW(betas=(0.8, 0.93), eps=1e-2, learning_rate=LR, weight_decay=DECAY),
    recipe.Adam(name="adam", betas=(0.7, 0.91), eps=2e-2, learning_rate=LR, weight_decay=DECAY),
    recipe.SGD(name="sgd", learning_rate=LR, weight_decay=DECAY),
    recipe.SGD(name="sgd", momentum=0.6, learning_rate=LR, weight_decay=DECAY),
    recipe.SGD(name="sgd", momentum=0.6, nesterov=True, learning_rate=LR, weight_decay=DECAY),
    recipe.RMSprop(name="rmsprop", alpha=0.83, eps=3e-2, momentum=0.4, learning_rate=LR, weight_decay=DECAY),
    recipe.Adagrad(
        name="adagrad", eps=4e-2, initial_accumulator_value=0.3, learning_rate=LR, weight_decay=DECAY
    ),
    recipe.Adafactor(
        name="adafactor",
        beta2_decay=-0.6,
        eps=(1e-2, 5e-2),
        clip_threshold=1.2,
        learning_rate=LR,
        weight_decay=DECAY,
    ),
    recipe.AdamW8bit(name="adamw_8bit", betas=(0.8, 0.93), eps=1e-2, learning_rate=LR, weight_decay=DECAY),
    recipe.Lion8bit(name="lion_8bit", betas=(0.7, 0.95), learning_rate=LR, weight_decay=DECAY),
]
IDS = [
    "adamw",
    "adam",
    "sgd",
    "sgd+momentum",
    "sgd+nesterov",
    "rmsprop+momentum",
    "adagrad",
    "adafactor",
    "adamw_8bit",
    "lion_8bit",
]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
EVERY = pytest.mark.parametrize(
    "settings",
    [pytest.param(s, marks=needs_bitsandbytes if s.name.endswith("_8bit") else ()) for s in SETTINGS],
    ids=IDS,
)
ONE, GO, SKIP = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)


class ScaleNorm(nn.Module):
    """A normalisation of somebody's own, with a matrix for a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.linear = nn.Linear(4, 4)
        self.layer_norm = nn.LayerNorm([2, 4])
        self.own = ScaleNorm()
        self.batch = nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.ones(4))
        self.pair_bias = nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def a_parameter(shape: tuple[int, ...] = (5, 3)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)))


def gradients(count: int, shape: tuple[int, ...] = (5, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


REFERENCE = Kernels(linear_cross_entropy="reference", adamw="reference", adamw_8bit="reference")


def built(
    settings: recipe.Optim, *parameters: nn.Parameter, kernels: Kernels | None = None
) -> torch.optim.Optimizer:
    module = nn.Module()
    module.weights = nn.ParameterList(parameters)
    return optim.build(
        optim.Spec(settings, kernels or Kernels()), optim.parameter_groups(module, optim.Spec(settings))
    )


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in optimizer.state[parameter].items()
    }


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


# --- groups -------------------------------------------------------------------------------------------------


def test_groups_by_kind_of_parameter() -> None:
    model = Toy()
    groups = optim.parameter_groups(model, optim.Spec(SETTINGS[0]))
    by_tag = {group["tag"]: group for group in groups}
    assert by_tag["decay"]["names"] == ["embed.weight", "linear.weight"]
    assert by_tag["no_decay"]["names"] == [
        "gain",
        "pair_bias",
        "linear.bias",
        "layer_norm.weight",
        "layer_norm.bias",
        "own.weight",
        "batch.weight",
        "batch.bias",
    ]
    assert by_tag["decay"]["weight_decay"] == DECAY
    assert by_tag["no_decay"]["weight_decay"] == 0.0
    named = dict(model.named_parameters())
    for group in groups:
        assert group["lr"] == LR
        assert group["lr_scale"] == 1.0
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))


def test_groups_of_real_architectures() -> None:
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    bert = BertForSequenceClassification(
        BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
        )
    )
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    )
    for model in (bert, t5):
        groups = {group["tag"]: group for group in optim.parameter_groups(model, optim.Spec(SETTINGS[0]))}
        names: list[str] = groups["decay"]["names"] + groups["no_decay"]["names"]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert any("embed" in name or "shared" in name for name in groups["decay"]["names"])
        for name in names:
            undecayed = name.endswith(".bias") or "norm" in name.lower()
            assert (name in groups["no_decay"]["names"]) == undecayed, name


def test_an_empty_group_is_left_out_and_no_parameter_is_an_error() -> None:
    linear = nn.Linear(3, 3)
    linear.bias.requires_grad_(False)
    assert [g["tag"] for g in optim.parameter_groups(linear, optim.Spec(SETTINGS[0]))] == ["decay"]
    with pytest.raises(UserError, match="no parameter is left to train"):
        optim.parameter_groups(linear.requires_grad_(False), optim.Spec(SETTINGS[0]))


def test_learning_rates_follow_the_scale_of_each_group() -> None:
    groups = optim.parameter_groups(nn.Linear(3, 3), optim.Spec(SETTINGS[0]))
    groups[1]["lr_scale"] = 0.25
    optimizer = optim.build(optim.Spec(SETTINGS[0]), groups)
    update.set_learning_rates(optimizer, 0.5, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]


# --- settings -----------------------------------------------------------------------------------------------


@EVERY
def test_every_setting_arrives(settings: recipe.Optim) -> None:
    groups = optim.parameter_groups(nn.Linear(3, 3), optim.Spec(settings))
    keys_before = [set(group) for group in groups]
    optimizer = optim.build(optim.Spec(settings), groups)
    assert [set(group) for group in groups] == keys_before, "the caller's groups were changed"
    decay, no_decay = optimizer.param_groups
    assert (decay["tag"], no_decay["tag"]) == ("decay", "no_decay")
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (DECAY, 0.0)
    renamed = {"learning_rate": "lr", "clip_threshold": "d"}
    own = settings.model_dump(exclude={"name", "weight_decay", "max_grad_norm"})
    for group in optimizer.param_groups:
        for key, value in own.items():
            assert group[renamed.get(key, key)] == value, key


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_fused_where_torch_has_it(name: str) -> None:
    settings = next(s for s in SETTINGS if type(s).__name__ == name)
    assert all(group["fused"] for group in built(settings, a_parameter()).param_groups)


def test_settings_that_the_optimizer_refuses_are_the_users_errors() -> None:
    with pytest.raises(UserError, match="sgd: Nesterov momentum requires a momentum"):
        built(recipe.SGD(name="sgd", nesterov=True), a_parameter())
    with pytest.raises(UserError, match="adafactor: Clipping threshold d should be >= 1"):
        built(recipe.Adafactor(name="adafactor", clip_threshold=0.5), a_parameter())


@pytest.mark.parametrize("settings", SETTINGS[-2:], ids=IDS[-2:])
def test_without_bitsandbytes(settings: recipe.Optim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=rf"optim\.name: {settings.name} needs bitsandbytes"):
        built(settings, a_parameter(), kernels=REFERENCE)


@needs_bitsandbytes
@pytest.mark.parametrize("settings", SETTINGS[-2:], ids=IDS[-2:])
def test_8_bit_state(settings: recipe.Optim) -> None:
    for kernels in (Kernels(), REFERENCE):
        parameter = a_parameter((64, 64))
        optimizer = built(settings, parameter, kernels=kernels)
        parameter.grad = gradients(1, (64, 64))[0]
        update.step(optimizer, ONE, GO)
        assert optimizer.state[parameter]["state1"].dtype == torch.uint8
    assert type(optimizer).__module__.startswith("bitsandbytes")


def test_torchs_adamw_is_the_reference_of_ours() -> None:
    settings = next(s for s in SETTINGS if s.name == "adamw")
    ends: list[Tensor] = []
    for kernels in (Kernels(), REFERENCE):
        parameter = a_parameter()
        optimizer = built(settings, parameter, kernels=kernels)
        for gradient in gradients(3):
            parameter.grad = gradient.clone()
            update.step(optimizer, torch.tensor(0.5), GO)
        ends.append(parameter.detach())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (ends[0] - ends[1]).norm() <= 1e-6 * ends[1].norm()


def test_what_computes_the_update_is_told() -> None:
    cpu = torch.device("cpu")
    settings = next(s for s in SETTINGS if s.name == "adamw")
    assert optim.describe(optim.Spec(settings), cpu).startswith("cpu: C++")
    assert optim.describe(optim.Spec(settings, REFERENCE), cpu) == "reference: the recipe asks for it"
    sgd = next(s for s in SETTINGS if s.name == "sgd")
    assert optim.describe(optim.Spec(sgd), cpu) == "torch sgd"


def test_a_kernel_that_cannot_run_here_is_an_error() -> None:
    settings = next(s for s in SETTINGS if s.name == "adamw")
    with pytest.raises(MachineError, match=r"kernels\.adamw: triton cannot run here: "):
        built(settings, a_parameter(), kernels=Kernels(adamw="triton"))


# --- the update, by hand ------------------------------------------------------------------------------------


def by_hand(settings: recipe.Optim, p: Tensor, grads: list[Tensor]) -> Tensor:
    """The updates of the papers and of torch's documentation, in fp64."""
    m, v, b = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    row, col = torch.zeros(p.shape[0], 1).double(), torch.zeros(1, p.shape[1]).double()
    if isinstance(settings, recipe.Adagrad):
        v += settings.initial_accumulator_value
    for t, g in enumerate(grads, 1):
        match settings:
            case recipe.AdamW() | recipe.AdamW8bit() | recipe.Adam():
                b1, b2 = settings.betas
                if settings.name == "adam":
                    g = g + DECAY * p
                else:
                    p = p * (1 - LR * DECAY)
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                p = p - LR * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + settings.eps)
            case recipe.SGD():
                g = g + DECAY * p
                m = settings.momentum * m + g
                p = p - LR * (g + settings.momentum * m if settings.nesterov else m)
            case recipe.RMSprop():
                g = g + DECAY * p
                v = settings.alpha * v + (1 - settings.alpha) * g * g
                b = settings.momentum * b + g / (v.sqrt() + settings.eps)
                p = p - LR * b
            case recipe.Adagrad():
                g = g + DECAY * p
                v = v + g * g
                p = p - LR * g / (v.sqrt() + settings.eps)
            case recipe.Adafactor():
                eps1, eps2 = settings.eps
                assert eps1 is not None
                beta = 1 - t**settings.beta2_decay
                size = max(eps2, p.square().mean().sqrt().item()) * min(LR, 1 / math.sqrt(t))
                p = p * (1 - LR * DECAY)
                row = beta * row + (1 - beta) * (g * g).mean(1, keepdim=True)
                col = beta * col + (1 - beta) * (g * g).mean(0, keepdim=True)
                update = g / (row @ col / row.mean().clamp(min=eps1)).clamp(min=eps1**2).sqrt()
                rms = update.square().mean().sqrt().item()
                p = p - size * update / max(1.0, rms / settings.clip_threshold)
            case recipe.Lion8bit():
                b1, b2 = settings.betas
                p = p * (1 - LR * DECAY) - LR * (b1 * m + (1 - b1) * g).sign()
                m = b2 * m + (1 - b2) * g
    return p


@EVERY
def test_three_steps_against_the_formula(settings: recipe.Optim) -> None:
    parameter = a_parameter()
    grads = gradients(3)
    expected = by_hand(settings, parameter.detach().double(), [g.double() for g in grads])
    optimizer = built(settings, parameter)
    for grad in grads:
        parameter.grad = grad.clone()
        update.step(optimizer, ONE, GO)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=2e-6, atol=1e-6)


@EVERY
def test_the_coefficient_multiplies_the_gradient(settings: recipe.Optim) -> None:
    """By a power of two, so that equality is exact; the states tell even where the update is scale-free."""
    scaled, plain = a_parameter(), a_parameter()
    one, other = built(settings, scaled), built(settings, plain)
    for grad in gradients(2):
        scaled.grad, plain.grad = grad.clone(), grad / 4
        update.step(one, torch.tensor(0.25), GO)
        update.step(other, ONE, GO)
    assert torch.equal(scaled, plain)
    assert_same_state(state_of(one, scaled), state_of(other, plain))


def test_gradients_of_several_dtypes_are_scaled_in_their_own() -> None:
    wide, narrow = a_parameter(), nn.Parameter(a_parameter().detach().bfloat16())
    optimizer = built(SETTINGS[IDS.index("rmsprop+momentum")], wide, narrow)
    grads = gradients(1)[0]
    wide.grad, narrow.grad = grads.clone(), grads.bfloat16()
    update.step(optimizer, torch.tensor(0.5), GO)
    assert torch.equal(wide.grad, grads / 2)
    assert torch.equal(narrow.grad, grads.bfloat16() / 2)


# --- suppression --------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(5, 3), (7,), (80, 64)])
def test_a_suppressed_step_never_was(settings: recipe.Optim, bad: float, shape: tuple[int, ...]) -> None:
    """Bad gradients at the first step and in the middle: parameters and state are bitwise those of a run that
    never saw them."""
    seen, unseen = a_parameter(shape), a_parameter(shape)
    one, other = built(settings, seen), built(settings, unseen)
    for index, grad in enumerate(gradients(4, shape)):
        if index in (0, 2):
            values, state = seen.detach().clone(), state_of(one, seen)
            seen.grad = torch.full(shape, bad)
            update.step(one, torch.tensor(bad), SKIP)
            assert torch.equal(seen, values)
            if index > 0:
                assert_same_state(state_of(one, seen), state)
        seen.grad, unseen.grad = grad.clone(), grad.clone()
        update.step(one, ONE, GO)
        update.step(other, ONE, GO)
    assert torch.equal(seen, unseen)
    assert_same_state(state_of(one, seen), state_of(other, unseen))


@EVERY
@pytest.mark.parametrize(
    "skip", [torch.tensor(True), torch.tensor(3), torch.tensor(0.5), torch.tensor(2.0).double()], ids=str
)
def test_skip_is_anything_but_zero(settings: recipe.Optim, skip: Tensor) -> None:
    """torch's kernels take found_inf = 2 or 0.5 for "go on"."""
    parameter = a_parameter()
    before = parameter.detach().clone()
    optimizer = built(settings, parameter)
    parameter.grad = gradients(1)[0]
    update.step(optimizer, ONE, skip)
    assert torch.equal(parameter, before)
    update.step(optimizer, ONE, torch.zeros_like(skip))
    assert not torch.equal(parameter, before)


@EVERY
def test_a_plain_step_afterwards_is_not_suppressed(settings: recipe.Optim) -> None:
    """Nothing of the suppression stays on the optimizer."""
    parameter = a_parameter()
    before = parameter.detach().clone()
    optimizer = built(settings, parameter)
    parameter.grad = gradients(1)[0]
    update.step(optimizer, ONE, SKIP)
    optimizer.step()
    assert not torch.equal(parameter, before)


@EVERY
def test_a_parameter_whose_first_gradient_comes_later(settings: recipe.Optim) -> None:
    """Gradual unfreezing: torch's fused SGD with momentum fails on it by itself."""
    early, late, alone = a_parameter(), a_parameter(), a_parameter()
    first, second = gradients(2)
    optimizer, reference = built(settings, early, late), built(settings, alone)
    early.grad = first.clone()
    update.step(optimizer, ONE, GO)
    assert settings.name == "adagrad" or late not in optimizer.state  # torch fills Adagrad's at once
    early.grad, late.grad, alone.grad = first.clone(), second.clone(), second.clone()
    update.step(optimizer, ONE, GO)
    update.step(reference, ONE, GO)
    assert torch.equal(late, alone)


class _HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.name in ("adamw", "adam", "sgd", "adagrad")])
def test_the_fused_step_does_not_wait_for_the_device(settings: recipe.Optim) -> None:
    """torch's own; that ours does not on a GPU is shown where its launches are counted."""
    parameter = a_parameter()
    optimizer = built(settings, parameter, kernels=REFERENCE)
    parameter.grad = gradients(1)[0]
    with _HostReads() as reads:
        ONE.item()
        assert reads.count == 1, "the counter does not count"
        update.step(optimizer, torch.tensor(0.5), GO)
    assert reads.count == 1
