"""Long-context pretraining of rotary-position transformers."""

__version__ = "0.1.0"
