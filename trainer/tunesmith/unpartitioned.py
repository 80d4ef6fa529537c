"""Models that DeepSpeed must leave alone."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unpartitioned() -> Generator[None]:
    """What transformers builds in here is whole, also under ZeRO-3, where it would be partitioned, which takes all
    ranks."""
    from transformers.integrations import deepspeed

    library: Any = deepspeed
    held, library._hf_deepspeed_config_weak_ref = library._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        library._hf_deepspeed_config_weak_ref = held
