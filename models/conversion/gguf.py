"""Read a Llama GGUF file: weights, config, tokenizer. Needs the extra `convert`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers

from models.conversion.checkpoint import Checkpoint, Weight
from models.conversion.gguf_blocks import BLOCK_TYPES, read_blocks
from models.files.json_values import ModelError, describe_lfs_pointer, is_lfs_pointer
from models.weights import EMBEDDING, HEAD

INSTALL = "pip install 'magicdec[convert]'"
_PACKAGES = ("transformers", "gguf")
_CONFIG_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
)
_RESTORED_PRETOKENIZERS = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "gpt-2")
"""Values of tokenizer.ggml.pre for which transformers restores how to split text before merges."""
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Key of the number of heads, of parts whose rows are in GGUF's order: rotated pairs side by side, not half a head
apart."""


def check_packages() -> None:
    """Raise ModelError if a package is missing that reading GGUF needs."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"reading GGUF needs {package}: {INSTALL}")


def open_gguf(src: Path) -> Checkpoint:
    """Open a GGUF file. Weights are read one at a time. Matrices of BLOCK_TYPES keep their values, of other quantized
    types they are rounded to bfloat16.

    Raises ModelError: a package is missing; the file is broken, no Llama, or not convertible.
    """
    if is_lfs_pointer(src):
        raise ModelError(describe_lfs_pointer(src, "weights"))
    check_packages()
    os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise transformers queries the network for a local file
    import gguf
    import transformers

    try:
        reader = gguf.GGUFReader(src)
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(f"{src}: not a readable GGUF file: {error}") from error

    def field(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    if (kind := field("general.architecture")) != "llama":
        raise ModelError(f"{src}: architecture {kind!r} is not supported in GGUF; llama is")
    if field("llama.expert_count"):
        raise ModelError(f"{src}: a mixture of experts is not supported")
    scaling = field("llama.rope.scaling.type") not in (None, "none")
    if scaling or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise ModelError(f"{src}: GGUF does not say how its RoPE was scaled; convert the original weights")
    split = field("tokenizer.ggml.pre")
    if field("tokenizer.ggml.model") == "gpt2" and split not in ("smollm", *_RESTORED_PRETOKENIZERS):
        raise ModelError(f"{src}: its tokenizer is of unknown kind {split!r}; convert the original weights")

    where: dict[str, Any] = {"gguf_file": src.name, "local_files_only": True}
    front = transformers.AutoTokenizer.from_pretrained(src.parent, **where)
    settings = transformers.AutoConfig.from_pretrained(src.parent, **where).to_dict()
    if settings["model_type"] != "llama":
        raise ModelError(f"{src}: model type {settings['model_type']!r} is not supported in GGUF; llama is")
    tokens = field("tokenizer.ggml.tokens")
    data = json.loads(front.backend_tokenizer.to_str())
    # transformers adds special tokens of its own, with ids beyond the model's embedding
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < len(tokens)]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if split == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    bos = field("tokenizer.ggml.bos_token_id")
    adds_bos = field("tokenizer.ggml.add_bos_token")
    if adds_bos is not None and (tokenizer.encode("a").ids[0] == bos) != adds_bos:
        raise ModelError(f"{src}: its tokenizer's beginning-of-sequence token could not be carried over")
    ends = (field("tokenizer.ggml.eos_token_id"), field("tokenizer.ggml.eot_token_id"))
    eos = list(dict.fromkeys(token for token in ends if token is not None))
    if not eos:
        raise ModelError(f"{src}: names no end-of-sequence token")

    pad, unknown = field("tokenizer.ggml.padding_token_id"), field("tokenizer.ggml.unknown_token_id")
    special = {"bos_token_id": bos, "eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": pad}
    named = {"bos_token": bos, "eos_token": eos[0], "unk_token": unknown, "pad_token": pad}
    config = {key: value for key, value in settings.items() if key in _CONFIG_KEYS}
    config |= {"architectures": ["LlamaForCausalLM"], **special}
    # GGUF stores a float32: keep its short decimal.
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[token] for name, token in named.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": front.chat_template,
    }
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": _to_text(tokenizer_config),
        "generation_config.json": _to_text(special),
    }
    quantized = any(_has_codes(tensor) for tensor in reader.tensors)
    return Checkpoint(config, _read_weights(reader, config), texts, quantized)


def _has_codes(tensor: Any) -> bool:
    return tensor.tensor_type.name in BLOCK_TYPES and tensor.data.ndim == 2


def _read_weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Yield the weights with their names in transformers, and those of unknown names with their own."""
    for tensor in reader.tensors:
        weight, name = _read_weight(tensor), _OTHER_NAMES.get(tensor.name, tensor.name)
        if found := _LAYER_NAME.fullmatch(tensor.name):
            layer, part, kind = found.groups()
            if heads := config[_ROTATED[part]] if part in _ROTATED else None:
                weight = _in_halves(weight, heads)
            if part in _LAYER_PARTS:
                name = f"model.layers.{layer}.{_LAYER_PARTS[part]}.{kind}"
        yield name, weight


def _read_weight(tensor: Any) -> Weight:
    import gguf

    kind = tensor.tensor_type.name
    if _has_codes(tensor):
        return read_blocks(tensor.data, kind)
    try:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
    except NotImplementedError:
        raise ModelError(f"tensor {tensor.name} has unsupported type {kind}") from None
    return values.to({"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16))


def _in_halves(weight: Weight, heads: int) -> Weight:
    """Return the rows in the order of transformers; see _ROTATED. They stay where they do not divide into pairs."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        return weight
    order = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
    if isinstance(weight, torch.Tensor):
        return weight[order]
    mins = None if weight.mins is None else weight.mins[order]
    return replace(weight, codes=weight.codes[order], scales=weight.scales[order], mins=mins)


def _to_text(values: dict[str, Any]) -> str:
    present = {key: value for key, value in values.items() if value is not None}
    return json.dumps(present, indent=2, ensure_ascii=False) + "\n"
