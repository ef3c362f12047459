"""What holds for every input, not only for the ones that somebody thought of."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.audit.merkle import (
    CompactTree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)
from cloister.canonical import b64, canonical_json, digest, unb64
from cloister.errors import IntegrityError
from cloister.sealing.envelope import new_key, unwrap_key, unwrap_named, wrap_key, wrap_named
from cloister.sealing.lease import OneTimeKey, seal_to
from cloister.sealing.shard import open_table, seal_table, shard_aad
from cloister.sealing.stream import open_sealed, seal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
CONTEXT = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=16), max_size=3)


@given(JSON)
def test_equal_values_have_equal_bytes_whatever_their_order(value: object) -> None:
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert canonical_json(value) == canonical_json(shuffled)
    assert digest("a/v1", value) != digest("b/v1", value)


@given(st.binary(max_size=200))
def test_base64_is_read_back(data: bytes) -> None:
    assert unb64(b64(data)) == data


@settings(max_examples=50)
@given(st.binary(max_size=3000), CONTEXT, CONTEXT)
def test_a_stream_opens_under_its_own_context_only(
    plaintext: bytes, context: dict[str, str], other: dict[str, str]
) -> None:
    key = new_key()
    sealed = seal(key, plaintext, context)
    assert open_sealed(key, sealed, context) == plaintext
    if other != context:
        with pytest.raises(IntegrityError):
            open_sealed(key, sealed, other)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_wrapped_key_opens_under_its_own_data_only(data: bytes, other: bytes) -> None:
    kek, key = new_key(), new_key()
    wrapped = wrap_key(kek, key, data)
    assert unwrap_key(kek, wrapped, data) == key
    if other != data:
        with pytest.raises(IntegrityError):
            unwrap_key(kek, wrapped, other)


NAMED = st.tuples(st.text(min_size=1, max_size=9), st.integers(1, 2**32 - 1), st.binary(max_size=20))


@given(NAMED, NAMED)
def test_a_key_under_a_named_key_opens_under_its_own_name_and_version_only(
    mine: tuple[str, int, bytes], other: tuple[str, int, bytes]
) -> None:
    kek, key = new_key(), new_key()
    wrapped = wrap_named(kek, key, mine[2], name=mine[0], version=mine[1])
    assert unwrap_named(kek, wrapped, mine[2], name=mine[0]) == key
    if other != mine:
        moved = other[1].to_bytes(4, "big") + wrapped[4:]
        with pytest.raises(IntegrityError):
            unwrap_named(kek, moved, other[2], name=other[0])


PLACE = st.tuples(
    st.text("ab-@/", min_size=1, max_size=4), st.integers(1, 300), st.sampled_from(["public", "index"]),
    st.text("tr-0", min_size=1, max_size=4), st.sampled_from(["eu", "us", "e"]),
)  # fmt: skip


@settings(max_examples=50)
@given(
    PLACE, PLACE, st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30), st.lists(st.binary(min_size=3, max_size=3))
)
def test_a_shard_opens_in_its_own_place_only(
    mine: tuple[str, int, str, str, str], other: tuple[str, int, str, str, str], numbers: list[int], data: list[bytes]
) -> None:
    rows = min(len(numbers), len(data))
    table = pa.table({"n": pa.array(numbers[:rows], pa.int32()), "b": pa.array(data[:rows], pa.binary(3))})
    key = new_key()
    sealed = seal_table(table, key, shard_aad(*mine))
    assert open_table(sealed, key, shard_aad(*mine)).to_pydict() == table.to_pydict()
    if other != mine:
        with pytest.raises(IntegrityError):
            open_table(sealed, key, shard_aad(*other))


@settings(max_examples=30)
@given(st.binary(max_size=200), st.binary(max_size=40))
def test_a_lease_opens_once_for_its_own_purpose(secret: bytes, info: bytes) -> None:
    key = OneTimeKey.generate()
    sealed = seal_to(key.public, secret, info)
    with pytest.raises(IntegrityError):
        key.open(sealed, info + b"x")
    assert key.open(sealed, info) == secret


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=8), min_size=1, max_size=70), st.data())
def test_every_entry_and_every_earlier_log_is_proven(entries: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(entry) for entry in entries]
    tree = CompactTree()
    for entry in entries:
        tree.append(entry)
    assert tree.root() == root_of(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))

    def node(height: int, index: int) -> bytes:
        return root_of(leaves[index << height : (index + 1) << height])

    verify_inclusion(leaves[index], index, len(leaves), inclusion_proof(index, len(leaves), node), tree.root())
    earlier = data.draw(st.integers(1, len(leaves)))
    proof = consistency_proof(earlier, len(leaves), node)
    verify_consistency(earlier, len(leaves), root_of(leaves[:earlier]), tree.root(), proof)
