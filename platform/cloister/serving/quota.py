"""Row budgets: what a replica may answer to whom, spent from blocks that the authority debited beforehand.

Guarantees: a unit is spent at most once; units die with the window they were granted for; the authority is asked at
most once at a time per subject; an authority that cannot be reached means no answer. A crash strands at most one
block per subject (it over-charges, never under-charges).

Not guaranteed: a limit that was raised in the middle of a window is noticed only after `RECHECK_S`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cloister.errors import QuotaExceededError, UnavailableError

RECHECK_S = 5.0  # how long a refusal is repeated without asking the authority again
MAX_SUBJECTS = 10_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Units to spend until `window_ends` (Unix seconds). `granted` 0 means: no more in this window."""

    granted: int
    window_ends: float


class QuotaSource(Protocol):
    """Where blocks come from. Called in a thread; it may wait for the network, but must have a timeout."""

    def take_block(self, subject: str, wanted: int) -> Block:
        """A block of about `wanted` units that is durably debited already."""
        ...


@dataclass(slots=True)
class _Account:
    left: int = 0
    window_ends: float = 0.0
    refused_until: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Quota:
    """One row is one unit. All methods run in one event loop, so a debit without an `await` is atomic."""

    def __init__(
        self, source: QuotaSource, *, block_size: int, clock: Callable[[], float],
        steady: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Windows are by `clock`, the authority's; a refusal is repeated by `steady`, which nobody sets back."""
        self._source = source
        self._block_size = block_size
        self._clock, self._steady = clock, steady
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def check(self, subject: str) -> None:
        """Refuse early, before a body is read, whoever is known to have nothing left.

        Raises:
            QuotaExceededError: nothing left in this window.
        """
        account = self._accounts.get(subject)
        if account is not None and account.left == 0 and self._steady() < account.refused_until:
            raise self._exceeded(account)

    async def take(self, subject: str, units: int) -> None:
        """Spend `units`, all or nothing.

        Raises:
            QuotaExceededError: not that many left in this window.
            UnavailableError: the authority did not answer.
        """
        account = self._account(subject)
        if self._spend(account, units):
            return
        async with account.lock:  # single flight: whoever waits here finds the block that the first one took
            while not self._spend(account, units):
                if self._steady() < account.refused_until:
                    raise self._exceeded(account)
                block = await self._take_block(subject, max(units - account.left, self._block_size))
                same_window = block.window_ends == account.window_ends
                account.left = block.granted + (account.left if same_window else 0)
                account.window_ends = block.window_ends
                if block.granted == 0 or self._clock() >= block.window_ends:
                    account.refused_until = self._steady() + min(RECHECK_S, block.window_ends - self._clock())
                    raise self._exceeded(account)

    def _spend(self, account: _Account, units: int) -> bool:
        if self._clock() >= account.window_ends:
            account.left = 0
        if account.left < units:
            return False
        account.left -= units
        return True

    async def _take_block(self, subject: str, wanted: int) -> Block:
        try:
            block = await asyncio.to_thread(self._source.take_block, subject, wanted)
        except Exception as error:  # noqa: BLE001  (whatever went wrong, nothing was granted)
            # What the authority tells this replica (wrong key, endpoint stopped) is not for the caller's ears.
            _log.warning("no quota block: %s", type(error).__name__)
            raise UnavailableError("the quota of this caller cannot be read", "try again in a moment") from None
        if block.granted < 0 or not math.isfinite(block.window_ends):
            raise UnavailableError("the quota of this caller cannot be read", "try again in a moment")
        return block

    def _account(self, subject: str) -> _Account:
        account = self._accounts.setdefault(subject, _Account())
        self._accounts.move_to_end(subject)
        if len(self._accounts) > MAX_SUBJECTS:
            self._accounts.popitem(last=False)  # its units are lost: over-charged, never under-charged
        return account

    def _exceeded(self, account: _Account) -> QuotaExceededError:
        wait_s = max(1, math.ceil(account.window_ends - self._clock()))
        return QuotaExceededError(
            "the quota of this caller does not cover the request",
            f"send fewer rows, or try again in {wait_s} seconds",
            wait_s,
        )
