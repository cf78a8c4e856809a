"""Hugging Face both ways: configurations, weights and tokenizers of the families that this model can be."""
