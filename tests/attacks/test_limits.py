"""What is sent to the authority has a limit: each string, list, number and map of the OpenAPI document, and each body.

A body that is too large, in chunks, deep or of millions of values is refused early: with an answer in our three fields,
never a 500, and without reading it to its end.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import anyio
import pytest

from authority_world import APP, World
from cloister.authority import bodies, gate, uploads

DOCUMENT = APP.openapi()

# ---- every input has a limit ----

MAX_ITEMS, MAX_CHARS, MAX_NUMBER = 10_000, 8 * 1024 * 1024, 1e16
FORMS_MAY_SAY_MORE = "what a form does not declare is ignored (RFC 6749 section 3.2), and the whole of it is small"
MANIFESTS = f"a manifest has up to {bodies.MAX_FILE_REFS:,} files; its own limit is below that of the body"
LARGE = {
    "POST /v1/datasets body.envelope.payload: string": MANIFESTS,
    "POST /v1/datasets body.sealed_keys: string": MANIFESTS,
    "POST /v1/datasets body.ends: array": MANIFESTS,
    "POST /v1/datasets/{name}/endings body.ends: array": MANIFESTS,
    "POST /v1/datasets/{name}/openings body.files/0: array": MANIFESTS,
}
"""Inputs with a limit that is larger than others', with the reason. Who sends them waits for a turn."""
UNBOUNDED = {
    "POST /v1/token body: properties": FORMS_MAY_SAY_MORE,
    "POST /v1/revoke body: properties": FORMS_MAY_SAY_MORE,
}
"""Inputs without a limit of their own, with the reason."""


def inputs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every parameter and body of every operation: where it is, and its schema."""
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            label = f"{method.upper()} {path}"
            for parameter in operation.get("parameters", []):
                yield f"{label} {parameter['name']}", parameter["schema"]
            for media in operation.get("requestBody", {}).get("content", {}).values():
                yield f"{label} body", media["schema"]


def unlimited(place: str, schema: Any) -> Iterator[str]:
    """The places in `schema` that anything of any size fits into."""
    while isinstance(schema, dict) and "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if not isinstance(schema, dict) or not schema.keys() & {"type", "anyOf", "oneOf", "enum", "const"}:
        yield f"{place}: anything"
        return
    if "enum" in schema or "const" in schema:
        return
    for number, part in enumerate((*schema.get("anyOf", ()), *schema.get("oneOf", ()))):
        yield from unlimited(f"{place}/{number}", part)
    kind = schema.get("type")
    if kind == "string" and not schema.get("maxLength", math.inf) <= MAX_CHARS and not _finite(schema.get("pattern")):
        yield f"{place}: string"
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf))
        high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf))
        if not -MAX_NUMBER <= low <= high <= MAX_NUMBER:
            yield f"{place}: number"
    if kind == "array":
        if not schema.get("maxItems", math.inf) <= MAX_ITEMS:
            yield f"{place}: array"
        if "items" in schema or "prefixItems" not in schema:
            yield from unlimited(f"{place}[]", schema.get("items", True))
        for number, part in enumerate(schema.get("prefixItems", ())):  # as many as `maxItems`, which has been looked at
            yield from unlimited(f"{place}[{number}]", part)
    if kind == "object":
        yield from _unlimited_object(place, schema)


def _unlimited_object(place: str, schema: dict[str, Any]) -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        yield from unlimited(f"{place}.{name}", part)
    others = schema.get("additionalProperties", True)
    if others is not False and not schema.get("maxProperties", math.inf) <= MAX_ITEMS:
        yield f"{place}: properties"
    if isinstance(others, dict):
        yield from unlimited(f"{place}.*", others)
        yield from unlimited(f"{place}.* (name)", {"type": "string"} | schema.get("propertyNames", {}))


def _finite(pattern: str | None) -> bool:
    """Whether a pattern is anchored and repeats nothing without end."""
    return bool(pattern) and pattern.startswith("^") and pattern.endswith("$") and not re.search(r"[*+]|,}", pattern)


def test_every_string_list_number_and_map_that_is_sent_has_a_limit() -> None:
    found = [place for where, schema in inputs() for place in unlimited(where, schema)]
    assert set(found) == UNBOUNDED.keys() | LARGE.keys()
    assert not [where for where in LARGE if where in set(unlimited_at_all())]


def unlimited_at_all() -> Iterator[str]:
    """As above, but what has any limit is not found."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[__name__], "MAX_CHARS", uploads.MAX_BODY_BYTES)
        patched.setattr(sys.modules[__name__], "MAX_ITEMS", bodies.MAX_FILE_REFS)
        yield from [place for where, schema in inputs() for place in unlimited(where, schema)]


@pytest.mark.parametrize(
    "schema",
    [
        {}, {"type": "string"}, {"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "^a{2,}$"},
        {"type": "integer"}, {"type": "number", "minimum": 0}, {"type": "object"},
        {"type": "array", "items": {"type": "boolean"}}, {"type": "array", "maxItems": 3, "items": {"type": "string"}},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
        {"type": "object", "additionalProperties": {"type": "boolean"}, "propertyNames": {"maxLength": 3}},
        {"type": "object", "additionalProperties": False, "properties": {"a": {"title": "A"}}},
    ],
)  # fmt: skip
def test_what_has_no_limit_is_found(schema: dict[str, Any]) -> None:
    assert list(unlimited("here", schema))


def test_no_get_takes_a_body() -> None:
    """Their bodies are not looked at, so that they need no limit."""
    assert not [path for path, methods in DOCUMENT["paths"].items() if "requestBody" in methods.get("get", {})]


# ---- bodies ----

PART = 64 * 1024
WRITES = [
    (method.upper(), path.replace("{version}", "1"), "requestBody" in operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    if method != "get"
]
"""Method, path (of things that are called `{name}` and the like, and do not exist), and whether it takes a body."""


def raw(
    world: World, method: str, path: str, parts: Iterable[bytes], headers: Mapping[str, str]
) -> tuple[int, Any, int]:
    """Status, answer, and how many parts of the body were asked for: below HTTP, where no client puts it right."""
    asked, coming, answers = 0, iter(parts), []

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        part = next(coming, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "https",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8443), "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }  # fmt: skip
    anyio.run(world._app, scope, receive, send)
    answer = json.loads(b"".join(message.get("body", b"") for message in answers))
    assert answer.keys() == {"error", "hint", "kind"}
    return answers[0]["status"], answer, asked


def in_parts(content: bytes) -> Iterator[bytes]:
    return (content[start : start + PART] for start in range(0, len(content), PART))


def json_headers(world: World, name: str | None = "ed", **more: str) -> dict[str, str]:
    """Of somebody, or of nobody."""
    told = {"content-type": "application/json"} | {key.replace("_", "-"): value for key, value in more.items()}
    return told | ({"authorization": f"Bearer {world.token(name)}"} if name else {})


LENGTHS = {
    "too large": {"content_length": str(uploads.MAX_BODY_BYTES + 1)},
    "in chunks": {"transfer_encoding": "chunked"},
    "in chunks, with a length": {"transfer_encoding": "chunked", "content_length": "2"},
    "of a length beyond numbers": {"content_length": "9" * 5000},
    "of no number": {"content_length": "1e3"},
    "of less than nothing": {"content_length": "-1"},
}


@pytest.mark.parametrize("headers", LENGTHS.values(), ids=LENGTHS)
def test_a_body_that_is_too_large_or_says_no_length_is_not_read(calm_world: World, headers: dict[str, str]) -> None:
    for method, path, _ in WRITES:
        told = json_headers(calm_world, **headers)
        assert raw(calm_world, method, path, [b"{}"], told)[::2] == (413, 0), path


def test_only_manifests_may_be_larger_than_the_rest(calm_world: World) -> None:
    told = json_headers(calm_world, content_length=str(gate.MAX_BODY_BYTES + 1))
    larger = {path for method, path, _ in WRITES if raw(calm_world, method, path, [b"{}"], told)[0] != 413}
    assert larger == {"/v1/datasets", *(f"/v1/datasets/{{name}}/{what}" for what in ("sealing", "openings", "endings"))}


def test_a_stranger_s_body_is_not_read_at_all(calm_world: World) -> None:
    for method, path, _ in WRITES:
        if path not in gate.PUBLIC:
            for told in ({}, {"content_length": "2"}, *LENGTHS.values()):
                headers = json_headers(calm_world, None, **told)
                assert raw(calm_world, method, path, [b"{}"], headers)[::2] == (401, 0), path
        else:
            too_large = json_headers(calm_world, None, content_length=str(gate.MAX_PUBLIC_BODY_BYTES + 1))
            assert raw(calm_world, method, path, [b"{}"], too_large)[::2] == (413, 0), path


@pytest.mark.parametrize("headers", [{}, {"content_length": "2"}], ids=["no length", "a shorter length"])
def test_a_body_that_is_longer_than_it_says_is_left(calm_world: World, headers: dict[str, str]) -> None:
    for method, path, _ in WRITES:
        status, _, asked = raw(calm_world, method, path, [bytes(PART)] * 9, json_headers(calm_world, **headers))
        assert 400 <= status < 500, path
        assert asked <= 1, path


DEEP = 10_000
BOMBS = {
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep maps": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep, and never closed": b"[" * DEEP,
    "many keys": b'{"' + b'":1,"'.join(b"%x" % number for number in range(11_000)) + b'":1}',
    "one key many times": b"{" + b'"spec":{},' * 11_000 + b'"spec":{}}',
    "a number of many digits": b'{"spec":' + b"9" * 100_000 + b"}",
    "a number beyond numbers": b'{"spec":1e999999999,"seconds":NaN,"epsilon":-Infinity,"rank":1E400}',
    "escapes": b'{"spec":"' + b"\\u0041" * 60_000 + b'"}',
    "half a character": b'"' + b"\\ud800" * 60_000 + b'"',
    "another encoding": '{"spec":{}}'.encode("utf-16"),
    "no encoding": b'{"spec":"\xff\xfe\xc0"}',
    "packed": gzip.compress(bytes(1_000_000)),
    "nothing": b"",
    "a literal": b"null",
}
HUGE = {
    "lists": b"[" + b"[]," * 5_000_000 + b"[]]",
    "keys": b'{"error":{' + b'"":"",' * 2_000_000 + b'"":""}}',
    "numbers": b'{"roles":[' + b"1," * 7_000_000 + b"1]}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_no_bomb_of_json_is_a_fault(calm_world: World, bomb: bytes) -> None:
    for method, path, taken in WRITES:
        if taken and path not in gate.PUBLIC:
            told = json_headers(calm_world, content_length=str(len(bomb)))
            status, _, asked = raw(calm_world, method, path, in_parts(bomb), told)
            assert 400 <= status < 500, path
            assert asked <= len(bomb) // PART + 2, path


@pytest.mark.parametrize("bomb", HUGE.values(), ids=HUGE)
def test_millions_of_values_are_left_after_the_first(calm_world: World, bomb: bytes) -> None:
    """They would be gigabytes of objects. Texts as large as that are let in: sealed keys are."""
    assert PART < len(bomb) < gate.MAX_BODY_BYTES
    for path in ("/v1/plans", "/v1/datasets", "/v1/identities", "/v1/runs/x/end"):
        told = json_headers(calm_world, content_length=str(len(bomb)))
        status, _, asked = raw(calm_world, "POST", path, in_parts(bomb), told)
        assert status == 413, path
        assert asked <= (12 if path == "/v1/datasets" else 3), path  # which may name 100,000 files
    long_text = b'{"spec":"' + b"\\u0041" * 2_000_000 + b'"}'
    told = json_headers(calm_world, content_length=str(len(long_text)))
    assert raw(calm_world, "POST", "/v1/plans", in_parts(long_text), told)[0] == 400


def test_too_many_fields_are_one_error(calm_world: World) -> None:
    """Each would be one, of a hundred bytes or more, and a text of policies has room for many."""
    for path in ("/v1/policy", "/v1/token-keys"):
        body = json.dumps({f"x{number}": 1 for number in range(10_000)}).encode()
        told = json_headers(calm_world, content_length=str(len(body)))
        status, answer, _ = raw(calm_world, "POST", path, in_parts(body), told)
        assert (status, answer["error"]) == (400, "the request is not valid at body")


FORMS = {
    "fields": b"&".join(b"a%d=" % number for number in range(1500)),
    "escapes": b"grant_type=" + b"%41" * 5000,
    "parts": b"".join(b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n" for _ in range(250)) + b"--x--",
    "a broken part": b"--x\r\nContent-Disposition: form-data; filename=a\r\n\r\n",
    "no form": b"\x00\xff%ZZ&&==",
}


@pytest.mark.parametrize("kind", ["x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data"])
@pytest.mark.parametrize("bomb", FORMS.values(), ids=FORMS)
def test_no_bomb_of_a_form_is_a_fault(calm_world: World, bomb: bytes, kind: str) -> None:
    assert len(bomb) <= gate.MAX_PUBLIC_BODY_BYTES
    for path in ("/v1/token", "/v1/revoke"):
        full = kind if "/" in kind else f"application/{kind}"
        told = {"content-type": full, "content-length": str(len(bomb))}
        assert 400 <= raw(calm_world, "POST", path, [bomb], told)[0] < 500
