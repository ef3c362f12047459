"""How often, and how much at once, one caller may hand in about datasets.

Guarantees: of the requests that `LIMITED` names, each caller gets at most so many a minute, and has at most one at a
time, before a byte of its body is read: a manifest may be 100 MiB long. Counted by each authority for itself, and
anew after a start.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from cloister.errors import QuotaExceededError

DEFAULT_SEALS_PER_MINUTE = 120
LIMITED = re.compile(r"/v1/datasets(/[^/]+/(sealing|openings|endings))?")
MAX_BODY_BYTES = 100 * 1024 * 1024
"""Of these: 10,000 shards of five files each take 30 MiB."""
_WINDOW_S = 60.0


class Uploads:
    """Counts by caller. Thread-safe."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._begun: dict[str, deque[float]] = {}
        self._running: set[str] = set()

    @contextlib.contextmanager
    def turn(self, caller: str) -> Iterator[None]:
        """Held while one request of `caller` is worked on.

        Raises:
            QuotaExceededError: they have had enough for this minute, or another one of theirs is not done.
        """
        with self._lock:
            now = self._clock()
            for name in [name for name, begun in self._begun.items() if begun[-1] <= now - _WINDOW_S]:
                del self._begun[name]
            begun = self._begun.get(caller, deque())
            while begun and begun[0] <= now - _WINDOW_S:
                begun.popleft()
            if caller in self._running:
                raise QuotaExceededError("another request of yours about a dataset is not done yet", "wait for it", 1)
            if len(begun) >= self._limit:
                wait = int(begun[0] + _WINDOW_S - now) + 1
                raise QuotaExceededError(
                    f"you may hand in {self._limit} requests about datasets a minute", f"try again in {wait} s", wait
                )
            begun.append(now)
            self._begun[caller] = begun
            self._running.add(caller)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(caller)
