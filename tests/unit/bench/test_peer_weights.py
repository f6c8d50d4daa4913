"""magicdec and vllm as contenders: settings that follow from their names, and directories of quantized weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench.corpus import BenchError
from bench.peers.contenders import Peer, choose, quantized
from bench.peers.process import PEERS
from bench.peers.programs.driver import load_peer
from tests.support.tiny import write_model


def magicdec(contender: Peer, model: Path) -> Any:
    settings = {"model": str(model), "threads": 1, "rows": 2, "row_tokens": 200, "keep_prompts": False, "modes": ()}
    return load_peer(str(PEERS / "magicdec.py"), {**settings, "options": contender.options})


@pytest.mark.parametrize("name", ["magicdec off", "magicdec auto", "magicdec prefix", "magicdec prefix auto"])
def test_magicdec_reuses_prefixes_only_where_its_name_says_so(name: str, tmp_path: Path) -> None:
    (contender,) = choose(name, [])
    peer = magicdec(contender, write_model(tmp_path))
    assert peer._config.cache.prefix == ("prefix" in name) == ("prefix cache" in peer.about)


@pytest.mark.parametrize("weights", ["dense", "int8", "int4"])
def test_magicdec_multiplies_by_what_its_name_says(weights: str, tmp_path: Path) -> None:
    (contender,) = choose(f"magicdec {weights} off".replace("dense ", ""), [])
    peer = magicdec(contender, write_model(tmp_path))
    assert peer._config.weights == weights
    assert ("weights" if weights == "dense" else f", {weights} weights") in peer.about
    peer.prepare(1, 40, 0.0)
    assert peer._engine.stats().weights["target"].partition(" ")[0] == weights
    peer.stop()


def test_a_directory_of_quantized_weights(tmp_path: Path) -> None:
    """Both engines read the same weights; the others keep the model that is compared."""
    one, other = write_model(tmp_path / "model"), write_model(tmp_path / "int4")
    off, auto, vllm = quantized(other)
    assert [peer.name for peer in (off, auto, vllm)] == ["magicdec int4 off", "magicdec int4 auto", "vllm int4"]
    peer = magicdec(off, one)
    assert (peer._config.model, peer._config.weights) == (str(other), "auto")
    assert vllm.options == {"model": str(other)}
    with pytest.raises(BenchError, match=r"--quantized .*none: it is not a directory"):
        quantized(tmp_path / "none")


@pytest.mark.parametrize("directory", [None, "models/int4"])
def test_vllm_takes_a_directory(directory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    fake = ModuleType("vllm")
    fake.__dict__.update(__version__="0", SamplingParams=object)
    fake.__dict__["LLM"] = lambda **given: asked.update(given) or SimpleNamespace(llm_engine=None)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
    settings = {
        "model": "m",
        "threads": 1,
        "rows": 2,
        "row_tokens": 200,
        "kv_bytes": 1,
        "seed": 0,
        "keep_prompts": False,
    }
    peer = load_peer(str(PEERS / "vllm.py"), settings | {"options": {"model": directory} if directory else {}})
    assert asked["model"] == (directory or "m")
    assert peer.about == ("vllm 0, weights of int4" if directory else "vllm 0, bfloat16 weights")
