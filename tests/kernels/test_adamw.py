"""AdamW's arithmetic on the CPU: against fp64 and torch, C++ against plain torch, and what a step leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from accuracy import hold
from adamw_cases import (
    BF16,
    FP32,
    KINDS,
    SIZES,
    Kind,
    everything,
    exact,
    gradients,
    make,
    parameters,
    run,
    same,
    torchs,
    values,
)
from tunesmith_kernels.adamw import path_for

BACKENDS = ("cpu", "reference")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
backends = pytest.mark.parametrize("backend", BACKENDS)
# scale of the gradients, max_norm (of gradients whose norm is near 26 at scale 0.1)
SCALES = {
    "plain": (0.1, None),
    "clipped": (0.1, 1.0),
    "below": (0.1, 1e3),
    "tiny": (1e-12, None),
    "huge": (1e12, None),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_native_path_is_what_is_tested() -> None:
    assert path_for("cpu") == ("cpu", "C++, one pass over all tensors")


@pytest.mark.parametrize("case", SCALES)
@backends
def test_fp32_is_as_accurate_as_torch(backend: str, case: str) -> None:
    scale, max_norm = SCALES[case]
    initial, grads = values(FP32), gradients(20, FP32, scale=scale)
    params = parameters(initial)
    optimizer = make(params, KINDS["fp32"], max_norm=max_norm, backend=backend)
    run(optimizer, params, grads)
    right = exact(initial, grads, max_norm)
    own, own_optimizer = torchs(initial, grads, max_norm)
    undecayed = exact(initial, grads, max_norm, decays=False).params
    uncorrected = exact(initial, grads, max_norm, corrects=False).params
    for index, (start, param) in enumerate(zip(initial, params, strict=True)):
        moved = [(p.detach().double() - start.double()) for p in (param, own[index])]
        dropped = {"no decay": undecayed[index] - start.double()}
        if case != "tiny":  # there the decay is all that moves
            dropped["no correction"] = uncorrected[index] - start.double()
        hold(
            moved[0].float(),
            right.params[index] - start.double(),
            moved[1],
            f"{case}, {start.numel()}: p",
            **{name: value.float() for name, value in dropped.items()},
        )
        state, own_state = optimizer.state[param], own_optimizer.state[own[index]]
        hold(state["exp_avg"], right.exp_avgs[index], own_state["exp_avg"], "m")
        hold(state["exp_avg_sq"], right.exp_avg_sqs[index], own_state["exp_avg_sq"], "v")


@backends
def test_the_master_is_as_accurate_as_fp32_and_the_parameter_is_it_rounded(backend: str) -> None:
    initial, grads = values(BF16), gradients(20, BF16)
    params = parameters(initial)
    optimizer = make(params, KINDS["master"], max_norm=1.0, backend=backend)
    run(optimizer, params, grads)
    right = exact(initial, grads, 1.0)
    own, _ = torchs([value.float() for value in initial], [[g.float() for g in of] for of in grads], 1.0)
    for index, param in enumerate(params):
        master = optimizer.state[param]["master"]
        start = initial[index].double()
        hold(
            (master.double() - start).float(),
            right.params[index] - start,
            own[index].detach().double() - start,
            f"{param.numel()}",
        )
        assert torch.equal(param.detach(), master.to(BF16))


@backends
def test_kahan_beats_torchs_bf16(backend: str) -> None:
    initial, grads = values(BF16), gradients(20, BF16)
    params = parameters(initial)
    optimizer = make(params, KINDS["kahan"], max_norm=1.0, backend=backend)
    run(optimizer, params, grads)
    right = exact(initial, grads, 1.0)
    own, _ = torchs(initial, grads, 1.0)
    for index, param in enumerate(params):
        hold(param.detach(), right.params[index], own[index].detach(), f"{param.numel()}")
    largest = len(SIZES) - 1
    whole = params[largest].detach().double() + optimizer.state[params[largest]]["compensation"].double()
    start = initial[largest].double()
    hold(
        (whole - start).float(),
        right.params[largest] - start,
        # a tenth of torch's error, so that torch's rule asks for 0.15 of it
        right.params[largest] + (own[largest].detach().double() - right.params[largest]) / 10 - start,
        "with what rounding left out",
    )


def ulp(value: Tensor) -> Tensor:
    """bfloat16's last place at these fp64 values."""
    return torch.ldexp(torch.ones_like(value), torch.frexp(value.abs())[1] - 8)


def rounded_fairly(found: Tensor, right: Tensor) -> bool:
    """Under one last place off, and the mean error, in last places, within 4σ of 0: σ² of one rounding is
    f(1 − f), f the part cut off."""
    off = (found.double() - right) / ulp(right)
    cut = (right / ulp(right)).remainder(1.0)
    spread = (cut * (1 - cut)).sum().sqrt()
    # fp32 inside is not fp64: near a bfloat16 value, the part cut off is off by some 1e-4 of a last place
    return bool((off.abs() < 1 + 1e-3).all() and off.sum().abs() <= 4 * spread + 1e-4 * off.numel())


@backends
@pytest.mark.parametrize("kind", [KINDS["stochastic"], KINDS["kahan"]], ids=["stochastic", "kahan"])
def test_stochastic_rounding_is_fair_to_parameters_and_moments(kind: Kind, backend: str) -> None:
    size = 65_537
    initial, grads = values(BF16, [size]), gradients(1, BF16, [size])
    params = parameters(initial)
    optimizer = make(params, kind, backend=backend, seed=3)
    run(optimizer, params, grads)
    right = exact(initial, grads)
    state = optimizer.state[params[0]]
    checked = {"m": (state["exp_avg"], right.exp_avgs[0]), "v": (state["exp_avg_sq"], right.exp_avg_sqs[0])}
    if kind.precision == "stochastic":
        checked["p"] = (params[0].detach(), right.params[0])
    for name, (found, should) in checked.items():
        assert rounded_fairly(found, should), name
        step = ulp(should)
        for mutant in (
            torch.zeros_like(found),
            -found,
            2 * found,
            found.roll(1),
            should.to(BF16) + 0.3 * step,  # biased
            (should / step).floor() * step,  # cut off
            (should / step).ceil() * step,
        ):
            assert not rounded_fairly(mutant, should), name


@backends
@pytest.mark.parametrize("kind", [KINDS["stochastic"], KINDS["kahan"]], ids=["stochastic", "kahan"])
def test_a_second_moment_in_bf16_falls(kind: Kind, backend: str) -> None:
    """0.999 × is below half a last place: rounding to nearest would hold v where it is."""
    params = parameters([torch.ones(4096, dtype=BF16)])
    optimizer = make(params, kind, backend=backend)
    run(optimizer, params, [[torch.full((4096,), 4.0, dtype=BF16)], *[[torch.zeros(4096, dtype=BF16)]] * 200])
    start = 16 * (1 - 0.999)
    mean = optimizer.state[params[0]]["exp_avg_sq"].double().mean().item() / start
    # variance of the sum of 200 roundings of a last place of up to 1/128, over 4096 elements
    assert abs(mean - 0.999**200) < 4 * (200 * 0.25) ** 0.5 / 128 / 64
    nearest = torch.tensor(start, dtype=BF16)
    assert (nearest * 0.999).to(BF16) == nearest


@kinds
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_native_path_gives_the_references_bits(kind: Kind, max_norm: float | None) -> None:
    results = []
    for backend in BACKENDS:
        params = parameters(values(kind.dtype))
        optimizer = make(params, kind, max_norm=max_norm, backend=backend, seed=2**63 + 12345)
        optimizer.set_keys({params[3]: (2**31 + 7, 2**32 - 40_000), params[2]: (1, 2**32 - 501)})
        run(optimizer, params, gradients(5, kind.dtype))
        results.append((everything(optimizer, params), optimizer.last_grad_norm))
    assert same(results[0][0], results[1][0])
    if max_norm is not None:
        torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-7, atol=0)


@kinds
def test_the_number_of_threads_changes_no_bit(kind: Kind, threads: None) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = parameters(values(kind.dtype, [200_001, 7, 65_536]))
        optimizer = make(params, kind, max_norm=1.0, backend="cpu")
        run(optimizer, params, gradients(2, kind.dtype, [200_001, 7, 65_536]))
        assert optimizer.last_grad_norm is not None
        results.append([*everything(optimizer, params), optimizer.last_grad_norm])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@backends
@pytest.mark.parametrize("kind", [KINDS["stochastic"], KINDS["kahan"]], ids=["stochastic", "kahan"])
def test_shards_round_like_the_whole(kind: Kind, backend: str) -> None:
    size, cut = 70_001, 33_333
    whole = parameters(values(BF16, [size]))
    shards = parameters([whole[0].detach()[:cut], whole[0].detach()[cut:]])
    grads = gradients(3, BF16, [size])
    one = make(whole, kind, backend=backend)
    run(one, whole, grads)
    settings = {"precision": kind.precision, "backend": backend, "lr": 1e-3}
    two = type(one)(shards, **settings)
    two.set_keys({shards[0]: (0, 0), shards[1]: (0, cut)})
    run(two, shards, [[g[0][:cut], g[0][cut:]] for g in grads])
    assert same([whole[0].detach()], [torch.cat([shard.detach() for shard in shards])])

    unkeyed = parameters([value[:cut] for value in values(BF16, [size])] + [values(BF16, [size])[0][cut:]])
    three = type(one)(unkeyed, **settings)
    run(three, unkeyed, [[g[0][:cut], g[0][cut:]] for g in grads])
    assert not torch.equal(unkeyed[1], shards[1])


@backends
@kinds
def test_the_gradients_are_only_read(kind: Kind, backend: str) -> None:
    params = parameters(values(kind.dtype))
    optimizer = make(params, kind, max_norm=0.1, backend=backend)
    grads = gradients(1, kind.dtype)[0]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    assert same([param.grad for param in params if param.grad is not None], grads)


@backends
@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(kind: Kind, backend: str, bad: float) -> None:
    params = parameters(values(kind.dtype))
    optimizer = make(params, kind, max_norm=1.0, backend=backend)
    grads = gradients(3, kind.dtype)
    run(optimizer, params, grads[:2])
    before = everything(optimizer, params)
    grads[2][3][65_536] = bad
    run(optimizer, params, grads[2:])
    assert same(before, everything(optimizer, params))
    assert optimizer.last_grad_norm is not None
    assert not optimizer.last_grad_norm.isfinite()


@backends
def test_without_max_norm_a_nan_goes_through_as_in_torch(backend: str) -> None:
    for kind in KINDS.values():
        params = parameters(values(kind.dtype, [5]))
        optimizer = make(params, kind, backend=backend)
        grad = torch.ones(5, dtype=kind.dtype)
        grad[2] = float("nan")
        run(optimizer, params, [[grad]])
        assert params[0].isnan().tolist() == [False, False, True, False, False]
        assert optimizer.last_grad_norm is None


@backends
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_norm_does_not_overflow_inside(dtype: torch.dtype, backend: str) -> None:
    for scale, size in itertools.product((1e-25, 1.0, 1e25), (1, 63, 65, 129, 40_000)):
        kind = KINDS["fp32" if dtype == FP32 else "master"]
        params = parameters(values(dtype, [size]))
        optimizer = make(params, kind, max_norm=1.0, backend=backend)
        grad = gradients(1, dtype, [size], scale=scale)[0][0]
        run(optimizer, params, [[grad]])
        assert optimizer.last_grad_norm is not None
        torch.testing.assert_close(
            optimizer.last_grad_norm, grad.double().norm().float(), rtol=2e-7, atol=0, msg=f"{scale} {size}"
        )


@backends
def test_a_largest_bf16_never_becomes_infinite(backend: str) -> None:
    largest = torch.finfo(BF16).max
    params = parameters([torch.full((512,), largest, dtype=BF16)])
    optimizer = type(make(params, KINDS["stochastic"]))(
        params, lr=1e35, weight_decay=0.0, precision="stochastic", backend=backend
    )
    run(optimizer, params, [[torch.full((512,), -1.0, dtype=BF16)]])
    assert torch.equal(params[0].detach(), torch.full((512,), largest, dtype=BF16))
