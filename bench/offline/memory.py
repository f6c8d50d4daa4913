"""Measure the memory of each rank with its KV pool full: weights, KV, and the rest.

    python -m bench.offline.memory --ranks 1,2,3 --tokens 40000

Linux only: it reads the anonymous memory of each process, which excludes files and shared memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from bench.format_flags import add_format_flags, exits_on_error
from engine.config.deployment import CacheConfig, EngineConfig
from engine.config.speculation import SpeculationConfig
from engine.core import Engine
from models.config import read_config
from models.default import resolve_model
from parallel.split import split_heads


def own_bytes(pid: int) -> int:
    """Read the anonymous memory of a process: heap, stacks, tensors."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Anonymous:\s+(\d+) kB$", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def report(config: EngineConfig) -> None:
    """Start the ranks, fill their pools, and print a line for each rank."""
    shape = read_config(resolve_model(config.model))
    bare = own_bytes(os.getpid())
    engine = Engine(config, progress=False)
    try:
        engine.profiler.fill()
        stats = engine.stats()
        ranks = config.tensor_parallel_size
        heads = [mine.kv_heads.size for mine in split_heads(shape.num_heads, shape.num_kv_heads, ranks)]
        kv = stats.pages_total * stats.page_size * stats.kv_token_bytes
        weights = engine.weight_bytes.total / ranks
        for rank, pid in engine.pids.items():
            own, mine = own_bytes(pid), kv * heads[rank] / sum(heads)
            print(
                f"{ranks:>2} ranks, rank {rank}: {own / 1e6:7.0f} MB = weights {weights / 1e6:6.0f} + KV "
                f"{mine / 1e6:6.0f} + {(own - weights - mine) / 1e6:5.0f} (before the engine: {bare / 1e6:.0f})"
            )
    finally:
        engine.close()


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ranks", default="1,2,3")
    parser.add_argument("--tokens", type=int, default=40000, help="KV tokens of the pool")
    add_format_flags(parser, drafts=False)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.ranks.split(",")]
    if len(sizes) > 1:  # each in a fresh process
        for size in sizes:
            command = [sys.executable, "-m", "bench.offline.memory", "--ranks", str(size), "--model", arguments.model]
            command += ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens), "--weights", arguments.weights]
            command += ["--kv-format", arguments.kv_format]
            if status := subprocess.run(command, check=False).returncode:  # it has said why
                sys.exit(status)
        return
    cache = CacheConfig(format=arguments.kv_format)
    report(
        EngineConfig(
            model=arguments.model,
            dtype=arguments.dtype,
            weights=arguments.weights,
            tensor_parallel_size=sizes[0],
            cache=cache.model_copy(update={"num_pages": arguments.tokens // cache.page_size}),
            speculation=SpeculationConfig(gamma=0),
        )
    )


if __name__ == "__main__":
    main()
