"""Named places at which a test may stop, kill or slow this process; nothing happens without `ESPALIER_FAILPOINT`.

    ESPALIER_FAILPOINT=<where>:<kill|stop|raise|delay_ms=N>[:<k-th hit>]      several are separated by commas

The k-th hit (default 1) of `where` in this process acts: `kill` is SIGKILL, `stop` is SIGSTOP, `raise` raises
FailpointReached.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

VARIABLE = "ESPALIER_FAILPOINT"
_hits: Counter[str] = Counter()


class FailpointReached(RuntimeError):
    """A test wants an error at this place."""


def failpoint(where: str) -> None:
    """Stop, kill or slow this process if the environment names this place; else one look-up in a dictionary."""
    plan = os.environ.get(VARIABLE)
    if plan is None:
        return
    _hits[where] += 1
    for entry in plan.split(","):
        place, action, *count = entry.split(":")
        if place == where and _hits[where] == int(count[0] if count else 1):
            _run_action(where, action)


def _run_action(where: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise FailpointReached(where)
    elif action.startswith("delay_ms="):
        time.sleep(int(action.removeprefix("delay_ms=")) / 1000)
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}; use kill, stop, raise or delay_ms=N")
