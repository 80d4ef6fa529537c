"""From the tokens of a row to its features, and the stand-in for a backbone's forward that is made of them.

What a frozen backbone makes of a row is a function of the row's inputs, so these are what it is found by: a batch needs
to know nothing of features, whichever split it is from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.table import Table
from tunesmith.features.fields import Reading
from tunesmith.features.store import FeatureStore

_DIGEST = 16  # bytes: among 10^9 rows two differ and collide with a probability of 10^-21


def key_of(inputs: Mapping[str, NDArray[np.int32]], names: Sequence[str]) -> bytes:
    """Of one row's inputs without padding."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for name in names:
        digest.update(inputs[name].tobytes())
    return digest.digest()


class Lookup:
    """The features of several tables by the inputs of their rows."""

    def __init__(self, parts: Sequence[tuple[Table, FeatureStore]], names: Sequence[str]) -> None:
        self.stores = [store for _, store in parts]
        self.names = tuple(names)
        keys = b"".join(
            key_of({name: table.value(name, int(row)) for name in names}, names)
            for table, store in parts
            for row in store.order
        )
        every = np.frombuffer(keys, dtype=f"S{_DIGEST}")
        self._order = np.argsort(every, kind="stable")
        self._keys = every[self._order]
        self._edges = np.cumsum([0, *(len(store) for store in self.stores)])

    def rows(self, inputs: Mapping[str, Tensor], mask: Tensor) -> list[dict[str, Tensor]]:
        """The features of a batch's rows. inputs and mask (bool): [rows, positions]."""
        kept = mask.cpu().numpy()
        values = {name: inputs[name].cpu().numpy().astype(np.int32) for name in self.names}
        wanted = np.frombuffer(
            b"".join(
                key_of({name: value[i][kept[i]] for name, value in values.items()}, self.names)
                for i in range(len(kept))
            ),
            dtype=self._keys.dtype,
        )
        found = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        assert bool((self._keys[found] == wanted).all()), "a batch has a row that no table of the run has"
        return [self._row(int(place)) for place in self._order[found]]

    def _row(self, place: int) -> dict[str, Tensor]:
        store = int(np.searchsorted(self._edges, place, "right")) - 1
        return self.stores[store].row(place - int(self._edges[store]))


class StandIn:
    """Called as the backbone's forward; computes nothing."""

    def __init__(self, backbone: nn.Module, reading: Reading, lookup: Lookup) -> None:
        self.signature = inspect.signature(backbone.forward)
        self.reading = reading
        self.lookup = lookup

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.signature.bind(*args, **kwargs).arguments
        mask: Tensor = arguments["attention_mask"].bool()
        return self.reading.stand_in(self.lookup.rows(arguments, mask), mask)
