"""Make a draft model from a target: keep some of its layers, and everything else unchanged. Nothing is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from models.batch import ForwardBatch
from models.config import ModelError, parse_config
from models.conversion.checkpoint import Checkpoint, NamedWeights, Weight, open_directory
from models.conversion.convert import check_destination, install
from models.llama import Llama

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PAGE = 16


def make_draft(src: Path, dst: Path, layers: Sequence[int], *, force: bool = False) -> None:
    """Write the directory `dst`: the model directory `src` with only these of its layers, in ascending order.

    Tensors are read one at a time. Raises ModelError: a layer that the model does not have, and the errors of
    models.conversion.convert.convert.
    """
    check_destination(src, dst, force)
    install(_with_layers(open_directory(src), layers), src, dst, force=force)


def evenly_spaced_layers(count: int, keep: int) -> list[int]:
    """Choose `keep` of `count` layers, evenly spaced, including the first and the last. Raises ModelError."""
    if not 1 <= keep <= count:
        raise ModelError(f"of {count} layers, 1 to {count} can be kept, not {keep}")
    return [round(i * (count - 1) / max(1, keep - 1)) for i in range(keep)]


def _with_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    count = parse_config(checkpoint.config).num_layers
    kept = sorted(set(layers))
    if not kept or not 0 <= kept[0] <= kept[-1] < count:
        raise ModelError(f"layers {', '.join(map(str, layers)) or 'none'}: the model has layers 0 to {count - 1}")
    config: dict[str, Any] = checkpoint.config | {"num_hidden_layers": len(kept)}
    if isinstance(kinds := config.get("layer_types"), list) and len(kinds) == count:
        config["layer_types"] = [kinds[i] for i in kept]
    return replace(checkpoint, config=config, weights=_renumbered(checkpoint.weights, kept))


def _renumbered(weights: NamedWeights, kept: list[int]) -> Iterator[tuple[str, Weight]]:
    place = {layer: i for i, layer in enumerate(kept)}
    for name, weight in weights:
        found = _LAYER.match(name)
        if found is None:
            yield name, weight
        elif (layer := int(found[1])) in place:
            yield f"model.layers.{place[layer]}.{name[found.end() :]}", weight


def choose_layers(
    model: Llama, texts: Sequence[Sequence[int]], keep: int, progress: Callable[[list[int], float], None]
) -> list[int]:
    """Choose `keep` layers of `model` by dropping one layer at a time: the one without which the predictions of the
    next tokens of `texts` have the smallest Kullback-Leibler divergence from the whole model's.

    Takes about (layers² - keep²) / 2 forwards over the texts. texts: all of one length, at most the model's maximum.
    progress: called after each dropped layer with the remaining layers, and the share of tokens on which their argmax
    agrees with the whole model's. Raises ModelError.
    """
    count = model.num_layers
    evenly_spaced_layers(count, keep)
    whole = _LayerSubsetRunner(model, texts)
    expected = torch.log_softmax(whole.logits(range(count)), -1)
    kept = list(range(count))
    while len(kept) > keep:
        tried = {}
        for left_out in kept:
            rest = [layer for layer in kept if layer != left_out]
            logits = whole.logits(rest)
            agree = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
            tried[left_out] = float(_divergence(expected, logits)), float(agree)
        least_useful = min(tried, key=lambda layer: tried[layer][0])
        kept.remove(least_useful)
        progress(kept, tried[least_useful][1])
    return kept


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence, averaged over tokens. Both [tokens, vocabulary]; expected: logprobs."""
    return (expected.exp() * (expected - torch.log_softmax(logits, -1))).sum(-1).mean()


class _LayerSubsetRunner:
    """Runs whole texts through some layers of a model."""

    def __init__(self, model: Llama, texts: Sequence[Sequence[int]]) -> None:
        length, rows = len(texts[0]), len(texts)
        width = -(-length // _PAGE)
        pages = torch.arange(rows * width).view(rows, width)
        position = torch.arange(length).repeat(rows)
        row = torch.arange(rows).repeat_interleave(length)
        tokens = rows * length
        device = model.device
        self._model = model
        self._attention = model.ops.attention(_PAGE, model.head_dim)
        self._pool = model.make_pool(rows * width, _PAGE)
        self._batch = ForwardBatch(
            token_ids=torch.tensor([token for text in texts for token in text], device=device),
            positions=position.to(device),
            slots=(pages[row, position // _PAGE] * _PAGE + position % _PAGE).to(device),
            attention=AttentionBatch([length] * rows, [length] * rows, pages.to(device)),
            logit_index=torch.arange(tokens, device=device),
        )

    @torch.inference_mode()
    def logits(self, layers: Sequence[int]) -> Tensor:
        """Run the texts through these layers. Returns [tokens, vocabulary]."""
        return self._model.with_layers(list(layers)).forward(self._batch, self._pool, self._attention)
