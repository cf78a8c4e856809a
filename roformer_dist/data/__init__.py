"""Deterministic delivery of text: tokenizer, shards, packing plan, order, loader.

Import what you need from its module (``roformer_dist.data.loader`` and so on); nothing here knows
of ranks, devices or process groups. ``docs/data_format.md`` describes every file written.
"""
