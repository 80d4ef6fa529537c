"""Max-norm (`regularization.max_norm`; Srivastava et al. 2014, "Dropout", section 5.1): after every step the vector w
of the weights that go into one unit is projected, w ← w · min(1, value / ‖w‖).

A unit's weights are a row of a linear layer's or an embedding's matrix [units, inputs], a filter of a convolution's,
and a column of GPT-2's Conv1D [inputs, units]. Biases and norms' scales, of one dimension, are none and stay. Shards
may cut a row: its squares are summed over the ranks, those of all parameters in one collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.engine.shards import Shard
from tunesmith.errors import UserError
from tunesmith.parts import StepPart
from tunesmith.regularization.selection import trained
from tunesmith.shapes import whole_shape
from tunesmith.shard_sums import over_shards

_KEY = "regularization.max_norm"


@dataclass(frozen=True, slots=True)
class Units:
    """Where the units of a parameter lie: element i, in C order, belongs to unit i // inner, or where `columns`, to
    i % inner. `at`: the first one's place among all parameters' units."""

    at: int
    count: int
    inner: int
    columns: bool

    def of(self, shard: Shard) -> Tensor:
        """The unit of each element: int64 of value's shape."""
        positions = shard.positions()
        return positions % self.inner if self.columns else positions // self.inner


class MaxNorm(StepPart):
    name = "max_norm"

    def __init__(self, value: float, asked: frozenset[str] | None) -> None:
        self.value = value
        self._asked = asked

    def begin(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine
        names = trained(engine, self._asked, _KEY)
        self._units: dict[str, Units] = {}
        self._total = 0
        for prefix, owner in engine.train_module.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                shape = tuple(whole_shape(parameter))
                if name in names and len(shape) > 1:
                    self._units[name] = units_of(owner, name, shape, self._total)
                    self._total += self._units[name].count
        if not self._units:
            raise UserError(
                f"{_KEY}.parameters: none of these is a matrix with a row for each unit: name others"
            )
        self._open: frozenset[str] = frozenset()

    def penalize(self, step: int, scale: Tensor) -> None:
        """Notes what this step trains."""
        shards = self._engine.shards()
        self._open = frozenset(shard.name for shard in shards if shard.gradient is not None)

    @torch.no_grad()
    def after_step(self, step: int, skip: Tensor) -> None:
        shards = [s for s in self._engine.shards() if s.name in self._units and s.name in self._open]
        device = self._engine.device
        squares = torch.zeros(self._total, dtype=torch.float64, device=device)
        for shard in shards:
            units = self._units[shard.name]
            part = squares[units.at : units.at + units.count]
            _add_squares(part, shard, units)
        norms = over_shards(self._engine, squares).sqrt()
        factors = (self.value / norms.clamp_min(1e-30)).clamp_max(1.0)
        # exactly 1 where nothing is to be done: the weights are then left bitwise
        factors = torch.where(skip.to(device) != 0, 1.0, factors).float()
        for shard in shards:
            units = self._units[shard.name]
            _scale(shard, units, factors[units.at : units.at + units.count].to(shard.value.device))
        self._engine.wrote()


def units_of(owner: nn.Module, name: str, shape: tuple[int, ...], at: int) -> Units:
    """Raises UserError for a parameter that is no matrix of units."""
    if len(shape) == 2 or (isinstance(owner, _ConvNd) and len(shape) > 2):
        columns = type(owner).__name__ == "Conv1D"
        numel = torch.Size(shape).numel()
        count = shape[1] if columns else shape[0]
        return Units(at, count, count if columns else numel // count, columns)
    raise UserError(
        f"{_KEY}.parameters: {name.removeprefix('model.')} of shape {list(shape)} is no matrix with a row for each "
        "unit: leave it out, by naming those that are"
    )


def _pieces(shard: Shard, units: Units) -> list[tuple[int, Tensor]] | None:
    """The shard's elements as views [units, their elements], each with its first unit: a cut row, whole rows, a cut
    row; None where they lie otherwise."""
    value, count, inner = shard.value, shard.value.numel(), units.inner
    run = shard.box is None or tuple(value.shape[1:]) == shard.shape[1:]
    if units.columns or not run or not value.is_contiguous():
        return None
    flat = value.view(-1)
    head = min(count, -shard.start % inner)
    tail = (count - head) % inner
    parts = [(0, head, head), (head, count - tail, inner), (count - tail, count, tail)]
    return [
        ((shard.start + low) // inner, flat[low:high].view(-1, width))
        for low, high, width in parts
        if low < high
    ]


def _add_squares(sums: Tensor, shard: Shard, units: Units) -> None:
    pieces = _pieces(shard, units)
    if pieces is None:
        squares = shard.value.double().square().reshape(-1) / shard.copies
        sums.index_add_(0, units.of(shard).reshape(-1).to(sums.device), squares.to(sums.device))
        return
    for first, rows in pieces:
        found = rows.float().square().sum(1).double() / shard.copies
        sums[first : first + len(rows)] += found.to(sums.device)


def _scale(shard: Shard, units: Units, factors: Tensor) -> None:
    pieces = _pieces(shard, units)
    if pieces is None:
        shard.value.mul_(factors[units.of(shard)])
        return
    for first, rows in pieces:
        rows.mul_(factors[first : first + len(rows)].unsqueeze(1))
