"""Measure the cost of int8 weights: perplexity of real text under a model as loaded, and with int8 matrices.

python -m bench.offline.perplexity --text book.txt
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
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
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(resolve_model(arguments.model))
    texts = passages(tokenizer, read_text(arguments.text), count=arguments.passages, length=arguments.length)
    model = load_target(EngineConfig(model=arguments.model, device="cpu", dtype=arguments.dtype), progress=False)
    found = [torch.cat([logprobs(each, text) for text in texts]) for each in (model, model.quantized())]
    names = str(model.dtype).removeprefix("torch."), "int8"
    for name, values in zip(names, found, strict=True):
        print(f"{name:>9}: perplexity {math.exp(-float(values.mean())):.3f} over {len(values)} tokens")
    for full, quantized in pairwise(found):
        change = full - quantized
        error = float(change.std()) / len(change) ** 0.5
        print(f"int8 costs {float(change.mean()):.4f} ± {error:.4f} nats per token")


if __name__ == "__main__":
    main()
