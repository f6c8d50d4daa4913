"""Models on compiled kernels: logits, and unchanged output under speculation, in every dtype that they support."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.deployment import ConfigError
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.worker.kernels import choose_ops
from engine.worker.profiler import load_profile, save_profile
from kernels.cpu.choice import KernelChoice
from kernels.cpu.compiler import KernelsUnavailable
from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.micro_profile import choose
from kernels.reference_ops import REFERENCE
from kernels.weights.weight_format import FORMATS
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.default import default_model_dir, user_cache
from models.files.rope_config import RopeConfig
from models.loader import random_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.engines import run, tiny_engine, tokens
from tests.support.model_weights import tensors_of
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import CPU, PagedRows, compiled, sets_to_test

SHAPE = ModelConfig(
    vocab_size=211,
    hidden_size=72,
    intermediate_size=90,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    eos_token_ids=(1,),
)
VARIANTS = {
    "plain": SHAPE,
    "tied": dataclasses.replace(SHAPE, tie_word_embeddings=True),
    "biases": dataclasses.replace(SHAPE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk_norm": dataclasses.replace(SHAPE, qk_norm="head"),
    "scaled": dataclasses.replace(
        SHAPE,
        qk_norm="all",
        residual_scale=0.22,
        embedding_scale=12.0,
        logits_scale=0.5,
        attention_scale=0.3,
        rope=RopeConfig(interleaved=True, rotated=0.5),
    ),
    "odd heads": dataclasses.replace(SHAPE, head_dim=12, intermediate_size=31),
}
TEXT = random.Random(0).choices(range(2, 211), k=60)


CHOICES = {
    "dense": WeightChoice(None, "int4"),
    "int8": WeightChoice("int8", "int4"),
    "int4": WeightChoice("int4", "fp8"),
    "fp8": WeightChoice("fp8", "int8"),
}
"""Formats of targets, each with drafts of another one."""


@cache
def on_kernels(dtype: torch.dtype, variant: str = "tied", weights: str = "dense") -> DecoderModel:
    return random_model(VARIANTS[variant], 1, dtype, CPU, Group.single(), compiled(), CHOICES[weights])


def logits(model: DecoderModel) -> torch.Tensor:
    """Logits of a text in two chunks and three single tokens, next to another row."""
    rows = PagedRows(model, [64, 64], page_size=4)
    parts = []
    for first, last in ((0, 30), (30, 57), (57, 58), (58, 59), (59, 60)):
        feed = {0: TEXT[first:last], 1: TEXT[::-1][first:last]}
        parts.append(rows.forward(feed, {0: range(last - first)}))
    return torch.cat(parts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", FORMATS)
def test_models_agree_with_the_reference(variant: str, weights: str) -> None:
    arguments = VARIANTS[variant], 1, torch.float32, CPU, Group.single()
    ours = logits(random_model(*arguments, compiled(), WeightChoice(weights)))
    theirs = logits(random_model(*arguments, REFERENCE, WeightChoice(weights)))
    assert ours.dtype == torch.float32
    if weights == "dense":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:  # sums close to the middle of two integers round differently on the two sides, or inputs are rounded on one
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("ops", ["reference", "compiled"])
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_the_twin_that_drafts(ops: str, weights: str) -> None:
    """It computes what a model computes whose own weights have that format, shares the embedding, and is made once."""
    chosen = REFERENCE if ops == "reference" else compiled()
    arguments = SHAPE, 1, torch.float32, CPU, Group.single(), chosen
    model, quantized = (random_model(*arguments, WeightChoice(*each)) for each in ((None, weights), (weights, None)))
    before = logits(model)
    twin = model.drafting()
    assert torch.equal(logits(twin), logits(quantized))
    assert torch.equal(logits(model), before)
    assert torch.equal(before, logits(random_model(*arguments)))
    assert 0.005 < (before - logits(twin)).norm() / before.norm() < (0.1 if weights == "int8" else 0.4)
    assert twin is model.drafting()
    assert twin.drafting() is twin
    assert quantized.drafting() is quantized
    # Kernels pad 72 features to 80 floats, or to 128 codes; the reference has a byte per code, and wide scales.
    limit = 0.6 if (ops, weights) == ("reference", "int4") else 0.42
    assert twin.matrix_bytes == quantized.matrix_bytes < limit * model.matrix_bytes
    assert twin.table_bytes == model.table_bytes == 211 * 72 * 4


def test_bytes_of_a_tied_head() -> None:
    model = random_model(VARIANTS["tied"], 1, torch.float32, CPU, Group.single())
    assert model.table_bytes == 0  # the head reads the embedding itself
    assert model.matrix_bytes == sum(
        t.nbytes for name, t in tensors_of(model).items() if not name.endswith("norm.weight")
    )
    assert on_kernels(torch.float32).table_bytes == 211 * 72 * 4  # the head reads a packed copy


POLICIES: dict[str, dict[str, Any]] = {
    "window": {"kv": {"budget": 16, "sink": 4}},
    "same weights": {"kv": {"budget": 16, "sink": 4}, "weights": "same"},
    "relative": {"kv": {"budget": 16, "sink": 4, "positions": "relative"}},
    "verified": {"kv": {"policy": "verified", "budget": 16, "sink": 4}},
    "quest": {"kv": {"policy": "quest", "budget": 16, "sink": 4}},
    "snapkv": {"kv": {"policy": "snapkv", "budget": 24, "recent": 8, "queries": 4}},
    "topk": {"kv": {"policy": "topk", "budget": 16}},
}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.1, "min_p": 0.05},
    {"temperature": 0.0, "frequency_penalty": 0.7},
    {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0}, "repetition_penalty": 1.2},
    {"temperature": 0.7, "logprobs": 3},
]


NEW_TOKENS, FEW_TOKENS = (30, 14) if is_all() else (14, 9)
HERE = {torch.bfloat16: ("window", "same weights", "verified", "topk"), torch.float32: ("quest",)}
HERE |= {torch.float16: ("relative", "snapkv")}
"""Policies that `make test` has, too, by dtype."""


def requests(new_tokens: int = NEW_TOKENS) -> list[AddRequest]:
    return [
        AddRequest(
            str(i), TEXT[: 2 + 9 * i], SamplingParams(max_tokens=new_tokens, seed=i, ignore_eos=True, **sampling)
        )
        for i, sampling in enumerate(SAMPLING)
    ]


@cache
def alone(dtype: torch.dtype) -> dict[str, list[int]]:
    """Output of each request alone, without drafts and with its prompt in one chunk."""
    found: dict[str, list[int]] = {}
    for request in requests():
        engine = tiny_engine(on_kernels(dtype), gamma=0, page_size=16, max_model_len=256)
        found |= {name: tokens(outputs) for name, outputs in run(engine, [request]).items()}
    return found


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        (dtype, policy) if policy in policies else only_in_all(dtype, policy)
        for dtype, policies in HERE.items()
        for policy in POLICIES
    ],
    ids=str,
)
def test_the_law_holds_in_every_dtype(dtype: torch.dtype, policy: str) -> None:
    """Neither drafts, nor other rows, nor prompt chunks, nor threads change the text of a row, to the bit."""
    rejections = 0
    for gamma, scheduler in ((1, {"max_batch_tokens": 32}), (4, {"max_batch_tokens": 90})):
        speculation = POLICIES[policy]
        settings: dict[str, Any] = {"scheduler": scheduler, "max_model_len": 256, "speculation": speculation}
        engine = tiny_engine(on_kernels(dtype), gamma=gamma, threads=2, **settings)
        outputs = run(engine, requests(), joins={"2": 3, "4": 7})
        assert {name: tokens(outputs[name]) for name in outputs} == alone(dtype)
        stats = engine.stats()
        engine.close()  # torch has the former number of threads again
        assert stats.accepted_tokens > 0
        rejections += stats.rejections
    assert rejections > 0, "the draft was never wrong: nothing was shown"


BOUNDS = (1, 16, 1 << 30), (16, 1 << 30, 1)
DIMS = (64,)
"""Numbers of rows from which on tiles multiply: those of the plain run, and of two with drafts; for
full and 8-bit weights."""


SETS = [each.name for each in sets_to_test()]
ALWAYS = {*((name, "int4") for name in SETS), ("mixed", "int4"), ("chosen", "fp8")}
ALWAYS |= {("software_tiles", "dense"), ("software_tiles", "int8")}
"""Kernels and weights that `make test` has."""


@cache
def choices() -> dict[str, KernelChoice]:
    """Kernels of one set, those that are chosen here, and a mixture."""
    compiled()  # skips where there are no kernels
    sets = sets_to_test()
    found = {each.name: KernelChoice.all_of(each) for each in sets}
    found["chosen"] = choose(user_cache() / "kernels")
    found["mixed"] = KernelChoice(
        attention=sets[0],
        products=sets[-1],
        products_int8=sets[len(sets) // 2],
        products_int4=sets[-1],
        rest=sets[0],
    )
    return found


@cache
def on_choice(name: str, run: int, dtype: torch.dtype, weights: str) -> DecoderModel:
    """The model on kernels of a choice. run: place in BOUNDS."""
    full, rounded = (rows[run] for rows in BOUNDS)
    choice = dataclasses.replace(choices()[name], tiles_from=full, tiles_from_int8=rounded)
    ops = CpuOps(CpuKernels(user_cache() / "kernels", choice))
    return random_model(VARIANTS["tied"], 1, dtype, CPU, Group.single(), ops, CHOICES[weights])


@cache
def plain(name: str, dtype: torch.dtype, weights: str) -> dict[str, list[int]]:
    """Output of each request alone, without drafts, on kernels of a choice."""
    settings: dict[str, Any] = {"max_model_len": 256}
    found: dict[str, list[int]] = {}
    for request in requests(FEW_TOKENS):
        engine = tiny_engine(on_choice(name, 0, dtype, weights), gamma=0, page_size=16, **settings)
        found |= {id: tokens(outputs) for id, outputs in run(engine, [request]).items()}
    return found


@pytest.mark.timeout(1800)  # the first one compiles kernels of all sets
@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        pytest.param(
            dtype,
            policy,
            marks=() if (dtype, policy) == (torch.bfloat16, "window") else only_in_all().marks,
            id=f"{dtype}-{policy}",
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for policy in POLICIES
    ],
)
@pytest.mark.parametrize(
    ("name", "weights"),
    [each if each in ALWAYS else only_in_all(*each) for each in itertools.product((*SETS, "chosen", "mixed"), CHOICES)],
)
def test_the_law_holds_on_every_set(name: str, dtype: torch.dtype, policy: str, weights: str) -> None:
    """As above, on kernels of each instruction set; also if tiles multiply from other numbers of rows on."""
    settings: dict[str, Any] = {"max_model_len": 256, "speculation": POLICIES[policy]}
    accepted = rejections = 0
    for turn, gamma, batch_tokens in ((1, 4, 90), (2, 2, 32)):
        engine = tiny_engine(
            on_choice(name, turn, dtype, weights), gamma=gamma, scheduler={"max_batch_tokens": batch_tokens}, **settings
        )
        outputs = run(engine, requests(FEW_TOKENS), joins={"2": 3, "4": 7})
        assert {id: tokens(outputs[id]) for id in outputs} == plain(name, dtype, weights)
        accepted += engine.stats().accepted_tokens
        rejections += engine.stats().rejections
    assert accepted > 0
    assert rejections > 0, "the draft was never wrong: nothing was shown"


@pytest.mark.parametrize("weights", CHOICES)
def test_the_law_holds_for_weights_of_every_format(weights: str) -> None:
    found: list[dict[str, list[int]]] = []
    for gamma in (0, 3):
        engine = tiny_engine(on_kernels(torch.bfloat16, "plain", weights), gamma=gamma, max_model_len=256)
        found.append({name: tokens(outputs) for name, outputs in run(engine, requests(FEW_TOKENS + 4)).items()})
        assert bool(engine.weight_bytes.own_drafts) == bool(gamma)
    assert found[0] == found[1]


def test_which_kernels_serve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_ops("reference", CPU, torch.float32, DIMS) is REFERENCE
    assert choose_ops("auto", CPU, torch.float64, DIMS) is REFERENCE
    with pytest.raises(ConfigError, match=r"engine\.kernels: cpu has none for float64 on cpu"):
        choose_ops("cpu", CPU, torch.float64, DIMS)
    assert choose_ops("auto", CPU, torch.bfloat16, DIMS).kind == "cpu"

    def fail(*_: object) -> None:
        raise KernelsUnavailable("no C++ compiler (g++ or clang++) is installed")

    monkeypatch.setattr("engine.worker.kernels.CpuKernels", fail)
    assert choose_ops("auto", CPU, torch.bfloat16, DIMS) is REFERENCE
    assert caplog.messages == [
        "falling back to plain torch, several times slower than kernels: no C++ compiler (g++ or clang++) is installed"
    ]
    with pytest.raises(ConfigError, match=r"engine\.kernels: no C\+\+ compiler"):
        choose_ops("cpu", CPU, torch.bfloat16, DIMS)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A container that runs as a numeric user id has a user without a home directory."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("kernels.cpu.compiler.BUILT", Path("/nowhere"))
    assert choose_ops("auto", CPU, torch.bfloat16, DIMS) is REFERENCE
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "no folder is known to keep kernels in; set HOME or XDG_CACHE_HOME"
    ]
    with pytest.raises(ConfigError, match=r"engine\.kernels: no folder is known"):
        choose_ops("cpu", CPU, torch.bfloat16, DIMS)
    with pytest.raises(FileNotFoundError, match="set HOME or XDG_CACHE_HOME"):
        default_model_dir()
    assert load_profile("a") is None
    save_profile("a", [])
    assert "the profile cannot be saved" in caplog.messages[-1]


def test_which_kernels_serve_on_gpus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    assert choose_ops("triton", cuda, torch.float32, DIMS).kind == "triton"
    for setting, dtype, message in (
        ("cpu", torch.bfloat16, "cpu has none for bfloat16 on cuda"),
        ("flashinfer", torch.float32, "flashinfer has none for float32 on cuda"),
        ("triton", torch.float64, "triton has none for float64 on cuda"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_ops(setting, cuda, dtype, DIMS)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert choose_ops("auto", cuda, torch.bfloat16, DIMS).kind == "triton"
    with pytest.raises(ConfigError, match=r"engine\.kernels: attention by FlashInfer needs its package"):
        choose_ops("flashinfer", cuda, torch.bfloat16, DIMS)
    assert choose_ops("auto", cuda, torch.float64, DIMS) is REFERENCE
    assert not caplog.messages
