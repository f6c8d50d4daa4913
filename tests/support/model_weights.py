"""Weights of models on the reference kernels, which keep them as they were."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.decoder import DecoderModel
from parallel.layers import VocabEmbedding
from parallel.matrix_layer import MatrixLayer
from parallel.module import Module


def tensors_of(model: DecoderModel) -> dict[str, Tensor]:
    """Return the storage of every weight, by its name in a checkpoint, or a copy where a checkpoint joins matrices.
    Matrices are dense."""
    found = {slot.source: slot.tensor for slot in model.weight_slots()}
    for layer in _layers(model):
        if isinstance(layer, VocabEmbedding):
            (slot,) = layer.matrix_slots()
            found[slot.source] = layer.weight
        elif isinstance(layer, MatrixLayer):
            slots = list(layer.matrix_slots())
            sizes = [slot.index[0].stop - slot.index[0].start for slot in slots]
            weight: Tensor = layer.linear.weight  # type: ignore[attr-defined]
            if slots:
                for slot, part in zip(slots, weight.split_with_sizes(sizes), strict=True):
                    joined = [found[slot.source]] if slot.source in found else []
                    found[slot.source] = torch.cat([*joined, part]) if joined else part
    return found


def _layers(module: Module) -> Iterator[Module]:
    for child in module.children():
        yield child
        yield from _layers(child)
