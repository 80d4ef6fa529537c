"""`data.augment`: what is done to training rows, anew in every epoch and in the order of the list, told apart by
`type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.recipe.base import Positive, PositiveFloat, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class _Operation(Section):
    """`probability`: of a row, in each epoch, to be changed by this operation."""

    probability: Share = 0.5


class TokenMask(_Operation):
    """Each word becomes the tokenizer's mask (or unknown) token with probability `fraction`."""

    type: Literal["token_mask"]
    fraction: Share = 0.15
    token: Literal["mask", "unk"] = "mask"


class TokenDrop(_Operation):
    """Each word is left out with probability `fraction` (Wei & Zou 2019); a text that would lose all keeps all."""

    type: Literal["token_drop"]
    fraction: Share = 0.1


class TokenSwap(_Operation):
    """`swaps` times, or `fraction` × the number of words (at least once), two words change places (Wei & Zou 2019)."""

    type: Literal["token_swap"]
    fraction: Share | None = None
    swaps: Positive | None = None

    @model_validator(mode="after")
    def _one_strength(self) -> TokenSwap:
        if (self.fraction is None) == (self.swaps is None):
            raise ValueError("set one of fraction (of the words, such as 0.1) and swaps (a number)")
        return self


class _OfSynonyms(_Operation):
    """`table`: a file of synonyms, TSV (a word, then its synonyms) or JSON ({word: [synonym, …]}); `source: wordnet`:
    the English WordNet, read by NLTK from data that lie on this machine."""

    fraction: Share = 0.1
    table: str | None = None
    source: Literal["wordnet"] | None = None


class TokenInsert(_OfSynonyms):
    """`fraction` × the number of words (at least one) are put in at random places: copies of words of the row, or with
    a `table` or `source` synonyms of them (Wei & Zou 2019)."""

    type: Literal["token_insert"]

    @model_validator(mode="after")
    def _one_table(self) -> TokenInsert:
        if self.table is not None and self.source is not None:
            raise ValueError("table and source exclude each other")
        return self


class Synonyms(_OfSynonyms):
    """`fraction` × the number of words (at least one) that have synonyms are replaced by one (Wei & Zou 2019)."""

    type: Literal["synonyms"]

    @model_validator(mode="after")
    def _one_table(self) -> Synonyms:
        if (self.table is None) == (self.source is None):
            raise ValueError("set one of table (a TSV or JSON file) and source: wordnet")
        return self


class BackTranslation(_Operation):
    """A row's text is replaced by its translation into another language and back (Sennrich et al. 2016), by `model` and
    `back_model` (sequence-to-sequence models; `model` for both where it is left out), each told what to do by its
    entry of `prefixes`. `num_variants` are made of each text before the training, by beam search, and kept in the
    cache; an epoch draws one of them."""

    type: Literal["back_translation"]
    model: str
    back_model: str | None = None
    prefixes: Annotated[tuple[str, str], Field(strict=False)] = ("", "")
    num_variants: Positive = 2
    num_beams: Positive = 4
    max_new_tokens: Positive = 256
    batch_size: Positive = 16

    @model_validator(mode="after")
    def _enough_beams(self) -> BackTranslation:
        if self.num_variants > self.num_beams:
            raise ValueError("num_variants: at most num_beams, of which they are the best")
        return self


class Cutoff(_Operation):
    """`fraction` of a row's embedded input is set to zero (Shen et al. 2020): whole tokens, whole features (the same
    numbers of every token) or one span of tokens."""

    type: Literal["cutoff"]
    fraction: Share = 0.1
    kind: Literal["token", "feature", "span"] = "token"


class Mixup(_Operation):
    """A row is mixed with another one: λ × its embeddings + (1 − λ) × the other's, and the losses of both labels alike
    (Zhang et al. 2018, Guo et al. 2019). λ is drawn from Beta(`alpha`, `alpha`)."""

    type: Literal["mixup"]
    probability: Share = 1.0
    alpha: PositiveFloat = 0.2
    layer: Literal["embeddings"] = "embeddings"


Operation = Annotated[
    TokenMask | TokenDrop | TokenSwap | TokenInsert | Synonyms | BackTranslation | Cutoff | Mixup,
    Field(discriminator="type"),
]

OF_WORDS = (TokenMask, TokenDrop, TokenSwap, TokenInsert, Synonyms, BackTranslation)
"""The operations that change a row's text."""
