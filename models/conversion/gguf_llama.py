"""Llama in GGUF: transformers reads config and tokenizer."""

from __future__ import annotations

import json
import os
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from models.conversion.gguf_file import GGUFArchitecture, GGUFFile, GGUFModel, short_decimal
from models.files.json_values import ModelError

_CONFIG_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
)
_RESTORED_PRETOKENIZERS = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "gpt-2")
"""Values of tokenizer.ggml.pre for which transformers restores how to split text before merges."""


def _read(file: GGUFFile) -> GGUFModel:
    if file.field("llama.expert_count"):
        raise ModelError("a mixture of experts is not supported")
    scaling = file.field("llama.rope.scaling.type") not in (None, "none")
    if scaling or any(tensor.name.startswith("rope_") for tensor in file.tensors):
        raise ModelError("GGUF does not say how its RoPE was scaled; convert the original weights")
    split = file.field("tokenizer.ggml.pre")
    if file.field("tokenizer.ggml.model") == "gpt2" and split not in ("smollm", *_RESTORED_PRETOKENIZERS):
        raise ModelError(f"its tokenizer is of unknown kind {split!r}; convert the original weights")
    os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise transformers queries the network for a local file
    import transformers

    where: dict[str, Any] = {"gguf_file": file.path.name, "local_files_only": True}
    front = transformers.AutoTokenizer.from_pretrained(file.path.parent, **where)
    settings = transformers.AutoConfig.from_pretrained(file.path.parent, **where).to_dict()
    if settings["model_type"] != "llama":
        raise ModelError(f"model type {settings['model_type']!r} is not supported in GGUF of architecture 'llama'")
    tokens = file.needed("tokenizer.ggml.tokens")
    data = json.loads(front.backend_tokenizer.to_str())
    # transformers adds special tokens of its own, with ids beyond the model's embedding
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < len(tokens)]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if split == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    config = {key: value for key, value in settings.items() if key in _CONFIG_KEYS}
    config |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": short_decimal(config["rms_norm_eps"])}
    return GGUFModel(config, tokenizer, front.chat_template)


LLAMA = GGUFArchitecture(
    read=_read,
    layer_parts={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    rotated={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
)
