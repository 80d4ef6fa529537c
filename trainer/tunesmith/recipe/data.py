"""`data`: the sources of the rows, how they are split, cut and batched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.recipe.augment import Operation
from tunesmith.recipe.base import Fraction, NonNegative, Positive, PositiveFloat, Section
from tunesmith.recipe.curriculum import Curriculum, LengthSchedule
from tunesmith.recipe.sampling import Sampling

Format = Literal[
    "text",
    "prompt_answer",
    "alpaca",
    "messages",
    "sharegpt",
    "classification",
    "pairs",
    "tokens",
    "squad",
    "translation",
]


class Source(Section):
    """`path` is a file, a folder of files, a hub id (`hub:owner/name`) or a builtin source
    (`builtin:stdlib_docstrings`). `columns` maps the format's own names to the names in the file.
    `weight` is how many times each row is drawn per epoch: 2 draws every row twice, 0.5 half of
    them, the other half in the next. `constants` gives a column one value for all rows of the source (`{label: pos}`).
    `delimiter`, `header` and `quoting` are CSV's and TSV's; without a header the columns are called "0",
    "1", …; `split_by` says what a row of a plain-text file is (auto: the file for format `text`, else the
    line)."""

    path: str
    format: Format
    columns: dict[str, str | list[str]] = Field(default_factory=dict[str, Any])
    constants: dict[str, str | int | float] = Field(default_factory=dict[str, Any])
    weight: PositiveFloat = 1.0
    split: str | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    header: bool = True
    quoting: bool = True
    split_by: Literal["auto", "line", "paragraph", "file"] = "auto"
    limit: Positive | None = None


class Split(Section):
    """Rows taken out of `train` for `eval` and `test`: fractions of the rows, drawn by `seed`; `stratify`
    keeps the shares of a column's values; `group` keeps rows of equal value in one split."""

    eval: Fraction = 0.0
    test: Fraction = 0.0
    stratify: str | None = None
    group: str | None = None
    seed: NonNegative = 0

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Split:
        if self.eval + self.test >= 1.0:
            raise ValueError("eval + test must leave rows to train on (be below 1)")
        if self.stratify is not None and self.group is not None:
            raise ValueError("stratify and group exclude each other")
        return self


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict | Source) else value


Sources = Annotated[list[Source], BeforeValidator(_as_list, json_schema_input_type=Source | list[Source])]


class Data(Section):
    """`max_length` is in tokens. `truncation` says what becomes of a longer sample: `drop` leaves it out,
    `cut` shortens it by the objective's rule, which never takes an answer's end marker (docs/data.md)."""

    train: Sources = Field(min_length=1)
    eval: Sources = Field(default_factory=list[Source])
    test: Sources = Field(default_factory=list[Source])
    split: Split | None = None
    max_length: Positive = 512
    truncation: Literal["cut", "drop"] = "cut"
    packing: bool = False
    group_by_length: bool = True
    shuffle: bool = True
    sampling: Sampling | None = None
    curriculum: Curriculum | None = None
    max_length_schedule: LengthSchedule | None = None
    augment: list[Operation] = Field(default_factory=list[Any])
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Data:
        if self.split is not None:
            if self.split.eval > 0 and self.eval:
                raise ValueError("split.eval and eval both give evaluation rows: keep one")
            if self.split.test > 0 and self.test:
                raise ValueError("split.test and test both give test rows: keep one")
        return self
