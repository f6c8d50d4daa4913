"""Load a model's weights from safetensors, or fill them at random. Each rank reads only its own slices."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig, ModelError, read_config
from models.files.special_tokens import token_numbers
from models.llama import Llama
from models.weights import opened, weight_files
from parallel.group import Group
from parallel.layers import Placement
from parallel.module import WeightSlot

log = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    progress: bool,
    max_positions: int | None = None,
    ops: Ops = REFERENCE,
    int8: bool = False,
) -> Llama:
    """Load a model directory: config.json and *.safetensors. tokenizer.json, if present, is only checked.

    Weights are converted to `dtype`. progress: whether to draw a bar on stderr. max_positions: see Llama. ops: the
    model's arithmetic. int8: round matrices to 8 bits. Pickled weights are never opened.
    Raises ModelError: missing or broken files, a model that is not supported, tensors that are missing, unknown or of
    the wrong shape or type, a tokenizer with more tokens than the model embeds.
    """
    config = read_config(path)
    _check_tokenizer(path, config.vocab_size)
    files = weight_files(path)
    model = Llama(config, Placement(group, dtype, device, ops), max_positions)
    slots = {slot.source: slot for slot in model.weight_slots()}
    wanted = set(slots)
    total = sum(slot.tensor.nbytes for slot in slots.values())
    head: tuple[Path, str] | None = None
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Loading weights", file=sys.stderr, disable=not progress
    ) as bar:
        for file in files:
            with opened(file) as checkpoint:
                for name in checkpoint.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                    if name in wanted:
                        _fill(slots[name], checkpoint, file)
                        wanted.remove(name)
                        bar.update(slots[name].tensor.nbytes)
                    elif name in slots:
                        raise ModelError(f"{file}: tensor {name} is also in another file")
                    elif name == _HEAD and config.tie_word_embeddings:
                        head = file, name
                    elif not name.endswith(".rotary_emb.inv_freq"):
                        raise ModelError(f"{file}: unexpected tensor {name}")
    if wanted:
        names = ", ".join(sorted(wanted)[:3]) + (f" and {len(wanted) - 3} more" if len(wanted) > 3 else "")
        raise ModelError(f"{path}: tensors missing from the weight files: {names}")
    if head is not None:
        _check_tied(slots[_EMBEDDING], *head)
    del slots
    model.prepare(int8)
    if group.rank == 0:
        for warning in config.warnings:
            log.warning("%s: %s", path, warning)
    return model


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    ops: Ops = REFERENCE,
    int8: bool = False,
) -> Llama:
    """Create a model with random weights, which depend on config, seed and dtype alone, not on device or rank count.

    Matrices preserve the scale of their input, norms are near 1, biases small.
    """
    model = Llama(config, Placement(group, dtype, device, ops))
    for slot in model.weight_slots():
        # Seeded by name, and drawn whole before it is cut, so that weights do not depend on the split.
        key = hashlib.sha256(f"{seed}/{slot.source}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        whole = torch.randn(slot.full_shape, generator=generator)
        if slot.source.endswith("norm.weight"):
            whole.mul_(0.1).add_(1)
        else:
            whole.mul_(0.1 if len(slot.full_shape) == 1 else slot.full_shape[1] ** -0.5)
        slot.tensor.copy_(whole[slot.index])
    model.prepare(int8)
    return model


def _fill(slot: WeightSlot, checkpoint: Any, file: Path) -> None:
    source = checkpoint.get_slice(slot.source)
    shape = tuple(source.get_shape())
    if shape != slot.full_shape:
        raise ModelError(f"{file}: tensor {slot.source} has shape {list(shape)}, expected {list(slot.full_shape)}")
    if source.get_dtype() not in _FLOATS:
        raise ModelError(f"{file}: tensor {slot.source} has unsupported type {source.get_dtype()}")
    slot.tensor.copy_(source[slot.index])


def _check_tied(embedding: WeightSlot, file: Path, name: str) -> None:
    """Check the head that some checkpoints store although it is tied; if it differs, config.json is wrong."""
    twin = WeightSlot(torch.empty_like(embedding.tensor), name, embedding.full_shape, embedding.index)
    with opened(file) as checkpoint:
        _fill(twin, checkpoint, file)
    if not torch.equal(twin.tensor, embedding.tensor):
        raise ModelError(f"{file}: {name} differs from {embedding.source}, but tie_word_embeddings is true")


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer with ids beyond the embedding, which would fail only when a prompt contains one."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        tokens = 1 + max(token_numbers(file).values(), default=-1)
    except TypeError as error:
        raise ModelError(f"{file}: not a tokenizer: {error!r}") from error
    if tokens > vocab_size:
        raise ModelError(f"{file}: {tokens} tokens, but the model embeds {vocab_size} (vocab_size in config.json)")
