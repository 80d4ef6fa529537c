"""Next-token prediction on plain text. The unit is a token."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Text
from tunesmith.data.table import Encoded, Table
from tunesmith.objectives.base import Objective, Truncation, pad, pad_labels, text_inputs
from tunesmith.recipe.objective import SFT, CausalLM


class DecoderObjective(Objective):
    """What decoder-only objectives share: rows of `input_ids` and `labels` (equally long, the first label always
    ignored, for nothing predicts a row's first token), batches of them, packed or not, and perplexity. Where
    evaluations generate, a row also has `prompt_ids`, what generation continues, and `references` (a JSON list),
    what its text is compared with."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        truncation: Truncation,
        settings: CausalLM | SFT,
        *,
        generates: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, truncation)
        self.generates = generates
        self.use_loss(settings, settings.label_smoothing_factor, shift=True)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {"generates": self.generates}

    @abstractmethod
    def prompt_row(self, example: Example) -> Encoded | Dropped:
        """An example without its answer: a row of `input_ids` alone, which generation continues."""

    def prompt(self, table: Table, row: int) -> Sequence[int]:
        return table.value("prompt_ids" if "prompt_ids" in table.kinds else "input_ids", row)

    @staticmethod
    def _asked(prompt: Sequence[int], reference: str) -> Encoded:
        return {"prompt_ids": list(prompt), "references": json.dumps([reference], ensure_ascii=False)}

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        inputs, tokens = text_inputs(self.tokenizer, rows)
        return Batch(inputs, {"labels": pad_labels([row["labels"] for row in rows])}, tuple(places), tokens)

    def collate_packed(self, rows: Sequence[Sequence[Encoded]], places: Sequence[Sequence[int]]) -> Batch:
        """Position ids start at 0 in every row and there is no attention mask: that is how transformers tells the
        rows of a sequence apart. The padding behind them is a row of its own, without labels."""
        ids = pad(
            [np.concatenate([row["input_ids"] for row in group]) for group in rows],
            self.tokenizer.pad_token_id,
        )
        labels = pad_labels([np.concatenate([row["labels"] for row in group]) for group in rows])
        positions = torch.zeros_like(ids)
        tokens = 0
        for i, group in enumerate(rows):
            lengths = [len(row["input_ids"]) for row in group]
            tokens += sum(lengths)
            rest = ids.shape[1] - sum(lengths)
            positions[i] = torch.cat([torch.arange(n) for n in [*lengths, rest]])
        return Batch(
            {"input_ids": ids, "position_ids": positions}, {"labels": labels}, tuple(chain(*places)), tokens
        )

    def outputs(self, model: nn.Module, batch: Batch, **options: Any) -> Mapping[str, Any]:
        return model(**batch.inputs, use_cache=False, return_dict=True, **options)

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


class CausalLMObjective(DecoderObjective):
    accepts = (Text,)

    def __init__(
        self,
        settings: CausalLM,
        tokenizer: Any,
        max_length: int,
        truncation: Truncation,
        *,
        generates: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, truncation, settings, generates=generates)

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        """The document and its end marker, in pieces of `max_length`. Each piece begins with the last token of the
        one before, so that every token but the document's first is predicted exactly once. Where evaluations
        generate, they continue the first half of a piece."""
        ids = self._ids(example)
        if not ids:
            yield Dropped("empty text")
            return
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        if len(ids) > self.max_length and self.truncation == "drop":
            yield Dropped("longer than max_length")
            return
        stride = max(1, self.max_length - 1)
        for start in range(0, max(1, len(ids) - 1), stride):
            piece = ids[start : start + self.max_length]
            if len(piece) < 2:
                yield Dropped("a single token: nothing to predict")
                return
            row: Encoded = {"input_ids": piece, "labels": [IGNORED, *piece[1:]], "truncated": 0}
            if self.generates:
                half = len(piece) // 2
                reference = self.tokenizer.decode(piece[half:], skip_special_tokens=True)
                row |= self._asked(piece[:half], reference)
            yield row

    def prompt_row(self, example: Example) -> Encoded | Dropped:
        """The text, to be continued: without an end marker, also where the tokenizer appends one."""
        ids = self._ids(example)
        eos = self.tokenizer.eos_token_id
        if eos is not None and len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        return {"input_ids": ids} if ids else Dropped("empty text")

    def _ids(self, example: Example) -> list[int]:
        assert isinstance(example, Text)
        return self.tokenizer(example.text, verbose=False)["input_ids"] if example.text.strip() else []
