"""Changed bytes, by the ten thousand: makes them, and sees that none of them opens.

The opening happens in a child process of its own with little memory to spare: a crash or a runaway of the libraries
that parse the bytes is a finding, not the end of the tests. What is tried is decided by the seed alone, up to the
random nonces in what is sealed; the child notes what it is at, so that a crash has a place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from cloister.canonical import canonical_json
from cloister.client.verify import signed_manifest
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, Lineage, SealedFile
from cloister.datasets.subjects import index_table, protect
from cloister.errors import CloisterError, IntegrityError
from cloister.sealing import envelope, shard, stream
from cloister.sealing.lease import ReceivingKey, seal_to
from cloister.signing import dsse, keys

MEMORY_TO_SPARE = 512 << 20
TIMEOUT_S = 600
# Address space is limited: no pool reserves any, and nothing takes more of it on a machine with more cores.
FRUGAL = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
KEY, KEK = bytes(range(32)), bytes(range(32, 64))
SECRET = "Sekretariatswert"
"""What no error may show."""
PLACE = {"dataset": "adult", "version": 1, "shard": "train-000", "region": "eu"}
CONTEXT = {"kind": "checkpoint", "run": "r1", "step": "100"}
SMALL = pa.table(
    {"age": [39, 50, 38], "note": [SECRET, "x", SECRET], "image": pa.array([b"abcd" * 4] * 3, pa.binary(16))}
)


@dataclass(frozen=True)
class Target:
    """One sealed thing. `cuts` are where its parts meet."""

    name: str
    sealed: bytes
    open: Callable[[bytes], object]
    others: tuple[bytes, ...] = ()
    """Sealed for another place or under another key: to take pieces from, and refused whole."""
    cuts: Callable[[bytes], list[int]] = lambda data: [0, len(data)]
    twin: bytes = b""
    """The same sealed once more. To take pieces from only: whole it is as good, and nobody promises freshness here."""
    same_is_fine: bool = False
    """Whether bytes that mean the very same are accepted: JSON, with its hints and its base64, is no binary format."""


@dataclass
class Report:
    tried: int = 0
    refused: int = 0
    equal: int = 0
    """Opened to the very same, where that is fine."""
    faults: list[str] = field(default_factory=list)


def aad(part: str = "confidential", **changes: Any) -> bytes:
    return shard.shard_aad(**(PLACE | {"part": part} | changes))


def sealed_in_groups(table: pa.Table, rows: int, key: bytes = KEY, prefix: bytes | None = None) -> bytes:
    """As `seal_table`, in several row groups of small pages."""
    sink = pa.BufferOutputStream()
    properties = pe.create_encryption_properties(
        key, aad_prefix=prefix or aad(), store_aad_prefix=False, encryption_algorithm="AES_GCM_V1",
        plaintext_footer=False,
    )  # fmt: skip
    pq.write_table(
        table, sink, encryption_properties=properties, row_group_size=rows, compression="NONE", write_statistics=False,
        data_page_size=256, use_dictionary=["note"],
    )  # fmt: skip
    return bytes(sink.getvalue())


def modules(sealed: bytes) -> list[int]:
    """Where a shard's encrypted modules (pages, their headers, the footer) begin and end."""
    cuts, place = [4], 4
    while 4 <= place < len(sealed) - 8:
        place += 4 + int.from_bytes(sealed[place : place + 4], "little")
        cuts.append(min(place, len(sealed)))
    return cuts


def chunks(sealed: bytes) -> list[int]:
    return [*range(stream.HEADER_BYTES, len(sealed), stream.CHUNK_BYTES + stream.TAG_BYTES), len(sealed)]


def targets() -> dict[str, Target]:
    """One of each format that is stored or sent."""
    found = [*_shards(), *_envelopes(), *_streams(), _lease(), _manifest()]
    return {target.name: target for target in found}


def _shards() -> Iterator[Target]:
    long = pa.table(
        {"age": list(range(400)), "note": [f"{SECRET}{i % 7}" for i in range(400)],
         "image": pa.array([bytes([i % 251]) * 16 for i in range(400)], pa.binary(16))}
    )  # fmt: skip
    tags = _tags(40)
    for name, table, rows in (("shard", SMALL, None), ("groups", long, 100), ("index", index_table(tags), None)):
        prefix = aad("index" if name == "index" else "confidential")

        def again(prefix: bytes, table: pa.Table = table, rows: int | None = rows, key: bytes = KEY) -> bytes:
            return shard.seal_table(table, key, prefix) if rows is None else sealed_in_groups(table, rows, key, prefix)

        yield Target(
            name, again(prefix), lambda data, prefix=prefix: shard.open_table(data, KEY, prefix),  # type: ignore[misc]
            (again(aad(shard="train-001")), again(prefix, key=KEK)), modules, again(prefix),
        )  # fmt: skip


def _tags(rows: int) -> Any:
    from cloister.datasets.schema import DatasetSchema
    from cloister.datasets.subjects import SubjectKeys

    columns = [{"name": "id", "type": "text", "class": "restricted", "role": "identifier"}]
    facts = {"name": "a", "purpose": "p", "region": "eu", "retention": "P1Y", "columns": columns}
    table = pa.table({"id": [f"{SECRET}{i}" for i in range(rows)]})
    return protect(table, DatasetSchema.from_mapping(facts), SubjectKeys(pseudonym=KEY, index=KEK))[1]


def _envelopes() -> Iterator[Target]:
    others = tuple(envelope.wrap_key(KEK, KEY, b"adult@1/train-000/public") for _ in range(2))
    yield Target(
        "wrapped key", envelope.wrap_key(KEK, KEY, b"adult@1"), lambda d: envelope.unwrap_key(KEK, d, b"adult@1"),
        others, lambda _: [0, 1, 13, 45, 61], envelope.wrap_key(KEK, KEY, b"adult@1"),
    )  # fmt: skip
    one, two = (envelope.wrap_named(KEK, KEY, b"adult@1", name="dataset/adult", version=version) for version in (1, 2))
    yield Target(
        "named key", one, lambda data: envelope.unwrap_named(KEK, data, b"adult@1", name="dataset/adult"),
        (envelope.wrap_named(KEK, KEY, b"adult@1", name="dataset/bank", version=1),), lambda _: [0, 4, 5, 17, 49, 65],
        two,
    )  # fmt: skip


def _streams() -> Iterator[Target]:
    for name, size in (("stream", 7), ("long stream", 2 * stream.CHUNK_BYTES + 100)):
        plaintext = (SECRET.encode() * (size // 16 + 1))[:size]

        def opened(sealed: bytes) -> bytes:
            buffer = bytearray(max(1, len(sealed)))
            try:
                return bytes(buffer[: stream.open_into(KEY, sealed, CONTEXT, buffer)])
            except IntegrityError:
                assert not any(buffer), "plaintext was left in the buffer"
                raise

        other = stream.seal(KEY, plaintext, CONTEXT | {"step": "101"})
        sealed, twin = (stream.seal(KEY, plaintext, CONTEXT) for _ in range(2))
        yield Target(name, sealed, opened, (other,), chunks, twin)


def _lease() -> Target:
    key = ReceivingKey.from_seed(KEY)
    return Target(
        "lease", seal_to(key.public, SECRET.encode(), b"lease 7"), lambda data: key.open(data, b"lease 7"),
        (seal_to(key.public, b"x" * 16, b"lease 8"),), lambda _: [0, 1, 33],
        seal_to(key.public, SECRET.encode(), b"lease 7"),
    )  # fmt: skip


def manifest() -> DatasetManifest:
    columns = [{"name": "age", "type": "integer", "class": "internal", "bounds": [0, 99]}]
    facts = {"name": "adult", "purpose": "p", "region": "eu", "retention": "P1Y", "unit": "row", "columns": columns}
    file = SealedFile(
        shard="train-000", sealed_in=1, role="train", part="internal", columns=("age",), rows=3, path="a/b", bytes=9,
        sha256="0" * 64,
    )  # fmt: skip
    lineage = Lineage(kind="seal", code="sha256:" + "0" * 64, rows_before=0, rows_after=3)
    return DatasetManifest(name="adult", version=1, dataset_schema=facts, files=(file,), lineage=lineage)


def _manifest() -> Target:
    owner = keys.generate_ed25519()
    public = keys.public_to_pem(owner.public_key()).decode()

    def signed(made: DatasetManifest) -> bytes:
        digest = made.digest.removeprefix("sha256:")
        statement = dsse.statement("adult", digest, MANIFEST_PREDICATE, made.model_dump(mode="json"))
        return canonical_json(dsse.sign(statement, owner))

    def opened(data: bytes) -> DatasetManifest:
        return signed_manifest(dsse.strict_json(data), public)

    one = manifest()
    return Target(
        "manifest", signed(one), opened, twin=signed(one.model_copy(update={"version": 2})), same_is_fine=True
    )


# What is done to them.


def flips(target: Target) -> Iterator[bytes]:
    """Every single bit."""
    for bit in range(len(target.sealed) * 8):
        changed = bytearray(target.sealed)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def cuts(target: Target) -> Iterator[bytes]:
    """Every beginning and every end."""
    for size in range(len(target.sealed)):
        yield target.sealed[:size]
        yield target.sealed[size + 1 :]


def moves(target: Target) -> Iterator[bytes]:
    """Parts (pages, chunks) swapped, repeated, left out, and taken from other files at every place where they fit."""
    places = target.cuts(target.sealed)
    parts = [target.sealed[a:b] for a, b in itertools.pairwise(places)]
    head, tail = target.sealed[: places[0]], target.sealed[places[-1] :]
    count = range(len(parts))
    for i in count:
        yield head + b"".join(parts[:i] + parts[i + 1 :]) + tail
        yield head + b"".join(parts[: i + 1] + parts[i:]) + tail
        for j in count[i + 1 :]:
            order = list(parts)
            order[i], order[j] = order[j], order[i]
            yield head + b"".join(order) + tail
    for other in (*target.others, target.twin):
        theirs = target.cuts(other)
        for i, (a, b) in enumerate(itertools.pairwise(theirs)):
            if i < len(parts):
                yield head + b"".join([*parts[:i], other[a:b], *parts[i + 1 :]]) + tail
        yield other


def mutations(target: Target, chance: random.Random) -> Iterator[bytes]:
    """Without end: one to three random changes each."""
    while True:
        changed = bytearray(target.sealed)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            chance.choice(_CHANGES)(changed, target, chance)
        yield bytes(changed)


def _span(data: bytearray, chance: random.Random) -> slice:
    start = chance.randrange(len(data) + 1)
    return slice(start, min(len(data), start + chance.choice((1, 2, 4, 8, 16, 60, 400))))


def _flip(data: bytearray, _: Target, chance: random.Random) -> None:
    for _bit in range(chance.randrange(1, 9) if data else 0):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _overwrite(data: bytearray, _: Target, chance: random.Random) -> None:
    span = _span(data, chance)
    data[span] = chance.randbytes(span.stop - span.start)


def _zero(data: bytearray, _: Target, chance: random.Random) -> None:
    span = _span(data, chance)
    data[span] = bytes(span.stop - span.start)


def _insert(data: bytearray, _: Target, chance: random.Random) -> None:
    place = chance.randrange(len(data) + 1)
    data[place:place] = chance.randbytes(chance.choice((1, 4, 16, 100)))


def _remove(data: bytearray, _: Target, chance: random.Random) -> None:
    del data[_span(data, chance)]


def _truncate(data: bytearray, _: Target, chance: random.Random) -> None:
    size = chance.randrange(len(data) + 1)
    if chance.random() < 0.5:
        del data[size:]
    else:
        del data[:size]


def _repeat(data: bytearray, _: Target, chance: random.Random) -> None:
    span, place = _span(data, chance), chance.randrange(len(data) + 1)
    data[place:place] = data[span]


def _exchange(data: bytearray, _: Target, chance: random.Random) -> None:
    a, b = _span(data, chance), _span(data, chance)
    data[a], data[b] = data[b], data[a]


def _length(data: bytearray, target: Target, chance: random.Random) -> None:
    """A length field, or what may be one, says something else."""
    places = target.cuts(target.sealed) or [0]
    place = chance.choice([*places, max(0, len(data) - 8)])
    old = int.from_bytes(data[place : place + 4], "little")
    new = chance.choice((0, 1, old - 1, old + 1, 2**31 - 1, 2**31, 2**32 - 1, chance.getrandbits(32)))
    data[place : place + 4] = (new % 2**32).to_bytes(4, chance.choice(("little", "big")))  # type: ignore[arg-type]


def _splice(data: bytearray, target: Target, chance: random.Random) -> None:
    other = chance.choice((*target.others, target.twin or target.sealed, target.sealed))
    span = _span(data, chance)
    start = span.start if chance.random() < 0.7 else chance.randrange(len(other))
    data[span] = other[start : start + span.stop - span.start]


def _part(data: bytearray, target: Target, chance: random.Random) -> None:
    """A whole part in the place of another: of this file, or of another one."""
    places = target.cuts(target.sealed)
    source = chance.choice((*target.others, target.twin or target.sealed, target.sealed))
    theirs = target.cuts(source)
    if len(places) < 3 or len(theirs) < 3:
        return _splice(data, target, chance)
    i, j = chance.randrange(len(places) - 1), chance.randrange(len(theirs) - 1)
    end = places[i] if chance.random() < 0.3 else places[i + 1]  # put between, or put instead
    data[places[i] : end] = source[theirs[j] : theirs[j + 1]]
    return None


_CHANGES = (
    _flip, _flip, _overwrite, _zero, _insert, _remove, _truncate, _repeat, _exchange, _length, _length, _splice,
    _splice, _part, _part, _part,
)  # fmt: skip


def judge(target: Target, changed: bytes, report: Report, original: object) -> None:
    report.tried += 1
    try:
        opened = target.open(changed)
    except CloisterError as error:
        report.refused += 1
        if not target.same_is_fine and not isinstance(error, IntegrityError):
            report.faults.append(f"{target.name}: refused as {type(error).__name__}: {changed.hex()[:4000]}")
        shown = "".join(traceback.format_exception(error)) + str(error.hint)
        if SECRET in shown:
            report.faults.append(f"{target.name}: the refusal shows a value: {changed.hex()[:4000]}")
        return
    except Exception as error:  # noqa: BLE001  (whatever it is, it is a finding)
        report.faults.append(f"{target.name}: {type(error).__name__}: {changed.hex()[:4000]}")
        return
    if target.same_is_fine and opened == original:
        report.equal += 1
    else:
        report.faults.append(f"{target.name}: accepted: {changed.hex()[:4000]}")


def _campaign(kind: str, names: list[str], count: int, seed: int, place: Path) -> Report:
    report, known = Report(), targets()
    originals = {name: known[name].open(known[name].sealed) for name in names}
    with place.open("wb", buffering=0) as note:
        chance = random.Random(seed)  # noqa: S311  which bytes to change is no secret
        for name in names:
            target = known[name]
            made = {"flips": flips, "cuts": cuts, "moves": moves}.get(kind, lambda t: mutations(t, chance))(target)
            done = 0
            for changed in made:
                if kind == "mutations" and done >= count // len(names):
                    break
                if changed not in (target.sealed, target.twin):
                    os.pwrite(note.fileno(), f"{name} {done:>9}\n".encode(), 0)
                    judge(target, changed, report, originals[name])
                    done += 1
                if len(report.faults) > 5:
                    return report
    return report


def attack(kind: str, names: list[str], count: int = 0, seed: int = 1) -> Report:
    """Run a campaign in a child: `flips`, `cuts`, `moves`, or `count` random `mutations` over the targets named."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        command = [sys.executable, __file__, kind, str(count), str(seed), str(place), *names]
        child = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, env=os.environ | FRUGAL, check=False)
        if child.returncode == 0:
            return Report(**json.loads(child.stdout))
        where = place.read_text(errors="replace").strip() if place.exists() else "the start"
        last = child.stderr.decode(errors="replace")[-2000:]
        return Report(faults=[f"the process ended with {child.returncode} at {where} (seed {seed}): {last}"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("place", type=Path)
    parser.add_argument("names", nargs="+")
    asked = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_TO_SPARE, used + MEMORY_TO_SPARE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    report = _campaign(asked.kind, asked.names, asked.count, asked.seed, asked.place)
    sys.stdout.write(json.dumps(vars(report)))


if __name__ == "__main__":
    main()
