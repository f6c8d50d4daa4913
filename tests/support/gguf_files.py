"""GGUF files of tiny Llama models, written with the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
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
