"""The generator of stochastic rounding: its integers, their independence, and rounding by them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tunesmith_kernels.adamw.rounding import draws, mix32, round_stochastically, rounding_key

CPU = torch.device("cpu")
COUNT = 1 << 16


def test_the_integers_are_those_of_the_definition() -> None:
    """Written down once: a change would break the bits of resumed runs, and the agreement of the paths."""
    assert [mix32(x) for x in (0, 1, 0xFFFFFFFF)] == [0, 1753845952, 1734902346]
    key = rounding_key(seed=2**40 + 5, step=7, stream=3)
    assert key == 2318981070
    bits = draws(key, 2**32 - 1, 2, CPU)
    assert [tensor.tolist() for tensor in bits if tensor is not None] == [
        [61810, 26525],
        [34550, 50899],
        [55184, 56451],
    ]


def test_mixing_a_tensor_is_mixing_its_numbers() -> None:
    numbers = [0, 1, 2**31, 2**32 - 1, 123456789]
    assert mix32(torch.tensor(numbers)).tolist() == [mix32(number) for number in numbers]


def test_an_element_draws_alike_in_every_piece() -> None:
    key = rounding_key(1, 1, 1)
    for whole, piece in zip(draws(key, 10, 100, CPU), draws(key, 50, 60, CPU), strict=True):
        assert whole is not None
        assert piece is not None
        assert torch.equal(whole[40:], piece)


def _uniform(bits: Tensor) -> bool:
    """16 bits each: their mean, and the frequency of each bit, within 4σ."""
    values = bits.double()
    mean = (values.mean() - 32767.5).abs() <= 4 * 65536 / 12**0.5 / COUNT**0.5
    ones = torch.stack([(bits >> bit & 1).double().mean() for bit in range(16)])
    return bool(mean) and bool(((ones - 0.5).abs() <= 4 * 0.5 / COUNT**0.5).all())


def _unrelated(first: Tensor, second: Tensor) -> bool:
    """Their correlation within 5σ of 0, as one of many."""
    pair = torch.stack([first.double(), second.double()])
    return bool(torch.corrcoef(pair)[0, 1].abs() <= 5 / COUNT**0.5)


def test_draws_are_uniform_and_unrelated() -> None:
    """Neighbouring seeds, steps, parameters and elements; the three draws of an element."""
    keys = [
        rounding_key(*at) for at in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**32, 1, 0), (1, 0, 0)]
    ]
    found = [bits for key in keys for bits in draws(key, 0, COUNT, CPU) if bits is not None]
    found += [bits for bits in draws(keys[0], 2**32, COUNT, CPU) if bits is not None]
    for bits in found:
        assert int(bits.min()) >= 0
        assert int(bits.max()) < 65536
        assert _uniform(bits)
        for shift in (1, 2, 16, 32, 1024):
            assert _unrelated(bits, bits.roll(shift))
    for first, second in itertools.combinations(found, 2):
        assert _unrelated(first, second)
    ramp = torch.arange(COUNT, dtype=torch.int32)
    assert not _uniform(ramp // 2)
    assert not _unrelated(ramp, ramp.roll(1))


def test_rounding_goes_up_as_often_as_the_part_cut_off() -> None:
    """And under one last place; cutting off, rounding to nearest and always up are told apart."""
    for number, (base, part) in enumerate(
        itertools.product((1.0, -3.0, 1e-30, 2e38), (0.0, 0.003, 0.25, 0.5, 0.9))
    ):
        low = torch.tensor(base).bfloat16()
        above = (low.view(torch.int16) + 1).view(torch.bfloat16)
        value = low.double() + part * (above.double() - low.double())
        single = value.float().expand(COUNT).contiguous()
        draw = draws(rounding_key(9, number, 0), 0, COUNT, CPU).param
        assert draw is not None
        rounded = round_stochastically(single, draw)
        assert ((rounded == low) | (rounded == above)).all()
        share = (single[0].double() - low.double()) / (above.double() - low.double())

        def fair(result: Tensor, share: Tensor = share, above: Tensor = above) -> bool:
            went_up = (result == above).double().mean()
            return bool((went_up - share).abs() <= 4 * (share * (1 - share) / COUNT).sqrt())

        assert fair(rounded)
        if part > 0:
            assert not fair(low.expand(COUNT))
            assert not fair(above.expand(COUNT))


def test_what_is_exact_infinite_or_beyond_stays() -> None:
    largest = torch.finfo(torch.bfloat16).max
    beyond = torch.finfo(torch.float32).max
    inf = float("inf")
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, largest, -largest, inf, -inf])
    for draw in (0, 1, 32768, 65535):
        bits = torch.full((8,), draw, dtype=torch.int32)
        assert torch.equal(round_stochastically(kept, bits).float(), kept)
        assert round_stochastically(torch.tensor([beyond, -beyond]), bits[:2]).tolist() == [largest, -largest]
        payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
        assert round_stochastically(payloads.view(torch.float32), bits[:4]).isnan().all()
