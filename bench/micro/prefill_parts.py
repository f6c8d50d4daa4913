"""Measure the prefill of a whole prompt on a CPU, by kind of kernel, beside a bound: all its products and attention at
the rate of torch's fastest product.

    python -m bench.micro.prefill_parts --tokens 4000

torch's products (F.linear, bfloat16) have the model's shapes and as many rows as a chunk of the prompt, and run in
turns with the prompts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F

from bench.corpus import BenchError
from bench.format_flags import USUAL_FORMATS, FormatFlags, add_format_flags, exits_on_error, read_format_flags
from bench.machine import describe_processor
from bench.micro.blank_rounds import cpu_config, load_with_ops
from bench.micro.cpu_kernels import attention_flops, seconds
from bench.micro.shares import Clock, TimedOps
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.controller import FixedGamma
from models.config import ModelConfig


def product_shapes(shape: ModelConfig) -> list[tuple[int, int]]:
    """List input and output features of the products of a layer."""
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return [
        (shape.hidden_size, heads + 2 * kv_heads),
        (heads, shape.hidden_size),
        (shape.hidden_size, 2 * shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
    ]


def prefill_flops(shape: ModelConfig, tokens: int) -> dict[str, float]:
    """Count the floating-point operations of a prompt by kind of kernel. The head computes one token."""
    numbers = sum(inputs * outputs for inputs, outputs in product_shapes(shape)) * shape.num_layers
    attention = attention_flops(1, tokens, tokens, heads=shape.num_heads, head_dim=shape.head_dim)
    return {
        "products": 2.0 * tokens * numbers,
        "attention": attention * shape.num_layers,
        "head": 2.0 * shape.hidden_size * shape.vocab_size,
    }


def torch_rates(shape: ModelConfig, rows: int) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield each shape of the products with torch's operations per second at so many rows."""
    for inputs, outputs in product_shapes(shape):
        x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        yield (inputs, outputs), 2 * rows * inputs * outputs / seconds(partial(F.linear, x, weight), 10)


def parts(clock: Clock) -> dict[str, float]:
    """Return the seconds by kind of kernel, the longest first. Attention's are added up over all lengths."""
    found: dict[str, float] = defaultdict(float)
    for name, taken in clock.seconds.items():
        found[name.partition(",")[0] if name.startswith("attention") else name] += taken
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def prefill(engine: Engine, prompt: Sequence[int]) -> float:
    """Return the seconds until the prompt's first token."""
    engine.add(AddRequest("prompt", list(prompt), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
    began = perf_counter()
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise BenchError(output.error)
    return perf_counter() - began


def measure(model: str, tokens: int, repeats: int, formats: FormatFlags = USUAL_FORMATS) -> str:
    """Measure prompts of `tokens` tokens, and return the report. Raises BenchError, ConfigError, ModelError."""
    config, clock = cpu_config(model, 1, 0, formats), Clock()
    loaded = load_with_ops(config, lambda ops: TimedOps(ops, clock))
    engine = Engine(config, model=loaded, controller=FixedGamma(0), progress=False)
    shape, rows = loaded.config, min(tokens, config.scheduler.max_batch_tokens)
    if tokens >= shape.max_model_len:
        raise BenchError(f"the model takes {shape.max_model_len - 1} tokens at most")
    try:
        rates: dict[tuple[int, int], list[float]] = defaultdict(list)
        whole: list[float] = []
        generator = torch.Generator().manual_seed(0)
        for turn in range(repeats + 1):  # the first is a warm-up
            # Another prompt each time: pages of one that is known would be reused.
            prompt = torch.randint(shape.vocab_size, (tokens,), generator=generator).tolist()
            taken = prefill(engine, prompt)
            if turn:
                whole.append(taken)
            else:
                clock.clear()
            for name, rate in torch_rates(shape, rows):
                rates[name].append(rate)
        return _report(shape, tokens, rows, whole, parts(clock), {name: median(each) for name, each in rates.items()})
    finally:
        engine.close()


def _report(
    shape: ModelConfig,
    tokens: int,
    rows: int,
    whole: Sequence[float],
    kinds: dict[str, float],
    rates: dict[tuple[int, int], float],
) -> str:
    mean, best, flops = sum(whole) / len(whole), max(rates.values()), prefill_flops(shape, tokens)
    floor = sum(flops.values()) / best
    lines = [
        f"{describe_processor()}; {torch.get_num_threads()} threads; prompts of {tokens} tokens in chunks of {rows}: "
        f"median {median(whole):.3f} s, {tokens / median(whole):.0f} tokens/s"
    ]
    for name, taken in [*kinds.items(), ("everything else", sum(whole) - sum(kinds.values()))]:
        taken /= len(whole)
        line = f"  {name:24}{1e3 * taken:9.1f} ms {taken / mean:6.1%}"
        lines.append(f"{line} {flops[name] / taken / 1e9:7.0f} GFLOP/s" if name in flops else line)
    for (inputs, outputs), rate in rates.items():
        lines.append(f"torch's product of {rows} rows, {inputs:5} x {outputs:5}: {rate / 1e9:7.0f} GFLOP/s")
    bounds = (f"{name} {each / best:.3f} s ({each / 1e9:.0f} GFLOP)" for name, each in flops.items())
    lines.append(f"floor at the best of these rates: {', '.join(bounds)}; {floor / median(whole):.0%} of it is reached")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    add_format_flags(parser, drafts=False)
    given = parser.parse_args(arguments)
    if min(given.tokens, given.repeats) < 1:
        parser.error("--tokens and --repeats must be at least 1")
    with exits_on_error():
        print(measure(given.model, given.tokens, given.repeats, read_format_flags(given)))


if __name__ == "__main__":
    main()
