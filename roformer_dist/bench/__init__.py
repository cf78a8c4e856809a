"""``roformer-dist bench``: ours and named peers in turn, each sample in a process of its own."""
