"""Measure what weights and KV of few bits cost: perplexity of real text, by format of the matrices and of KV.

    python -m bench.offline.perplexity --text book.txt --weights dense int8 int4
    python -m bench.offline.perplexity --model dense-model --model int4-model --weights auto
    python -m bench.offline.perplexity --text book.txt --weights auto --kv-format dense int8 int4x2

The first model in the first formats is what the others are compared with. All models have the tokenizer of the first.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from bench.corpus import passages, read_text
from bench.format_flags import FormatFlags
from engine.config.deployment import CacheConfig, ConfigError, EngineConfig
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RowStart, RowWork
from engine.worker.build import make_row_state, make_target
from engine.worker.loading import load_target
from engine.worker.resolve import check_kv_format
from kernels.ragged import Ints
from models.decoder import DecoderModel
from models.default import resolve_model
from models.tokenizer import Tokenizer

_CHUNK = 256


@torch.inference_mode()
def logprobs(model: DecoderModel, text: Sequence[int], config: EngineConfig | None = None) -> Tensor:
    """Compute the log-probability of each token of a text except the first: [len(text) - 1] float32. config: of the KV
    that the model reads; dense without one."""
    config, model = config or EngineConfig(), model.keeping_all_kv()
    width = -(-len(text) // config.cache.page_size)
    state = make_row_state(config, model, width, len(text))
    runner = make_target(config, model, state, width, width)
    starts = [RowStart(0, list(text), len(text), SamplingParams(), [])]
    pages = [PageDelta(0, 0, list(range(width)), sliding) for sliding in (False, True)]
    tokens, parts = torch.tensor(text), []
    for first in range(0, len(text) - 1, _CHUNK):
        count = min(_CHUNK, len(text) - 1 - first)
        state.apply(RoundPlan(0, starts, pages, [RowWork(0, first, count, 0, False)]))
        starts, pages = [], []
        inputs = state.forward_inputs(_one(0), _one(0), _one(first), _one(count), runner.view, np.arange(count))
        expected = runner.forward(inputs).float().log_softmax(-1)
        parts.append(expected.gather(-1, tokens[first + 1 : first + count + 1, None])[:, 0])
    return torch.cat(parts)


def _one(value: int) -> Ints:
    return np.array([value], dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="can be repeated; `default` if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--weights", nargs="+", default=["dense", "int8"], help="values of engine.weights")
    choices = get_args(CacheConfig.model_fields["format"].annotation)
    parser.add_argument(
        "--kv-format", nargs="+", choices=choices, default=["dense"], help="values of engine.cache.format"
    )
    arguments = parser.parse_args()
    models = arguments.model or ["default"]
    tokenizer = Tokenizer(resolve_model(models[0]))
    texts = passages(tokenizer, read_text(arguments.text), count=arguments.passages, length=arguments.length)
    found = {}
    try:
        for model in models:
            for weights in arguments.weights:
                for kv, values in _perplexity(model, arguments.dtype, weights, arguments.kv_format, texts):
                    names = [model] * (len(models) > 1) + [weights] + [f"KV {kv}"] * (len(arguments.kv_format) > 1)
                    found[", ".join(names)] = values
    except ConfigError as refusal:
        sys.exit(f"error: {refusal}")
    first = next(iter(found.values()))
    for name, values in found.items():
        change = first - values
        error = float(change.std()) / len(change) ** 0.5
        print(
            f"{name:>9}: perplexity {math.exp(-float(values.mean())):.3f} over {len(values)} tokens, "
            f"{float(change.mean()):.4f} ± {error:.4f} nats per token more"
        )


def _perplexity(
    name: str, dtype: str, weights: str, kv_formats: Sequence[str], texts: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the log-probabilities of the texts' tokens with matrices of one format, by format of KV. name: of the
    model."""
    settings = {"model": name, "device": "cpu", "dtype": dtype, "speculation": {"gamma": 0}}
    config = FormatFlags(weights).apply(EngineConfig.model_validate(settings))
    model = load_target(config, progress=False)
    for kv in kv_formats:
        own = FormatFlags(weights, kv=kv).apply(config)
        check_kv_format(own, model.ops)
        yield kv, torch.cat([logprobs(model, text, own) for text in texts])


if __name__ == "__main__":
    main()
