"""Our attention on FlashInfer's own Python, and our sizes beside its own planners in C++, without a GPU. For the first
and the last version that was read; both are downloaded once."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.batch.forward_graphs import graph_row_counts
from engine.config.deployment import EngineConfig
from kernels.flashinfer.flashinfer_sizes import (
    Heads,
    Kernels,
    captured_plan,
    captured_ragged_plan,
    eager_float_bytes,
    eager_int_bytes,
)
from kernels.flashinfer.flashinfer_workspace import HEAD_DIMS
from models.known_shapes import SHAPES
from parallel.split import split_heads
from tests.support.paths import ROOT
from tests.support.profiles import is_all, only_in_all
from tests.support.wheels import unpacked

VERSIONS = ["0.6.6", "0.7.2"]
PROCESSORS = {"A100": 108, "H100": 132}
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "cpu"]
MODELS = {
    "default": "smollm2-135m",
    "LLaMA-2-7B-32K": "llama-2-7b-32k",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b",
}


def flashinfer(version: str) -> Path:
    return unpacked(f"flashinfer-python=={version}")


@pytest.mark.parametrize(("version", "uniform"), [only_in_all("0.6.6", False), ("0.7.2", True)])
def test_equals_the_oracle(version: str, uniform: bool) -> None:
    """Eager and captured, decode, verify, chunk and mixed batches, lists of rows, of heads and of layers, 1, 3 and 4
    heads per KV head, changing lengths. A process of its own: FlashInfer's modules are replaced."""
    command = [
        sys.executable,
        "-m",
        "tests.support.flashinfer_versions",
        str(flashinfer(version)),
        *([] if is_all() else ["few"]),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == version
    assert found["uniform"] == uniform
    assert found["kernels"] == (["fa2", "fa2 uniform", "fa3"] if uniform else ["fa2", "fa3"])
    assert found["compared"] == (192 if is_all() else 96)


# -- planners --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VERSIONS)
def planner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """FlashInfer's planners as a program, and whether they take a uniform number of queries."""
    include = flashinfer(request.param) / "flashinfer/data/include"
    if shutil.which("g++") is None:
        pytest.skip("FlashInfer's planners are compiled with g++, which is not installed")
    folder = tmp_path_factory.mktemp("planner")
    runtime = "cuda_bf16 cuda_fp16 cuda_fp8 cuda_runtime cuda_runtime_api cuda_device_runtime_api driver_types"
    for name in runtime.split():
        (folder / f"{name}.h").write_text('#include "cuda_stub.h"\n')
    uniform = "uniform_q_len" in (include / "flashinfer/attention/scheduler.cuh").read_text()
    support = ROOT / "tests/support"
    command = ["g++", "-std=c++17", "-O1", *(["-DHAS_UNIFORM"] if uniform else [])]
    command += [f"-I{path}" for path in (folder, support, include)]
    command += [str(support / "flashinfer_planner.cpp"), "-o", str(folder / "planner")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "planner", uniform


def plan(program: Path, batches: list[str]) -> list[str]:
    """Plan batches: a line for each, as in flashinfer_planner.cpp."""
    done = subprocess.run([str(program)], input="\n".join(batches), capture_output=True, text=True, check=True)
    plans = done.stdout.splitlines()
    assert len(plans) == len(batches)
    refused = [(batch[:60], each) for batch, each in zip(batches, plans, strict=True) if each.startswith("error")]
    assert not refused, refused[:3]
    return plans


def line(
    kernels: Kernels, heads: Heads, processors: int, captured: int, floats: int, ints: int, rows: list[tuple[int, int]]
) -> str:
    """A line for `plan`. captured: the number of queries of all rows; 0 in an eager batch."""
    numbers = [processors, *heads, int(captured > 0), captured if captured > 1 else 0, floats, ints, len(rows)]
    return " ".join(map(str, [kernels, *numbers, *(number for row in rows for number in row)]))


@cache
def captured_shapes(path: Path) -> tuple[tuple[Heads, int, int], ...]:
    """Heads, rows and queries of all forwards that a deployment captures; also with lists for each head."""
    config = EngineConfig.model_validate(yaml.safe_load(path.read_text())["engine"])
    gamma, ranks = config.speculation.max_draft_tokens, config.tensor_parallel_size
    used = [(config.model, ranks, range(1, gamma + 2))]
    if config.speculation.draft_model is not None:
        used += [(config.speculation.draft_model, count, range(1, 3)) for count in (1, ranks)]
    shapes = set()
    for name, count, queries in used:
        shape = SHAPES[MODELS[Path(name).name]]
        for part in set(split_heads(shape.num_heads, shape.num_kv_heads, count)):
            heads = Heads(part.heads.size, part.kv_heads.size, shape.head_dim)
            for rows in graph_row_counts(config.scheduler.max_rows):
                shapes |= {(heads, rows, each) for each in queries}
                shapes |= {(heads.as_rows(), rows * heads.kv_heads, each) for each in (1, 2)}
    return tuple(sorted(shapes))


@pytest.mark.parametrize(
    ("path", "device"),
    [
        pytest.param(path, device, id=f"{path.stem}-{device}", marks=() if often else only_in_all().marks)
        for number, path in enumerate(CONFIGS)
        for often, device in zip((number % 2 == 0, number % 2 == 1), PROCESSORS, strict=True)
    ],
)
def test_captured_plans_have_the_memory_they_need(planner: tuple[Path, bool], path: Path, device: str) -> None:
    """And stand where they stood: a graph's kernels have tiles, numbers of blocks and addresses of its first plan.

    Tiles have 16 rows where 16 hold all queries of a row.
    """
    program, uniform = planner
    random.seed(0)
    shapes, batches = captured_shapes(path), []
    if not is_all():
        shapes = tuple(random.sample(shapes, -(-len(shapes) // 3)))
    for heads, rows, queries in shapes:
        size = captured_plan(heads, rows, queries, PROCESSORS[device], uniform)
        for longest in (1, 300, 34_000):
            lengths = [random.randint(1, longest) for _ in range(rows)]
            batch = [(queries, length) for length in lengths]
            batches.append(line("fa2", heads, PROCESSORS[device], queries, size.floats, size.ints, batch))
    plans = plan(program, batches)
    for (heads, rows, queries), first, *others in zip(shapes, plans[::3], plans[1::3], plans[2::3], strict=True):
        assert others == [first, first], (heads, rows, queries)
        _, tokens, _, tile, *offsets = map(int, first.split())
        assert tokens == rows * queries
        size = captured_plan(heads, rows, queries, PROCESSORS[device], uniform)
        log_sums = offsets[7]  # after the outputs, head_dim times as large
        if not uniform or heads.group == 1:  # later versions need 1 / group of it
            assert size.floats == log_sums + log_sums // heads.head_dim
        packed = queries * heads.group
        if uniform or queries == 1:
            assert tile == (16 if packed <= 16 else 64 if packed <= 64 else 128)
        if heads.kv_heads > 1:  # one list for all heads: at most a few KB, rather than 8 MB
            assert size.ints <= 10_000


def test_captured_prefixes_have_the_memory_they_need(planner: tuple[Path, bool]) -> None:
    """Rows of any numbers of queries, none included; plans stand where the first one stood."""
    program, _ = planner
    random.seed(0)
    batches, counts = [], []
    for heads in (Heads(32, 8, 128), Heads(32, 32, 128), Heads(8, 1, 128), Heads(9, 3, 64), Heads(16, 1, 256)):
        for rows, queries in ((2, 1), (4, 1), (8, 5), (64, 1), (64, 4), (256, 8)):
            tokens, prefixes = rows * queries, min(rows // 2, 8)
            size = captured_ragged_plan(heads, prefixes + 1, tokens, 132)
            for shares in ([1.0], [0.5, 0.25], [0.0], [1 / prefixes] * prefixes):
                own = [int(share * tokens) for share in shares[:prefixes]]
                own += [0] * (prefixes - len(own)) + [tokens - sum(own)]
                batch = [(each, 16 * random.randint(1, 2000)) for each in own]
                batches.append(line("fa2", heads, 132, 1, size.floats, size.ints, batch))
            counts.append(tokens)
    plans = plan(program, batches)
    for index, tokens in enumerate(counts):
        first, *others = plans[4 * index : 4 * index + 4]
        assert others == [first] * 3
        assert int(first.split()[1]) == tokens


@pytest.mark.parametrize(
    ("shape", "rows", "queries", "megabytes"),
    [("llama-2-7b-32k", 64, 4, 137.4), ("llama-2-7b-32k", 128, 4, 276.9), ("llama-3.1-8b", 128, 7, 327.6)],
)
def test_memory_of_large_batches(shape: str, rows: int, queries: int, megabytes: float) -> None:
    """Where 128 MB, FlashInfer's own advice, are too few; on one H100, without the hint that all rows are alike."""
    model = SHAPES[shape]
    heads = Heads(model.num_heads, model.num_kv_heads, model.head_dim)
    assert captured_plan(heads, rows, queries, 132, uniform=False).floats / 1e6 == pytest.approx(megabytes, rel=1e-3)


def test_eager_plans_have_the_memory_they_need(planner: tuple[Path, bool]) -> None:
    program, _ = planner
    random.seed(0)
    batches = []
    for _ in range(150 if is_all() else 60):
        group, kv_heads = random.choice([1, 3, 4, 8]), random.choice([1, 2, 3, 8, 32])
        heads = Heads(group * kv_heads, kv_heads, random.choice(HEAD_DIMS))
        processors = random.choice([60, 108, 132, 148])
        kinds: list[tuple[Kernels, int, int]] = [("fa2", 1, 9), ("fa2", 1, 400), ("fa3", 128, 3000)]
        for kernels, lowest, highest in kinds:
            queries = [random.randint(lowest, highest) for _ in range(random.choice([1, 3, 40, 300]))]
            rows = [(each, each + random.choice([0, 7, 500, 40_000])) for each in queries]
            floats = eager_float_bytes(heads, processors) if kernels == "fa2" else 0
            ints = eager_int_bytes(kernels, heads, np.array(queries), processors)
            batches.append(line(kernels, heads, processors, 0, floats, ints, rows))
    plan(program, batches)


def test_a_chunk_beside_decoding_rows_would_keep_them_whole(planner: tuple[Path, bool]) -> None:
    """Why rows are parted: alone, decoding rows have their KV split, and tiles of 16."""
    program, _ = planner
    decode = [(1, 30_000)] * 8

    def tile_and_split(rows: list[tuple[int, int]]) -> tuple[int, int]:
        numbers = plan(program, [line("fa2", Heads(32, 8, 128), 132, 0, 1 << 30, 8 << 20, rows)])[0].split()
        return int(numbers[3]), int(numbers[-1])

    assert tile_and_split(decode) == (16, 1)
    assert tile_and_split([*decode, (2048, 30_000)]) == (128, 0)
    assert tile_and_split([*decode, (16, 30_000)]) == (16, 1)  # as many queries as a short row can have
    assert tile_and_split([(17, 30_000)]) == (128, 1)
