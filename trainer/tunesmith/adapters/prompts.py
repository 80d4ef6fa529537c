"""A model with virtual tokens before its input, or learned keys and values before every layer's.

PEFT's own forwards differ by task, know no masked language model, return logits of virtual tokens, and read the last
position of a padded batch in a decoder's classifier. Here the base model runs on token ids all the way: it gets a
placeholder id for each virtual token, and their embeddings are put in place where the ids are embedded. So position
ids, pooling, losses without logits and generation are the model's own. Parameters, names and files are PEFT's."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.fused_head import HeadOutput

_OF_TOKENS = ("logits", "start_logits", "end_logits", "prediction_logits", "last_hidden_state")
_ROWS = {"input_ids", "attention_mask", "token_type_ids"}


class PromptModel(PeftModel):
    """`forward` and `generate` take what the base model takes, by keyword, and return what it returns for the real
    tokens: [rows, tokens, …] and generated ids. One adapter."""

    @property
    def prefixes(self) -> bool:
        """Whether the virtual tokens are keys and values, which stand before no logits."""
        return self.active_peft_config.peft_type == "PREFIX_TUNING"

    @property
    def virtual(self) -> int:
        """The number of virtual tokens."""
        config: Any = self.active_peft_config
        return int(config.num_virtual_tokens)

    def forward(self, **inputs: Any) -> Any:
        rows, model = inputs["input_ids"].shape[0], cast(Any, self.base_model)
        if self.prefixes:
            return model(**self._behind_keys(inputs), past_key_values=self.get_prompt(rows))
        with self._embedded():
            outputs = model(**self._behind_tokens(inputs))
        if not self._encoder_decoder:
            for name in _OF_TOKENS:
                if name in outputs and self._per_token(outputs[name], inputs["input_ids"]):
                    outputs[name] = self._cut(outputs[name])
        return outputs

    def generate(self, **options: Any) -> Tensor:
        """Ids as the base model's `generate` returns them: [rows, tokens]."""
        rows = options["input_ids"].shape[0] * (options.get("num_beams") or 1)
        model: Any = self.base_model
        if "attention_mask" not in options:
            options["attention_mask"] = torch.ones_like(options["input_ids"])
        if self.prefixes:
            past = self.get_prompt(rows)
            return model.generate(**self._behind_keys(options), past_key_values=past)
        with self._embedded():
            found: Tensor = model.generate(**self._behind_tokens(options))
        return found if self._encoder_decoder else found[:, self.virtual :]

    @property
    def _encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def _behind_keys(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """An encoder-decoder's prefix is its decoder's, whose mask the model makes itself."""
        out = dict(inputs)
        key = "decoder_attention_mask" if self._encoder_decoder else "attention_mask"
        if out.get(key) is not None:
            out[key] = _before(out[key], self.virtual, 1)
        return out

    def _behind_tokens(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids: Tensor = inputs["input_ids"]
        out = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and not name.startswith("decoder_") and value.shape == ids.shape:
                assert name in _ROWS, f"a prompt method cannot lengthen {name}"
        out["input_ids"] = _before(ids, self.virtual, placeholder(self.config))
        if out.get("attention_mask") is not None:
            out["attention_mask"] = _before(out["attention_mask"], self.virtual, 1)
        if out.get("token_type_ids") is not None:
            out["token_type_ids"] = _before(out["token_type_ids"], self.virtual, 0)
        return out

    @contextmanager
    def _embedded(self) -> Generator[None]:
        """Within it, the embeddings of the placeholders are the virtual tokens'. An encoder-decoder embeds its source
        first, with weights that its decoder may share; a decoder that generates embeds its prompt first, then single
        tokens."""
        prompt: Tensor = self.get_prompt(1)
        done = False

        def put(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            nonlocal done
            if output.shape[1] <= self.virtual or (done and self._encoder_decoder):
                return output
            done = True
            own = prompt[:, : self.virtual].to(output.device, output.dtype).expand(output.shape[0], -1, -1)
            return torch.cat((own, output[:, self.virtual :]), 1)

        handle = source_embeddings(self.base_model).register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def _per_token(self, value: Any, ids: Tensor) -> bool:
        return len(value.shape) >= 2 and value.shape[1] == ids.shape[1] + self.virtual

    def _cut(self, value: Any) -> Any:
        if isinstance(value, HeadOutput):
            return replace(value, hidden=value.hidden[:, self.virtual :])
        return value[:, self.virtual :]


def _before(value: Tensor, count: int, fill: int) -> Tensor:
    return torch.cat((value.new_full((value.shape[0], count), fill), value), 1)


def source_embeddings(model: Any) -> nn.Module:
    """The module that embeds the tokens which the model reads first."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return (model.get_encoder() if encoder_decoder else model).get_input_embeddings()


def placeholder(config: Any) -> int:
    """A token id without a meaning of its own to the model: padding and end markers decide what it pools."""
    text = config.get_text_config()
    marks = {value for name, value in text.to_dict().items() if name.endswith("_token_id")}
    return next(i for i in range(text.vocab_size) if i not in marks)
