"""AdamW8bit against fp64 and against bitsandbytes, whose states it reads and writes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from accuracy import hold, within
from tunesmith_kernels.adamw8bit import AdamW8bit
from tunesmith_kernels.adamw8bit.codebook import Books, from_map
from tunesmith_kernels.adamw8bit.reference import decode

BF16, FP32 = torch.bfloat16, torch.float32
Theirs = bitsandbytes.optim.AdamW8bit
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
N = (1 << 18) + 77  # whole blocks and a part of one


def normal(scale: float) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: scale * torch.randn(N, generator=generator)


def sparse(generator: torch.Generator) -> Tensor:
    """Rows of an embedding: a tenth of the runs of 512 get a gradient in a step."""
    seen = torch.rand(N // 512 + 1, generator=generator).repeat_interleave(512)[:N] < 0.1
    return torch.where(seen, 1e-3 * torch.randn(N, generator=generator), 0.0)


def uneven(generator: torch.Generator) -> Tensor:
    """Every element has a scale of its own, the same in every step."""
    scales = torch.exp(torch.randn(N, generator=torch.Generator().manual_seed(9)))
    return 1e-3 * scales * torch.randn(N, generator=generator)


def drifting(generator: torch.Generator) -> Tensor:
    return 1e-2 + 1e-2 * torch.randn(N, generator=generator)


GRADIENTS = {
    "1e-3": normal(1e-3),
    "1e3": normal(1e3),
    "1e-8": normal(1e-8),
    "sparse": sparse,
    "uneven": uneven,
    "drifting": drifting,
}


def gradients(kind: str, steps: int, dtype: torch.dtype) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield GRADIENTS[kind](generator).to(dtype)


def start(dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(N, generator=torch.Generator().manual_seed(4))).to(dtype)


@dataclass(frozen=True)
class Result:
    """After a run: how far the parameter moved, and the decoded moments."""

    moved: Tensor
    m: Tensor
    v: Tensor


def exact(kind: str, steps: int, dtype: torch.dtype, wrong: str = "") -> Result:
    """AdamW in fp64, or with a part of it wrong."""
    p0 = start(dtype).double()
    p, m, v = p0.clone(), torch.zeros_like(p0), torch.zeros_like(p0)
    (beta1, beta2), lr, eps = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["eps"]
    for t, grad in enumerate(gradients(kind, steps, dtype), 1):
        g = grad.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g if wrong == "gradient not squared" else g * g).abs()
        correction1 = 1.0 if wrong == "no bias correction of m" else 1 - beta1**t
        correction2 = 1.0 if wrong == "no bias correction of v" else 1 - beta2**t
        decay = 0.0 if wrong == "no weight decay" else lr * SETTINGS["weight_decay"]
        p = p * (1 - decay) - lr / correction1 * m / ((v / correction2).sqrt() + eps)
    return Result(p - p0, m, v)


def moments(state: dict[str, Any], block_size: int = 256) -> tuple[Tensor, Tensor]:
    books = Books(from_map(state["qmap1"]), from_map(state["qmap2"]))
    return (
        decode(state["state1"].view(-1), state["absmax1"], books.signed, block_size),
        decode(state["state2"].view(-1), state["absmax2"], books.unsigned, block_size),
    )


def trained(optimizer: Optimizer, param: Parameter, grads: Iterator[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.clone().view(param.shape)
        optimizer.step()


def result_of(make: Any, kind: str, steps: int, dtype: torch.dtype) -> Result:
    param = Parameter(start(dtype))
    optimizer = make([param], **SETTINGS)
    trained(optimizer, param, gradients(kind, steps, dtype))
    moved = param.detach().double() - start(dtype).double()
    return Result(moved.float(), *moments(optimizer.state[param]))


@pytest.mark.parametrize("steps", [1, 10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_accuracy(kind: str, dtype: torch.dtype, steps: int) -> None:
    ours, theirs = (result_of(make, kind, steps, dtype) for make in (AdamW8bit, Theirs))
    true = exact(kind, steps, dtype)
    for name in ("moved", "m", "v"):
        hold(getattr(ours, name), getattr(true, name), getattr(theirs, name), f"{kind}: {name}")
    if dtype == FP32:  # in bf16 the parameter's own rounding is larger than what these terms move
        for wrong in ("no bias correction of m", "no bias correction of v", "gradient not squared"):
            mutant = exact(kind, steps, dtype, wrong)
            assert not within(mutant.moved.float(), true.moved, theirs.moved), wrong


def test_weight_decay() -> None:
    """Where nothing else moves the parameter: zero gradients."""
    ours, theirs = (Parameter(torch.linspace(-1, 1, 8192)) for _ in range(2))
    for make, param in ((AdamW8bit, ours), (Theirs, theirs)):
        trained(make([param], **SETTINGS), param, iter([torch.zeros(8192)] * 3))
    moved = torch.linspace(-1, 1, 8192).double() * ((1 - 1e-4) ** 3 - 1)
    before = torch.linspace(-1, 1, 8192).double()
    hold((ours.double() - before).detach().float(), moved, (theirs.double() - before).detach().float())


# --- bitsandbytes' states ---


def states_equal(one: Any, other: Any) -> bool:
    if set(one) != set(other) or int(one["step"]) != int(other["step"]):
        return False
    return all(torch.equal(one[name], other[name]) for name in one if name != "step")


def model() -> list[Parameter]:
    """Codes with a part of a block, codes in two dimensions, and fp32 moments."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(5001,), (64, 100), (100,)]
    return [Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]


def steps_of(optimizer: Optimizer, params: list[Parameter], first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for param in params:
            param.grad = (1e-2 * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("first", "then"), [(Theirs, AdamW8bit), (AdamW8bit, Theirs)])
def test_training_goes_on_with_the_others_state(first: Any, then: Any, dtype: torch.dtype) -> None:
    params = [Parameter(param.detach().to(dtype)) for param in model()]
    optimizer = first(params, **SETTINGS)
    steps_of(optimizer, params, 0, 7)
    copies = [Parameter(param.detach().clone()) for param in params]
    other = then(copies, lr=1.0)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for param, copied in zip(params, copies, strict=True):
        one, two = optimizer.state[param], other.state[copied]
        assert states_equal(one, two)
        assert two["state1"].dtype == (torch.uint8 if param.numel() > 4096 else FP32)
        if "qmap1" in one:
            assert all(map(torch.equal, moments(one), moments(two)))
    before = [param.detach().clone() for param in params]
    steps_of(optimizer, params, 7, 14)
    steps_of(other, copies, 7, 14)
    for param, copied, at in zip(params, copies, before, strict=True):
        moved, others = (tensor.detach().double() - at.double() for tensor in (param, copied))
        # a code of the second moment is off by up to 7 %, and the two round a few apart
        limit = 0.02 if param.numel() > 4096 else 1e-5
        assert (moved - others).norm() <= max(limit, 2**-7 if dtype == BF16 else 0) * moved.norm()
        fresh = Parameter(at.clone())
        steps_of(then([fresh], **SETTINGS), [fresh], 7, 14)
        assert (fresh.detach().double() - at.double() - moved).norm() > 0.1 * moved.norm()


def test_a_state_dict_is_what_bitsandbytes_keeps() -> None:
    ours, theirs = model(), model()
    optimizers = AdamW8bit(ours, **SETTINGS), Theirs(theirs, **SETTINGS)
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        steps_of(optimizer, params, 0, 1)
    saved = optimizers[0].state_dict()
    for index, param in enumerate(theirs):
        kept = optimizers[1].state[param]
        assert saved["state"][index].keys() == kept.keys()
        for name, value in kept.items():
            one = saved["state"][index][name]
            assert type(one) is type(value)
            if isinstance(value, Tensor):
                assert (one.dtype, one.shape) == (value.dtype, value.shape)
    assert "fused" not in saved["param_groups"][0]
    assert all("fused" in group for group in optimizers[0].param_groups)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_resuming_is_bitwise(dtype: torch.dtype, backend: Any) -> None:
    def made(params: list[Parameter]) -> AdamW8bit:
        rounding = dtype == BF16
        return AdamW8bit(params, **SETTINGS, stochastic_rounding=rounding, seed=5, backend=backend)

    whole = [Parameter(param.detach().to(dtype)) for param in model()]
    optimizer = made(whole)
    steps_of(optimizer, whole, 0, 4)
    buffer = io.BytesIO()
    torch.save((optimizer.state_dict(), [param.detach() for param in whole]), buffer)
    steps_of(optimizer, whole, 4, 8)
    buffer.seek(0)
    state, values = torch.load(buffer, weights_only=True)
    resumed = [Parameter(value) for value in values]
    optimizer2 = made(resumed)
    optimizer2.load_state_dict(state)
    steps_of(optimizer2, resumed, 4, 8)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)
        assert states_equal(optimizer.state[one], optimizer2.state[other])


def changed(state: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**state, "state": {**state["state"], 0: {**state["state"][0], **values}}}


def test_other_states_are_refused() -> None:
    params = model()
    optimizer = AdamW8bit(params)
    steps_of(optimizer, params, 0, 1)
    state = optimizer.state_dict()
    for values, said in (
        ({"absmax1": torch.zeros(79)}, "block_size=256"),
        ({"state2": torch.zeros(5000, dtype=torch.uint8)}, "5001 elements"),
        ({"state1": torch.zeros(5001)}, "not an 8-bit AdamW's"),
        ({"unorm_vec": torch.zeros(1)}, "unorm_vec"),
        ({"qmap1": torch.linspace(-1, 1, 256)}, "dynamic"),
        ({"qmap1": state["state"][0]["qmap2"]}, "signed"),
    ):
        with pytest.raises(ValueError, match=said):
            AdamW8bit(model()).load_state_dict(changed(state, **values))
    torch_state = torch.optim.AdamW(params)
    torch_state.step()
    with pytest.raises(ValueError, match="not an 8-bit AdamW's"):
        AdamW8bit(model()).load_state_dict(torch_state.state_dict())


# --- the protocol ---


def after(prepare: Callable[[AdamW8bit, list[Parameter]], None], **settings: Any) -> list[Tensor]:
    """The parameters after two steps, with `prepare` called before each; the gradients are seen to stay."""
    params = model()
    optimizer = AdamW8bit(params, **{**SETTINGS, **settings})
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        for param in params:
            param.grad = 1e-2 * torch.randn(param.shape, generator=generator)
        prepare(optimizer, params)
        grads = [None if param.grad is None else param.grad.clone() for param in params]
        optimizer.step()
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                assert param.grad is not None
                assert torch.equal(grad.view(torch.int32), param.grad.view(torch.int32))
    return [param.detach() for param in params]


def scaled_by(factor: float) -> Callable[[Any, list[Parameter]], None]:
    def prepare(_: Any, params: list[Parameter]) -> None:
        for param in params:
            assert param.grad is not None
            param.grad *= factor

    return prepare


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_grad_scale_divides(backend: Any) -> None:
    def prepare(optimizer: Any, params: list[Parameter]) -> None:
        scaled_by(8.0)(optimizer, params)
        optimizer.grad_scale = torch.tensor(8.0)
        optimizer.found_inf = torch.tensor(0.0)

    plain = after(lambda *_: None, backend=backend)
    assert all_equal(after(prepare, backend=backend), plain)
    assert not all_equal(after(scaled_by(8.0), backend=backend), plain)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_found_inf_suppresses_the_step(backend: Any) -> None:
    params = model()
    optimizer: Any = AdamW8bit(params, **SETTINGS, backend=backend)
    steps_of(optimizer, params, 0, 2)
    before = [param.detach().clone() for param in params]
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    optimizer.found_inf = torch.tensor(1.0)
    steps_of(optimizer, params, 2, 3)
    assert all_equal(before, [param.detach() for param in params])
    assert all(
        states_equal(optimizer.state[param], state) for param, state in zip(params, states, strict=True)
    )
    del optimizer.found_inf
    steps_of(optimizer, params, 2, 3)
    assert not all_equal(before, [param.detach() for param in params])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_max_norm_is_clip_grad_norm(backend: Any) -> None:
    norms: list[Tensor] = []

    def clip(_: Any, params: list[Parameter]) -> None:
        norms.append(torch.nn.utils.clip_grad_norm_(params, 0.05))

    clipped = after(clip, backend=backend)
    found: list[Tensor | None] = []
    folded = after(
        lambda optimizer, _: found.append(optimizer.last_grad_norm), max_norm=0.05, backend=backend
    )
    assert found[0] is None
    assert found[1] is not None
    torch.testing.assert_close(found[1], norms[0], rtol=1e-6, atol=0)
    start_values = [param.detach() for param in model()]
    for one, other, at in zip(folded, clipped, start_values, strict=True):
        assert (one - other).norm() <= 1e-4 * (other - at).norm()
    assert not all_equal(folded, after(lambda *_: None, backend=backend))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(value: float) -> None:
    def prepare(_: Any, params: list[Parameter]) -> None:
        assert params[0].grad is not None
        params[0].grad[17] = value

    assert all_equal(after(prepare, max_norm=1.0), [param.detach() for param in model()])
    assert not after(prepare)[0].isfinite().all()


def test_without_a_gradient_nothing_is_done() -> None:
    def prepare(_: Any, params: list[Parameter]) -> None:
        params[1].grad = None

    found = after(prepare)
    assert torch.equal(found[1], model()[1])
    assert not torch.equal(found[0], model()[0])
    params = model()
    optimizer = AdamW8bit(params, max_norm=1.0)
    optimizer.step()
    assert not optimizer.state
    assert float(optimizer.last_grad_norm or 0.0) == 0


def test_a_grad_scaler_drives_it() -> None:
    params = model()
    optimizer = AdamW8bit(params, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = sum((param * param).sum() for param in params)
    scaler.scale(loss).backward()  # type: ignore[union-attr]
    scaler.step(optimizer)
    plain = model()
    for param in plain:
        param.grad = 2 * param.detach()
    AdamW8bit(plain, **SETTINGS).step()
    assert all_equal([param.detach() for param in params], [param.detach() for param in plain])


def test_stochastic_rounding_is_unbiased_and_within_one_unit() -> None:
    """At a learning rate of which nearest rounding keeps nothing."""
    numbers = 0.5 + 0.5 * torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))
    moved: dict[bool, Tensor] = {}
    for stochastic in (True, False):
        param = Parameter(numbers.to(BF16))
        param.grad = torch.ones(1 << 16, dtype=BF16)
        AdamW8bit([param], lr=1e-4, weight_decay=0, stochastic_rounding=stochastic, seed=1).step()
        moved[stochastic] = param.detach().double() - numbers.to(BF16).double()
    unit = 2**-8
    assert (moved[False] == 0).all()
    error = (moved[True] + 1e-4) / unit
    assert error.abs().max() < 1
    assert error.mean().abs() < 4 * error.std() / len(error) ** 0.5
    other = Parameter(numbers.to(BF16))
    other.grad = torch.ones(1 << 16, dtype=BF16)
    AdamW8bit([other], lr=1e-4, weight_decay=0, stochastic_rounding=True, seed=2).step()
    assert not torch.equal(other.detach().double() - numbers.to(BF16).double(), moved[True])


def test_a_parameter_that_is_not_contiguous_keeps_bitsandbytes_order() -> None:
    values, grad = torch.randn(64, 8, 4, 4), torch.randn(64, 8, 4, 4)
    params = [Parameter(values.clone()), Parameter(values.to(memory_format=torch.channels_last))]
    optimizers = [AdamW8bit([param], min_8bit_size=0) for param in params]
    for _ in range(2):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.empty_like(param).copy_(grad)
            optimizer.step()
    assert torch.equal(params[0], params[1])
    assert states_equal(
        *(optimizer.state[param] for param, optimizer in zip(params, optimizers, strict=True))
    )


def test_mixed_groups_are_each_updated_with_their_own() -> None:
    whole = model()
    mixed = AdamW8bit([{"params": whole[:1], "lr": 1e-2}, {"params": whole[1:], "weight_decay": 0.5}])
    steps_of(mixed, whole, 0, 3)
    alone = model()
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for param in alone:
            param.grad = 1e-2 * torch.randn(param.shape, generator=generator)
        if number == 0:
            optimizers = [AdamW8bit(alone[:1], lr=1e-2), AdamW8bit(alone[1:], weight_decay=0.5)]
        for optimizer in optimizers:
            optimizer.step()
    assert all_equal([param.detach() for param in whole], [param.detach() for param in alone])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"block_size": 100}, "block_size"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdamW8bit(model(), **settings)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        AdamW8bit([Parameter(torch.ones(3, dtype=torch.float16))])
    params = model()
    optimizer: Any = AdamW8bit(params, max_norm=1.0)
    optimizer.found_inf = torch.tensor(0.0)
    with pytest.raises(ValueError, match="max_norm"):
        steps_of(optimizer, params, 0, 1)
    sparse_param = Parameter(torch.ones(10, 2))
    sparse_param.grad = torch.eye(10, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        AdamW8bit([sparse_param]).step()


def test_a_dtensor_shard_has_states_of_its_own() -> None:
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    values, grad = torch.randn(100, 64), torch.randn(100, 64)
    plain = Parameter(values.clone())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
        optimizers = AdamW8bit([plain]), AdamW8bit([sharded])
        for _ in range(2):
            plain.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(plain, sharded.to_local())  # type: ignore[attr-defined]
        assert states_equal(optimizers[0].state[plain], optimizers[1].state[sharded])
        clipping = AdamW8bit([sharded], max_norm=1.0)
        with pytest.raises(ValueError, match="DTensor"):
            clipping.step()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_as_the_original(copy: Callable[[Any], Any]) -> None:
    params = model()
    optimizer = AdamW8bit(params, **SETTINGS, max_norm=0.1)
    steps_of(optimizer, params, 0, 2)
    copied = copy(optimizer)
    others = copied.param_groups[0]["params"]
    steps_of(optimizer, params, 2, 4)
    steps_of(copied, others, 2, 4)
    assert all_equal([param.detach() for param in params], [param.detach() for param in others])
    assert copied.last_grad_norm == optimizer.last_grad_norm
