"""Read a GGUF file of an architecture of ARCHITECTURES: weights, config, tokenizer. Needs the extra `convert`."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.conversion.checkpoint import Checkpoint, Weight
from models.conversion.gguf_blocks import BLOCK_TYPES, read_blocks
from models.conversion.gguf_file import GGUFArchitecture, GGUFFile
from models.conversion.gguf_gemma3 import GEMMA3
from models.conversion.gguf_llama import LLAMA
from models.files.json_values import Json, ModelError, describe_lfs_pointer, is_lfs_pointer, short
from models.weights import EMBEDDING, HEAD

ARCHITECTURES: Mapping[str, GGUFArchitecture] = {"llama": LLAMA, "gemma3": GEMMA3}
"""By GGUF's general.architecture."""
INSTALL = "pip install 'magicdec[convert]'"
_PACKAGES = ("transformers", "gguf")
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OTHER_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_NORM = "norm.weight"


def check_packages() -> None:
    """Raise ModelError if a package is missing that reading GGUF needs."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"reading GGUF needs {package}: {INSTALL}")


def open_gguf(src: Path) -> Checkpoint:
    """Open a GGUF file. Weights are read one at a time. Matrices of BLOCK_TYPES keep their values, of other quantized
    types they are rounded to bfloat16.

    Raises ModelError: a package is missing; the file is broken, of another architecture, or not convertible.
    """
    if is_lfs_pointer(src):
        raise ModelError(describe_lfs_pointer(src, "weights"))
    check_packages()
    try:
        return _open(GGUFFile(src))
    except ModelError as error:
        raise ModelError(f"{src}: {error}") from error
    except Exception as error:  # values of other types than they should have, and whatever libraries raise for them
        raise ModelError(f"{src}: not a readable GGUF file: {short(error)}") from error


def _open(file: GGUFFile) -> Checkpoint:
    kind = file.field("general.architecture")
    if not isinstance(kind, str) or (architecture := ARCHITECTURES.get(kind)) is None:
        raise ModelError(f"architecture {short(kind)} is not supported in GGUF; these are: {', '.join(ARCHITECTURES)}")
    model = architecture.read(file)
    tokenizer, tokens = model.tokenizer, file.needed("tokenizer.ggml.tokens")
    bos, end = (file.checked_token(name, len(tokens)) for name in ("bos", "eos"))
    adds_bos = file.field("tokenizer.ggml.add_bos_token")
    if adds_bos is not None and (tokenizer.encode("a").ids[0] == bos) != adds_bos:
        raise ModelError("its tokenizer's beginning-of-sequence token could not be carried over")
    ends = [end, file.token("eot", len(tokens))]
    ends += [tokenizer.token_to_id(name) for name in architecture.end_tokens]
    eos = list(dict.fromkeys(token for token in ends if token is not None))
    if not eos:
        raise ModelError("names no end-of-sequence token")
    pad, unknown = (file.token(name, len(tokens)) for name in ("padding", "unknown"))
    special = {"bos_token_id": bos, "eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": pad}
    named = {"bos_token": bos, "eos_token": eos[0], "unk_token": unknown, "pad_token": pad}
    config = {**model.config, **special}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[token] for name, token in named.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": model.chat_template,
    }
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": _to_text(tokenizer_config),
        "generation_config.json": _to_text(special),
    }
    quantized = any(_has_codes(tensor) for tensor in file.tensors)
    return Checkpoint(config, _read_weights(file.tensors, config, architecture), texts, quantized)


def _has_codes(tensor: Any) -> bool:
    return tensor.tensor_type.name in BLOCK_TYPES and tensor.data.ndim == 2


def _read_weights(tensors: list[Any], config: Json, architecture: GGUFArchitecture) -> Iterator[tuple[str, Weight]]:
    """Yield the weights with their names in transformers, and those of unknown names with their own."""
    parts, rotated = architecture.layer_parts, architecture.rotated
    for tensor in tensors:
        weight, name = _read_weight(tensor), _OTHER_NAMES.get(tensor.name, tensor.name)
        if isinstance(weight, torch.Tensor) and architecture.norm_offset and tensor.name.endswith(_NORM):
            weight = weight.float() - architecture.norm_offset
        if found := _LAYER_NAME.fullmatch(tensor.name):
            layer, part, kind = found.groups()
            if part in rotated:
                weight = _in_halves(weight, config[rotated[part]])
            if part in parts:
                name = f"model.layers.{layer}.{parts[part]}.{kind}"
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
    """Return the rows in the order of transformers; see GGUFArchitecture. Those that make no pairs stay."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        return weight
    order = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
    if isinstance(weight, torch.Tensor):
        return weight[order]
    mins = None if weight.mins is None else weight.mins[order]
    return replace(weight, codes=weight.codes[order], scales=weight.scales[order], mins=mins)


def _to_text(values: Json) -> str:
    present = {key: value for key, value in values.items() if value is not None}
    return json.dumps(present, indent=2, ensure_ascii=False) + "\n"
