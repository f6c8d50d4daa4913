"""Measure what KV of few bits costs: perplexity of long texts, greedy texts that differ, and the error of each layer.

    python -m bench.offline.kv_quality --text book.txt --length 2048 7500
    python -m bench.offline.kv_quality --text book.txt --formats dense int8 --layers

Formats are values of engine.cache.format; int4x2:draft is a target that reads what drafts of int4x2 read. The first one
is what the others are compared with. Tokens of the first half of each text count as context only.

    python -m bench.offline.kv_quality --text book.txt --length 2048 --passages 1 --layers --think 0 0.4

The errors of the last queries of each forward, with a share of the keys' channels left out (ThinK, arXiv 2407.21018).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.corpus import passages, read_text
from engine.llm import LLM
from engine.params import SamplingParams
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.cpu.library import READABLE_KV
from kernels.kv.kv_bits import KV_BITS, SEALED_GROUP
from kernels.kv.kv_formats import KV_FORMATS
from kernels.kv.kv_pool import LayerKV
from models.default import resolve_model
from models.tokenizer import Tokenizer

_DRAFT = ":draft"
_RECENT = 32
"""Last queries that choose channels, and last keys that keep all (ThinK, section 4)."""
Texts = Sequence[Sequence[int]]


def load(model: str, dtype: str, kv_format: str) -> LLM:
    """Load an engine without drafts, whose target reads KV of a format."""
    name = kv_format.removesuffix(_DRAFT)
    cache = {"format": name, "prefix": False}
    llm = LLM(model, dtype=dtype, device="cpu", weights="dense", speculation={"gamma": 0}, cache=cache)
    if kv_format != name:
        worker = llm.engine._worker
        worker._target = replace(worker._target, pool=worker._target.pool.drafting())
    return llm


def logprobs(llm: LLM, texts: Texts) -> Tensor:
    """Return the log-probabilities of the second half of each text: [tokens] float32."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    found = []
    for completion in llm.generate(texts, [params] * len(texts)):
        assert completion.prompt_logprobs is not None
        scores = [each.logprob for each in completion.prompt_logprobs]
        found += scores[len(scores) // 2 :]
    return torch.tensor(found)


def greedy(llm: LLM, texts: Texts, new_tokens: int) -> list[list[int]]:
    """Continue each text greedily."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return [completion.token_ids for completion in llm.generate(texts, [params] * len(texts))]


def describe(scores: Tensor, first: Tensor, answers: list[list[int]], own: list[list[int]]) -> str:
    """Describe one format beside the first one: scores and texts of both."""
    loss = first - scores
    error = float(loss.std()) / len(loss) ** 0.5
    same = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(own, answers, strict=True)
    ]
    whole = sum(count == len(answer) for count, answer in zip(same, answers, strict=True))
    return (
        f"perplexity {math.exp(-float(scores.mean())):.3f} over {len(scores)} tokens, {float(loss.mean()):.4f} ± "
        f"{error:.4f} nats per token more; {whole} of {len(answers)} greedy texts the same, others for "
        f"{median(same):.0f} tokens (median)"
    )


class ComparingAttention:
    """Attention over exact KV, which also attends to the same KV in another format. Own groups of queries count as any
    other: the error is at most that of a sealing target.

    errors: by layer, the sums of squares of differences, and of results.
    """

    def __init__(self, inner: AttentionBackend, kv_format: str, think: float | None = None) -> None:
        """think: share of the keys' channels that the last queries do not read, see without_weak_channels; None: all
        queries are compared, and read all."""
        self._inner, self._format, self._think = inner, KV_FORMATS[kv_format.removesuffix(_DRAFT)], think
        self._drafts = kv_format.endswith(_DRAFT)
        self.errors: dict[int, tuple[float, float]] = {}

    def plan(self, batch: AttentionBatch) -> None:
        self._batch = batch
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See PlannedAttention.run."""
        k, v = self._format.rounded(layer.k, layer.v, drafts=self._drafts)
        out, lse = self._inner.run(layer, q, scale)
        if self._think is not None:
            pages, length = self._batch.pages[0], self._batch.kv_lengths[0]
            k[pages] = without_weak_channels(layer.k[pages], k[pages], q, length, self._think)
        other, _ = self._inner.run(replace(layer, k=k, v=v), q, scale)
        compared = slice(None) if self._think is None else slice(-_RECENT, None)
        difference, exact = (other - out)[compared].float(), out[compared].float()
        squares = float(difference.square().sum()), float(exact.square().sum())
        before = self.errors.get(layer.index, (0.0, 0.0))
        self.errors[layer.index] = before[0] + squares[0], before[1] + squares[1]
        return out, lse


def without_weak_channels(exact: Tensor, keys: Tensor, q: Tensor, length: int, share: float) -> Tensor:
    """Set to zero the channels of keys that matter least to the last queries (ThinK, equation 3): those with the
    smallest product of the norms of queries and keys. The last keys stay whole.

    exact, keys: [pages, kv_heads, page_size, head_dim], one row's, as written and as read. q: [n, heads, head_dim].
    length: number of keys. share: of the channels of each KV head.
    """
    by_head = exact.transpose(0, 1).flatten(1, 2)[:, :length].float()  # [kv_heads, length, head_dim]
    recent = q[-_RECENT:].float()
    queries = recent.reshape(len(recent), len(by_head), -1, recent.shape[-1])  # [n, kv_heads, group, head_dim]
    scores = queries.square().sum((0, 2)).sqrt() * by_head.square().sum(1).sqrt()
    weak = scores.argsort(-1)[:, : int(share * scores.shape[-1])]
    kept = keys.transpose(0, 1).flatten(1, 2).clone()
    index = weak[:, None].expand(-1, max(0, length - _RECENT), -1)
    kept[:, : max(0, length - _RECENT)] = kept[:, : max(0, length - _RECENT)].scatter(2, index, 0)
    return kept.view(len(kept), *keys.shape[0:1], *keys.shape[2:]).transpose(0, 1)


def layer_errors(model: str, dtype: str, kv_format: str, texts: Texts, think: float | None = None) -> list[float]:
    """Return, by layer, the error of attention's results over some texts, relative to their size. think: see
    ComparingAttention; one text after another."""
    pages = sum(-(-len(text) // SEALED_GROUP) + 1 for text in texts)
    cache = {"page_size": SEALED_GROUP, "prefix": False, "num_pages": pages}
    length = max(map(len, texts)) + 1
    with LLM(
        model, dtype=dtype, device="cpu", weights="dense", speculation={"gamma": 0}, cache=cache, max_model_len=length
    ) as llm:
        worker = llm.engine._worker
        comparing = ComparingAttention(worker._target.attention, kv_format, think)
        worker._target = replace(worker._target, attention=comparing)
        for each in [texts] if think is None else [[text] for text in texts]:
            greedy(llm, each, 1)
    return [(wrong / size) ** 0.5 for _, (wrong, size) in sorted(comparing.errors.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    known = [name for name in KV_BITS if name in READABLE_KV]
    known += [f"{name}{_DRAFT}" for name in known if KV_BITS[name].draft_bits is not None]
    parser.add_argument("--formats", nargs="+", choices=known, default=known)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 7500])
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--layers", action="store_true", help="only the error of each layer")
    parser.add_argument("--think", type=float, nargs="+", help="with --layers, shares of key channels to leave out")
    arguments = parser.parse_args()
    if arguments.think and not arguments.layers:
        parser.error("--think needs --layers")
    tokenizer = Tokenizer(resolve_model(arguments.model))
    text = read_text(arguments.text)
    for length in arguments.length:
        texts = passages(tokenizer, text, count=arguments.passages, length=length)
        print(f"{arguments.passages} texts of {length} tokens")
        if arguments.layers:
            for kv_format in (each for each in arguments.formats if each != "dense"):
                for think in arguments.think or [None]:
                    errors = layer_errors(arguments.model, arguments.dtype, kv_format, texts, think)
                    without = "" if think is None else f" without {100 * think:g} % of key channels"
                    print(f"{kv_format:>14}{without}: " + " ".join(f"{error:.4f}" for error in errors), flush=True)
            continue
        first: tuple[Tensor, list[list[int]]] | None = None
        for kv_format in arguments.formats:
            with load(arguments.model, arguments.dtype, kv_format) as llm:
                scores, answers = logprobs(llm, texts), greedy(llm, texts, arguments.new_tokens)
            first = first or (scores, answers)
            print(f"{kv_format:>14}: {describe(scores, first[0], answers, first[1])}", flush=True)


if __name__ == "__main__":
    main()
