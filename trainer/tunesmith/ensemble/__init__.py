"""Several finished runs answering together, and several sets of weights made one."""
