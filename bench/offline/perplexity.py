"""Measure what weights of few bits cost: perplexity of real text, by format of the matrices.

    python -m bench.offline.perplexity --text book.txt --weights dense int8 int4
    python -m bench.offline.perplexity --model dense-model --model int4-model --weights auto

The first model in the first format is what the others are compared with. All models have the tokenizer of the first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.corpus import passages, read_text
from engine.config.deployment import EngineConfig
from engine.worker.loading import load_target
from kernels.attention.base import AttentionBatch
from models.batch import ForwardBatch
from models.default import resolve_model
from models.llama import Llama
from models.tokenizer import Tokenizer

_PAGE, _CHUNK = 16, 256


@torch.inference_mode()
def logprobs(model: Llama, text: Sequence[int]) -> Tensor:
    """Compute the log-probability of each token of a text except the first: [len(text) - 1] float32."""
    width = -(-len(text) // _PAGE)
    pool = model.make_pool(width, _PAGE)
    attention = model.ops.attention(_PAGE, model.head_dim)
    tokens, pages = torch.tensor(text), torch.arange(width)[None]
    parts = []
    for first in range(0, len(text) - 1, _CHUNK):
        positions = torch.arange(first, min(first + _CHUNK, len(text) - 1))
        batch = ForwardBatch(
            token_ids=tokens[positions],
            positions=positions,
            slots=positions,
            attention=AttentionBatch([len(positions)], [int(positions[-1]) + 1], pages),
            logit_index=torch.arange(len(positions)),
        )
        expected = model.forward(batch, pool, attention).float().log_softmax(-1)
        parts.append(expected.gather(-1, tokens[positions + 1, None])[:, 0])
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="can be repeated; `default` if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--weights", nargs="+", default=["dense", "int8"], help="values of engine.weights")
    arguments = parser.parse_args()
    models = arguments.model or ["default"]
    tokenizer = Tokenizer(resolve_model(models[0]))
    texts = passages(tokenizer, read_text(arguments.text), count=arguments.passages, length=arguments.length)
    found = {
        f"{model}, {weights}" if len(models) > 1 else weights: _perplexity(model, arguments.dtype, weights, texts)
        for model in models
        for weights in arguments.weights
    }
    first = next(iter(found.values()))
    for name, values in found.items():
        change = first - values
        error = float(change.std()) / len(change) ** 0.5
        print(
            f"{name:>9}: perplexity {math.exp(-float(values.mean())):.3f} over {len(values)} tokens, "
            f"{float(change.mean()):.4f} ± {error:.4f} nats per token more"
        )


def _perplexity(name: str, dtype: str, weights: str, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probabilities of the texts' tokens with matrices of one format. name: of the model."""
    settings = {"model": name, "device": "cpu", "dtype": dtype, "weights": weights}
    config = EngineConfig.model_validate(settings | {"speculation": {"gamma": 0}})
    model = load_target(config, progress=False)
    return torch.cat([logprobs(model, text) for text in texts])


if __name__ == "__main__":
    main()
