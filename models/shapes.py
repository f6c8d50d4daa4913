"""Parameter counts and memory sizes of models, and the shapes of well-known ones. Free of torch and of weights."""

from __future__ import annotations

from kernels.kv.kv_bits import KV_BITS
from kernels.weights.weight_bits import HEAD_FORMATS, WEIGHT_BITS
from models.config import ModelConfig, ModelError, RopeConfig, read_config, read_json
from models.default import resolve_model
from models.files.json_values import describe_no_directory

_LLAMA_31_ROPE = RopeConfig(
    theta=500000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)
_LLAMA_32_ROPE = RopeConfig(
    theta=500000.0, kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)

SHAPES = {
    "llama-2-7b-32k": ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        rope=RopeConfig(kind="linear", factor=8.0),
    ),
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope=_LLAMA_31_ROPE,
    ),
    "llama-3.1-70b": ModelConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope=_LLAMA_31_ROPE,
    ),
    "llama-3.2-1b": ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope=_LLAMA_32_ROPE,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": ModelConfig(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=RopeConfig(theta=1000000.0),
        tie_word_embeddings=True,
        qk_norm=True,
    ),
    "qwen3-8b": ModelConfig(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=RopeConfig(theta=1000000.0),
        qk_norm=True,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope=RopeConfig(theta=100000.0),
        tie_word_embeddings=True,
    ),
    "tinyllama-1.1b": ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    ),
}
"""Shapes by name, as published by the models' makers."""


def find_shape(name: str) -> ModelConfig:
    """Find the shape for a name in SHAPES, a default model, or a directory with a config.json; needs no weights.

    Raises ModelError: none of these, or a config.json that is not supported.
    """
    if name in SHAPES:
        return SHAPES[name]
    directory = resolve_model(name)
    if directory.is_file():
        raise ModelError(describe_no_directory(directory))
    if not directory.is_dir():
        raise ModelError(f"{name!r} is neither a model directory nor one of {', '.join(SHAPES)}")
    return read_config(directory)


def is_quantized(name: str) -> bool:
    """Whether `name`, see find_shape, is a directory whose config.json describes quantized weights."""
    if name in SHAPES:
        return False
    file = resolve_model(name) / "config.json"
    return file.is_file() and bool(read_json(file).get("quantization_config"))


def _key_value_parameters(model: ModelConfig) -> int:
    """Count the parameters of the key and value projections of all layers."""
    return 2 * model.num_layers * model.hidden_size * model.num_kv_heads * model.head_dim


def active_parameters(model: ModelConfig) -> int:
    """Count the weights that one token is multiplied with: all matrices, including the LM head, without the embedding
    table, of which a token looks up one row."""
    return _layer_parameters(model) + _key_value_parameters(model) + _table_parameters(model)


def _layer_parameters(model: ModelConfig) -> int:
    """Count the weights of all layers' matrices, without key and value projections."""
    attention = 2 * model.hidden_size * model.num_heads * model.head_dim
    network = 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * (attention + network)


def _table_parameters(model: ModelConfig) -> int:
    """Count the weights of the LM head, or of the embedding."""
    return model.vocab_size * model.hidden_size


def parameters(model: ModelConfig) -> int:
    """Count all parameters: matrices, embedding (once, if the LM head is tied to it), norms and biases."""
    heads = model.num_heads + 2 * model.num_kv_heads
    layer = 2 * model.hidden_size
    layer += 2 * model.head_dim * model.qk_norm
    layer += heads * model.head_dim * model.qkv_bias + model.hidden_size * model.o_bias
    layer += (2 * model.intermediate_size + model.hidden_size) * model.mlp_bias
    embedding = 0 if model.tie_word_embeddings else _table_parameters(model)
    return active_parameters(model) + embedding + model.num_layers * layer + model.hidden_size


def kv_heads_per_rank(model: ModelConfig, ranks: int) -> int:
    """Return the number of KV heads on the fullest rank (parallel/split.py): at least 1, since heads are replicated."""
    return -(-model.num_kv_heads // ranks)


def matrix_bytes(model: ModelConfig, element_bytes: int, weights: str = "dense") -> float:
    """Return the bytes of the weights that one token is multiplied with (`active_parameters`). weights: their format,
    a key of WEIGHT_BITS; dense: elements of `element_bytes`."""
    return rank_matrix_bytes(model, 1, element_bytes, weights)


def rank_matrix_bytes(model: ModelConfig, ranks: int, element_bytes: int, weights: str = "dense") -> float:
    """Return the bytes of matrices on the fullest rank; the projections of replicated KV heads are replicated, too."""
    keys_values = _key_value_parameters(model) * kv_heads_per_rank(model, ranks) / model.num_kv_heads
    layers = _weight_bytes(weights, element_bytes) * (_layer_parameters(model) / ranks + keys_values)
    return layers + _weight_bytes(HEAD_FORMATS[weights], element_bytes) * _table_parameters(model) / ranks


def _weight_bytes(weights: str, element_bytes: int) -> float:
    return element_bytes if weights == "dense" else WEIGHT_BITS[weights] / 8


def rank_weight_bytes(model: ModelConfig, ranks: int, element_bytes: int, weights: str = "dense") -> float:
    """Return the bytes of all weights on the fullest rank. An embedding that the LM head is tied to is kept beside a
    head of fewer bits."""
    others = parameters(model) - active_parameters(model)
    if model.tie_word_embeddings and weights != "dense":
        others += _table_parameters(model)
    return rank_matrix_bytes(model, ranks, element_bytes, weights) + element_bytes * others / ranks


def kv_token_bytes(model: ModelConfig, element_bytes: int, kv_format: str = "dense") -> int:
    """Return the KV bytes of one token: all layers, all KV heads, each once. kv_format: see kernels.kv.kv_bits; dense:
    numbers of `element_bytes`."""
    return rank_kv_token_bytes(model, 1, element_bytes, kv_format)


def rank_kv_token_bytes(
    model: ModelConfig, ranks: int, element_bytes: int, kv_format: str = "dense", *, drafts: bool = False
) -> int:
    """Return the KV bytes of one token on the fullest rank; with more ranks than KV heads they no longer shrink.
    kv_format: see kv_token_bytes. drafts: those that drafts read."""
    head = KV_BITS[kv_format].token_bytes(model.head_dim, element_bytes, drafts=drafts)
    return model.num_layers * kv_heads_per_rank(model, ranks) * head
