"""What a run tells the world: events go in; metrics.jsonl, a progress display, W&B and report.html come out."""
