"""What DeepSpeed is told."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from tunesmith.recipe.parallel import Zero1, Zero2, Zero3

_BUCKET = 50_000_000  # elements: 200 MB in fp32; DeepSpeed's own 500 M would be 2 GB
_PERSISTED = (
    1_000  # ZeRO-3 leaves parameters up to this many elements whole: biases and norms of small models
)


def quiet() -> None:
    """DeepSpeed tells of every step of its own start, and calls functions that torch means to rename."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def config(stage: int, settings: Zero1 | Zero2 | Zero3, world_size: int) -> dict[str, Any]:
    offload = settings.offload_optimizer
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET,
        "offload_optimizer": {"device": "cpu" if offload else "none"},
    }
    match settings:
        case Zero3(offload_parameters=offload_parameters):
            zero |= {
                "stage3_param_persistence_threshold": _PERSISTED,
                "stage3_prefetch_bucket_size": _BUCKET,
                "offload_param": {"device": "cpu" if offload_parameters else "none"},
            }
        case Zero1() | Zero2():
            # the norm is ours; with offload DeepSpeed takes its own on the way
            zero |= {"allgather_bucket_size": _BUCKET, "compute_grad_norm": offload}
    return {
        # counted by us: DeepSpeed is told of every boundary
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # else accelerate swaps any optimizer for DeepSpeedCPUAdam where the state is offloaded
        "zero_force_ds_cpu_optimizer": False,
    }
