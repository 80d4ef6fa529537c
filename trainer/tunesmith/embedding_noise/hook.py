"""A change of the embedded tokens that a backbone reads, while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.errors import UserError
from tunesmith.parts import ForwardPart

Change = Callable[[Tensor, Batch, nn.Module], Tensor]
"""(embedded tokens [rows, positions, width], the batch, the embedding module) → embedded tokens."""

_KEY = "data.augment"


class EmbeddingNoise(ForwardPart):
    """The `changes` in their order, on what the token embedding gives the forward of a loss: the embedding's first call
    in it, which in an encoder-decoder is the encoder's."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = tuple(changes)
        self._batch: Batch | None = None

    def attach(self, embedding: nn.Module, reader: str) -> None:
        """Hooks the token embedding of `reader` (its name, for the error of a forward that does not call it)."""
        self._reader = reader
        embedding.register_forward_hook(self._change)

    def _change(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if (batch := self._batch) is None:
            return None
        self._batch = None  # a change may embed tokens itself, and the decoder comes later
        for change in self.changes:
            output = change(output, batch, module)
        return output

    def _waits(self) -> bool:
        return self._batch is not None

    @contextmanager
    def around(self, batch: Batch) -> Generator[None]:
        self._batch = batch
        try:
            yield
            if self._waits():
                raise UserError(
                    f"{_KEY}: {self._reader} is trained without its own embedding being read (an adapter that makes or "
                    "replaces embeddings): leave cutoff and mixup out"
                )
        finally:
            self._batch = None


def ways_of_reading(model: Any) -> tuple[nn.Module, str]:
    """The token embedding that the backbone reads its input by (in an encoder-decoder the encoder's), and the
    backbone's name. Raises UserError where there is none."""
    from transformers import PreTrainedModel

    base: Any = model.base_model
    inner = getattr(base, "encoder", None)
    reader: Any = inner if isinstance(inner, PreTrainedModel) else base
    embedding = reader.get_input_embeddings()
    if not isinstance(embedding, nn.Module):
        raise UserError(
            f"{_KEY}: {type(reader).__name__} has no token embeddings: leave cutoff and mixup out"
        )
    return embedding, type(reader).__name__
