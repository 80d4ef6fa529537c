"""PEFT's warnings, as notes for the start-up report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

# said of what is right as it is
_NO_NEWS = (
    "fan_in_fan_out is set to",  # Conv1D's weights lie the other way round: PEFT sees it, and says so
    "Setting `save_embedding_layers`",
    "Failed to load the CUDA extension",  # of BOFT, which then computes without it
    "Could not find a config file in",
)


@contextmanager
def heard(notes: list[str]) -> Generator[None]:
    """Within it, warnings become notes: their first line each, once; those about the code of libraries are dropped."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # which PEFT imports, and which misses faster kernels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        text = " ".join(str(one.message).split())
        of_code = issubclass(one.category, DeprecationWarning | FutureWarning | PendingDeprecationWarning)
        if not of_code and not text.startswith(_NO_NEWS) and f"PEFT: {text}" not in notes:
            notes.append(f"PEFT: {text}")
