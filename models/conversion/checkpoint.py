"""Checkpoint to convert, independent of its file format, and a reader for Hugging Face style directories."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.weights.matrix import QuantizedMatrix
from models.config import parse_config
from models.files.json_values import ModelError, describe_lfs_pointer, is_lfs_pointer, read_json
from models.files.nested_text import text_model
from models.layouts.dense_layout import DENSE
from models.layouts.group_layout import GroupLayout
from models.layouts.layout import parse_layout
from models.layouts.stacked_experts import stacks_of
from models.layouts.weight_files import WeightFiles
from models.weights import StoredTensors, find_tensors

log = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Weight = torch.Tensor | QuantizedMatrix
NamedWeights = Iterable[tuple[str, Weight]]

_PASSED_ON = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "LICENSE"),
)
_TEMPLATES = "additional_chat_templates"
_TIED = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in Hugging Face terms.

    config: Hugging Face keys.
    weights: (Hugging Face name, tensor or matrix), read one at a time, in any order and dtype; can be iterated once.
    With tied embeddings, the LM head's may be left out.
    texts: name and content of the accompanying files: tokenizer.json and the like, not config.json.
    quantized: whether some weights are quantized matrices.
    """

    config: dict[str, Any]
    weights: NamedWeights
    texts: dict[str, str]
    quantized: bool = False


def open_directory(src: Path) -> Checkpoint:
    """Open a directory; of a model that reads more than text, its text model. Its config says of tied embeddings what
    the stored tensors say (models.weights).

    Raises ModelError: config.json, tokenizer.json or safetensors weights are missing or broken.
    """
    gguf = min((path.name for path in src.glob("*.gguf")), default=None)
    hint = f"; to convert {gguf}, name that file" if gguf else ""
    for name in ("config.json", "tokenizer.json"):
        if not (src / name).is_file():
            raise ModelError(f"{src}: has no {name}{hint}")
    names = [*_PASSED_ON, *(f"{_TEMPLATES}/{path.name}" for path in sorted((src / _TEMPLATES).glob("*.jinja")))]
    texts = {}
    try:
        for name in names:
            if (file := src / name).is_file():
                if is_lfs_pointer(file):
                    raise ModelError(describe_lfs_pointer(file, "the file itself"))
                texts[name] = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{src}: {error}") from error
    config = read_json(src / "config.json")
    try:
        config = text_model(config)
        layout = parse_layout(config)
    except ModelError as error:
        raise ModelError(f"{src}: {error}") from None
    own = layout if isinstance(layout, GroupLayout) else None
    if layout is not DENSE and own is None:
        raise ModelError(f"{src}: has quantized weights, which are served as they are")
    try:
        parsed = parse_config(config)
    except ModelError as error:
        raise ModelError(f"{src}: {error}") from None
    tied = parsed.tie_word_embeddings
    stored = find_tensors(src, tied, stacks_of(parsed))
    for warning in stored.warnings:
        log.warning("%s: %s", src, warning)
    if stored.tied != tied:
        config[_TIED] = stored.tied
    return Checkpoint(config, _read_tensors(stored) if own is None else own.read_all(stored), texts, own is not None)


def _read_tensors(stored: StoredTensors) -> Iterator[tuple[str, torch.Tensor]]:
    with WeightFiles(stored) as files:
        for name in stored.sources:
            yield name, files[name].read()
