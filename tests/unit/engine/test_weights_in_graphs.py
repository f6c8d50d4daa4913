"""Captured forwards hold the addresses of weights: an update leaves none of the old ones, and new ones replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from models.loader import load_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.engines import TINY, run, tiny_engine
from tests.support.profiles import is_all
from tests.support.ranks import write_random_model

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.gpu import INTERPRETED
from kernels.gpu.gpu_ops import GpuOps

if not INTERPRETED:
    pytest.skip("tests/gpu has this on a GPU", allow_module_level=True)

from tests.support.recorded import Recorded

# The interpreter takes its time for every layer, head and page that a row may have.
SMALL = replace(TINY, num_layers=1, num_heads=1, num_kv_heads=1)
SHAPE, LENGTH = (TINY, TINY.max_position_embeddings) if is_all() else (SMALL, 40)


def drafted_and_sampled(engine: Engine) -> list[tuple[list[int], int, int]]:
    params = SamplingParams(max_tokens=9 if is_all() else 5, temperature=1.0, seed=3, ignore_eos=True)
    (outputs,) = run(engine, [AddRequest("one", list(range(2, 12)), params)]).values()
    return [(each.tokens, each.drafted, each.accepted) for each in outputs]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # outputs of padding queries are undefined
def test_graphs_are_captured_anew(tmp_path: Path) -> None:
    folders = [write_random_model(tmp_path / str(seed), SHAPE, dtype=torch.float32, seed=seed) for seed in range(2)]

    def start(folder: Path) -> tuple[Engine, list[Recorded]]:
        made: list[Recorded] = []

        def recorder() -> Recorded:
            made.append(Recorded())
            return made[-1]

        device, dtype = torch.device("cpu"), torch.float32
        ops = GpuOps(make_recorder=recorder)
        weights = WeightChoice(drafts="int8")
        model = load_model(
            folder, dtype=dtype, device=device, group=Group.single(), progress=False, ops=ops, weights=weights
        )
        settings: dict[str, Any] = {"scheduler": {"max_rows": 1}, "speculation": {"weights": "int8"}}
        settings |= {"max_model_len": LENGTH}
        return tiny_engine(model, gamma=2, budget=8, directory=folder, **settings), made

    (fresh, _), (engine, made) = start(folders[1]), start(folders[0])
    expected, first = drafted_and_sampled(fresh), drafted_and_sampled(engine)
    engine.update_weights(str(folders[1]))
    (old, new) = made
    assert (old.released, old.held) == (True, 0)
    assert (new.captured, new.replayed) == (old.captured, 0)
    assert drafted_and_sampled(engine) == expected != first
    assert new.replayed > 0
    engine.sleep()
    assert (new.released, new.held, len(made)) == (True, 0, 2)
