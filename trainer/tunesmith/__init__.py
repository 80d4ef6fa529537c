"""tunesmith fine-tunes pretrained models from one recipe. This module stays light: nothing heavy is imported here.
Once it is imported, transformers' Auto classes load models with a head of ours."""

from tunesmith.heads.registration import install

__version__ = "0.1.0"

install()
