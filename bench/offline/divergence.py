"""Measure how often speculation diverges from plain decoding in a given precision. In float32 and float64 it must not.

    python -m bench.offline.divergence --dtype bfloat16

A pass over several tokens rounds differently from several passes over one; in 16 bits that can tip a near tie.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.corpus import passages, read_text
from bench.format_flags import add_format_flags, exits_on_error, read_format_flags
from engine.llm import LLM
from engine.params import SamplingParams


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--text", type=Path)
    add_format_flags(parser)
    arguments = parser.parse_args()
    flags = read_format_flags(arguments)

    texts = []
    for gamma in (0, arguments.gamma):
        speculation = {"gamma": gamma, "kv": {"budget": arguments.budget}, "weights": flags.draft_weights}
        # Passages of a short text overlap, and each row must compute its own.
        cache = {"prefix": False, "format": flags.kv}
        settings = {"dtype": arguments.dtype, "weights": flags.weights, "speculation": speculation, "cache": cache}
        with LLM(arguments.model, **settings) as llm:
            prompts = passages(llm.tokenizer, read_text(arguments.text), count=arguments.rows, length=arguments.context)
            params = [
                SamplingParams(
                    max_tokens=arguments.new_tokens, temperature=arguments.temperature, seed=row, ignore_eos=True
                )
                for row in range(arguments.rows)
            ]
            texts.append([completion.token_ids for completion in llm.generate(prompts, params)])

    # Compare tokens up to the first difference only: after it the contexts differ.
    shared = [
        next((i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b), arguments.new_tokens)
        for plain, drafted in zip(*texts, strict=True)
    ]
    parted = sum(length < arguments.new_tokens for length in shared)
    compared = sum(shared) + parted
    print(
        f"{arguments.dtype}, gamma {arguments.gamma}, temperature {arguments.temperature}: {parted} of "
        f"{arguments.rows} rows part within {arguments.new_tokens} tokens; {parted / compared:.2%} of tokens differ "
        "where the texts before them agree"
    )


if __name__ == "__main__":
    main()
