"""People in a table: pseudonyms that join inside one dataset only, tags that find rows, units that stay whole."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.datasets import subjects
from cloister.datasets.ingest import read_table
from cloister.datasets.partition import Numbering, partition
from cloister.datasets.schema import DatasetSchema
from cloister.datasets.subjects import (
    SubjectKeys,
    Tags,
    check_units,
    held_out,
    index_table,
    protect,
    pseudonym,
    read_index,
    subject_tag,
)
from cloister.errors import InputError
from cloister.sealing.shard import open_table, seal_table

KEYS = SubjectKeys(pseudonym=bytes(range(32)), index=bytes(range(32, 64)))
SCHEMA = DatasetSchema.from_yaml_text("""
name: visits
purpose: research
region: eu
retention: P5Y
unit: {column: patient, max_rows: 3}
columns:
  - {name: patient, type: text, class: internal, role: identifier, keep_original: true}
  - {name: doctor, type: text, class: internal, role: identifier}
  - {name: age, type: integer, class: confidential, bounds: [0, 120]}
  - {name: ward, type: category, class: public, values: [north, south]}
""")
VISITS = b"patient,doctor,age,ward\nAda,Grace,36,north\nGrace,Ada,40,south\nAda,Edsger,37,south\n"


def by_unit(kind: dict[str, object]) -> DatasetSchema:
    column = {"name": "who", "class": "restricted", "role": "unit"} | kind
    facts = {"name": "a", "purpose": "p", "region": "eu", "retention": "P1Y", "unit": {"column": "who", "max_rows": 2}}
    return DatasetSchema.from_mapping(facts | {"columns": [column]})


def tags_of(people: list[str], keys: SubjectKeys = KEYS) -> Tags:
    tags = protect(pa.table({"who": people}), by_unit({"type": "text"}), keys)[1]
    assert tags is not None
    return tags


def bits(tags: Tags) -> np.ndarray:
    return np.unpackbits(np.frombuffer(tags.tobytes(), np.uint8).reshape(len(tags), -1), axis=1)


def test_identifiers_become_pseudonyms_and_their_originals_go_apart() -> None:
    table, tags = protect(read_table(VISITS, SCHEMA), SCHEMA, KEYS)
    assert tags is not None
    assert table.column_names == ["patient", "doctor", "age", "ward", "patient.original"]
    patients, doctors = table["patient"].to_pylist(), table["doctor"].to_pylist()
    assert all(re.fullmatch("[0-9a-f]{32}", text) for text in patients + doctors)
    assert patients[0] == patients[2] == doctors[1], "one person is one pseudonym, in every column"
    assert len(set(patients + doctors)) == 3
    assert table["patient.original"].to_pylist() == ["Ada", "Grace", "Ada"]
    assert "Edsger" not in str(table.to_pydict()), "what is not kept is gone"
    assert tags[0].tobytes() == tags[2].tobytes() == subject_tag(KEYS.index, SCHEMA.columns[0], " Ada ")
    assert patients[0] == pseudonym(KEYS.pseudonym, "Ada") != subject_tag(KEYS.index, SCHEMA.columns[0], "Ada").hex()


def test_without_people_nothing_changes_and_with_people_keys_are_needed() -> None:
    facts = SCHEMA.to_dict() | {"unit": "row"}
    plain = DatasetSchema.from_mapping(facts | {"columns": facts["columns"][2:]})
    table = pa.table({"age": [1], "ward": [0]})
    assert protect(table, plain, None) == (table, None)
    with pytest.raises(InputError, match="no keys"):
        protect(read_table(VISITS, SCHEMA), SCHEMA, None)


def test_keys_are_two_of_32_bytes_and_show_themselves_nowhere() -> None:
    for wrong in ((bytes(32), bytes(32)), (bytes(31), bytes(range(32))), (bytes(range(32)), b"")):
        with pytest.raises(InputError):
            SubjectKeys(pseudonym=wrong[0], index=wrong[1])
    assert repr(KEYS) == "SubjectKeys()"
    assert KEYS.index.hex() not in f"{KEYS}{KEYS!r}"


def test_two_datasets_have_nothing_in_common() -> None:
    """For each pair of keys, half of the bits agree: what two strangers' pseudonyms would do as well."""
    people = [f"person {index}" for index in range(500)]
    fixed = [hashlib.sha256(b"key %d" % number).digest() for number in range(12)]  # the same bits in every run
    keyed = [SubjectKeys(pseudonym=one, index=other) for one, other in zip(fixed[::2], fixed[1::2], strict=True)]
    all_tags = [tags_of(people, keys) for keys in keyed]
    all_tags += [tags_of(people, SubjectKeys(pseudonym=keys.index, index=keys.pseudonym)) for keys in keyed]
    assert len({tag.tobytes() for tags in all_tags for tag in tags}) == 12 * 500
    n = 500 * 128
    for one in range(12):
        for other in range(one):
            agree = int((bits(all_tags[one]) == bits(all_tags[other])).sum())
            assert abs(agree - n / 2) < 6 * (n / 4) ** 0.5, "six standard deviations, once in half a billion"


def test_people_with_similar_names_have_unrelated_tags() -> None:
    tags = bits(tags_of([f"patient {index:05d}" for index in range(2000)]))
    assert abs(tags.mean() - 0.5) < 6 * 0.5 / (2000 * 128) ** 0.5
    assert np.abs(tags.mean(axis=0) - 0.5).max() < 6 * 0.5 / 2000**0.5
    assert abs((tags[1:] != tags[:-1]).mean() - 0.5) < 6 * 0.5 / (2000 * 128) ** 0.5


@pytest.mark.parametrize(
    ("kind", "rows", "asked", "found"),
    [
        ({"type": "text"}, ["a", "b", "a"], "a", [0, 2]),
        ({"type": "integer", "bounds": [-9, 99]}, [7, -7, 7], "007", [0, 2]),
        ({"type": "integer", "bounds": [-9, 99]}, [7, -7, 7], " -7 ", [1]),
        ({"type": "category", "values": ["x", "y"]}, [1, 0, 1], "y", [0, 2]),
    ],
)
def test_a_persons_rows_are_found_as_people_write_them(
    kind: dict[str, object], rows: list[object], asked: str, found: list[int]
) -> None:
    schema = by_unit(kind)
    stored = {"text": pa.string(), "integer": pa.int32(), "category": pa.int16()}[str(kind["type"])]
    table, tags = protect(pa.table({"who": pa.array(rows, stored)}), schema, KEYS)
    assert tags is not None
    assert table["who"].to_pylist() == rows, "a unit that is no identifier stays as it is, in its class"
    wanted = subject_tag(KEYS.index, schema.columns[0], asked)
    assert [index for index, tag in enumerate(tags) if tag.tobytes() == wanted] == found


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ({"type": "integer", "bounds": [0, 9]}, "seven"),
        ({"type": "integer", "bounds": [0, 9]}, "7.0"),
        ({"type": "integer", "bounds": [0, 9]}, "--7"),
        ({"type": "integer", "bounds": [0, 9]}, "٧"),
        ({"type": "integer", "bounds": [0, 9]}, ""),
        ({"type": "integer", "bounds": [0, 9]}, "7" * 5000),
        ({"type": "category", "values": ["x", "y"]}, "z424242"),
    ],
)
def test_a_subject_that_the_column_never_holds_is_refused_unnamed(kind: dict[str, object], asked: str) -> None:
    with pytest.raises(InputError) as refusal:
        subject_tag(KEYS.index, by_unit(kind).columns[0], asked)
    assert not asked or asked not in f"{refusal.value.message}{refusal.value.hint}"


def test_one_person_has_one_tag_and_one_pseudonym_in_every_form_of_unicode() -> None:
    forms = ["Zo\u00eb \u00c5", "Zoe\u0308 A\u030a", "Zo\u00eb \u212b", "\u00a0Zoe\u0308 \u00c5 "]
    rows = "".join(f"{form},{form},1,north\n" for form in forms)
    table, tags = protect(read_table(f"patient,doctor,age,ward\n{rows}".encode(), SCHEMA), SCHEMA, KEYS)
    assert tags is not None
    assert {tag.tobytes() for tag in tags} == {subject_tag(KEYS.index, SCHEMA.columns[0], form) for form in forms}
    assert len({tag.tobytes() for tag in tags}) == 1
    assert {*table["patient"].to_pylist(), *table["doctor"].to_pylist()} == {
        pseudonym(KEYS.pseudonym, form.strip()) for form in forms
    }
    ward = by_unit({"type": "category", "values": ["Zoe\u0308", "x"]})
    stored = protect(pa.table({"who": pa.array([0], pa.int16())}), ward, KEYS)[1]
    assert stored is not None
    assert stored[0].tobytes() == subject_tag(KEYS.index, ward.columns[0], "Zo\u00eb")


@pytest.mark.parametrize("unseen", ["\u200b", "\u202e", "\ufeff", "\u00ad", "\U000e0041", "\x7f", "\x01"])
def test_a_character_that_nobody_sees_is_refused_in_what_names_people(unseen: str) -> None:
    name = f"Ada{unseen}L"
    for column, rows in (("patient", [name, "x"]), ("doctor", ["x", name])):
        stored = {
            "patient": [rows[0]],
            "doctor": [rows[1]],
            "age": pa.array([1], pa.int32()),
            "ward": pa.array([0], pa.int16()),
        }
        with pytest.raises(InputError, match=f"column '{column}'.*nobody sees") as refusal:
            protect(pa.table(stored), SCHEMA, KEYS)
        assert name not in f"{refusal.value.message}{refusal.value.hint}"
    with pytest.raises(InputError, match="nobody sees"):
        subject_tag(KEYS.index, SCHEMA.columns[0], name)
    with pytest.raises(InputError, match="nobody sees"):
        tags_of([name])


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_an_index_is_sealed_and_read_back_row_by_row(rows: int) -> None:
    tags = tags_of([f"p{index % 7}" for index in range(rows)])
    table = index_table(tags)
    assert np.array_equal(read_index(table), tags)
    sealed = open_table(seal_table(table, bytes(32), b"a"), bytes(32), b"a")
    assert np.array_equal(read_index(sealed), tags)
    assert np.array_equal(read_index(sealed.slice(rows // 2)), tags[rows // 2 :])
    for wrong in (sealed.rename_columns(["tag"]), pa.table({"subject": ["a"]}), pa.table({})):
        with pytest.raises(InputError, match="not a subject index"):
            read_index(wrong)


@pytest.mark.parametrize("rows", [1, 1000])
def test_a_slice_or_several_chunks_of_a_table_are_its_rows(rows: int) -> None:
    people = [f"p{index % 37}" for index in range(rows)]
    whole = pa.table({"who": pa.chunked_array([[p] for p in people])})
    assert np.array_equal(protect(whole, by_unit({"type": "text"}), KEYS)[1], tags_of(people))
    part = pa.table({"who": people}).slice(rows // 3)
    assert np.array_equal(protect(part, by_unit({"type": "text"}), KEYS)[1], tags_of(people[rows // 3 :]))


def counted(*blocks: Tags, schema: DatasetSchema = SCHEMA) -> None:
    check_units(schema, sum(map(len, blocks)), lambda: iter(blocks))


@pytest.mark.parametrize("slice_rows", [7, 100, 10_000])
def test_a_unit_is_counted_over_all_shards(monkeypatch: pytest.MonkeyPatch, slice_rows: int) -> None:
    monkeypatch.setattr(subjects, "SLICE_ROWS", slice_rows)
    everybody = tags_of([f"p{index}" for index in range(400)])
    counted(everybody, everybody, everybody)
    for one in (0, 100, 399):
        with pytest.raises(InputError, match="a unit has 4 rows, and the schema allows 3") as refusal:
            counted(everybody, everybody[one : one + 1], everybody, everybody)
        assert f"p{one} " not in f"{refusal.value.message} {refusal.value.hint}"


def test_each_unit_that_has_too_many_rows_is_found_whatever_its_tag() -> None:
    for person in range(64):
        with pytest.raises(InputError, match="4 rows"):
            counted(tags_of([f"p{person}"] * 4 + [f"other {index}" for index in range(50)]))


def test_rows_as_units_are_not_counted() -> None:
    facts = SCHEMA.to_dict() | {"unit": "row"}
    counted(tags_of(["a"] * 100), schema=DatasetSchema.from_mapping(facts))
    counted()


def test_the_share_that_is_held_out_is_right_and_its_units_whole() -> None:
    people = [f"p{index}" for index in range(20_000)]
    tags = tags_of(people)
    for share in (0.05, 0.2, 0.5):
        apart = held_out(tags, share)
        assert abs(apart.mean() - share) < 5 * (share * (1 - share) / len(people)) ** 0.5
        assert np.array_equal(held_out(tags[::-1], share), apart[::-1]), "it depends on the person only"
    assert (held_out(tags, 0.05) <= held_out(tags, 0.2)).all(), "a larger share keeps who was held out"
    assert not held_out(tags, 0.0).any()
    other = tags_of(people, SubjectKeys(pseudonym=bytes(32), index=bytes(range(1, 33))))
    both = (held_out(tags, 0.2) & held_out(other, 0.2)).mean()
    assert 0.03 < both < 0.05, "another dataset holds out others"


@settings(max_examples=60, deadline=None)
@given(
    people=st.lists(st.integers(0, 30), min_size=8, max_size=120), shards=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.2, 0.6]), seed=st.integers(0, 2**32 - 1), whole_units=st.booleans(),
)  # fmt: skip
def test_a_partition_has_every_row_once_in_its_class_and_beside_its_tag(
    people: list[int], shards: int, share: float, seed: int, whole_units: bool
) -> None:
    rows = len(people)
    schema = SCHEMA if whole_units else DatasetSchema.from_mapping(SCHEMA.to_dict() | {"unit": "row"})
    stored = pa.table({
        "patient": [f"p{person}" for person in people], "doctor": ["d"] * rows,
        "age": pa.array(range(rows), pa.int32()), "ward": pa.array([0] * rows, pa.int16()),
    })  # fmt: skip
    table, tags = protect(stored, schema, KEYS)
    order = np.random.default_rng(seed).permutation(rows)
    numbering = Numbering(train=2, holdout=1)
    try:
        parts = list(partition(table, tags, schema, shards, share, order, numbering))
    except InputError:
        assert share > 0 or rows < shards, "only a holdout can leave too few"
        return
    files = {(part.shard, part.part): part for part in parts}
    names = {part.shard for part in parts}
    assert len(files) == len(parts) == len(names) * len(schema.parts())
    assert names == {f"train-{n:03d}" for n in range(2, numbering.train)} | {
        f"holdout-{n:03d}" for n in range(1, numbering.holdout)
    }
    seen: list[int] = []
    roles: dict[str, set[str]] = {}
    for name in sorted(names):
        for part in schema.parts():
            assert tuple(files[name, part].table.column_names) == schema.stored_columns(part)
            assert files[name, part].role == name.partition("-")[0]
        ages = files[name, "confidential"].table["age"].to_pylist()
        found = read_index(files[name, "index"].table)
        originals = files[name, "restricted"].table["patient.original"].to_pylist()
        hidden = files[name, "internal"].table["patient"].to_pylist()
        for row, tag, original, alias in zip(ages, found, originals, hidden, strict=True):
            assert original == f"p{people[row]}"
            assert alias == pseudonym(KEYS.pseudonym, original)
            assert tag.tobytes() == subject_tag(KEYS.index, schema.columns[0], original)
            roles.setdefault(original, set()).add(files[name, "index"].role)
        seen += ages
    assert sorted(seen) == list(range(rows))
    if whole_units:
        assert all(len(role) == 1 for role in roles.values()), "nobody is trained on and evaluated with"
