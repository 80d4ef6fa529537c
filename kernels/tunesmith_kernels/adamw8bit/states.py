"""What the optimizer keeps per parameter, in bitsandbytes' names and form: made, and taken from a state dict as it
is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith_kernels.adamw.states import Kept
from tunesmith_kernels.adamw8bit.codebook import Books, from_map, standard_books

# where bitsandbytes' state dicts (0.50) keep the tensors of a parameter, so that FSDP does not gather them
_WRAPPED = "__bnb_optimizer_quant_state__"
_FP32 = {"state1": torch.float32, "state2": torch.float32}
_ENCODED = {
    "state1": torch.uint8,
    "qmap1": torch.float32,
    "absmax1": torch.float32,
    "state2": torch.uint8,
    "qmap2": torch.float32,
    "absmax2": torch.float32,
}


def new_state(param: Tensor, block_size: int, encoded: bool) -> dict[str, Tensor]:
    """The state before the first update. param: this process's part of the parameter."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    dtype = torch.uint8 if encoded else torch.float32
    books, blocks = standard_books(param.device), -(-param.numel() // block_size)
    for number, book in (("1", books.signed), ("2", books.unsigned)):
        state[f"state{number}"] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        if encoded:
            state[f"qmap{number}"] = book.values
            state[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
    return state


def books_of(qmap1: Tensor, qmap2: Tensor) -> Books:
    """The code books with these values: the standard ones where they are equal. Waits for the device. Raises
    ValueError for maps that are not dynamic, or not signed and unsigned."""
    books, device = Books(from_map(qmap1), from_map(qmap2)), qmap1.device
    if not books.signed.signed or books.unsigned.signed:
        raise ValueError("qmap1 must be the signed map of 8-bit codes, and qmap2 the unsigned one")
    standard = standard_books(device)
    equal = torch.equal(qmap1, standard.signed.values) and torch.equal(qmap2, standard.unsigned.values)
    return standard if equal else books


def kept(param: Tensor, saved: Mapping[str, Any], block_size: int, label: str) -> dict[str, Any]:
    """The saved state of `param` (this process's part), ours or bitsandbytes', as ours. Raises ValueError where it is
    neither, or not of this parameter's size."""
    if not saved:
        return {}
    flat = {name: value for name, value in saved.items() if name != _WRAPPED} | saved.get(_WRAPPED, {})
    found = {name: value.dtype for name, value in flat.items() if name != "step"}
    if found not in (_FP32, _ENCODED) or "step" not in flat:
        raise ValueError(
            f"{label}: the saved state is not an 8-bit AdamW's, it holds {', '.join(sorted(flat))}"
        )
    expected = {"state1": param.numel(), "state2": param.numel()}
    if found == _ENCODED:
        blocks = -(-param.numel() // block_size)
        expected |= {"absmax1": blocks, "absmax2": blocks}
    for name, numel in expected.items():
        if flat[name].numel() != numel:
            raise ValueError(
                f"{label}: {name} has {flat[name].numel()} numbers, and with block_size={block_size} the "
                f"parameter's {param.numel()} elements need {numel}"
            )
    if found == _ENCODED:
        books_of(flat["qmap1"], flat["qmap2"])
    state = {name: flat[name].to(param.device).contiguous() for name in found}
    for name in ("state1", "state2"):
        state[name] = state[name].view(param.shape)
    step = torch.as_tensor(flat["step"], dtype=torch.float32, device=param.device)
    return {name: Kept(value) for name, value in ({"step": step} | state).items()}
