"""A model shape whose parameters are counted by hand."""

from __future__ import annotations

from models.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=100,
    hidden_size=10,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    max_position_embeddings=100_000,
)
# A layer: queries and output 2·10·8, keys and values 2·10·4, MLP 3·10·20. Head: 1000.
SMALL_ACTIVE = 3 * (160 + 80 + 600) + 1000
