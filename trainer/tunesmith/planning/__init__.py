"""What a run will need before it runs: memory by part, and time (docs/plan.md)."""
