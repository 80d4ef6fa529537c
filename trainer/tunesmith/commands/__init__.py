"""What looks at a recipe before it runs, or at a run that is done."""
