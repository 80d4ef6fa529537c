"""Before the first collective of a run of several processes: its ranks agree on recipe, data, model, code, versions
and environment, prove that the output folder is shared and has room, and that the nodes reach each other
(docs/preflight.md). `agree.py` is the way through."""
