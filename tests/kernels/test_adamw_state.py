"""AdamW as a torch optimizer: state dicts, resume, groups, torch's fused protocol, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_cases import (
    BF16,
    FP32,
    KINDS,
    SETTINGS,
    Kind,
    everything,
    gradients,
    grouped,
    make,
    parameters,
    run,
    same,
    values,
)
from tunesmith_kernels.adamw import AdamW

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
SMALL = (1, 3, 1000)


def resaved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@kinds
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(kind: Kind) -> None:
    grads = gradients(6, kind.dtype, SMALL)
    straight = parameters(values(kind.dtype, SMALL))
    one = make(straight, kind, max_norm=1.0, seed=5)
    run(one, straight, grads)

    first = parameters(values(kind.dtype, SMALL))
    two = make(first, kind, max_norm=1.0, seed=5)
    run(two, first, grads[:3])
    saved = resaved(two.state_dict())
    second = parameters([param.detach() for param in first])
    three = make(second, kind, max_norm=1.0, seed=5)
    three.load_state_dict(saved)
    assert same(everything(two, first), everything(three, second))
    run(three, second, grads[3:])
    assert same(everything(one, straight), everything(three, second))
    assert [group["lr"] for group in three.param_groups] == [settings["lr"] for settings in SETTINGS]


@pytest.mark.parametrize("fused", [False, True])
def test_torch_takes_over_and_hands_back(fused: bool) -> None:
    grads = gradients(9, FP32, SMALL)
    params, wanted = parameters(values(FP32, SMALL)), parameters(values(FP32, SMALL))
    run(torch.optim.AdamW(grouped(wanted), fused=fused), wanted, grads)

    ours = make(params, KINDS["fp32"])
    run(ours, params, grads[:3])
    torchs = torch.optim.AdamW(grouped(params), fused=fused)
    torchs.load_state_dict(resaved(ours.state_dict()))
    run(torchs, params, grads[3:6])
    again = make(params, KINDS["fp32"])
    again.load_state_dict(resaved(torchs.state_dict()))
    run(again, params, grads[6:])
    for param, right in zip(params, wanted, strict=True):
        torch.testing.assert_close(param, right, rtol=1e-6, atol=1e-6)
        assert again.state[param]["step"].item() == 9
    assert "amsgrad" not in again.param_groups[0]


def test_state_has_torchs_names_and_types() -> None:
    for kind, names in (
        ("fp32", {"step": FP32, "exp_avg": FP32, "exp_avg_sq": FP32}),
        ("master", {"step": FP32, "exp_avg": FP32, "exp_avg_sq": FP32, "master": FP32}),
        ("stochastic", {"step": FP32, "exp_avg": BF16, "exp_avg_sq": BF16}),
        ("stochastic, fp32 moments", {"step": FP32, "exp_avg": FP32, "exp_avg_sq": FP32}),
        ("kahan", {"step": FP32, "exp_avg": BF16, "exp_avg_sq": BF16, "compensation": BF16}),
    ):
        params = parameters(values(KINDS[kind].dtype, SMALL))
        optimizer = make(params, KINDS[kind])
        run(optimizer, params, gradients(1, KINDS[kind].dtype, SMALL))
        assert {name: value.dtype for name, value in optimizer.state[params[0]].items()} == names
        assert optimizer.state[params[0]]["step"].shape == ()


def _edited(change: Callable[[dict[str, Any]], None], kind: str = "fp32") -> dict[str, Any]:
    params = parameters(values(KINDS[kind].dtype, SMALL))
    optimizer = make(params, KINDS[kind])
    run(optimizer, params, gradients(1, KINDS[kind].dtype, SMALL))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved


def test_a_state_that_is_not_this_optimizers_is_refused_by_name() -> None:
    def nothing(saved: dict[str, Any]) -> None:
        pass

    def amsgrad(saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["amsgrad"] = True

    def adam(saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["decoupled_weight_decay"] = False

    def shape(saved: dict[str, Any]) -> None:
        saved["state"][0]["exp_avg"] = torch.zeros(2)

    fp32, bf16 = parameters(values(FP32, SMALL)), parameters(values(BF16, SMALL))
    for optimizer, saved, message in (
        (make(bf16, KINDS["master"]), _edited(nothing, "kahan"), r"precision keeps .* master \(float32\)"),
        (make(bf16, KINDS["stochastic"]), _edited(nothing, "stochastic, fp32 moments"), "float32"),
        (make(fp32, KINDS["fp32"]), _edited(amsgrad), "amsgrad"),
        (make(fp32, KINDS["fp32"]), _edited(adam), "L2"),
        (make(fp32, KINDS["fp32"]), _edited(shape), r"exp_avg was saved as \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)


def test_a_copy_and_a_pickle_go_on_alike() -> None:
    params = parameters(values(BF16, SMALL))
    optimizer = make(params, KINDS["kahan"], max_norm=1.0, seed=9)
    optimizer.set_keys({params[2]: (77, 2**33)})
    grads = gradients(3, BF16, SMALL)
    run(optimizer, params, grads[:1])
    twin_params, twin = copy.deepcopy((params, optimizer))
    run(optimizer, params, grads[1:])
    run(twin, twin_params, grads[1:])
    assert same(everything(optimizer, params), everything(twin, twin_params))


def test_bf16_and_fp32_parameters_share_a_group() -> None:
    for name in ("master", "stochastic", "kahan"):
        params = parameters([*values(BF16, [100]), *values(FP32, [100], seed=4)])
        alone = parameters(values(FP32, [100], seed=4))
        optimizer = AdamW(params, precision=KINDS[name].precision)
        run(optimizer, params, [[*gradients(1, BF16, [100])[0], *gradients(1, FP32, [100])[0]]] * 3)
        run(AdamW(alone), alone, [gradients(1, FP32, [100])[0]] * 3)
        assert torch.equal(params[1], alone[0])
        assert set(optimizer.state[params[1]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    params = parameters(values(FP32, SMALL))
    optimizer = make(params, KINDS["fp32"], max_norm=1.0)
    optimizer.step()
    assert optimizer.last_grad_norm == 0
    before = params[1].detach().clone()
    for param in (params[0], params[2]):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 1, 2]


def test_groups_are_added_and_rates_changed_as_in_torch() -> None:
    params, others = parameters(values(FP32, SMALL)), parameters(values(FP32, SMALL))
    rate = torch.tensor(1e-2)
    ours, torchs = AdamW(params[:2], lr=rate), torch.optim.AdamW(others[:2], lr=rate.clone(), foreach=False)
    grads = gradients(4, FP32, SMALL)
    for optimizer, tensors in ((ours, params), (torchs, others)):
        run(optimizer, tensors[:2], [of[:2] for of in grads[:2]])
        optimizer.add_param_group(
            {"params": tensors[2:], "lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.5)}
        )
        optimizer.param_groups[0]["lr"] = 1e-3
        run(optimizer, tensors, grads[2:])
    for param, right in zip(params, others, strict=True):
        torch.testing.assert_close(param, right, rtol=1e-6, atol=1e-7)


def test_a_closure_is_called_with_gradients_on() -> None:
    param = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([param], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    torch.testing.assert_close(param.detach(), torch.tensor([2.9]))


def test_a_learning_rate_schedule_drives_it() -> None:
    params = parameters(values(FP32, SMALL))
    optimizer = make(params, KINDS["fp32"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(optimizer, params, gradients(1, FP32, SMALL))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [s["lr"] / 2 for s in SETTINGS]


@kinds
def test_memory_layouts_other_than_contiguous(kind: Kind) -> None:
    weight = values(kind.dtype, [2 * 3 * 4 * 5])[0].view(2, 3, 4, 5)
    plain = parameters([weight])
    laid = [nn.Parameter(weight.clone(memory_format=torch.channels_last))]
    for params in (plain, laid):
        optimizer = AdamW(params, precision=kind.precision, state_dtype=kind.state_dtype)
        run(optimizer, params, [[torch.ones_like(weight)], [weight]])
        twin = AdamW(params, precision=kind.precision, state_dtype=kind.state_dtype)
        saved = copy.deepcopy(optimizer.state_dict())
        for name, value in saved["state"][0].items():
            saved["state"][0][name] = value.contiguous()
        twin.load_state_dict(saved)
        run(twin, params, [[weight]])
    if kind.precision != "stochastic":  # the draws go by the place in memory
        tolerance = {"rtol": 0.02, "atol": 1e-3} if kind.precision == "kahan" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(laid[0].detach().contiguous(), plain[0].detach(), **tolerance)


def test_a_tensor_with_gaps_is_refused() -> None:
    param = nn.Parameter(torch.zeros(4, 4)[:, ::2])
    param.grad = torch.ones(4, 2)
    with pytest.raises(ValueError, match="not dense"):
        AdamW([param]).step()


# torch's fused protocol: GradScaler, and engines that clip


@kinds
def test_grad_scale_divides_and_found_inf_suppresses(kind: Kind) -> None:
    grads = gradients(3, kind.dtype, SMALL)
    params, others = (parameters(values(kind.dtype, SMALL)) for _ in range(2))
    scaled, plain = make(params, kind), make(others, kind)
    run(plain, others, grads)
    scaled.grad_scale, scaled.found_inf = torch.tensor(64.0), torch.tensor(0.0)
    run(scaled, params, [[grad * 64 for grad in of] for of in grads])
    assert same(everything(plain, others), everything(scaled, params))
    scaled.found_inf = torch.tensor([1.0])
    run(scaled, params, [[grad * float("nan") for grad in grads[0]]])
    assert same(everything(plain, others), everything(scaled, params))


def test_torchs_grad_scaler_drives_it() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    params = parameters(values(FP32, SMALL))
    optimizer = make(params, KINDS["fp32"])
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        loss = sum(((param**2).sum() for param in params), torch.zeros(())) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2, 2]
    assert scaler.get_scale() == 512.0
    assert not hasattr(optimizer, "grad_scale")


def test_max_norm_with_an_engines_numbers_is_refused() -> None:
    params = parameters(values(FP32, SMALL))
    optimizer = make(params, KINDS["fp32"], max_norm=1.0)
    optimizer.found_inf = torch.tensor(0.0)
    with pytest.raises(ValueError, match="max_norm"):
        run(optimizer, params, gradients(1, FP32, SMALL))


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "precision must be one of"),
        ({"backend": "cuda"}, "backend must be None or one of reference, cpu, triton"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"max_norm": float("nan")}, "max_norm"),
        ({"state_dtype": BF16}, "state_dtype"),
        ({"precision": "kahan", "state_dtype": FP32}, "state_dtype"),
        ({"precision": "stochastic", "state_dtype": torch.float16}, "state_dtype"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"betas": (1.0, 0.9)}, "betas"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(values(FP32, SMALL)), **options)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (BF16, "precision='master', 'stochastic' or 'kahan'"),
        (torch.float16, "fp16 training keeps its parameters in fp32"),
        (torch.float64, "float64"),
        (torch.complex64, "complex64"),
    ],
)
def test_types_that_it_does_not_update_are_refused(dtype: torch.dtype, message: str) -> None:
    optimizer = AdamW(parameters(values(FP32, SMALL)))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=dtype))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_and_foreign_states_are_refused() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        AdamW(embedding.parameters()).step()

    params = parameters(values(FP32, SMALL))
    optimizer = make(params, KINDS["fp32"])
    run(optimizer, params, gradients(1, FP32, SMALL))
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match="exp_avg of parameter"):
        run(optimizer, params, gradients(1, FP32, SMALL))


def test_a_backend_that_cannot_run_here_says_why() -> None:
    params = parameters(values(FP32, SMALL))
    with pytest.raises(RuntimeError, match=r"backend='triton'.*the tensors are on the CPU"):
        run(AdamW(params, backend="triton"), params, gradients(1, FP32, SMALL))
