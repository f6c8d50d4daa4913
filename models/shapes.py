"""Parameter counts and memory sizes of models. Free of torch and of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.kv.kv_bits import KV_BITS
from kernels.weights.weight_bits import EXPERTS_ALONE, HEAD_FORMATS, WEIGHT_BITS
from models.config import ModelConfig, ModelError, read_config, read_json
from models.default import resolve_model
from models.files.json_values import describe_no_directory
from models.files.nested_text import text_model
from models.known_shapes import SHAPES
from models.model_config import ExpertsConfig


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
    return file.is_file() and bool(text_model(read_json(file)).get("quantization_config"))


def distinct_experts(experts: ExpertsConfig, tokens: float) -> float:
    """Return the expected number of a layer's experts that `tokens` tokens are given to:

        count · (1 − (1 − per_token / count)^tokens)

    It takes every token's experts to be drawn uniformly and independently of those of other tokens. Routers are less
    even than that, and tokens of one text alike, so the true number is smaller.
    """
    return experts.count * (1 - math.pow(1 - experts.per_token / experts.count, tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrices:
    """Numbers of weights of the matrices of a model, all layers together.

    keys_values: projections that ranks replicate with the KV heads. routers: of experts, and the gates of shared ones;
    dense in every format, and whole on every rank. expert: one expert of each layer that has some. layers: all else.
    head: the LM head, or the embedding.
    """

    layers: int
    keys_values: int
    routers: int
    expert: int
    head: int


def _matrices(model: ModelConfig) -> _Matrices:
    hidden, experts = model.hidden_size, model.experts
    attention = 2 * model.num_layers * hidden * model.num_heads * model.head_dim
    mixed = 0 if experts is None else model.num_layers - len(experts.dense_layers)
    networks = (model.num_layers - mixed) * 3 * hidden * model.intermediate_size
    routers = expert = 0
    if experts is not None:
        networks += mixed * 3 * hidden * experts.shared_size
        routers = mixed * hidden * (experts.count + (experts.shared_size > 0))
        expert = mixed * 3 * hidden * experts.size
    return _Matrices(
        layers=attention + networks,
        keys_values=2 * model.num_layers * hidden * model.num_kv_heads * model.head_dim,
        routers=routers,
        expert=expert,
        head=model.vocab_size * hidden,
    )


def _matrix_parameters(model: ModelConfig, experts: int) -> int:
    """Count the weights of matrices, with so many experts per layer."""
    found = _matrices(model)
    return found.layers + found.keys_values + found.routers + experts * found.expert + found.head


def active_parameters(model: ModelConfig) -> int:
    """Count the weights that one token is multiplied with: all matrices, including the LM head, and of experts those
    that it is given to; without the embedding table, of which a token looks up one row."""
    return _matrix_parameters(model, model.experts.per_token if model.experts else 0)


def parameters(model: ModelConfig) -> int:
    """Count all parameters: matrices, all experts, embedding (once, if the LM head is tied to it), norms, biases and
    sinks."""
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return _all_matrices(model) + embedding + _vectors(model)


def _all_matrices(model: ModelConfig) -> int:
    """Count the weights of all matrices."""
    return _matrix_parameters(model, model.experts.count if model.experts else 0)


def _vectors(model: ModelConfig) -> int:
    """Count the parameters of norms, biases and sinks."""
    names, experts, hidden = model.names, model.experts, model.hidden_size
    norms = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
    heads = model.num_heads + 2 * model.num_kv_heads
    normed = {"none": 0, "head": 2, "all": model.num_heads + model.num_kv_heads}[model.qk_norm]
    layer = hidden * sum(map(bool, norms)) + model.head_dim * normed + model.num_heads * model.has_sinks
    layer += heads * model.head_dim * model.qkv_bias + hidden * model.o_bias
    dense, mixed = (model.num_layers, 0) if experts is None else (len(experts.dense_layers), 0)
    if experts is not None and experts.biased:
        mixed = experts.count * (2 * experts.size + hidden + 1)
        mixed += (2 * experts.shared_size + hidden) * (experts.shared_size > 0)
    networks = dense * (2 * model.intermediate_size + hidden) * model.mlp_bias + (model.num_layers - dense) * mixed
    return model.num_layers * layer + hidden + networks


def kv_heads_per_rank(model: ModelConfig, ranks: int) -> int:
    """Return the number of KV heads on the fullest rank (parallel/split.py): at least 1, since heads are replicated."""
    return -(-model.num_kv_heads // ranks)


def matrix_bytes(
    model: ModelConfig, element_bytes: int, weights: str = "dense", *, tokens: float | None = None
) -> float:
    """Return the bytes of all matrices, including the LM head. weights: their format, a key of WEIGHT_BITS; dense:
    elements of `element_bytes`. tokens: of a forward, which reads only the experts that these are given to
    (`distinct_experts`); None: all."""
    return rank_matrix_bytes(model, 1, element_bytes, weights, tokens=tokens)


def rank_matrix_bytes(
    model: ModelConfig, ranks: int, element_bytes: int, weights: str = "dense", *, tokens: float | None = None
) -> float:
    """Return the bytes of matrices on the fullest rank; the projections of replicated KV heads are replicated, too, and
    routers. tokens: see matrix_bytes."""
    found, experts = _matrices(model), 0.0
    if model.experts is not None:
        experts = model.experts.count if tokens is None else distinct_experts(model.experts, tokens)
    keys_values = found.keys_values * kv_heads_per_rank(model, ranks) / model.num_kv_heads
    others = "dense" if weights in EXPERTS_ALONE else weights
    return (
        _weight_bytes(others, element_bytes) * (found.layers / ranks + keys_values)
        + _weight_bytes(weights, element_bytes) * experts * found.expert / ranks
        + element_bytes * found.routers
        + _weight_bytes(HEAD_FORMATS[weights], element_bytes) * found.head / ranks
    )


def _weight_bytes(weights: str, element_bytes: int) -> float:
    return element_bytes if weights == "dense" else WEIGHT_BITS[weights] / 8


def rank_weight_bytes(model: ModelConfig, ranks: int, element_bytes: int, weights: str = "dense") -> float:
    """Return the bytes of all weights on the fullest rank. An embedding that the LM head is tied to is kept beside a
    head of fewer bits."""
    others = parameters(model) - _all_matrices(model)
    if model.tie_word_embeddings and HEAD_FORMATS[weights] != "dense":
        others += model.vocab_size * model.hidden_size
    return rank_matrix_bytes(model, ranks, element_bytes, weights) + element_bytes * others / ranks


def kv_token_bytes(model: ModelConfig, element_bytes: int, kv_format: str = "dense") -> int:
    """Return the KV bytes of one token in the layers that keep the KV of all tokens (`attention_groups`): all KV heads,
    each once. kv_format: see kernels.kv.kv_bits; dense: numbers of `element_bytes`."""
    return rank_kv_token_bytes(model, 1, element_bytes, kv_format)


def rank_kv_token_bytes(
    model: ModelConfig, ranks: int, element_bytes: int, kv_format: str = "dense", *, drafts: bool = False
) -> int:
    """Return the same on the fullest rank; with more ranks than KV heads they no longer shrink. kv_format: see
    kv_token_bytes. drafts: those that drafts read."""
    head = KV_BITS[kv_format].token_bytes(model.head_dim, element_bytes, drafts=drafts)
    return len(model.attention_groups[0]) * kv_heads_per_rank(model, ranks) * head


def rank_sliding_token_bytes(model: ModelConfig, ranks: int, element_bytes: int) -> int:
    """Return the KV bytes of one token, on the fullest rank, in the layers that keep the KV of a window only, which is
    dense."""
    head = KV_BITS["dense"].token_bytes(model.head_dim, element_bytes)
    return len(model.attention_groups[1]) * kv_heads_per_rank(model, ranks) * head


def window_pages_per_row(window: int, draft_tokens: int, page_size: int) -> int:
    """Return the largest number of pages of sliding layers that a row owns, besides those that all rows' new tokens of
    a round fill: of its window, the drafts of a round and the pending token, which begin and end within pages, and one
    that new tokens fill in part. Each page has `page_size` tokens."""
    return math.ceil((window + draft_tokens) / page_size) + 3
