"""`final/`: the trained model in Hugging Face's format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tunesmith.engine import Engine


def export_final(engine: Engine, tokenizer: Any, run_dir: Path) -> Path:
    """Writes model and tokenizer to `final/` (rank 0) and returns it. An older `final/` is replaced whole."""
    final = run_dir / "final"
    if engine.rank == 0:
        temporary = run_dir / ".final.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model: Any = engine.train_module.model
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    engine.barrier()
    return final
