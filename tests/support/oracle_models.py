"""Tiny random checkpoints, written and computed by transformers, beside the same files as they are served."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.batch import ForwardBatch, SlidingKV
from models.decoder import DecoderModel
from models.loader import load_model
from parallel.group import Group

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAGE = 8


def write_checkpoint(
    directory: Path,
    config: Any,
    *,
    changes: dict[str, Any] | None = None,
    without: Sequence[str] = (),
    kind: Any = None,
) -> Any:
    """Write random weights of `config`, a transformers config, large enough for logits of order 1, so that an error
    would show. Returns the model that transformers reads from the directory, in float32.

    changes, without: keys that config.json then has instead. kind: the class that makes models of the config; None: as
    transformers chooses.
    """
    torch.manual_seed(17)
    model: Any = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model = model.float()
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.3)  # a norm stays near what it is at first: 0 or 1
            else:
                weight.normal_(0, 1.5 * weight.flatten(1).shape[1] ** -0.5)
            if "embed_tokens" in name:
                weight.mul_(0.5)
    model.save_pretrained(directory)
    file = directory / "config.json"
    keys = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(keys | (changes or {})))
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


def load_served(directory: Path, ops: Ops = REFERENCE) -> DecoderModel:
    """Load a directory in float32."""
    device, group = torch.device("cpu"), Group.single()
    return load_model(directory, dtype=torch.float32, device=device, group=group, progress=False, ops=ops)


def check_served(directory: Path, theirs: Any, *, ops: Ops = REFERENCE, length: int = 90, new_tokens: int = 8) -> None:
    """Check that the directory is served with the logits of `theirs`, at every position of a text that comes in chunks,
    and with its greedy tokens after it."""
    ours = load_served(directory, ops)
    draw = random.Random(5)
    text = [draw.randrange(3, VOCAB) for _ in range(length)]
    row = OracleRow(ours, length + new_tokens)
    parts, start = [], 0
    while start < length:
        count = min(draw.choice((1, 2, 7, 30)), length - start)
        parts.append(row.forward(text[start : start + count]))
        start += count
    made = [int(parts[-1][-1].argmax())]
    while len(made) < new_tokens:
        parts.append(row.forward(made[-1:]))
        made.append(int(parts[-1][-1].argmax()))
    with torch.inference_mode():
        expected = theirs(torch.tensor([text + made[:-1]]), use_cache=False).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-4)
    assert made == expected[length - 1 :].argmax(-1).tolist()


class OracleRow:
    """One row of a model over pools of its own, whose pages come in random order and are full of junk at first."""

    def __init__(self, model: DecoderModel, length: int) -> None:
        """length: largest number of tokens."""
        self.model, self.computed = model, 0
        count = -(-length // _PAGE)
        draw = torch.Generator().manual_seed(3)
        self._pages, self._sliding_pages = (torch.randperm(count, generator=draw)[None] for _ in range(2))
        self._pool = model.make_pool(count, _PAGE)
        self._pool._data.fill_(1e3)
        self._attention = self._backend()
        self._sliding: SlidingKV | None = None
        if model.num_sliding_layers:
            pool = model.make_sliding_pool(count, _PAGE)
            pool._data.fill_(1e3)
            self._sliding = SlidingKV(pool, self._backend())

    def _backend(self) -> AttentionBackend:
        return self.model.ops.attention(_PAGE, self.model.head_dim)

    def forward(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens. Returns their logits, [tokens, vocab_size]."""
        count, model = len(tokens), self.model
        positions = torch.arange(self.computed, self.computed + count)
        self.computed += count

        def slots(pages: Tensor) -> Tensor:
            return pages[0, positions // _PAGE] * _PAGE + positions % _PAGE

        def attention(pages: Tensor, window: int) -> AttentionBatch:
            return AttentionBatch([count], [self.computed], pages, window=window)

        slides = self._sliding is not None
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=positions,
            slots=slots(self._pages),
            sliding_slots=slots(self._sliding_pages) if slides else None,
            attention=attention(self._pages, model.window),
            sliding_attention=attention(self._sliding_pages, model.sliding_window) if slides else None,
            logit_index=torch.arange(count),
        )
        with torch.inference_mode():
            return model.forward(batch, self._pool, self._attention, self._sliding)
