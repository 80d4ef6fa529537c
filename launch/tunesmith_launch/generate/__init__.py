"""From a recipe and a topology to the files of a cluster's scheduler: pure functions from options to text, which know
nothing of the caller's environment, so that none of its secrets can reach a file."""
