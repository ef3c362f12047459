"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0  # a machine that does much else may take that long


def wait_for(condition: Callable[[], object], what: str = "it", timeout_s: float = PATIENCE_S) -> float:
    """Wait until `condition` holds; how long that took, in seconds.

    Raises:
        TimeoutError: it does not hold after `timeout_s`.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"{what} did not come about within {timeout_s:g} s")
        time.sleep(0.02)
    return time.monotonic() - start
