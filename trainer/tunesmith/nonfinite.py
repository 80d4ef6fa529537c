"""Finding the row that made a step non-finite. The weights are still those before the step: its update was
suppressed on the device, and every one after it."""

from __future__ import annotations

import torch

from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.engine.base import Rehearsal
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
    ones = torch.ones(len(engine.train_module.terms), device=engine.device)
    found: list[tuple[bool, str]] = []
    for i in range(max(engine.gather(len(own)))):
        micro_step, row = own[i] if i < len(own) else (0, None)

        def rehearse(row: int | None, micro_step: int = micro_step) -> Rehearsal:
            batch = stream.batch([] if row is None else [[row]], epoch, int(window[0]))
            seed_generators(seed, step, micro_step, engine.draw_rank, engine.device)
            return engine.rehearse(batch, ones)

        rehearsal = rehearse(row)
        if rehearsal.reduced and not rehearsal.finite:
            # the ranks' gradients are one: each rank's row again, beside the others' fillers
            for rank in range(engine.data_size):
                alone = rehearse(row if rank == engine.data_rank else None)
                rehearsal = alone if rank == engine.data_rank else rehearsal
        if row is None:
            continue
        place = stream.dataset.place(row)
        if not torch.isfinite(rehearsal.loss):
            found.append((True, f"{place} (rank {engine.rank}): its loss is {float(rehearsal.loss)}"))
        elif not rehearsal.finite:
            found.append((False, f"{place} (rank {engine.rank}): its gradient is not finite"))
    told = [row for part in engine.gather(found) for row in part]
    # beside a row whose loss is bad, a gradient may be so only for that row's sake: fillers are made of a row too
    everywhere = [text for bad_loss, text in told if bad_loss] or [text for _, text in told]
    if everywhere:
        more = f" (and {len(everywhere) - 1} more rows of the step)" if len(everywhere) > 1 else ""
        return f"the sample at {everywhere[0]}{more}"
    first, last = stream.dataset.place(int(window.min())), stream.dataset.place(int(window.max()))
    return f"no row of the step is non-finite alone; its {len(window)} rows lie between {first} and {last}"
