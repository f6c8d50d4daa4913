"""Top-level package names can collide with other distributions: transformers also uses one named `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import PACKAGES, foreign_package
from tests.support.paths import ROOT


def run_python(code: str, *search: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    code = """
import kernels
from pathlib import Path
assert Path(kernels.__file__).resolve() == Path("kernels/__init__.py").resolve()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
assert is_kernels_available() is False
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
logits = LlamaForCausalLM(LlamaConfig(**sizes))(torch.tensor([[1, 2, 3]])).logits
assert logits.shape == (1, 3, 32) and logits.isfinite().all()
"""
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(PACKAGES) - {"server"}))
def test_a_foreign_package_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    code = "import sys; sys.argv = ['magicdec', 'fetch', '--help']; from server.cli import main; main()"
    done = run_python(code, tmp_path, ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the package '{name}' of magicdec is found in {tmp_path / name}")


def test_our_own_packages_pass() -> None:
    assert foreign_package(ROOT) is None
