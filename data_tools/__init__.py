"""The ``roformer-dist data`` commands: a thin layer over ``roformer_dist.data``."""
