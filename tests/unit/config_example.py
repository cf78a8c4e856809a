"""A small configuration that the tests of the configuration change."""

from __future__ import annotations

BASE = """
name = "run"

[model]
vocab_size = 64
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 48

[data]
tokenizer = "t.model"
train = { shards = "train", plan = "train.npz" }
validation = { shards = "val", plan = "val.npz" }

[parallel]
sp_size = 2

[train]
seq_len = 32
tokens_per_step = 256
micro_batch_size = 2
num_steps = 100

[optimizer]
lr = 1e-3

[schedule]
kind = "cosine"
warmup_steps = 10

[checkpoint]
every_steps = 50

[validation]
every_steps = 50
rows = 8
"""

YARN = 'kind = "yarn", factor = 2.0, original_seq_len = 32'
