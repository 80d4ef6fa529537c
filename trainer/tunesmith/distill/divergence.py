"""The divergences of two distributions over classes, from logits. They are those of
`tunesmith_kernels.linear_loss.distillation_rows`, written down for logits that stand there whole.

With p = softmax(t/T) the teacher's and q = softmax(z/T) the student's:

    forward_kl   T²·Σ p·(log p − log q)                              Hinton et al. 2015
    reverse_kl   T²·Σ q·(log q − log p)                              Gu et al. 2024 (MiniLLM)
    jsd          T²·(β·KL(p‖m) + (1−β)·KL(q‖m)),  m = β·p + (1−β)·q  Agarwal et al. 2024 (GKD), 0 < β < 1

T² keeps the size of the gradient as T grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
_FLOOR = 2.0**-24  # fp32 log-probabilities do not tell a smaller remainder from 0


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's k likeliest classes of each unit: indices int64 [..., k], log_probs fp32 [..., k], of
    softmax(t/T), not renormalised. `bucket`: all other classes are one more; else both are normalised over the k."""

    indices: Tensor
    log_probs: Tensor
    bucket: bool

    @staticmethod
    def of(logits: Tensor, k: int, temperature: float, *, bucket: bool) -> TopK:
        """logits [..., classes]."""
        log_p = torch.log_softmax(_wide(logits) / temperature, dim=-1)
        top = log_p.topk(min(k, logits.shape[-1]), dim=-1)
        return TopK(top.indices, top.values, bucket)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which one, and at which temperature T > 0."""

    kind: Kind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor | TopK) -> Tensor:
        """student [..., classes], teacher of the same shape or a TopK → [...] fp32 (fp64 for fp64), with gradient for
        the student."""
        log_q = torch.log_softmax(_wide(student) / self.temperature, dim=-1)
        if isinstance(teacher, TopK):
            log_p, log_q = buckets(teacher, log_q)
        else:
            log_p = torch.log_softmax(_wide(teacher) / self.temperature, dim=-1)
        return self.temperature**2 * self._of(log_p, log_q)

    def bernoulli(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The same of independent yes-or-no labels: [..., labels] → the mean over the labels [...]."""
        z, t = _wide(student) / self.temperature, _wide(teacher) / self.temperature
        log_q = torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], dim=-1)
        log_p = torch.stack([F.logsigmoid(t), F.logsigmoid(-t)], dim=-1)
        return self.temperature**2 * self._of(log_p, log_q).mean(dim=-1)

    def _of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        match self.kind:
            case "forward_kl":
                return kl(log_p, log_q)
            case "reverse_kl":
                return kl(log_q, log_p)
            case "jsd":
                beta = self.beta
                none = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp has no gradient there
                of_p, of_q = log_p.masked_fill(none, 0.0), log_q.masked_fill(none, 0.0)
                log_m = torch.logaddexp(of_p + math.log(beta), of_q + math.log1p(-beta))
                return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a·(log a − log b) over the last dimension; classes without a (log a = −inf) count nothing."""
    gone = log_a == -math.inf
    a = log_a.masked_fill(gone, 0.0)
    return (a.exp() * (a - log_b.masked_fill(gone, 0.0))).masked_fill(gone, 0.0).sum(dim=-1)


def buckets(teacher: TopK, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, log q) over the teacher's k classes and, with a bucket for the rest, over k + 1: p_rest = max(1 − Σp,
    2⁻²⁴) and q_rest = Σ q over the other classes. Without it, each is normalised over the k."""
    log_p, classes = teacher.log_probs.to(log_q.dtype), log_q.shape[-1]
    own = log_q.gather(-1, teacher.indices)
    if not teacher.bucket:
        return torch.log_softmax(log_p, dim=-1), torch.log_softmax(own, dim=-1)
    if teacher.indices.shape[-1] == classes:
        return log_p, own
    rest = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp_min(_FLOOR).log()
    others = log_q.scatter(-1, teacher.indices, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_p, rest], dim=-1), torch.cat([own, others], dim=-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
