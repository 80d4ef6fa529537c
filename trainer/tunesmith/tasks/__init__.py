"""Several tasks on one backbone: composites with the interfaces of one objective, one model, one stream. The loop, the
module and the engines know nothing of them."""

from __future__ import annotations

from tunesmith.tasks.build import build

__all__ = ["build"]
