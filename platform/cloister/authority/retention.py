"""The authority's own schedule: ends what is due, finishes what earlier erasures have left to do, and ends runs that
never began.

Guarantees: it starts with the authority and comes back every `interval_s` seconds whatever went wrong before; several
authorities over one state do each other's work at most once.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from cloister.authority.ends import Ends
from cloister.authority.lifecycle import Lifecycle
from cloister.authority.shredding import Shredding
from cloister.errors import CloisterError

DEFAULT_INTERVAL_S = 600.0
_log = logging.getLogger("cloister.authority")


class Retention:
    """A thread, once started."""

    def __init__(self, lifecycle: Lifecycle, shredding: Shredding, ends: Ends, interval_s: float) -> None:
        self._lifecycle = lifecycle
        self._shredding = shredding
        self._ends = ends
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True, name="retention")
        self._thread.start()

    def stop(self) -> None:
        """End it, after what it is doing at this moment."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def once(self) -> list[str]:
        """Do what there is to do. Returns the erasures that it made."""
        with contextlib.ExitStack() as also:  # whatever fails of it
            also.callback(self._ends.expire)
            also.callback(self._shredding.settle)
            return self._lifecycle.expire_due()

    def _run(self) -> None:
        while True:
            try:
                self.once()
            except CloisterError as error:
                _log.error("retention: %s; it is tried again", error)
            except Exception as error:  # noqa: BLE001  (it must come back; the text may hold anything)
                _log.error("retention: unexpected %s; it is tried again", type(error).__name__)
            if self._stopping.wait(self._interval_s):
                return
