"""Tiny random checkpoints of architectures that transformers has, and their logits and greedy texts there and here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.batch import ForwardBatch, SlidingKV
from models.decoder import DecoderModel
from models.loader import load_model
from parallel.group import Group
from tests.support.rig import CPU, run_ranks

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PAGE = 8


def make_theirs(model_type: str, **settings: Any) -> Any:
    """Build a model of transformers in float32, with weights that make logits of order 1."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})
    torch.manual_seed(23)
    model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3 if weight.dim() == 1 else 1.5 * weight.shape[1] ** -0.5)
            if name.endswith("norm.weight"):
                weight.add_(1)
    return model.eval()


def load(
    path: Path, group: Group | None = None, ops: Ops = REFERENCE, max_positions: int | None = None
) -> DecoderModel:
    return load_model(
        path,
        dtype=torch.float32,
        device=CPU,
        group=group or Group.single(),
        progress=False,
        ops=ops,
        max_positions=max_positions,
    )


class OneRow:
    """One row of a model, whose pages are in reverse order, in both of its pools where it has two."""

    def __init__(self, model: DecoderModel, length: int) -> None:
        self._model, self.computed = model, 0
        count = -(-length // _PAGE)
        self._pages = torch.arange(count).flip(0)
        self._pool = model.make_pool(count, _PAGE)
        self._attention = model.ops.attention(_PAGE, model.head_dim)
        self._sliding: SlidingKV | None = None
        if model.num_sliding_layers:
            pool = model.make_sliding_pool(count, _PAGE)
            self._sliding = SlidingKV(pool, model.ops.attention(_PAGE, model.head_dim))

    def forward(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens. Returns the logits of each."""
        positions = torch.arange(self.computed, self.computed + len(tokens))
        slots = self._pages[positions // _PAGE] * _PAGE + positions % _PAGE
        self.computed += len(tokens)

        def seen(window: int) -> AttentionBatch:
            return AttentionBatch([len(tokens)], [self.computed], self._pages[None], window=window)

        sliding = None if self._sliding is None else slots
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=positions,
            slots=slots,
            sliding_slots=sliding,
            attention=seen(self._model.window),
            sliding_attention=None if sliding is None else seen(self._model.sliding_window),
            logit_index=torch.arange(len(tokens)),
        )
        with torch.inference_mode():
            return self._model.forward(batch, self._pool, self._attention, self._sliding)


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    tokens: list[int] = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist()
    return tokens


def logits_of(model: DecoderModel, tokens: Sequence[int], chunk: int = 19) -> Tensor:
    """Return the logits of all tokens, fed in chunks: [tokens, this rank's vocabulary]."""
    row = OneRow(model, len(tokens))
    return torch.cat([row.forward(tokens[first : first + chunk]) for first in range(0, len(tokens), chunk)])


def greedy(model: DecoderModel, tokens: Sequence[int], count: int) -> list[int]:
    """Continue a prompt by `count` tokens, whatever they are."""
    row, new = OneRow(model, len(tokens) + count), []
    fed = list(tokens)
    for _ in range(count):
        fed = [int(row.forward(fed)[-1].argmax())]
        new += fed
    return new


def their_greedy(theirs: Any, tokens: Sequence[int], count: int) -> list[int]:
    """Continue a prompt in transformers, by the whole text each time."""
    text = list(tokens)
    for _ in range(count):
        with torch.inference_mode():
            text.append(int(theirs(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(tokens) :]


def assert_same(theirs: Any, path: Path, length: int, ranks: Sequence[int] = (1, 2, 3)) -> None:
    """Save the model of transformers, and assert that ours has its logits, at every position of a prompt and on every
    number of ranks, and its greedy text."""
    theirs.save_pretrained(path)
    tokens = prompt(length)
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.1
    for size in ranks:
        found = run_ranks(size, lambda group: logits_of(load(path, group), tokens))
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-4)
    assert greedy(load(path), tokens, 6) == their_greedy(theirs, tokens, 6)
