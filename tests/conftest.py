"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

from kernels.cpu.openmp import sleep_while_waiting
from models.default import default_model_dir, is_model_dir
from tests.support.private_cache import use_private_cache
from tests.support.profiles import load_profiles

sleep_while_waiting()  # before any test module imports torch: several processes share few cores
# Torch's threads would wait for each other in every operator, and the cores are busy with other tests. Tests of threads
# set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # some containers set this; tests start many processes of Python
for _override in ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):  # some containers for GPUs set these
    os.environ.pop(_override, None)  # float32 would be computed in TF32, with errors of 1e-3


if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the variable
    use_private_cache()

_KILLING = ("test_chaos", "test_faults", "test_lifecycle", "test_torchrun", "test_trainers")
"""Files of e2e whose tests kill, stop or change servers."""

load_profiles()
gc.disable()  # while test modules import torch and others: nothing is garbage yet, and collecting takes a fifth of that


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but never go through what all the imports made."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing where only tests of GPUs run
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests of `-n` to processes. The tests of a file stay in one process, for its fixtures. Those of e2e
    are two groups, which start first since they take longest: tests that kill servers, most of them their own, and
    tests that share servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if not file.startswith("tests/e2e/"):
                return file
            return "e2e, killed" if Path(file).stem in _KILLING else "e2e, shared"

    return ByFile(config, log)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's directory."""
    directory = default_model_dir()
    if not is_model_dir(directory):
        pytest.fail(f"the default model is not in {directory.resolve()}: run `make model`", pytrace=False)
    return directory


@pytest.fixture(scope="session")
def int4_model_dir() -> Path:
    """The directory of `default-int4`."""
    directory = default_model_dir("default-int4")
    if not is_model_dir(directory):
        pytest.skip(f"default-int4 is not in {directory.resolve()}: run `make model`")
    return directory
