"""Finding the row that made a step non-finite. The weights are still those before the step: its update was
suppressed on the device, and every one after it."""

from __future__ import annotations

import torch

from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.step import seed_generators


def explain_nonfinite(engine: Engine, stream: Stream, step: int, seed: int) -> str:
    """Runs the step's window again row by row, every rank its own rows (fillers keep the ranks in step), and says
    which row of which rank is not finite alone. The same text on every rank."""
    epoch, window = stream.position(step).epoch, stream.window(step)
    own = [
        (micro_step, row)
        for micro_step, ranks in enumerate(stream.cells(step, engine.data_size))
        for sequence in ranks[engine.data_rank]
        for row in sequence
    ]
    forwards = max(engine.gather(len(own)))
    ones = torch.ones(len(stream.objective.terms), device=engine.device)
    found: list[str] = []
    for i in range(forwards):
        micro_step, row = own[i] if i < len(own) else (0, None)
        batch = stream.batch([] if row is None else [[row]], epoch, int(window[0]))
        seed_generators(seed, step, micro_step, engine.data_rank)
        engine.optimizer.zero_grad(set_to_none=True)
        with engine.accumulate(last=False):
            loss = engine.forward(batch, "loss", ones)
            engine.backward(loss.total)
        if row is None:
            continue
        place = stream.dataset.place(row)
        if not torch.isfinite(loss.total):
            found.append(f"{place} (rank {engine.rank}): its loss is {float(loss.total)}")
        elif not engine.local_gradients_finite():
            found.append(f"{place} (rank {engine.rank}): its gradient is not finite")
    engine.optimizer.zero_grad(set_to_none=True)
    everywhere = [text for part in engine.gather(found) for text in part]
    if everywhere:
        more = f" (and {len(everywhere) - 1} more rows of the step)" if len(everywhere) > 1 else ""
        return f"the sample at {everywhere[0]}{more}"
    first, last = stream.dataset.place(int(window.min())), stream.dataset.place(int(window.max()))
    return f"no row of the step is non-finite alone; its {len(window)} rows lie between {first} and {last}"
