"""Sealing files and uploading them while the next rows are read.

Guarantees: what leaves this module is ciphertext; each file has a key and a name (AAD) of its own; files lie in a
folder whose name nobody can guess; `discard` removes what was uploaded. At most `IN_HAND` files are in memory.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cloister.canonical import b64, sha256_hex
from cloister.datasets.manifest import SealedFile
from cloister.datasets.partition import Part
from cloister.sealing.envelope import new_key
from cloister.sealing.shard import seal_table, shard_aad
from cloister.stores.blobs import Blobs

WORKERS = 2
IN_HAND = 4
T = TypeVar("T")


class Upload:
    """The files of one coming version. `close` it, whatever happens."""

    def __init__(self, blobs: Blobs, dataset: str, version: int, region: str) -> None:
        self._blobs = blobs
        self._named = dataset, version, region
        self._folder = f"datasets/{dataset}/{secrets.token_hex(8)}"
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="seal")
        self._in_hand: deque[Future[tuple[SealedFile, bytes]]] = deque()
        self.files: list[SealedFile] = []
        self.keys: dict[str, str] = {}
        """Data keys in base64, by `SealedFile.key_name`: what the authority is told."""

    def add(self, part: Part) -> None:
        """Take one file to seal. Waits while enough of them are in hand.

        Raises:
            CloisterError: one that was added before could not be sealed or stored.
        """
        if len(self._in_hand) >= IN_HAND:
            self._take()
        self._in_hand.append(self._pool.submit(self._seal, part))

    def finish(self) -> None:
        """Wait until everything is stored. Raises as `add`."""
        while self._in_hand:
            self._take()

    def discard(self) -> None:
        """Remove what was uploaded."""
        self.close()
        self._blobs.remove_tree(self._folder)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _take(self) -> None:
        file, key = self._in_hand.popleft().result()
        self.files.append(file)
        self.keys[file.key_name] = b64(key)

    def _seal(self, part: Part) -> tuple[SealedFile, bytes]:
        dataset, version, region = self._named
        key = new_key()
        sealed = seal_table(part.table, key, shard_aad(dataset, version, part.part, part.shard, region))
        file = SealedFile(
            shard=part.shard,
            sealed_in=version,
            role=part.role,
            part=part.part,
            columns=tuple(part.table.column_names),
            rows=part.table.num_rows,
            path=f"{self._folder}/{part.shard}.{part.part}.parquet",
            bytes=len(sealed),
            sha256=sha256_hex(sealed),
        )
        self._blobs.put(file.path, sealed)
        return file, key


def ahead(source: Iterator[T], depth: int) -> Generator[T]:
    """The same items, `depth` of them fetched ahead in a thread of its own. Raises what `source` raises, in its place.

    Close it if it is not read to its end.
    """
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read")
    waiting = deque(pool.submit(next, source, end) for _ in range(depth))
    try:
        while True:
            item = waiting.popleft().result()
            if item is end:
                return
            waiting.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]  # it is no `end`
    finally:
        pool.shutdown(cancel_futures=True)
