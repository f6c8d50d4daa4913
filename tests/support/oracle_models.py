"""Tiny random checkpoints, written and computed by transformers, beside the same files as they are served."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
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
from tests.support.rig import CPU, run_ranks

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
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
            if "embed_tokens" in name:
                weight.mul_(0.5)
    model.save_pretrained(directory)
    file = directory / "config.json"
    keys = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(keys | (changes or {})))
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


def load_served(
    directory: Path, ops: Ops = REFERENCE, group: Group | None = None, max_positions: int | None = None
) -> DecoderModel:
    """Load a directory in float32. group: of the rank that it is loaded for; None: the only one. max_positions: see
    models.loader.load_model."""
    return load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        group=group or Group.single(),
        progress=False,
        ops=ops,
        max_positions=max_positions,
    )


def draw_text(length: int) -> list[int]:
    """Draw tokens, none of them special."""
    draw = random.Random(5)
    return [draw.randrange(3, VOCAB) for _ in range(length)]


def check_served(
    directory: Path,
    theirs: Any,
    *,
    ops: Ops = REFERENCE,
    ranks: Sequence[int] = (1,),
    length: int = 90,
    new_tokens: int = 8,
) -> None:
    """Check that the directory is served with the logits of `theirs`, at every position of a text that comes in chunks
    and of the greedy tokens that transformers generates after it, and that these have the largest logits here. Each is
    the greedy one after the same text, so both make the same text.

    ranks: numbers of ranks, each of which is checked. One rank is fed the new tokens one by one, others some of them.
    """
    text = draw_text(length)
    with torch.inference_mode():
        greedy = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
        whole: list[int] = theirs.generate(torch.tensor([text]), **greedy)[0].tolist()
        expected = theirs(torch.tensor([whole[:-1]]), use_cache=False).logits[0]
    assert whole[:length] == text
    assert len(whole) == length + new_tokens
    assert expected.std() > 0.5
    for size in ranks:
        singles = range(length, len(whole) - 1) if size == 1 else (length, length + 1)
        parts = _cut(whole[:-1], (1, 8, 38, *singles))
        found = torch.cat(run_ranks(size, partial(_logits, directory, ops, parts)), 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=partial("{} ranks: {}".format, size))
        assert found[length - 1 :].argmax(-1).tolist() == whole[length:], f"{size} ranks"


def _cut(text: list[int], starts: Sequence[int]) -> list[list[int]]:
    """Cut a text into parts, the first of which starts at 0."""
    return [text[start:stop] for start, stop in pairwise((0, *starts, len(text)))]


def _logits(directory: Path, ops: Ops, parts: Sequence[list[int]], group: Group) -> Tensor:
    """Feed the parts of a text. Returns the logits of all tokens, [tokens, vocab_size of the rank]."""
    row = OracleRow(load_served(directory, ops, group), sum(map(len, parts)))
    return torch.cat([row.forward(part) for part in parts])


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
        self._sliding: SlidingKV[AttentionBackend] | None = None
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
