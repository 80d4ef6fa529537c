"""From files to batches: rows → examples → encoded rows → windows → batches."""
