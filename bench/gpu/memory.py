"""Peak memory of the linear losses, beyond what they are given, in the allocator's own count."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu.device import Machine
from gpu.record import Record
from tunesmith_kernels.linear_loss.chunks import chunk_rows, sum_dtype
from tunesmith_kernels.linear_loss.cross_entropy import linear_cross_entropy
from tunesmith_kernels.linear_loss.distillation import linear_distillation
from tunesmith_kernels.linear_loss.distillation_checks import TeacherHidden

ALLOWANCE = 0.6e9


def run(machine: Machine, record: Record) -> None:
    features, vocab = machine.pick((4096, 128_256), (4096, 128_256), (64, 503))
    weight = _random(machine, vocab, features).requires_grad_()
    for tokens in machine.pick((1024, 4096, 8192), (4096,), (50,)):
        with record.attempt(f"cross-entropy, {tokens} tokens", needs=2):
            _cross_entropy(machine, record, weight, tokens)
    with record.attempt("distillation", needs=3):
        # whole chunks, so that their buffers are alike at N and 2N
        chunk = chunk_rows(1 << 30, vocab, 2, machine.device.type)
        _distillation(machine, record, weight, machine.pick(2 * chunk, chunk, 50))


def _random(machine: Machine, *shape: int) -> Tensor:
    return (torch.randn(shape, device=machine.device) * shape[-1] ** -0.5).to(torch.bfloat16)


def _cross_entropy(machine: Machine, record: Record, weight: Tensor, tokens: int) -> None:
    vocab, features = weight.shape
    hidden = _random(machine, tokens, features).requires_grad_()
    target = torch.randint(vocab, (tokens,), device=machine.device)
    with machine.peak() as peak:
        loss = linear_cross_entropy(hidden, weight, target, backend=machine.loss_backend)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    del loss, gradients
    chunks = -(-tokens // chunk_rows(tokens, vocab, 2, machine.device.type))
    sums = sum_dtype(torch.bfloat16, torch.bfloat16, chunks).itemsize
    limit = 2 * hidden.numel() + sums * weight.numel() + ALLOWANCE
    case = f"cross-entropy, {tokens} tokens, H {features}, V {vocab}, bf16, {chunks} chunks"
    record.row(case, "peak beyond the inputs", peak[0] / 1e9, "GB", f"<= {limit / 1e9:.3f}")
    logits = 2 * tokens * vocab / 1e9
    record.row(case, "logits in bf16, which never exist", logits, "GB")


def _distillation(machine: Machine, record: Record, weight: Tensor, tokens: int) -> None:
    """At N and 2N tokens: what grows is dX and vectors of N."""
    vocab, features = weight.shape
    teacher_weight = _random(machine, vocab, features)
    peaks: list[int] = []
    for count in (tokens, 2 * tokens):
        hidden = _random(machine, count, features).requires_grad_()
        teacher = TeacherHidden(_random(machine, count, features), teacher_weight)
        with machine.peak() as peak:
            loss = linear_distillation(
                hidden, weight, teacher=teacher, divergence="jsd", backend=machine.loss_backend
            )
            gradients = torch.autograd.grad(loss, (hidden, weight))
        del loss, gradients
        peaks += peak
        case = f"distillation (JSD), {count} tokens, H {features}, V {vocab}, bf16"
        record.row(case, "peak beyond the inputs", peak[0] / 1e9, "GB")
    grown = (peaks[1] - peaks[0] - 2 * tokens * features) / 1e9
    record.row(
        "distillation, twice the tokens",
        "growth of the peak beyond dX",
        grown,
        "GB",
        f"<= {tokens * 1e-7 + 0.05:.3f}",
    )
