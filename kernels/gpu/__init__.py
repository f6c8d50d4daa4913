"""Triton kernels for NVIDIA GPUs. Triton's interpreter runs the same functions on a CPU, for tests.

Importing this package needs Triton, so it is imported where a GPU is chosen, not at the top of other modules.
"""

from __future__ import annotations

try:
    import triton
except ImportError as error:
    raise ImportError("kernels for GPUs need Triton: pip install 'magicdec[cuda]'") from error

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets kernels (TRITON_INTERPRET=1, read when Triton is first imported)."""
