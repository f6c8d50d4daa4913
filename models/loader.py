"""Load a model's weights from safetensors, or fill them at random. Each rank reads only its own slices."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig, ModelError, read_config
from models.files.json_values import short
from models.files.special_tokens import token_numbers
from models.llama import Llama
from models.weights import FLOATS, NOT_FINITE, PROJECTION_BIAS, StoredTensors, find_tensors, is_finite, is_zero, opened
from parallel.group import Group
from parallel.layers import Placement
from parallel.module import WeightSlot

_TOKEN_IDS = ("bos_token_id", "eos_token_ids")
"""Fields of a ModelConfig that no forward depends on."""

log = logging.getLogger(__name__)


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
    like: ModelConfig | None = None,
) -> Llama:
    """Load a model directory: config.json and *.safetensors. tokenizer.json, if present, is only checked.

    Weights are converted to `dtype`. progress: whether to draw a bar on stderr. max_positions: see Llama. ops: the
    model's arithmetic. int8: round matrices to 8 bits. like: config of the model that this one replaces, which it must
    have too, except for token ids, and keeps. Pickled weights are never opened.
    Logs what it reads otherwise than it is written, and weights that are not finite: on rank 0, or on a rank that alone
    has that part.
    Raises ModelError: missing or broken files, a model that is not supported, tensors that are missing, unknown or of
    the wrong shape or type.
    """
    config, stored, warnings = _read(path, like)
    if group.rank == 0:
        for warning in warnings:
            log.warning("%s: %s", path, warning)
    model = Llama(config, Placement(group, dtype, device, ops), max_positions)
    slots = {slot.source: slot for slot in model.weight_slots()}
    stored = _wanted(path, set(slots), stored)
    total = sum(slot.tensor.nbytes for slot in slots.values())
    not_finite: list[str] = []
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Loading weights", file=sys.stderr, disable=not progress
    ) as bar:
        for file, tensors in stored.by_file():
            with opened(file) as checkpoint:
                for name, stored_name in tensors:
                    slot = slots[name]
                    finite = _fill(slot, checkpoint, file, stored_name)
                    if not finite and (group.rank == 0 or slot.tensor.shape != slot.full_shape):
                        not_finite.append(f"{file}: tensor {stored_name}")
                    bar.update(slot.tensor.nbytes)
    if not_finite:
        count = f" (the first of {len(not_finite)})" if len(not_finite) > 1 else ""
        log.warning(NOT_FINITE, not_finite[0], count, str(dtype).removeprefix("torch."))
    del slots
    model.prepare(int8)
    return model


def check_model(path: Path, like: ModelConfig, group: Group) -> None:
    """Raise ModelError if `load_model` would, for this rank. Reads no weights but those it has to compare."""
    config, stored, _ = _read(path, like)
    model = Llama(config, Placement(group, torch.float32, torch.device("meta")), max_positions=1)
    slots = {slot.source: slot for slot in model.weight_slots()}
    for file, tensors in _wanted(path, set(slots), stored).by_file():
        with opened(file) as checkpoint:
            for name, stored_name in tensors:
                _check(slots[name], checkpoint.get_slice(stored_name), file, stored_name)


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


def _read(path: Path, like: ModelConfig | None) -> tuple[ModelConfig, StoredTensors, list[str]]:
    """Read what a model directory holds: the config to use, the tensors, and warnings. like: see load_model."""
    config = read_config(path)
    stored = find_tensors(path, config.tie_word_embeddings)
    warnings = [*config.warnings, *stored.warnings, *_check_tokenizer(path, config.vocab_size)]
    config = replace(config, tie_word_embeddings=stored.tied)
    if like is None:
        return config, stored, warnings
    names = [field.name for field in fields(config) if field.compare and field.name not in _TOKEN_IDS]
    for name in names:
        if getattr(config, name) != getattr(like, name):
            raise ModelError(f"{path}: {name} is not that of the model in use")
    return like, stored, warnings


def _wanted(path: Path, wanted: set[str], stored: StoredTensors) -> StoredTensors:
    """Return the stored tensors without biases that are zero and not `wanted`. Raises ModelError unless these are
    exactly the wanted ones."""
    for file, tensors in stored.by_file():
        for name, stored_name in tensors:
            if name in wanted:
                continue
            if name.endswith(PROJECTION_BIAS):
                with opened(file) as checkpoint:
                    if is_zero(checkpoint.get_tensor(stored_name)):
                        continue
            raise ModelError(f"{file}: unexpected tensor {stored_name}")
    if missing := sorted(wanted - stored.sources.keys()):
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{path}: tensors missing from the weight files: {names}")
    return replace(stored, sources={name: source for name, source in stored.sources.items() if name in wanted})


def _fill(slot: WeightSlot, checkpoint: Any, file: Path, name: str) -> bool:
    """Fill a slot from the stored tensor `name`. Returns whether this rank's part of it is finite, in the slot's
    dtype."""
    source = checkpoint.get_slice(name)
    _check(slot, source, file, name)
    slot.tensor.copy_(source[slot.index])
    return is_finite(slot.tensor)


def _check(slot: WeightSlot, source: Any, file: Path, name: str) -> None:
    """Raise ModelError if a slot cannot be filled from the stored tensor `name`. source: its slice."""
    shape = tuple(source.get_shape())
    if shape != slot.full_shape:
        raise ModelError(f"{file}: tensor {name} has shape {list(shape)}, expected {list(slot.full_shape)}")
    if source.get_dtype() not in FLOATS:
        raise ModelError(f"{file}: tensor {name} has unsupported type {source.get_dtype()}")


def _check_tokenizer(path: Path, vocab_size: int) -> list[str]:
    """Return a warning if the tokenizer has ids that the model does not embed. Raises ModelError if it is broken."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        largest = max(token_numbers(file).values(), default=-1)
        if largest < vocab_size:
            return []
    except TypeError as error:
        raise ModelError(f"{file}: not a tokenizer: {error!r}") from error
    return [
        f"tokenizer.json has token ids up to {short(largest)}, but the model embeds {vocab_size} (vocab_size in "
        f"config.json); prompts with token ids from {vocab_size} on are refused"
    ]
