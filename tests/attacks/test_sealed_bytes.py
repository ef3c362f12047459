"""Whoever can write to the blob store tries to get changed, moved or foreign bytes opened."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from cloister.canonical import b64, unb64
from cloister.client.verify import signed_manifest
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest
from cloister.errors import InputError, IntegrityError
from cloister.sealing import envelope, shard, stream
from cloister.signing import dsse, keys
from mutations import Report, Target, attack, judge, manifest, mutations

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
CONTEXT = {"kind": "checkpoint", "run": "r1", "step": "100"}
AAD = shard.shard_aad("adult", 1, "confidential", "0000", "eu")
TABLE = pa.table({"age": [39, 50, 38], "income": ["<=50K", ">50K", None], "x": pa.array([b"abcd"] * 3, pa.binary(4))})
CHUNK = stream.CHUNK_BYTES + stream.TAG_BYTES
BODY = stream.HEADER_BYTES


def flips(data: bytes, bits: Iterator[int] | range) -> Iterator[bytes]:
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def refuse_stream(sealed: bytes, key: bytes = KEY, context: dict[str, str] = CONTEXT) -> None:
    """Refused, and nothing is left in the buffer that the caller gave."""
    with pytest.raises(IntegrityError):
        stream.open_sealed(key, sealed, context)
    buffer = bytearray(max(len(sealed), 1))
    with pytest.raises(IntegrityError):
        stream.open_into(key, sealed, context, buffer)
    assert not any(buffer)


def refuse_shard(sealed: bytes, key: bytes = KEY, aad: bytes = AAD) -> None:
    with pytest.raises(IntegrityError):
        shard.open_table(sealed, key, aad)


@pytest.fixture(scope="module")
def long_stream() -> bytes:
    return stream.seal(KEY, b"\x5a" * (3 * stream.CHUNK_BYTES + 100), CONTEXT)


@pytest.fixture(scope="module")
def sealed_shard() -> bytes:
    return shard.seal_table(TABLE, KEY, AAD)


@pytest.mark.parametrize("plaintext", [b"", b"weights of the model"])
def test_every_flipped_bit_of_a_stream_is_refused(plaintext: bytes) -> None:
    sealed = stream.seal(KEY, plaintext, CONTEXT)
    for changed in flips(sealed, range(len(sealed) * 8)):
        refuse_stream(changed)


def test_flipped_bits_in_later_chunks_are_refused_and_leave_no_plaintext(long_stream: bytes) -> None:
    for index in range(4):
        start = BODY + index * CHUNK
        for byte in (start, start + 50, min(start + CHUNK, len(long_stream)) - 1):
            refuse_stream(next(flips(long_stream, range(byte * 8, byte * 8 + 1))))


def test_truncation_at_every_chunk_boundary_is_refused(long_stream: bytes) -> None:
    for index in range(4):
        for offset in (-1, 0, 1, stream.TAG_BYTES, stream.TAG_BYTES + 1):
            refuse_stream(long_stream[: BODY + index * CHUNK + offset])


def test_truncation_of_a_whole_number_of_chunks_is_refused() -> None:
    sealed = stream.seal(KEY, b"\x5a" * (2 * stream.CHUNK_BYTES), CONTEXT)
    refuse_stream(sealed[: BODY + CHUNK])


def test_every_truncation_of_a_small_stream_is_refused() -> None:
    sealed = stream.seal(KEY, b"weights", CONTEXT)
    for size in range(len(sealed)):
        refuse_stream(sealed[:size])


def test_appended_bytes_and_chunks_are_refused(long_stream: bytes) -> None:
    for tail in (b"\x00", bytes(stream.TAG_BYTES), long_stream[BODY : BODY + CHUNK], long_stream):
        refuse_stream(long_stream + tail)


def test_an_empty_last_chunk_is_refused_even_from_a_key_holder() -> None:
    """One plaintext has one sealed length."""
    header = stream.MAGIC + stream.VERSION + bytes(stream.SALT_BYTES)
    cipher, aad = stream._cipher(KEY, header), stream._aad(header, CONTEXT)
    first = cipher.encrypt(stream._nonce(0, False), b"\x5a" * stream.CHUNK_BYTES, aad)
    refuse_stream(header + first + cipher.encrypt(stream._nonce(1, True), b"", aad))


def test_swapped_dropped_and_repeated_chunks_are_refused(long_stream: bytes) -> None:
    header, chunks = long_stream[:BODY], [long_stream[BODY + i * CHUNK : BODY + (i + 1) * CHUNK] for i in range(4)]
    a, b, c, d = chunks
    for order in ([b, a, c, d], [a, c, b, d], [a, b, d], [b, c, d], [a, a, b, c, d], [a, b, c, c], [d], [a, b, c]):
        refuse_stream(header + b"".join(order))


def test_a_chunk_or_header_of_another_stream_is_refused(long_stream: bytes) -> None:
    other = stream.seal(KEY, b"\x5a" * (3 * stream.CHUNK_BYTES + 100), CONTEXT)
    refuse_stream(other[:BODY] + long_stream[BODY:])
    refuse_stream(long_stream[: BODY + CHUNK] + other[BODY + CHUNK :])


@pytest.mark.parametrize(
    "context", [{}, {"kind": "model", "run": "r1", "step": "100"}, {**CONTEXT, "step": "101"}, {**CONTEXT, "more": ""}]
)
def test_a_stream_under_another_context_or_key_is_refused(context: dict[str, str]) -> None:
    sealed = stream.seal(KEY, b"weights", CONTEXT)
    refuse_stream(sealed, context=context)
    refuse_stream(sealed, key=OTHER_KEY)


def flawless(report: Report, at_least: int) -> None:
    assert not report.faults, "\n".join(report.faults)
    assert report.tried == report.refused + report.equal >= at_least


def test_every_flipped_bit_of_everything_sealed_or_signed_is_refused() -> None:
    flawless(attack("flips", ["shard", "index", "wrapped key", "named key", "stream", "lease"]), 19_000)
    report = attack("flips", ["manifest"])
    flawless(report, 8_000)
    # Bits of a key's hint and the unused ones at the end of base64: they are no part of what is signed.
    assert report.equal < 600


def test_every_truncation_of_everything_sealed_or_signed_is_refused() -> None:
    flawless(attack("cuts", ["shard", "index", "wrapped key", "named key", "stream", "lease", "manifest"]), 7_000)


def test_pages_and_chunks_moved_repeated_dropped_or_taken_from_elsewhere_are_refused() -> None:
    flawless(attack("moves", ["shard", "groups", "index", "stream", "long stream", "lease", "named key"]), 800)


def test_twenty_thousand_random_mutations_of_shards_are_refused() -> None:
    flawless(attack("mutations", ["shard", "groups", "index"], 20_000, seed=4), 19_000)


def test_random_mutations_of_everything_else_are_refused() -> None:
    flawless(attack("mutations", ["wrapped key", "named key", "stream", "lease", "manifest"], 4_000, seed=4), 3_900)


def test_the_child_that_tries_mutations_reports_what_it_finds() -> None:
    """An attack that finds nothing proves nothing, unless it would have found something."""
    missed = Target("deaf", b"abcdef", lambda data: data, ())
    report = Report()
    for changed in itertools.islice(mutations(missed, random.Random(1)), 50):  # noqa: S311  no secret
        judge(missed, changed, report, b"abcdef")
    assert report.refused == 0
    assert len(report.faults) == report.tried == 50
    crashed = attack("flips", ["no such target"])
    assert "the process ended with 1" in crashed.faults[0]


@pytest.mark.parametrize(
    "aad",
    [
        shard.shard_aad("adult", 2, "confidential", "0000", "eu"),
        shard.shard_aad("adult", 1, "public", "0000", "eu"),
        shard.shard_aad("adult", 1, "index", "0000", "eu"),
        shard.shard_aad("adult", 1, "confidential", "0001", "eu"),
        shard.shard_aad("adult", 1, "confidential", "0000", "us"),
        shard.shard_aad("census", 1, "confidential", "0000", "eu"),
    ],
)
def test_a_shard_in_the_place_of_another_is_refused(sealed_shard: bytes, aad: bytes) -> None:
    refuse_shard(sealed_shard, aad=aad)
    refuse_shard(sealed_shard, key=OTHER_KEY)


@pytest.mark.parametrize("columns", [None, ["age"], []])
def test_plaintext_parquet_in_the_place_of_a_shard_is_refused(columns: list[str] | None) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    plain = bytes(sink.getvalue())
    for data in (plain, b"PARE" + plain[4:-4] + b"PARE", b"PARE" + plain[4:], plain[:-4] + b"PARE"):
        with pytest.raises(IntegrityError):
            shard.open_table(data, KEY, AAD, columns)


@pytest.mark.parametrize(
    "options",
    [
        {"aad_prefix": AAD, "store_aad_prefix": True},
        {"aad_prefix": AAD, "store_aad_prefix": False, "encryption_algorithm": "AES_GCM_CTR_V1"},
        {"aad_prefix": AAD, "store_aad_prefix": False, "plaintext_footer": True},
        {},
    ],
)
def test_a_weaker_kind_of_encrypted_parquet_is_refused_even_under_the_right_key(options: dict[str, object]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, encryption_properties=pe.create_encryption_properties(KEY, **options))
    refuse_shard(bytes(sink.getvalue()))


def test_a_page_of_another_file_is_refused(sealed_shard: bytes) -> None:
    """Same key, same name, same table: the file's own random identifier is in every page's AAD."""
    other = shard.seal_table(TABLE, KEY, AAD)
    assert len(other) == len(sealed_shard)
    for cut in (60, 200, len(other) // 2):
        refuse_shard(sealed_shard[:cut] + other[cut:])


def test_a_stream_is_no_shard_and_a_shard_is_no_stream(sealed_shard: bytes) -> None:
    refuse_shard(stream.seal(KEY, b"x" * 100, CONTEXT))
    refuse_stream(sealed_shard)


def test_two_shards_that_change_places_are_refused() -> None:
    """Not even with their keys, which whoever holds the store does not have."""
    aads = [shard.shard_aad("adult", 1, "confidential", name, "eu") for name in ("train-000", "train-001")]
    data_keys = [KEY, OTHER_KEY]
    sealed = [shard.seal_table(TABLE, key, aad) for key, aad in zip(data_keys, aads, strict=True)]
    for place, other in ((0, 1), (1, 0)):
        refuse_shard(sealed[other], key=data_keys[place], aad=aads[place])
        refuse_shard(sealed[other], key=data_keys[other], aad=aads[place])
        assert shard.open_table(sealed[place], data_keys[place], aads[place]).to_pydict() == TABLE.to_pydict()


def test_a_wrapped_key_in_the_place_of_another_is_refused() -> None:
    kek = OTHER_KEY
    wrapped = envelope.wrap_named(kek, KEY, b"adult/1/train-000", name="dataset/adult", version=3)
    assert envelope.unwrap_named(kek, wrapped, b"adult/1/train-000", name="dataset/adult") == KEY
    for data, name in ((b"adult/2/train-000", "dataset/adult"), (b"adult/1/train-000", "dataset/bank"),
                       (b"adult/1/train-000", "models"), (b"", "dataset/adult")):  # fmt: skip
        with pytest.raises(IntegrityError):
            envelope.unwrap_named(kek, wrapped, data, name=name)
    # The version in front says which key to take; it cannot be made to say another.
    for version in (0, 2, 4, 2**32 - 1):
        with pytest.raises(IntegrityError):
            envelope.unwrap_named(
                kek, version.to_bytes(4, "big") + wrapped[4:], b"adult/1/train-000", name="dataset/adult"
            )


def _edited(change: dict[str, object]) -> DatasetManifest:
    facts = manifest().model_dump(mode="json")
    file = change.pop("file", {})
    return DatasetManifest.parse(facts | change | {"files": [facts["files"][0] | file]})  # type: ignore[operator]


@pytest.mark.parametrize(
    "change",
    [
        {"file": {"sha256": "1" * 64}}, {"file": {"rows": 4}}, {"file": {"path": "a/c"}}, {"file": {"role": "holdout"}},
        {"file": {"part": "public"}}, {"file": {"shard": "train-001"}}, {"name": "bank"}, {"version": 2},
    ],
)  # fmt: skip
def test_an_edited_manifest_is_refused(change: dict[str, object]) -> None:
    owner, stranger = keys.generate_ed25519(), keys.generate_ed25519()
    public = keys.public_to_pem(owner.public_key()).decode()

    def statement(made: DatasetManifest) -> bytes:
        return dsse.statement(
            made.name, made.digest.removeprefix("sha256:"), MANIFEST_PREDICATE, made.model_dump(mode="json")
        )

    true, edited = statement(manifest()), statement(_edited(dict(change)))
    signed = dsse.sign(true, owner)
    assert signed_manifest(signed, public) == manifest()
    by_stranger = dsse.sign(edited, stranger)
    renamed = {
        **by_stranger,
        "signatures": [{**by_stranger["signatures"][0], "keyid": signed["signatures"][0]["keyid"]}],
    }
    assert unb64(signed["payload"]) == true
    for forged in ({**signed, "payload": b64(edited)}, by_stranger, renamed, {**signed, "signatures": []},
                   {**signed, "payloadType": "application/json"}):  # fmt: skip
        with pytest.raises(IntegrityError):
            signed_manifest(forged, public)


def test_a_manifest_that_contradicts_itself_is_refused_whoever_signed_it() -> None:
    facts = manifest().model_dump(mode="json")
    file = facts["files"][0]
    for files in ([file, file], [file, file | {"shard": "train-001"}], [file | {"sealed_in": 2}], []):
        with pytest.raises(InputError):
            DatasetManifest.parse(facts | {"files": files})
