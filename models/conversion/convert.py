"""Convert a checkpoint into the one format that is served.

The format is a Hugging Face style directory: config.json, model*.safetensors (tied embeddings stored once),
tokenizer.json, tokenizer_config.json (special tokens, chat template), generation_config.json. Weights are bf16, or, if
the source has quantized matrices, those as they are (models.layouts.group_layout) and all others in their own type.
Neither reading it nor converting to it runs code from the checkpoint: pickled weights are refused.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from kernels.weights.matrix import QuantizedMatrix, is_finite
from models.config import ModelError, parse_config
from models.conversion.checkpoint import Checkpoint, NamedTensors, open_directory
from models.conversion.gguf import open_gguf
from models.decoder import DecoderModel
from models.files.json_values import Json
from models.files.rope_config import FULL, SLIDING, has_own_rope
from models.layouts.group_layout import SETTINGS, stored_tensors
from models.weights import HEAD, NOT_FINITE, PROJECTION_BIAS, is_zero
from parallel.group import Group
from parallel.matrix_layer import Placement

log = logging.getLogger(__name__)

SHARD_BYTES = 4_000_000_000
Weights = Literal["stored", "dense"]
"""Quantized matrices of the source: stored: as they are; dense: as their values in bf16."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def convert(
    src: Path, dst: Path, *, force: bool = False, shard_bytes: int = SHARD_BYTES, weights: Weights = "stored"
) -> None:
    """Convert `src`, a .gguf file or a directory with safetensors weights, into the directory `dst`.

    `dst` appears complete or not at all; `force` replaces an existing one. A weight file holds at most `shard_bytes` of
    tensors, or one larger tensor. Needs no network.
    Raises ModelError: the source cannot be read or served, the destination exists or cannot be written.
    """
    check_destination(src, dst, force)
    checkpoint = _open(src)
    if weights == "dense":
        checkpoint = replace(checkpoint, quantized=False)
    install(checkpoint, src, dst, force=force, shard_bytes=shard_bytes)


def install(
    checkpoint: Checkpoint, src: Path, dst: Path, *, force: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `checkpoint`, which was read from `src`, to the directory `dst`: all in bf16, unless it is marked as
    quantized. See convert."""
    try:
        config = served_config(checkpoint.config, SETTINGS if checkpoint.quantized else None)
    except ModelError as error:
        raise ModelError(f"{src}: {error}") from None
    write_directory(config, _checked(checkpoint, src), checkpoint.texts, src, dst, force=force, shard_bytes=shard_bytes)


def write_directory(
    config: Json,
    tensors: NamedTensors,
    texts: dict[str, str],
    src: Path,
    dst: Path,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what was made from `src` to the directory `dst`. See convert."""
    try:
        part = dst.parent / f".{dst.name}.{secrets.token_hex(4)}.part"
        part.mkdir(parents=True)
        try:
            write_weights(tensors, part, shard_bytes)
            for name, text in texts.items():
                (part / name).parent.mkdir(exist_ok=True)
                (part / name).write_text(text, encoding="utf-8")
            _write_json(part / "config.json", config)
            _replace(part, dst, force)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except ModelError as error:
        raise ModelError(f"{src}: {error}") from None
    except OSError as error:
        raise ModelError(f"{dst}: cannot be written: {error.strerror or error}") from error


def _open(src: Path) -> Checkpoint:
    if src.is_dir():
        return open_directory(src)
    if not src.is_file():
        raise ModelError(f"{src}: no such file or directory")
    if src.suffix != ".gguf":
        raise ModelError(f"{src}: neither a .gguf file nor a directory with safetensors weights")
    return open_gguf(src)


def check_destination(src: Path, dst: Path, force: bool) -> None:
    """Check that `src` can be converted into `dst`. Raises ModelError if `dst` may not be replaced."""
    source, target = src.resolve(), dst.resolve()
    if target == source or target in source.parents:
        raise ModelError(f"{dst}: holds the source")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise ModelError(f"{dst}: exists and is not a directory")
    if dst.is_dir() and any(dst.iterdir()) and not force:
        raise ModelError(f"{dst}: exists and is not empty (--force replaces it)")


def _checked(checkpoint: Checkpoint, src: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors to store. Logs, at the end, weights that are not finite in bf16. Raises ModelError unless they
    are exactly the model's, with its shapes."""
    config = parse_config(checkpoint.config)
    model = DecoderModel(config, Placement(Group.single(), torch.bfloat16, torch.device("meta")), max_positions=1)
    missing: dict[str, tuple[int, ...]] = {slot.source: slot.full_shape for slot in model.weight_slots()}
    missing |= {slot.source: slot.full_shape for slot in model.matrix_slots()}
    not_finite: list[str] = []
    for name, weight in checkpoint.weights:
        if config.tie_word_embeddings and name == HEAD:
            continue
        if (shape := missing.pop(name, None)) is None:
            if name.endswith(PROJECTION_BIAS) and isinstance(weight, torch.Tensor) and is_zero(weight):
                continue
            raise ModelError(f"unexpected tensor {name}")
        if tuple(weight.shape) != shape:
            raise ModelError(f"tensor {name} has shape {list(weight.shape)}, expected {list(shape)}")
        if isinstance(weight, QuantizedMatrix):
            rounded, parts = weight.dense(torch.bfloat16), stored_tensors(name, weight)
        elif weight.dtype in _FLOATS:
            rounded, parts = weight.to(torch.bfloat16), iter([(name, weight.contiguous())])
        else:
            raise ModelError(f"tensor {name} is {weight.dtype}; only unquantized weights can be converted")
        if not is_finite(rounded):
            not_finite.append(f"{src}: tensor {name}")
        if checkpoint.quantized:
            yield from parts
        else:
            yield name, rounded.contiguous()
    if not_finite:
        count = f" (the first of {len(not_finite)})" if len(not_finite) > 1 else ""
        log.warning(NOT_FINITE, not_finite[0], count, "bfloat16")
    if missing:
        raise ModelError(f"{len(missing)} tensors are missing, among them {min(missing)}")


def write_weights(tensors: NamedTensors, directory: Path, shard_bytes: int) -> None:
    """Write model.safetensors, or above shard_bytes several model-0000i-of-0000n.safetensors and an index."""
    shards: list[list[str]] = []
    batch: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        file = directory / f"{len(shards)}.part"
        save_file(batch, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors creates it readable by its owner only
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        batch[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.part").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


def served_config(config: Json, quantization: Json | None = None) -> Json:
    """Adapt `config` to bf16 weights, or those that `quantization` describes, and duplicate RoPE under the older keys,
    for readers that support only those."""
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if quantization is not None:
        config["quantization_config"] = quantization
    rope = config.get("rope_parameters")
    if rope and not config.get("rope_scaling"):
        if has_own_rope(config, FULL):
            rope = rope[FULL]
        if has_own_rope(config, SLIDING):
            config["rope_local_base_freq"] = config["rope_parameters"][SLIDING].get("rope_theta")
        scaled = rope.get("rope_type", "default") != "default"
        config["rope_theta"] = parse_config(config).rope.theta
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
    return config


def _replace(part: Path, dst: Path, force: bool) -> None:
    """Move `part` to `dst`, which is absent, an empty directory, or with `force` any directory."""
    old = part.with_suffix(".old")
    if force and dst.is_dir():
        dst.rename(old)
    try:
        part.rename(dst)
    except OSError:
        if old.is_dir():
            old.rename(dst)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
