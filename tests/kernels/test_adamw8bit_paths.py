"""8-bit AdamW: the codes are the nearest ones, and every path computes what the reference does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

from adamw8bit_cases import BF16, CASES, CPU, TENSORS, bits_of, group_of, run
from tunesmith_kernels.adamw8bit import cpu, path_for, reference
from tunesmith_kernels.adamw8bit.codebook import Codebook, dynamic_map, from_map, standard_books

RUNS = Path(__file__).with_name("adamw8bit_triton_runs.py")
BOOKS = {"signed": standard_books(CPU).signed, "unsigned": standard_books(CPU).unsigned}


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes(signed: bool) -> None:
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_map(signed=signed), theirs)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.linspace(-1, 1, 256), "dynamic"),
        (torch.linspace(0, 1, 16), "fp32"),
        (dynamic_map(signed=True).double(), "fp32"),
        (dynamic_map(signed=True).flip(0), "dynamic"),
    ],
)
def test_other_maps_are_refused(values: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_map(values)


def probes(book: Codebook) -> Tensor:
    """Blocks of 256 numbers that are their own scaled ones (each holds a 1): every value and every bound of the book
    with its neighbours in fp32, and numbers of all magnitudes."""
    edges = torch.cat([book.values, book.bounds[1:-1]])
    infinity = torch.tensor(float("inf"))
    near = torch.cat([edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity)])
    random = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 60 - 50
    numbers = torch.cat([near, torch.exp(random.clamp(max=0)), torch.tensor([0.0, 1e-45, 1e-38])])
    numbers = torch.cat([numbers, -numbers]) if book.signed else numbers.abs()
    numbers = numbers[numbers.abs() <= 1]
    whole = numbers[: len(numbers) // 255 * 255].view(-1, 255)
    return torch.cat([torch.ones(len(whole), 1), whole], dim=1).flatten()


def nearest(numbers: Tensor, values: Tensor) -> Tensor:
    """By measuring every distance, in fp64 (exact: all are fp32 within [-1, 1] and of like size where it matters); of
    two equally near, the lower. Of an unsigned map, numbers above 0 do not get 0."""
    pieces = (piece.double()[:, None] - values.double() for piece in numbers.split(1 << 14))
    codes = torch.cat([piece.abs().argmin(dim=1) for piece in pieces])
    return codes if values[0] < 0 else torch.where(numbers > 0, codes.clamp(min=1), codes)


def encoded_by_reference(numbers: Tensor, name: str) -> Tensor:
    codes, absmax = torch.empty(numbers.numel(), dtype=torch.uint8), torch.empty(-(-numbers.numel() // 256))
    reference.encode(numbers, BOOKS[name], 256, codes, absmax)
    assert (absmax == 1).all()
    return codes


@pytest.mark.parametrize("name", BOOKS)
def test_the_code_is_the_nearest(name: str) -> None:
    numbers = probes(BOOKS[name])
    codes = encoded_by_reference(numbers, name)
    expected = nearest(numbers, BOOKS[name].values)
    assert torch.equal(codes.long(), expected)
    assert codes.unique().numel() >= 255  # of the signed book, −1 has no code of its own
    # bitsandbytes' CPU code is near the nearest: never nearer
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise(numbers, BOOKS[name].values, 256)
    error = (BOOKS[name].values[codes.long()] - numbers).abs()
    assert (error <= (BOOKS[name].values[theirs.long()] - numbers).abs() + 1e-8).all()
    assert name == "signed" or ((codes == 0) == (numbers == 0)).all()


@pytest.mark.parametrize("name", BOOKS)
def test_the_native_code_is_the_nearest(name: str) -> None:
    """A moment is set to any numbers by β = 0 and the gradient that makes it so."""
    numbers = probes(BOOKS[name])
    if name == "unsigned":
        numbers = numbers.sqrt()  # the second moment is the square: not every number, but as many
    group = group_of(CASES["betas of 0"])
    blocks = numbers.numel() // 256
    parts: dict[str, Any] = {
        "params": [torch.zeros_like(numbers)],
        "grads": [numbers],
        "states1": [torch.zeros(numbers.numel(), dtype=torch.uint8)],
        "states2": [torch.zeros(numbers.numel(), dtype=torch.uint8)],
        "absmaxes1": [torch.zeros(blocks)],
        "absmaxes2": [torch.zeros(blocks)],
    }
    group = type(group)(**{**vars(group), **parts})
    cpu.update([group], torch.tensor(1.0), torch.tensor(0.0), 0)
    moments = numbers if name == "signed" else numbers * numbers
    codes = group.states1[0] if name == "signed" else group.states2[0]
    assert torch.equal(codes, encoded_by_reference(moments, name))


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits_of(one), bits_of(other))


def compared(name: str, found: list[dict[str, list[Tensor]]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for ours, theirs in zip(found, run(CASES[name], reference.update), strict=True):
        for tensors in TENSORS:
            for one, other in zip(ours[tensors], theirs[tensors], strict=True):
                yield tensors, one, other


@pytest.mark.parametrize("name", CASES)
def test_native_is_the_reference_bit_for_bit(name: str) -> None:
    for tensors, one, other in compared(name, run(CASES[name], cpu.update)):
        assert equal(one, other), tensors


def test_the_number_of_threads_changes_nothing() -> None:
    before = torch.get_num_threads()
    found: list[Any] = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(CASES["fp32"], cpu.update))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        for tensors in TENSORS:
            assert all(map(equal, one[tensors], other[tensors]))


@pytest.mark.parametrize("update", [cpu.update, reference.update])
@pytest.mark.parametrize("skip", [1.0, float("nan")])
def test_a_skipped_update_leaves_every_bit(update: Any, skip: float) -> None:
    for name in ("fp32", "bf16, stochastic, fp32 moments"):
        before = group_of(CASES[name])
        for after in run(CASES[name], update, skip):
            for tensors in set(TENSORS) - {"grads"}:
                assert all(map(equal, after[tensors], getattr(before, tensors)))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the Triton kernel computed, all cases in one process of its own."""
    out = tmp_path_factory.mktemp("adamw8bit") / "found.pt"
    done = subprocess.run(
        [sys.executable, str(RUNS), str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_reference(interpreted: dict[str, Any], name: str) -> None:
    """Moments to the bit, as no operation is fused in the interpreter; the parameters' step size is off by the fp32
    bias corrections, a few units in the last place."""
    found, launches = interpreted[name]
    assert launches == [1] * CASES[name].updates
    for tensors, one, other in compared(name, found):
        assert tensors == "params" or equal(one, other), tensors
    before = group_of(CASES[name]).params
    for i, param in enumerate(before):
        scale = param.double().abs()
        for ours, theirs in zip(found, run(CASES[name], reference.update), strict=True):
            one, other = ours["params"][i].double(), theirs["params"][i].double()
            scale += (other - param.double()).abs()  # what was added and taken away counts too
            unit = 2**-8 if param.dtype == BF16 else 2**-23
            apart = (one - other).abs()
            assert (apart <= 4 * unit * scale).all()
            # the same numbers are drawn for stochastic rounding, so few are rounded apart
            assert param.dtype != BF16 or (apart > 0).sum() <= 1 + len(param) / 1000


def test_triton_skips_without_a_trace(interpreted: dict[str, Any]) -> None:
    before = group_of(CASES["fp32"])
    for after in interpreted["skipped"]:
        for tensors in set(TENSORS) - {"grads"}:
            assert all(map(equal, after[tensors], getattr(before, tensors)))


def test_triton_codes_are_the_nearest(interpreted: dict[str, Any]) -> None:
    for name, (numbers, codes) in interpreted["codes"].items():
        assert torch.equal(codes, encoded_by_reference(numbers, name))


def test_without_a_compiler_the_reference_runs_and_says_why() -> None:
    program = (
        "import torch; from tunesmith_kernels.adamw8bit import AdamW8bit, path_for\n"
        "p = torch.nn.Parameter(torch.ones(5000)); p.grad = torch.ones(5000); AdamW8bit([p]).step()\n"
        "print(path_for('cpu'), float(p.amax()) < 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TUNESMITH_KERNELS_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "('reference', " in done.stdout
    assert "TUNESMITH_KERNELS_NATIVE=0" in done.stdout
    assert done.stdout.strip().endswith("True")
    assert path_for("cpu")[0] == "cpu"
