"""GGUF files of tiny models of Llama and Gemma 3, written with the gguf package."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

ALPHABET = [*"0123456789abcdefghij", "Ġ", "Ċ"]
SPECIAL = ["<unk>", "<s>", "</s>"]
MERGES = ["a b", "ab c", "Ġ Ġ"]
TOKENS = [*SPECIAL, *ALPHABET, "ab", "abc", "ĠĠ"]

PIECES = (
    *(("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 3), ("<start_of_turn>", 3), ("<end_of_turn>", 3)),
    *(("\n", 4), ("\n\n", 4), ("  ", 4), ("   ", 4), ("<b>", 4), ("[x]", 4)),
    *((f"<0x{byte:02X}>", 6) for byte in range(256)),
    *(
        (piece, 1)
        for piece in ("in", "▁i", "▁in", "bb", "bbb", "ing", "ng", "▁the", "he", "th", "the", "▁t", "[x", "x]")
    ),
    *((char, 1) for char in "▁abcdefghijklmnopqrstuvwxyz[]<>é"),
)
"""Pieces and kinds of a tokenizer with scores, the best first."""

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GEMMA_NAMES = _NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_0": (0,), "Q6_K": (208,), "Q8_0": (0,), "Q5_K": (0, 2)}
"""Offsets of float16 numbers in a block, by type."""


def random_blocks(kind: str, rows: int, features: int, seed: int) -> NDArray[np.uint8]:
    """Draw blocks of a quantized type: any bits, but small scales and minima. Returns [rows, bytes]."""
    per_block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * features // per_block, size), dtype=np.uint8)
    for offset in _HALVES[kind]:
        scales = (random.standard_normal(len(blocks)) * 2.0**-12).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    types: Mapping[str, str] | None = None,
    pre: str = "smollm",
    architecture: str = "llama",
    **extra: Any,
) -> Path:
    """Write a Llama model. types: GGUF's type of a tensor, by its name in transformers, if it is not the tensor's own;
    for types that the gguf package cannot round to, the blocks are drawn. extra: more keys, with `__` for a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(len(TOKENS))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}")
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    for number, (name, tensor) in enumerate(weights.items()):
        kind = (types or {}).get(name)
        target, values = _TOP.get(name, name), tensor.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{layer}.{_NAMES[part]}.weight"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                values = _permuted(values, config["num_attention_heads" if "q_" in part else "num_key_value_heads"])
        if kind is None:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, _blocks(kind, values, number), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gemma3_gguf(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    types: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    **extra: Any,
) -> Path:
    """Write a text model of Gemma 3 with the tokenizer PIECES. types, extra: see write_gguf. left_out: keys."""
    writer = gguf.GGUFWriter(path, "gemma3")
    values: dict[str, Any] = {
        "gemma3.context_length": config["max_position_embeddings"],
        "gemma3.embedding_length": config["hidden_size"],
        "gemma3.block_count": config["num_hidden_layers"],
        "gemma3.feed_forward_length": config["intermediate_size"],
        "gemma3.attention.head_count": config["num_attention_heads"],
        "gemma3.attention.head_count_kv": config["num_key_value_heads"],
        "gemma3.attention.key_length": config["head_dim"],
        "gemma3.attention.value_length": config["head_dim"],
        "gemma3.attention.sliding_window": config["sliding_window"],
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        **{key.replace("__", "."): value for key, value in extra.items()},
    }
    for key, value in values.items():
        if key in left_out:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    if "tokenizer.ggml.tokens" not in left_out:
        writer.add_token_list([piece for piece, _ in PIECES])
        writer.add_token_types([kind for _, kind in PIECES])
        writer.add_token_scores([-float(token) if kind == 1 else -1000.0 for token, (_, kind) in enumerate(PIECES)])
    for number, (name, tensor) in enumerate(weights.items()):
        target, kind = _TOP.get(name, name), (types or {}).get(name)
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{layer}.{_GEMMA_NAMES[part]}.weight"
        array = tensor.float().numpy() + np.float32(name.endswith("norm.weight"))
        if kind is None:
            writer.add_tensor(target, array)
        else:
            writer.add_tensor(target, _blocks(kind, array, number), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _blocks(kind: str, values: NDArray[np.float32], seed: int) -> NDArray[Any]:
    if kind == "F64":
        return values.astype(np.float64)
    try:
        return np.ascontiguousarray(gguf.quantize(values, GGMLQuantizationType[kind]))
    except NotImplementedError:
        return random_blocks(kind, values.shape[0], values.shape[1], seed)


def _permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Permute query or key rows to GGUF's order, in which rotated pairs are adjacent instead of half a head apart."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(weight.shape))
