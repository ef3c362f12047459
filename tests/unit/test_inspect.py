"""What inspection proposes, finds and leaves open; and that it shows names and counts, never a cell."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloister.datasets.inspect import DATE_OF_BIRTH, FREE_TEXT, NAME_HINT, Report, draft, inspect
from cloister.datasets.recognise import RECOGNISERS, recognise
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError

# Published examples of each form, none of a person.
EXAMPLES = {
    "e-mail": "a.b+c@mail.example.org",
    "phone": "+49 (170) 1234567",
    "phone (national)": "(030) 1234567",
    "payment card": "4111 1111 1111 1111",
    "IBAN": "GB82 WEST 1234 5698 7654 32",
    "IP address": "192.0.2.17",
    "IP address (version 6)": "2001:db8::1",
    "ES DNI or NIE": "12345678Z",
    "FR NIR": "2 55 08 14 168 025 38",
    "BE national number": "93.05.18-223.61",
    "BE national number (bare)": "93051822361",
    "IT codice fiscale": "RSSMRA85T10A562S",
    "SE personnummer": "811218-9876",
    "FI henkilötunnus": "131052-308T",
    "BR CPF": "111.444.777-35",
    "BR CPF (bare)": "11144477735",
    "CH AHV number": "756.9217.0769.85",
    "US SSN": "219-09-9999",
    "PL PESEL": "44051401359",
    "DE Steuer-ID": "86095742719",
    "NO fødselsnummer": "01010750160",
    "NL BSN": "111222333",
    "UK NHS number": "943 476 5919",
    "date": "1985-03-02",
}
WITH_CHECKS = EXAMPLES.keys() - {
    "e-mail", "phone", "phone (national)", "IP address", "IP address (version 6)", "US SSN", "date",
}  # fmt: skip
ROWS = "\n".join(
    [
        "patient_id,Birth Date,sex,age,email,remarks,dose,surname,ward code",
        *(f"P{at // 2},19{at % 90 + 10}-02-01,{'fm'[at % 2]},{20 + at},p{at}@example.org,"
          f"came in for the {at}th time and left +4930123456{at},{at / 8},Doe{at},0{at}" for at in range(60)),
    ]
).encode()  # fmt: skip


def report(data: bytes, **options: int) -> Report:
    return inspect(io.BytesIO(data), **options)


def test_every_recogniser_finds_its_example() -> None:
    assert EXAMPLES.keys() == {recogniser.name for recogniser in RECOGNISERS}
    for name, example in EXAMPLES.items():
        assert recognise({example: 3})[name] == 3


@pytest.mark.parametrize("name", sorted(WITH_CHECKS))
def test_a_wrong_check_digit_is_not_counted(name: str) -> None:
    example = EXAMPLES[name]
    last = max(at for at, letter in enumerate(example) if letter.isdigit())
    wrong = example[:last] + str((int(example[last]) + 1) % 10) + example[last + 1 :]
    assert name not in recognise({wrong: 1})


def test_numbers_without_a_form_of_their_own_need_most_of_the_column() -> None:
    random = {str(number): 1 for number in np.random.default_rng(0).integers(10**8, 10**9, 400)}
    assert "NL BSN" not in recognise(random)
    assert recognise({"seen by a.b@example.org": 1, "nothing": 99}) == {"e-mail": 1}


def test_hostile_cells_are_matched_in_bounded_time() -> None:
    cells = {piece * 2_000_000: 1 for piece in ("1", "a@", "+1 ", "GB82 1", "1:", "1.", "1-", " ")}
    recognise(cells)  # the suite's time limit is the bound


def test_types_classes_and_roles_are_proposed() -> None:
    found = {each.name: each for each in report(ROWS).columns}
    assert {name: (each.type, each.sensitivity, each.role) for name, each in found.items()} == {
        "patient_id": ("text", "restricted", "identifier"),
        "Birth_Date": ("text", "restricted", None),
        "sex": ("category", "confidential", None),
        "age": ("integer", "confidential", None),
        "email": ("text", "restricted", "identifier"),
        "remarks": ("text", "restricted", None),
        "dose": ("number", "confidential", None),
        "surname": ("text", "restricted", None),
        "ward_code": ("text", "restricted", "identifier"),
    }
    assert found["Birth_Date"].findings == {DATE_OF_BIRTH: 60}
    assert found["email"].findings == {"e-mail": 60}
    assert found["remarks"].findings[FREE_TEXT] == 60
    assert found["remarks"].findings["phone"] == 60
    assert found["surname"].findings == {NAME_HINT: 60}
    assert found["Birth_Date"].renamed
    assert not found["sex"].renamed


def test_parquet_and_json_get_the_same_proposal() -> None:
    rows = [{"age": at, "dose": at / 8, "sex": "fm"[at % 2], "ok": at % 3 == 0, "vector": [0.5, at / 100]} for at in
            range(50)]  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = [
        [(each.name, each.type, each.shape, each.state) for each in report(data).columns]
        for data in (sink.getvalue(), lines)
    ]
    assert found[0] == found[1]
    assert found[0] == [
        ("age", "integer", (), "bounds"),
        ("dose", "number", (), "bounds"),
        ("sex", "category", (), "values"),
        ("ok", "category", (), "values"),
        ("vector", "tensor", (2,), "bounds"),
    ]


def test_the_sample_is_bounded_and_its_size_is_told() -> None:
    assert report(ROWS).whole
    part = report(ROWS, max_rows=10)
    assert (part.rows, part.whole) == (10, False)
    large = b"a,b\n" + b"1,some text that fills the file\n" * 400_000
    part = report(large, max_rows=1_000_000)
    assert not part.whole
    assert 100_000 < part.rows < 150_000


@pytest.mark.parametrize("name", ["39", "1,5e3", "a@example.org", "1985-03-02", "+4930123456", "x" * 200, "f"])
def test_a_name_that_could_be_a_value_hides_all_names(name: str) -> None:
    found = report(f'"{name}",Miller\nf,Smith\nm,Jones\n'.encode())
    assert not found.headed
    assert [each.name for each in found.columns] == ["column_1", "column_2"]
    assert name not in draft(found, "rows.csv") or len(name) == 1


def test_bounds_and_values_are_never_taken_from_the_rows() -> None:
    """A second file of the same form but with other values gets the same draft, byte for byte."""
    other = ROWS.replace(b",f,", b",w,").replace(b",20,", b",19,").replace(b"0.125", b"7.125")
    assert draft(report(ROWS), "rows.csv") == draft(report(other), "rows.csv")


def test_a_draft_is_refused_until_its_owner_has_completed_it() -> None:
    text = draft(report(ROWS), "rows.csv")
    steps = (
        ("name:  ", "name: people ", "name"),
        ("purpose:  ", "purpose: research ", "purpose"),
        ("region:  ", "region: eu ", "region"),
        ("retention:  ", "retention: P1Y ", "retention"),
        ("max_rows: }", "max_rows: 9}", "unit"),
        ("values: [] ", "values: [f, m] ", "columns.2"),
        ("type: integer\n    class: confidential\n    bounds: [] ", "type: integer\n    class: confidential\n"
         "    bounds: [0, 120] ", "columns.3.bounds"),
        ("bounds: [] ", "bounds: [0, 99] ", "columns.6.bounds"),
    )  # fmt: skip
    for empty, stated, field in steps:
        with pytest.raises(InputError, match=rf"not valid: .*{field}"):
            DatasetSchema.from_yaml_text(text)
        assert text.count(empty) == 1 or "bounds" in empty
        text = text.replace(empty, stated, 1)
    schema = DatasetSchema.from_yaml_text(text)
    assert schema.rows_per_unit == 9
    assert schema.column("email").role == "identifier"


def test_a_file_name_cannot_write_into_the_draft() -> None:
    text = draft(report(ROWS), "rows\nregion: elsewhere\x1b.csv")
    assert "\nregion: elsewhere" not in text
    assert "\x1b" not in text
