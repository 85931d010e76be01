"""Child processes that end with their parent, whatever ended the parent (the kernel's parent-death signal)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "ESPALIER_PARENT"
PR_SET_PDEATHSIG = 1


def parent_environment() -> dict[str, str]:
    """The variable with which this process starts a child that calls `end_with_parent`."""
    return {PARENT_VARIABLE: str(os.getpid())}


def end_with_parent(how: signal.Signals) -> None:
    """Ask the kernel for signal `how` when the parent's starting thread ends (Linux); exit at once if it already has.

    The child calls it in its first lines: `preexec_fn` is not safe with threads. Without `ESPALIER_PARENT` nothing
    changes.
    """
    expected = os.environ.get(PARENT_VARIABLE)
    if expected is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != int(expected):
        os._exit(75)
