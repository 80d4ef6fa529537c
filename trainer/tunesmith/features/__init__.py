"""Training a head on what its frozen backbone makes of each row, computed once and kept on disk."""

from tunesmith.features.cache import cache_features

__all__ = ["cache_features"]
