"""The part that runs once, before any rank: command line, launch, supervision."""
