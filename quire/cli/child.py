"""What a supervised process does first: tie its life to its supervisor's.

The supervisor's pid comes in QUIRE_SUPERVISED. Linux only; elsewhere it does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
VARIABLE = "QUIRE_SUPERVISED"


def end_with_parent() -> None:
    """Have the kernel kill this process when its supervisor dies, however it dies.

    A supervisor that died before the call is noticed by the parent's pid being another.
    The variable is removed, so that a grandchild is not tied to a process it does not know.
    """
    parent = os.environ.pop(VARIABLE, "")
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and str(os.getppid()) != parent:
        os._exit(1)
