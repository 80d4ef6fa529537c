"""Augmentation of training rows (`data.augment`): words, operations on them, and what the stream does with both."""
