"""Write a model with weights of 4 bits: its decoder layers' matrices, rounded by GPTQ or to nearest."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import is_finite
from models.config import ModelError, parse_config
from models.conversion.checkpoint import open_directory
from models.conversion.convert import check_destination, served_config, write_directory
from models.decoder import DecoderModel
from models.layouts.stacked_experts import stacks_of
from models.layouts.weight_files import WeightFiles
from models.loader import check_model
from models.quantize.compressed_writer import compression_settings, stored_tensors
from models.quantize.layer_rounder import LayerRounder
from models.weights import EMBEDDING, StoredTensors, find_tensors
from parallel.group import Group
from parallel.matrix_layer import Placement


def quantize(
    src: Path,
    dst: Path,
    texts: Sequence[Sequence[int]],
    *,
    group_size: int,
    symmetric: bool,
    device: str = "auto",
    progress: bool = False,
    force: bool = False,
) -> None:
    """Write the directory `dst`: the dense model directory `src` in the layout of compressed-tensors, in bf16 but for
    the codes. Embedding, LM head and routers are not rounded.

    texts: token ids for GPTQ, all texts of one length; none: weights are rounded to nearest. One layer is in memory at
    a time, beside the texts' activations (LayerRounder). device: where that computes: auto, cpu or cuda. progress:
    whether to draw a bar on stderr. `dst` appears complete or not at all; `force` replaces an existing one.
    Raises ModelError: the source cannot be read or served, or is quantized already; groups do not fit its matrices; the
    destination exists or cannot be written.
    """
    check_destination(src, dst, force)
    if not src.is_dir():
        raise ModelError(f"{src}: not a directory; `magicdec convert` makes one of a .gguf file")
    place = _device(device)
    checkpoint = open_directory(src)
    if checkpoint.quantized:
        raise ModelError(f"{src}: has quantized weights, which are served as they are; quantize the original")
    config = parse_config(checkpoint.config)
    check_model(src, config, Group.single())
    int4 = Int4Format(group_size, symmetric, scale_dtype=torch.bfloat16)
    stored = find_tensors(src, config.tie_word_embeddings, stacks_of(config))
    # The model without its weights.
    model = DecoderModel(config, Placement(Group.single(), torch.float32, torch.device("meta")), max_positions=1)
    tensors = _quantized(model, stored, int4, texts, place, progress)
    dense = [slot.source.removesuffix(".weight") for slot in model.matrix_slots() if not slot.rounds]
    settings = served_config(checkpoint.config, compression_settings(int4, dense))
    write_directory(settings, tensors, checkpoint.texts, src, dst, force=force)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: no CUDA device is visible")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _quantized(
    model: DecoderModel,
    stored: StoredTensors,
    int4: Int4Format,
    texts: Sequence[Sequence[int]],
    device: torch.device,
    progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the quantized model."""
    config, slots = model.config, list(model.matrix_slots())
    others = dict.fromkeys(slot.source for slot in model.weight_slots())
    layers = [f"model.layers.{number}." for number in range(config.num_layers)]
    matrices = dict.fromkeys(slot.source for slot in slots)
    rounded = {slot.source: slot.full_shape for slot in slots if slot.rounds and slot.source.startswith(tuple(layers))}
    for name, (_, features) in rounded.items():
        if features % int4.group_size:
            raise ModelError(f"tensor {name} has {features} features, no multiple of --group-size {int4.group_size}")
    with WeightFiles(stored) as files:

        def read(name: str) -> Tensor:
            tensor = files[name].read().to(torch.bfloat16)
            if not is_finite(tensor):
                raise ModelError(f"tensor {name} holds values that are NaN or infinite in bfloat16")
            return tensor

        for name in (*(name for name in matrices if name not in rounded), *others):
            yield name, read(name)
        rounder = LayerRounder(config, int4, texts, read(EMBEDDING), device) if texts else None
        bar = tqdm(layers, unit=" layers", desc="Quantizing", file=sys.stderr, disable=not progress)
        for number, prefix in enumerate(bar):
            if rounder is not None:
                made = rounder.round_layer(number, read)
            else:
                mine = [name for name in rounded if name.startswith(prefix)]
                made = {name: int4.quantize(read(name).to(device)).to(torch.device("cpu")) for name in mine}
            for name, matrix in made.items():
                yield from stored_tensors(name, matrix)
