"""Safetensors files of a model directory, and the tensors in them. Pickled weights are never opened, only named in
errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.files.json_values import (
    ModelError,
    describe_lfs_pointer,
    is_lfs_pointer,
    read_json,
    read_json_if_any,
    short,
)
from models.files.nested_text import text_tensor
from models.layouts.stacked_experts import ExpertStacks, StackedPart

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that can be loaded, as safetensors names them."""
NOT_FINITE = "%s%s holds values that are NaN or infinite in %s: the text may be nonsense"
"""Warning: a tensor, how many others, dtype."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HEAD_MODULE = "lm_head."
_PLAIN_HEAD = (HEAD, f"{_HEAD_MODULE}bias")

PROJECTION_BIAS = "_proj.bias"
"""End of the name of a projection's bias."""

_PREFIX, _LAYERS = "model.", "layers."
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|masked_bias|(self_)?attn\.bias|attention\.bias)$")
"""Constants of a model's code that old versions of transformers store with its weights."""
_CACHE_SCALES = re.compile(r"\.((q|k|v|kv|prob)_(scale|zero_point)|[kv]_proj\.output_scale)$")
"""Scales of an 8-bit KV cache, which is not used here."""
_INPUT_SCALES = re.compile(r"\.((input|output)_(scale|zero_point|scale_ub|global_scale)|activation_scale)$")
"""Scales of inputs and outputs of products, which are not used here."""
_BLOCK = 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(path: Path) -> list[Path]:
    """List the model's safetensors files: those in the index, else model.safetensors, else all. Raises ModelError."""
    if weight_map := _weight_map(path):
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{path / _INDEX}: {short(name)} is not a file of this directory")
            if not (path / name).is_file():
                raise ModelError(f"{path / name}: not found, but listed in {_INDEX}")
        return [path / name for name in names]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        only = f", only pickled weights ({pickles[0]}), which run code when they are read" if pickles else ""
        raise ModelError(f"{path}: has no safetensors weights{only}")
    return files


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index's file name for each tensor; without an index, an empty mapping."""
    index = path / _INDEX
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map does not map tensors to files")
    return weight_map


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """Tensors of a model, as they are stored.

    sources: the file of each, and its name there, by the model's name for it; those of one file are adjacent.
    tied: whether the LM head uses the embedding's weight, which is then stored once. warnings: what the files contain
    that is not served as it is written. parts: of the tensors that are a part of one in a file, which part.
    """

    sources: dict[str, tuple[Path, str]]
    tied: bool
    warnings: tuple[str, ...]
    parts: Mapping[str, StackedPart] = field(default_factory=dict)

    def by_file(self) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
        """Yield each file with its tensors: the model's name and the file's."""
        for file, tensors in itertools.groupby(self.sources.items(), lambda item: item[1][0]):
            yield file, [(name, stored) for name, (_, stored) in tensors]


def find_tensors(path: Path, tied: bool, stacks: ExpertStacks | None = None) -> StoredTensors:
    """Find the tensors of the model directory `path`, whose config.json says whether embedding and LM head are `tied`,
    and which experts are stacked: each part of one is a tensor of its own.

    As in transformers, what is stored decides: two different weights are not tied; the only one serves for both. Names
    may lack the prefix `model.`, if all do. Of a model that reads more than text, those of its text model are found. Of
    a tensor in several files, the one in the file that the index names
    counts. Raises ModelError.
    """
    sources: dict[str, tuple[Path, str]] = {}
    has_scales, has_input_scales, weight_map = False, False, _weight_map(path)
    config = read_json_if_any(path / "config.json")
    for file in weight_files(path):
        with opened(file) as checkpoint:
            for stored in checkpoint.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                if (name := text_tensor(stored, config)) is None:
                    continue
                if name in sources:
                    indexed = weight_map.get(stored)
                    if indexed == sources[name][0].name:
                        continue
                    if indexed != file.name:
                        raise ModelError(f"{file}: tensor {stored} is also in another file")
                    del sources[name]  # so that the tensors of one file stay adjacent
                if _CACHE_SCALES.search(name):
                    has_scales = True
                elif _INPUT_SCALES.search(name):
                    has_input_scales = True
                elif not _BUFFERS.search(name):
                    sources[name] = file, stored
    if any(name.startswith(_LAYERS) for name in sources) and not any(name.startswith(_PREFIX) for name in sources):
        sources = {
            name if name.startswith(_HEAD_MODULE) else f"{_PREFIX}{name}": source for name, source in sources.items()
        }
    warnings = []
    if has_scales:
        warnings.append("scales of an 8-bit KV cache are not used: engine.cache.format says what the cache stores")
    if has_input_scales:
        warnings.append("scales of inputs are not used: products round inputs by their own range, or not at all")
    has_quantized_head = any(name.startswith(_HEAD_MODULE) for name in sources if name not in _PLAIN_HEAD)
    if tied and has_quantized_head:
        tied = False
        warnings.append("lm_head is quantized, so it is used, although tie_word_embeddings is true")
    elif tied and EMBEDDING not in sources and HEAD in sources:
        sources = {EMBEDDING if name == HEAD else name: source for name, source in sources.items()}
    elif tied and HEAD in sources:
        equal = _have_equal_values(sources[EMBEDDING], sources[HEAD])
        tied = bool(equal)
        if tied:
            del sources[HEAD]
        elif equal is not None:
            warnings.append(f"{HEAD} differs from {EMBEDDING}, so it is used, although tie_word_embeddings is true")
    elif not tied and EMBEDDING in sources and HEAD not in sources and not has_quantized_head:
        tied = True
        warnings.append(f"{HEAD} is not stored, so {EMBEDDING} is used, although tie_word_embeddings is false")
    found = StoredTensors(sources, tied, tuple(warnings))
    return found if stacks is None else _split_stacks(found, stacks)


def _split_stacks(stored: StoredTensors, stacks: ExpertStacks) -> StoredTensors:
    """Return each part of an expert in place of the stacks. Raises ModelError."""
    sources: dict[str, tuple[Path, str]] = {}
    parts: dict[str, StackedPart] = {}
    for file, tensors in stored.by_file():
        with opened(file) as checkpoint:
            for name, stored_name in tensors:
                try:
                    mine = dict(stacks.split(name, tuple(checkpoint.get_slice(stored_name).get_shape())))
                except ModelError as error:
                    raise ModelError(f"{file}: tensor {stored_name} {error}") from None
                parts |= mine
                for each in mine or (name,):
                    if each in sources:
                        raise ModelError(f"{file}: tensor {each} is stored twice, by itself and in a stack of experts")
                    sources[each] = file, stored_name
    return replace(stored, sources=sources, parts=parts)


def is_zero(tensor: torch.Tensor) -> bool:
    """Whether all values are 0. A bias of zeros adds nothing, so a model without biases may leave it out."""
    return not tensor.double().any()


def _have_equal_values(first: tuple[Path, str], second: tuple[Path, str]) -> bool | None:
    """Compare two stored matrices, a block of rows at a time, in a precision that holds both. Returns None if they are
    no matrices, have different shapes, or types that cannot be loaded."""
    with opened(first[0]) as one, opened(second[0]) as other:
        a, b = one.get_slice(first[1]), other.get_slice(second[1])
        if len(a.get_shape()) != 2 or a.get_shape() != b.get_shape():
            return None
        if not {a.get_dtype(), b.get_dtype()} <= set(FLOATS):
            return None
        for start in range(0, a.get_shape()[0], _BLOCK):
            x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
            dtype = torch.promote_types(x.dtype, y.dtype)
            if not torch.equal(x.to(dtype), y.to(dtype)):
                return False
    return True


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises ModelError if it is not a readable one."""
    try:
        if is_lfs_pointer(file):
            raise ModelError(describe_lfs_pointer(file, "weights"))
        with safe_open(str(file), framework="pt") as checkpoint:
            yield checkpoint
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error}") from error
