"""tunesmith fine-tunes pretrained models from one recipe. This module stays light: nothing heavy is imported here."""

__version__ = "0.1.0"
