"""The libraries' own chatter is off: what matters of it stands in the start-up report."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Errors only, and no progress bars, from transformers and datasets."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tunesmith.engine import device_type

    if device_type() == "cpu":
        # accelerate imports deepspeed wherever it is installed, which warns where it has to find out by itself
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # where the processor multiplies bf16, bitsandbytes would fetch a kernel from the hub as it is imported
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
