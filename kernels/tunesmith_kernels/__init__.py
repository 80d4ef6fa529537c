"""Pure tensor functions on torch (and, where a GPU is, triton); usable without the trainer."""
