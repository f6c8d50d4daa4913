"""Load a model's weights from safetensors, or fill them at random. Each rank reads only its own slices."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from kernels.weights.matrix import DenseMatrix, is_finite
from models.config import ModelConfig, ModelError, read_config
from models.decoder import DecoderModel
from models.files.json_values import short
from models.files.special_tokens import token_numbers
from models.files.tokenizer_source import read_tokenizer_source
from models.layouts.layout import Layout, find_layout
from models.layouts.stacked_experts import stacks_of
from models.layouts.weight_files import WeightFiles
from models.weights import NOT_FINITE, PROJECTION_BIAS, StoredTensors, find_tensors, is_zero
from parallel.group import Group
from parallel.matrix_layer import AS_STORED, Placement, WeightChoice
from parallel.module import MatrixSlot, WeightSlot

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
    weights: WeightChoice = AS_STORED,
    like: ModelConfig | None = None,
) -> DecoderModel:
    """Load a model directory: config.json and *.safetensors. tokenizer.json, if present, is only checked.

    dtype: of all that is not quantized. progress: whether to draw a bar on stderr. max_positions: see DecoderModel.
    ops: the model's arithmetic. weights: formats of its matrices. like: config of the model that this one replaces,
    which it must have too, except for token ids, and keeps. Pickled weights are never opened.
    Logs what it reads otherwise than it is written, and weights that are not finite: on rank 0, or on a rank that alone
    has that part.
    Raises ModelError: missing or broken files, a model that is not supported, tensors that are missing, unknown or of
    the wrong shape or type.
    """
    config, stored, warnings = _read(path, like)
    layout = find_layout(path)
    if group.rank == 0:
        for warning in warnings:
            log.warning("%s: %s", path, warning)
    model = DecoderModel(config, Placement(group, dtype, device, ops, weights), max_positions)
    storage, matrices = list(model.weight_slots()), list(model.matrix_slots())
    stored = _wanted(path, storage, matrices, layout, stored)
    total = sum(slot.tensor.nbytes for slot in storage) + sum(_part_bytes(slot, dtype) for slot in matrices)
    not_finite: dict[str, None] = {}
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", file=sys.stderr, disable=not progress)
    with bar, WeightFiles(stored) as files:

        def note(slot: WeightSlot | MatrixSlot, finite: bool, nbytes: int) -> None:
            is_part = any(part != slice(0, size) for part, size in zip(slot.index, slot.full_shape, strict=True))
            if not finite and (group.rank == 0 or is_part):
                not_finite[files[layout.tensors(slot.source, stored)[0]].where] = None
            bar.update(nbytes)

        for slot in storage:
            source = files[slot.source]
            source.check(slot.full_shape)
            values = source.read(*slot.index)
            slot.tensor.copy_(values.to(torch.promote_types(values.dtype, torch.float32)) + slot.offset)
            note(slot, is_finite(slot.tensor), slot.tensor.nbytes)
        for place in matrices:
            matrix = layout.read(files, place.source, place.full_shape, *place.reads)
            note(place, matrix.is_finite(dtype), _part_bytes(place, dtype))
            place.fill(matrix)
    if not_finite:
        count = f" (the first of {len(not_finite)})" if len(not_finite) > 1 else ""
        log.warning(NOT_FINITE, next(iter(not_finite)), count, str(dtype).removeprefix("torch."))
    del storage, matrices
    model.prepare()
    return model


def check_model(path: Path, like: ModelConfig, group: Group) -> None:
    """Raise ModelError if `load_model` would, for this rank. Reads no weights but those it has to compare."""
    config, stored, _ = _read(path, like)
    layout = find_layout(path)
    model = DecoderModel(config, Placement(group, torch.float32, torch.device("meta")), max_positions=1)
    storage, matrices = list(model.weight_slots()), list(model.matrix_slots())
    with WeightFiles(_wanted(path, storage, matrices, layout, stored)) as files:
        for slot in storage:
            files[slot.source].check(slot.full_shape)
        for place in matrices:
            layout.check(files, place.source, place.full_shape)


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    ops: Ops = REFERENCE,
    weights: WeightChoice = AS_STORED,
) -> DecoderModel:
    """Create a model with random weights, which depend on config, seed and dtype alone, not on device or rank count.

    Matrices preserve the scale of their input, norms are near 1, biases small.
    """
    model = DecoderModel(config, Placement(group, dtype, device, ops, weights))

    def drawn(source: str, shape: tuple[int, ...]) -> Tensor:
        # Seeded by name, and drawn whole before it is cut, so that weights do not depend on the split.
        key = hashlib.sha256(f"{seed}/{source}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        whole = torch.randn(shape, generator=generator)
        if source.endswith("norm.weight"):
            return whole.mul_(0.1).add_(1)
        return whole.mul_(0.1 if len(shape) == 1 else shape[1] ** -0.5)

    for slot in model.weight_slots():
        slot.tensor.copy_(drawn(slot.source, slot.full_shape)[slot.index])
    for place in model.matrix_slots():
        place.fill(DenseMatrix(drawn(place.source, place.full_shape)[place.reads].to(dtype)))
    model.prepare()
    return model


def _read(path: Path, like: ModelConfig | None) -> tuple[ModelConfig, StoredTensors, list[str]]:
    """Read what a model directory holds: the config to use, the tensors, and warnings. like: see load_model."""
    config = read_config(path)
    stored = find_tensors(path, config.tie_word_embeddings, stacks_of(config))
    warnings = [*config.warnings, *stored.warnings, *_check_tokenizer(path, config.vocab_size)]
    config = replace(config, tie_word_embeddings=stored.tied)
    if like is None:
        return config, stored, warnings
    names = [field.name for field in fields(config) if field.compare and field.name not in _TOKEN_IDS]
    for name in names:
        if getattr(config, name) != getattr(like, name):
            raise ModelError(f"{path}: {name} is not that of the model in use")
    return like, stored, warnings


def _wanted(
    path: Path, storage: list[WeightSlot], matrices: list[MatrixSlot], layout: Layout, stored: StoredTensors
) -> StoredTensors:
    """Return the stored tensors without biases that are zero and have no slot. Raises ModelError unless these are
    exactly those that fill the slots."""
    found = {slot.source: layout.tensors(slot.source, stored) for slot in matrices}
    found |= {slot.source: (slot.source,) for slot in storage if slot.source in stored.sources}
    wanted = {name for names in found.values() for name in names}
    with WeightFiles(stored) as files:
        for name, (file, stored_name) in stored.sources.items():
            if name in wanted or (name.endswith(PROJECTION_BIAS) and is_zero(files[name].read())):
                continue
            raise ModelError(f"{file}: unexpected tensor {stored_name}")
    sources = {*(slot.source for slot in storage), *(slot.source for slot in matrices)}
    if missing := sorted(source for source in sources if not found.get(source)):
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{path}: tensors missing from the weight files: {names}")
    return replace(stored, sources={name: source for name, source in stored.sources.items() if name in wanted})


def _part_bytes(slot: MatrixSlot, dtype: torch.dtype) -> int:
    """Count the bytes of this rank's part of a matrix in `dtype`."""
    rows, features = slot.index
    size: int = (rows.stop - rows.start) * (features.stop - features.start)
    return size * dtype.itemsize


def _check_tokenizer(path: Path, vocab_size: int) -> list[str]:
    """Return warnings of tokens that the tokenizer cannot have, and of ids that the model does not embed. Raises
    ModelError if it is broken."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        numbers, source = token_numbers(file), read_tokenizer_source(path)
        largest = max([*numbers.values(), *source.added], default=-1)
        is_embedded = largest < vocab_size
    except TypeError as error:
        raise ModelError(f"{file}: not a tokenizer: {error!r}") from error
    warnings = []
    if source.left_out:
        warnings.append(
            f"tokenizer_config.json lists the added token {short(source.left_out[0])}, which tokenizer.json does not "
            f"have, with an id that does not follow those of the others: it is plain text"
        )
    if is_embedded:
        return warnings
    return [
        *warnings,
        f"tokenizer.json has token ids up to {short(largest)}, but the model embeds {vocab_size} (vocab_size in "
        f"config.json); prompts with token ids from {vocab_size} on are refused",
    ]
