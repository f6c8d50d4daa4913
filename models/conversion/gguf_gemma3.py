"""Text models of Gemma 3 in GGUF. config.json has what the file says, and the scale of scores, as llama.cpp derives it.
For all else that the file leaves out, llama.cpp and transformers have the same defaults."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from models.conversion.gguf_file import GGUFArchitecture, GGUFFile, GGUFModel, short_decimal
from models.conversion.piece_tokenizer import make_tokenizer
from models.files.json_values import Json, ModelError, short

_BASES = {"rope_theta": "rope.freq_base", "rope_local_base_freq": "rope.freq_base_swa"}
"""Names in GGUF of the bases of rotary embeddings, which files may leave out."""
_LAYERS_OF_27B = 62
"""Gemma 3 27B alone scales scores by hidden_size / num_attention_heads instead of head_dim. No key of the file says
so."""


def _read(file: GGUFFile) -> GGUFModel:
    return GGUFModel(_config(file), _tokenizer(file), file.field("tokenizer.chat_template"))


def _config(file: GGUFFile) -> Json:
    def value(name: str) -> int:
        return int(file.needed(f"gemma3.{name}"))

    head_dim, layers = value("attention.key_length"), value("block_count")
    heads, hidden_size = value("attention.head_count"), value("embedding_length")
    if (other := value("attention.value_length")) != head_dim:
        raise ModelError(f"values of {other} elements with keys of {head_dim} are not supported")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if file.field(f"gemma3.{name}"):
            raise ModelError(f"{name} is not supported")
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(file.needed("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": short_decimal(file.needed("gemma3.attention.layer_norm_rms_epsilon")),
        "query_pre_attn_scalar": hidden_size // heads if layers == _LAYERS_OF_27B else head_dim,
        "sliding_window": value("attention.sliding_window"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file.tensors),
    }
    config |= {key: short_decimal(base) for key, name in _BASES.items() if (base := file.field(f"gemma3.{name}"))}
    if scaling := _scaling(file):
        config["rope_scaling"] = scaling
    if (pattern := file.field("gemma3.attention.sliding_window_pattern")) is not None:
        if not isinstance(pattern, int):
            raise ModelError(f"sliding_window_pattern {short(pattern)} is not supported; a number is")
        config["sliding_window_pattern"] = pattern
    return config


def _scaling(file: GGUFFile) -> Json | None:
    """Return the scaling of the positions of full layers."""
    kind = file.field("gemma3.rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind != "linear":
        raise ModelError(f"rope scaling {kind!r} is not supported; linear is")
    return {"rope_type": "linear", "factor": short_decimal(file.needed("gemma3.rope.scaling.factor"))}


def _tokenizer(file: GGUFFile) -> Tokenizer:
    def value(name: str) -> Any:
        return file.field(f"tokenizer.ggml.{name}")

    if (kind := value("model")) != "llama":
        raise ModelError(f"its tokenizer is of kind {kind!r}, which is not supported for Gemma 3; llama is")
    for name in ("add_eos_token", "remove_extra_whitespaces"):
        if value(name):
            raise ModelError(f"tokenizer.ggml.{name} is not supported")
    if value("add_space_prefix") is not False:
        raise ModelError("a tokenizer that begins texts with a space is not supported for Gemma 3")
    needed = ("tokens", "scores", "token_type", "unknown_token_id")
    pieces, scores, kinds, _ = (file.needed(f"tokenizer.ggml.{name}") for name in needed)
    first = None
    if value("add_bos_token") is not False:
        file.needed("tokenizer.ggml.bos_token_id")
        first = file.checked_token("bos", len(pieces))
    return make_tokenizer(pieces, scores, kinds, unknown=file.token("unknown", len(pieces)), first=first)


GEMMA3 = GGUFArchitecture(
    read=_read,
    layer_parts={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k": "self_attn.k_proj",
        "attn_k_norm": "self_attn.k_norm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    norm_offset=1.0,
    end_tokens=("<end_of_turn>",),
)
