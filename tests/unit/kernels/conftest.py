"""What tests of kernels share."""

from __future__ import annotations

import pytest

from kernels.cpu.compiler import InstructionSet, KernelsUnavailable
from kernels.cpu.library import CpuKernels
from models.default import user_cache
from tests.support.rig import sets_to_test


@pytest.fixture(scope="module", params=sets_to_test(), ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """The CPU kernels of each instruction set that this processor supports, and tiles in software."""
    target: InstructionSet = request.param
    try:
        return CpuKernels(user_cache() / "kernels", target)
    except KernelsUnavailable as reason:
        pytest.skip(f"no CPU kernels: {reason}")
