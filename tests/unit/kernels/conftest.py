"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.cpu.compiler import InstructionSet, KernelsUnavailable
from kernels.cpu.library import CpuKernels
from models.default import user_cache
from tests.support.rig import sets_to_test


@pytest.fixture(scope="module", params=sets_to_test(), ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    """The CPU kernels of each instruction set that this processor supports, and tiles in software; on two threads."""
    target: InstructionSet = request.param
    try:
        kernels = CpuKernels(user_cache() / "kernels", target)
    except KernelsUnavailable as reason:
        pytest.skip(f"no CPU kernels: {reason}")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield kernels
    torch.set_num_threads(threads)
