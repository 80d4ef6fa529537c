"""Adapters, through PEFT, which no other package imports: what a recipe names becomes a PeftModel, is saved in PEFT's
format, loaded, and merged."""
