"""Whole engines on a GPU: CUDA graphs change nothing, random loads give correct output, and the pool takes the free
memory."""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.worker.kv_memory import measure, size_pool
from engine.worker.resolve import resolve
from models.decoder import DecoderModel
from models.default import default_model_dir
from models.loader import random_model
from models.tokenizer import Tokenizer
from parallel.group import Group
from tests.support.engines import TINY, run, tiny_engine, tokens
from tests.support.profiles import is_all
from tests.support.ranks import write_random_model

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is present", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install 'magicdec[cuda]'")

from kernels.gpu.cuda_graphs import CudaGraphs
from kernels.gpu.gpu_ops import GpuOps

CUDA = torch.device("cuda")
SHAPE = dataclasses.replace(TINY, num_layers=3, hidden_size=96, num_heads=6, num_kv_heads=2, head_dim=16)
WINDOW = {"policy": "window", "budget": 32, "sink": 4}
SNAPKV = {"policy": "snapkv", "budget": 32, "recent": 16}


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    """Model in float32, so that batch shapes cannot tip a near tie."""
    return random_model(SHAPE, 0, torch.float32, CUDA, Group.single(), GpuOps(make_recorder=partial(CudaGraphs, CUDA)))


def requests(count: int, seed: int) -> list[AddRequest]:
    chance = random.Random(seed)
    sampling: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.9, "top_k": 9}]
    return [
        AddRequest(
            str(i),
            [chance.randrange(2, 64) for _ in range(chance.choice([1, 7, 60, 200]))],
            SamplingParams(max_tokens=chance.choice([1, 30, 90]), seed=i, ignore_eos=True, **chance.choice(sampling)),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a draft model with fewer layers."""
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", dataclasses.replace(SHAPE, num_layers=2))


@pytest.mark.parametrize("kv", [WINDOW, SNAPKV], ids=["window", "snapkv"])
@pytest.mark.parametrize("drafter", ["self", "model"])
def test_graphs_and_speculation_change_nothing(
    model: DecoderModel, draft_dir: Path, drafter: str, kv: dict[str, Any]
) -> None:
    speculation = {"kv": kv, "drafter": drafter, **({"model": str(draft_dir)} if drafter == "model" else {})}
    check_graphs(model, speculation)


@pytest.mark.parametrize("sliding", [(0, 2), (0, 1, 2)], ids=["some layers", "all layers"])
@pytest.mark.parametrize("kv", [WINDOW, SNAPKV], ids=["window", "snapkv"])
def test_nor_with_sliding_layers(sliding: tuple[int, ...], kv: dict[str, Any]) -> None:
    shape = dataclasses.replace(SHAPE, sliding_window=40, sliding_layers=sliding)
    ops = GpuOps(make_recorder=partial(CudaGraphs, CUDA))
    check_graphs(random_model(shape, 0, torch.float32, CUDA, Group.single(), ops), {"kv": kv})


def check_graphs(model: DecoderModel, speculation: dict[str, Any]) -> None:
    wanted = requests(12, seed=1)
    plain = {id: tokens(out) for id, out in run(tiny_engine(model, gamma=0, cuda_graphs=False), wanted).items()}
    accepted = {}
    for gamma, graphs in ((0, True), (3, False), (3, True)):
        engine = tiny_engine(model, gamma=gamma, speculation=speculation, cuda_graphs=graphs, max_model_len=400)
        assert {id: tokens(out) for id, out in run(engine, wanted).items()} == plain, (gamma, graphs)
        stats = engine.stats()
        accepted[gamma, graphs] = stats.accepted_tokens / max(1, stats.draft_tokens)
        if gamma:
            assert stats.rejections > 0
        engine.close()
    # The drafts are the same too, except for rounding.
    assert accepted[3, True] == pytest.approx(accepted[3, False], abs=0.02)


def test_a_random_load_stays_right(model: DecoderModel) -> None:
    """Requests join and leave at any time, and pages are so few that some requests are preempted."""
    engine = tiny_engine(model, gamma=3, speculation={"kv": WINDOW}, cache={"num_pages": 300}, max_model_len=400)
    for seed in range(6 if is_all() else 2):
        chance, wanted = random.Random(seed), requests(30, seed)
        alone = {each.id: tokens(run(engine, [each])[each.id]) for each in wanted}
        joins = {each.id: chance.randrange(60) for each in wanted}
        leaves = {each.id: chance.randrange(80) for each in wanted if chance.random() < 0.3}
        for id, out in run(engine, wanted, joins=joins, leaves=leaves).items():
            found = tokens(out)
            assert found == (alone[id] if id not in leaves else alone[id][: len(found)])
    engine.close()


def test_the_pool_takes_what_is_left(model: DecoderModel) -> None:
    config = EngineConfig.model_validate({"model": "tiny", "device": "cuda", "max_model_len": 2000})
    memory = measure(config, model)
    assert 0 < memory.running < memory.total
    assert 0 < memory.used < memory.total
    sizes = dataclasses.replace(resolve(config, model), num_pages=None)
    assert size_pool(config, sizes, model, Group.single()).num_pages == -(-2000 // 16) * config.scheduler.max_rows


def test_other_weights_and_sleep(tmp_path: Path) -> None:
    """Graphs are captured anew, and a sleeping engine leaves its memory to others."""
    folders = [write_random_model(tmp_path / str(seed), SHAPE, dtype=torch.float32, seed=seed) for seed in range(2)]

    def start(folder: Path) -> Engine:
        settings = {"device": "cuda", "dtype": "float32", "max_model_len": 400, "cache": {"memory_gb": 1}}
        speculation = {"gamma": 3, "weights": "int8", "kv": WINDOW}
        return Engine(
            EngineConfig.model_validate({"model": str(folder), "speculation": speculation, **settings}), progress=False
        )

    wanted = requests(8, seed=2)
    fresh = start(folders[1])
    expected = {id: tokens(out) for id, out in run(fresh, wanted).items()}
    fresh.close()
    before = torch.cuda.memory_allocated()
    engine = start(folders[0])
    run(engine, wanted)
    engine.update_weights(str(folders[1]))
    assert {id: tokens(out) for id, out in run(engine, wanted).items()} == expected
    awake = torch.cuda.memory_allocated()
    engine.sleep()
    assert torch.cuda.memory_allocated() - before < 0.05 * (awake - before)
    engine.wake_up()
    assert {id: tokens(out) for id, out in run(engine, wanted).items()} == expected
    engine.close()


def test_the_default_model_follows_the_law() -> None:
    directory = default_model_dir()
    if not directory.is_dir():
        pytest.skip("the default model is not installed: magicdec fetch")
    prompts = ["The whale is", "def fibonacci(n):", "Once upon a time there was a"]
    texts = []
    for gamma in (0, 4):
        config = EngineConfig.model_validate(
            {
                "model": str(directory),
                "device": "cuda",
                "dtype": "float32",
                "cache": {"memory_gb": 2},
                "speculation": {"gamma": gamma, "kv": {"budget": 64}},
            }
        )
        engine = Engine(config, progress=False)
        tokenizer = Tokenizer(directory)
        params = SamplingParams(max_tokens=120, temperature=0.7, seed=3, ignore_eos=True)
        wanted = [AddRequest(text, tokenizer.encode(text), params) for text in prompts]
        texts.append({id: tokens(out) for id, out in run(engine, wanted).items()})
        engine.close()
    assert texts[0] == texts[1]
