"""Make a draft model from a target: keep some of its layers, and everything else unchanged. Nothing is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from models.architectures import find_architecture
from models.batch import ForwardBatch, SlidingKV
from models.config import ModelError, parse_config
from models.conversion.checkpoint import Checkpoint, NamedWeights, Weight, open_directory
from models.conversion.convert import check_destination, install
from models.decoder import DecoderModel
from models.files.rope_config import FULL, SLIDING
from models.model_config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PAGE = 16


def make_draft(src: Path, dst: Path, layers: Sequence[int], *, force: bool = False) -> None:
    """Write the directory `dst`: the model directory `src` with only these of its layers, in ascending order.

    Tensors are read one at a time. Raises ModelError: a layer that the model does not have, layers of which some slide,
    and the errors of models.conversion.convert.convert.
    """
    check_destination(src, dst, force)
    draft = _with_layers(open_directory(src), layers)
    if (config := parse_config(draft.config)).mixes_layers:
        count = len(config.sliding_layers)
        raise ModelError(f"{count} of these layers slide, which a draft model's must not, unless all do")
    install(draft, src, dst, force=force)


def evenly_spaced_layers(count: int, keep: int) -> list[int]:
    """Choose `keep` of `count` layers, evenly spaced, including the first and the last. Raises ModelError."""
    if not 1 <= keep <= count:
        raise ModelError(f"of {count} layers, 1 to {count} can be kept, not {keep}")
    return [round(i * (count - 1) / max(1, keep - 1)) for i in range(keep)]


def check_any_layers(config: ModelConfig) -> None:
    """Raise ModelError if a draft model cannot have whichever layers are chosen: some of them slide."""
    if config.mixes_layers:
        full = config.attention_groups[0]
        raise ModelError(
            f"{len(config.sliding_layers)} of {config.num_layers} layers slide, which a draft model's must not; choose "
            f"among the others: --layers {','.join(map(str, full))}"
        )


_LAYER_KEYS: Mapping[str, Callable[[ModelConfig], Any]] = {
    "layer_types": lambda config: [SLIDING if i in config.sliding_layers else FULL for i in range(config.num_layers)],
    "no_rope_layers": lambda config: [int(i not in config.unrotated_layers) for i in range(config.num_layers)],
    "mlp_only_layers": lambda config: list(config.experts.dense_layers if config.experts else ()),
    "decoder_sparse_step": lambda config: 1,
}
"""What keys of config.json say that tell layers apart: lists, since patterns count from the first layer."""


def _with_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    whole = parse_config(checkpoint.config)
    kept = sorted(set(layers))
    if not kept or not 0 <= kept[0] <= kept[-1] < whole.num_layers:
        given = ", ".join(map(str, layers)) or "none"
        raise ModelError(f"layers {given}: the model has layers 0 to {whole.num_layers - 1}")
    config: dict[str, Any] = checkpoint.config | {"num_hidden_layers": len(kept)}
    wanted = whole.with_layers(kept)
    for key in find_architecture(checkpoint.config).layer_keys:
        config[key] = _LAYER_KEYS[key](wanted)
    if not wanted.sliding_layers and not config.get("layer_types"):
        config.pop("layer_types", None)
    if (found := parse_config(config)) != wanted:
        names = [each.name for each in fields(wanted) if getattr(found, each.name) != getattr(wanted, each.name)]
        raise ModelError(f"a model of only layers {kept} cannot be described: {', '.join(names)} would change")
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
    model: DecoderModel, texts: Sequence[Sequence[int]], keep: int, progress: Callable[[list[int], float], None]
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

    def __init__(self, model: DecoderModel, texts: Sequence[Sequence[int]]) -> None:
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
        self._sliding: SlidingKV[AttentionBackend] | None = None
        if model.num_sliding_layers:
            sliding_pool = model.make_sliding_pool(rows * width, _PAGE)
            self._sliding = SlidingKV(sliding_pool, model.ops.attention(_PAGE, model.head_dim))
        slots = (pages[row, position // _PAGE] * _PAGE + position % _PAGE).to(device)
        pages = pages.to(device)
        self._batch = ForwardBatch(
            token_ids=torch.tensor([token for text in texts for token in text], device=device),
            positions=position.to(device),
            slots=slots,
            sliding_slots=slots,
            attention=AttentionBatch([length] * rows, [length] * rows, pages, window=model.window),
            sliding_attention=AttentionBatch([length] * rows, [length] * rows, pages, window=model.sliding_window),
            logit_index=torch.arange(tokens, device=device),
        )

    @torch.inference_mode()
    def logits(self, layers: Sequence[int]) -> Tensor:
        """Run the texts through these layers. Returns [tokens, vocabulary]."""
        return self._model.with_layers(list(layers)).forward(self._batch, self._pool, self._attention, self._sliding)
