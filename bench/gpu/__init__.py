"""The parts of `bench/gpu_check.py`. Only `results` and `record` import without torch."""
