"""Kernel tests. Without a GPU the Triton kernels run in triton's interpreter, on CPU tensors.

The interpreter must be chosen before triton is first imported, so it is chosen here. On a machine
with a GPU nothing is set (tests/gpu runs the real kernels); there, `TRITON_INTERPRET=1 pytest
tests/unit/kernels` interprets.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

_TRITON_CAME_FIRST = "triton" in sys.modules

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def interpreter() -> None:
    """Ask for triton's interpreter; tests of torch code do without."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 to interpret kernels on a machine with a GPU")
    if _TRITON_CAME_FIRST and not _standard_library_is_interpreted():
        pytest.fail(
            "triton was imported before TRITON_INTERPRET=1 was set; run tests/unit/kernels alone"
        )


def _standard_library_is_interpreted() -> bool:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.philox_impl, InterpretedFunction)
