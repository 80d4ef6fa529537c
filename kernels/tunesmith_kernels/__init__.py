"""Fused losses and optimizers: pure tensor functions on torch (and, where a GPU is, triton); usable without the
trainer."""

from tunesmith_kernels.linear_loss.cross_entropy import Stats, linear_cross_entropy

__all__ = ["Stats", "linear_cross_entropy"]
