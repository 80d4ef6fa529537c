"""That a reduction over all ranks gives what it must, once the process group is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.preflight.compare import node_name
from tunesmith.preflight.exchange import Meeting
from tunesmith.preflight.findings import Finding, error

_LENGTH = 1 << 16
_PERIOD = 251  # values repeat with a prime period, so that shifted blocks differ
_SECONDS = 30.0
_BLAMED = 64
_FAULTY = "its device, network card, memory or NCCL is faulty: leave the node out, and see dmesg and NCCL_DEBUG=INFO"


def known_values(rank: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(65536,): (i mod 251) + rank. Their sums over up to 5,000 ranks are below 2^24: exact in fp32."""
    return (torch.arange(_LENGTH, device=device) % _PERIOD + rank).to(dtype)


def known_sum(world_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(65536,): W (i mod 251) + W (W − 1) / 2."""
    base = torch.arange(_LENGTH, device=device) % _PERIOD
    return (base * world_size + world_size * (world_size - 1) // 2).to(dtype)


def check_sums(meeting: Meeting, device: torch.device) -> list[Finding]:
    """The same findings on every rank. A rank that does not come to the reduction ends it after half a minute. A
    wrong sum is wrong on every rank: whose part it was shows when each sends its own to all."""
    found = meeting.decide("sums", _wrong(meeting, device), lambda values: judge_sums(meeting, values))
    if not any("wrong sums" in one.what for one in found):
        return found
    blamed = meeting.decide("blame", _misheard(meeting, device), lambda values: judge_heard(meeting, values))
    return blamed or found


def _misheard(meeting: Meeting, device: torch.device) -> list[int]:
    """The ranks (of the first 64) whose known values came here as others."""
    wrong: list[int] = []
    for rank in range(min(meeting.claim.world_size, _BLAMED)):
        values = known_values(meeting.claim.rank, torch.int64, device)
        try:
            work: Any = dist.broadcast(values, src=rank, async_op=True)
            work.wait(timedelta(seconds=_SECONDS))
        except RuntimeError:
            break  # the sums are wrong already, and told
        if not torch.equal(values, known_values(rank, torch.int64, device)):
            wrong.append(rank)
    return wrong


def judge_heard(meeting: Meeting, values: Mapping[int, Sequence[int]]) -> list[Finding]:
    """A sender whom most others hear wrongly; else each who hears wrongly. `values`: by rank, whom it hears so."""
    assert meeting.roll is not None
    nodes = {claim.rank: node_name(claim) for claim in meeting.roll.claims}
    heard = Counter(sender for rank, senders in values.items() for sender in senders if sender != rank)
    guilty = [rank for rank, times in sorted(heard.items()) if 2 * times > len(values) - 1]
    if guilty:
        what = "sends other values than it should: an all-reduce of known values gave wrong sums"
        return [error(nodes[rank], f"rank {rank} {what}", _FAULTY) for rank in guilty]
    what = "receives other values than were sent: an all-reduce of known values gave wrong sums"
    return [error(nodes[rank], f"rank {rank} {what}", _FAULTY) for rank in sorted(values) if values[rank]]


def _wrong(meeting: Meeting, device: torch.device) -> str:
    """What is wrong with this rank's sums; empty where nothing is."""
    claim = meeting.claim
    for dtype in (torch.int64, torch.float32):
        values = known_values(claim.rank, dtype, device)
        try:
            work: Any = dist.all_reduce(values, async_op=True)
            work.wait(timedelta(seconds=_SECONDS))
        except RuntimeError as caught:
            return f"the first all-reduce failed: {str(caught).partition(chr(10))[0]}"
        expected = known_sum(claim.world_size, dtype, device)
        if not torch.equal(values, expected):
            wrong = int((values != expected).sum())
            return f"an all-reduce of known {dtype} values gave {wrong:,} of {_LENGTH:,} wrong sums"
    return ""


def judge_sums(meeting: Meeting, values: Mapping[int, str]) -> list[Finding]:
    assert meeting.roll is not None
    nodes = {claim.rank: node_name(claim) for claim in meeting.roll.claims}
    return [
        error(nodes[rank], f"rank {rank}: {what}", _FAULTY) for rank, what in sorted(values.items()) if what
    ]
