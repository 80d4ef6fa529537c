"""Losses of a linear head, without its logits: cross-entropy and distillation."""
