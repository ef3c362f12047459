"""The replica over the wire: real uvicorn, real TLS, real httpx, on loopback. Only the authority is an object."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pickle
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloister.client.inference import InferenceClient, infer
from cloister.errors import (
    ApprovalMissingError,
    AuthenticationError,
    CloisterError,
    InputError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    UnavailableError,
)
from cloister.serving import app as app_module
from cloister.serving.connect import cedar_authorizer
from cloister.serving.endpoint import Endpoint, open_endpoint
from cloister.serving.pipeline import Authorizer, Pipeline
from cloister.serving.release import VerifiedModel
from cloister.serving.replica import Backing, Replica
from cloister.serving.tables import MAX_BODY_BYTES
from ports import free_port
from serving_world import (
    GOOD_COLUMNS,
    MODEL,
    NOW,
    FakeAuthority,
    TokenMaker,
    allow_all,
    body,
    changed,
    signed_release,
    write_endpoint,
)

MAKER = TokenMaker()
SECRET = "Sekretariatswert"
URL = f"/v2/models/{MODEL}/infer"


class Served:
    """A running replica and how to reach it."""

    def __init__(self, folder: Path, authority: FakeAuthority) -> None:
        self.authority = authority
        authority.token_keys = MAKER.keys
        self.directory = write_endpoint(folder / "endpoint", MAKER)
        self.replica = Replica(str(self.directory), self.connect)
        self.url = f"https://127.0.0.1:{self.replica.port}"
        self.ca = self.directory / "ca.crt"
        context = ssl.create_default_context(cafile=self.ca)
        self.http = httpx.Client(base_url=self.url, verify=context, trust_env=False, timeout=60)

    def connect(self, _: Endpoint) -> Backing:
        return Backing(authority=self.authority, authorizer=cedar_authorizer, clock=lambda: NOW)

    def post(self, content: Any = None, token: str | None = None, path: str = URL, **headers: str) -> httpx.Response:
        data = content if isinstance(content, bytes) else json.dumps(content or body()).encode()
        known = {"authorization": f"Bearer {token or self.token()}"}
        return self.http.post(path, content=data, headers=known | headers)

    def token(self, **changes: Any) -> str:
        return MAKER.token(**changes)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    authority = FakeAuthority(signed_release(), budget=100_000, window_ends=NOW + 3600)
    world = Served(tmp_path_factory.mktemp("served"), authority)
    yield world
    world.http.close()
    world.replica.close()


@contextlib.contextmanager
def begun(served: Served, content_length: int) -> Iterator[ssl.SSLSocket]:
    """A connection on which a request has begun: its body is still to come."""
    context = ssl.create_default_context(cafile=served.ca)
    lines = (f"POST {URL} HTTP/1.1", "host:x", f"authorization: Bearer {served.token()}")
    head = "\r\n".join((*lines, f"content-length: {content_length}", "", ""))
    with (
        socket.create_connection(("127.0.0.1", served.replica.port), timeout=60) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(head.encode())
        yield connection


def check_refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    assert answer.keys() == {"error", "hint", "kind"}
    assert isinstance(answer["error"], str)
    assert "Traceback" not in response.text
    assert SECRET not in response.text
    return answer


def test_an_answer(served: Served) -> None:
    response = served.post()
    assert response.status_code == 200
    assert response.json()["outputs"][0]["data"] == ["yes", "no"]
    assert response.headers["cache-control"] == "no-store"
    assert "server" not in response.headers
    assert response.http_version == "HTTP/1.1"


def test_what_is_open_to_anybody(served: Served) -> None:
    assert served.http.get("/v2/health/live").json() == {"live": True}
    assert served.http.get("/v2/health/ready").json() == {"ready": True}
    assert served.http.get("/v2").json()["name"] == "cloister"


class TestRefusals:
    def test_401_without_a_token(self, served: Served) -> None:
        for response in (served.http.post(URL, json=body()), served.http.get(f"/v2/models/{MODEL}")):
            check_refusal(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"

    def test_401_with_a_bad_token(self, served: Served) -> None:
        for token in ("a.b.c", served.token(now=NOW - 1000), TokenMaker().token()):
            response = served.post(token=token)
            check_refusal(response, 401)
            assert response.headers["www-authenticate"].startswith("Bearer ")

    def test_403_without_the_role(self, served: Served) -> None:
        answer = check_refusal(served.post(token=served.token(roles=["engineer"])), 403)
        assert answer["kind"] == "PermissionDeniedError"

    def test_404(self, served: Served) -> None:
        check_refusal(served.post(path="/v2/models/another/infer"), 404)
        for path in ("/", "/docs", "/openapi.json", "/metrics", "/-/routes", "/v2/models", f"{URL}/x"):
            check_refusal(served.http.get(path), 404)

    def test_405(self, served: Served) -> None:
        check_refusal(served.http.get(URL), 405)
        check_refusal(served.http.delete(URL), 405)

    def test_400(self, served: Served) -> None:
        check_refusal(served.post({"inputs": [{"name": SECRET}]}), 400)
        check_refusal(served.post(body(GOOD_COLUMNS | {"job": [SECRET, "clerk"]})), 400)
        check_refusal(served.post(b"\xff"), 400)

    def test_413_by_declared_and_by_real_length(self, served: Served) -> None:
        check_refusal(served.post(b" " * (MAX_BODY_BYTES + 1)), 413)

        def chunks() -> Iterator[bytes]:
            for _ in range(MAX_BODY_BYTES // 65536 + 2):
                yield b" " * 65536

        headers = {"authorization": f"Bearer {served.token()}"}
        check_refusal(served.http.post(URL, content=chunks(), headers=headers), 413)

    def test_413_before_a_body_that_is_announced_too_large(self, served: Served) -> None:
        with begun(served, content_length=2_000_000) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")

    def test_a_stranger_sends_no_body(self, served: Served) -> None:
        """401 comes before the body: else anybody could fill the memory."""
        check_refusal(served.http.post(URL, content=b" " * (MAX_BODY_BYTES + 1)), 401)

    def test_415_for_compressed_bodies(self, served: Served) -> None:
        check_refusal(served.post(**{"content-encoding": "gzip"}), 415)

    def test_408_for_a_body_that_never_ends(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(app_module, "BODY_TIMEOUT_S", 0.5)
        with begun(served, content_length=2) as connection:
            connection.sendall(b"{")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")

    def test_429_says_when_to_come_back(self, served: Served) -> None:
        served.authority.used["greedy"] = served.authority.budget
        response = served.post(token=served.token(subject="greedy"))
        check_refusal(response, 429)
        assert response.headers["retry-after"] == "3600"

    def test_a_failure_inside_shows_nothing(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail(*_: object) -> None:
            raise RuntimeError(SECRET)

        monkeypatch.setattr(Pipeline, "infer", fail)
        with caplog.at_level(logging.DEBUG):
            check_refusal(served.post(), 500)
        assert SECRET not in caplog.text
        assert "RuntimeError" in caplog.text


class TestTransport:
    def test_nothing_older_than_tls_1_3(self, served: Served) -> None:
        context = ssl.create_default_context(cafile=served.ca)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", served.replica.port), timeout=60) as raw,
            pytest.raises(ssl.SSLError),
        ):
            context.wrap_socket(raw, server_hostname="127.0.0.1")

    def test_no_plain_http(self, served: Served) -> None:
        with pytest.raises(httpx.TransportError):
            httpx.get(served.url.replace("https", "http") + "/v2", timeout=60)

    def test_two_replicas_share_the_port_and_one_can_leave(self, served: Served, tmp_path: Path) -> None:
        folder = write_endpoint(tmp_path / "e", MAKER, port=served.replica.port)
        for name in ("tls.crt", "tls.key"):
            (folder / name).write_bytes((served.directory / name).read_bytes())
        second = Replica(str(folder), served.connect)
        second.check_health()
        second.close()
        second.close()
        with pytest.raises(UnavailableError):
            second.check_health()
        assert all(served.post().status_code == 200 for _ in range(10))

    def test_a_port_that_somebody_else_holds(self, served: Served, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            folder = write_endpoint(tmp_path / "e", MAKER, port=taken.getsockname()[1])
            with pytest.raises(UnavailableError):
                Replica(str(folder), served.connect)

    def test_a_request_in_flight_is_finished(self, tmp_path: Path) -> None:
        asking, closing = threading.Event(), threading.Event()

        class Slow(FakeAuthority):
            def take_quota_block(self, endpoint_id: str, subject: str, wanted: int) -> tuple[int, float]:
                asking.set()
                assert closing.wait(60)
                time.sleep(0.5)  # for `close` to begin
                return super().take_quota_block(endpoint_id, subject, wanted)

        world = Served(tmp_path, Slow(signed_release(), window_ends=NOW + 60))

        async def story() -> httpx.Response:
            context = ssl.create_default_context(cafile=world.ca)
            async with httpx.AsyncClient(base_url=world.url, verify=context, timeout=60) as client:
                headers = {"authorization": f"Bearer {world.token()}"}
                asked = asyncio.create_task(client.post(URL, json=body(), headers=headers))
                await asyncio.to_thread(asking.wait, 60)
                closing.set()
                await asyncio.to_thread(world.replica.close)
                return await asked

        assert asyncio.run(story()).status_code == 200
        with pytest.raises(httpx.ConnectError):
            world.http.get("/v2")


class TestClient:
    def test_labels_and_probabilities(self, served: Served) -> None:
        rows = infer(served.url, MODEL, GOOD_COLUMNS, served.token(), served.ca)
        assert [label for label, _ in rows] == ["yes", "no"]
        assert all(0.5 <= probability <= 1 and round(probability, 2) == probability for _, probability in rows)

    def test_refusals_arrive_as_the_errors_that_they_are(self, served: Served) -> None:
        def ask(token: str, model: str = MODEL, columns: Any = GOOD_COLUMNS) -> None:
            infer(served.url, model, columns, token, served.ca)

        with pytest.raises(AuthenticationError):
            ask("a.b.c")
        with pytest.raises(PermissionDeniedError):
            ask(served.token(roles=[]))
        with pytest.raises(NotFoundError):
            ask(served.token(), "another/../../x")
        with pytest.raises(InputError, match="hours"):
            ask(served.token(), columns={name: GOOD_COLUMNS[name] for name in ("age", "job")})
        with pytest.raises(InputError, match="mixed"):
            ask(served.token(), columns={"mixed": [1, "a"]})
        served.authority.used["greedy"] = served.authority.budget
        with pytest.raises(QuotaExceededError) as caught:
            ask(served.token(subject="greedy"))
        assert caught.value.retry_after_s == 3600

    def test_metadata(self, served: Served) -> None:
        with InferenceClient(served.url, served.token(), served.ca) as client:
            assert client.metadata(MODEL)["outputs"][0]["name"] == "label"

    def test_nobody_there(self, served: Served) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"https://127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(UnavailableError) as caught:
                infer(url, MODEL, GOOD_COLUMNS, "t", served.ca)
        assert caught.value.hint

    def test_a_server_with_a_foreign_certificate(self, served: Served, tmp_path: Path) -> None:
        other = write_endpoint(tmp_path / "e", MAKER) / "ca.crt"
        with pytest.raises(UnavailableError):
            infer(served.url, MODEL, GOOD_COLUMNS, "t", other)

    def test_no_plain_url_and_no_missing_ca(self, served: Served, tmp_path: Path) -> None:
        with pytest.raises(InputError):
            infer("http://127.0.0.1:1", MODEL, GOOD_COLUMNS, "t", served.ca)
        with pytest.raises(InputError):
            infer(served.url, MODEL, GOOD_COLUMNS, "t", tmp_path / "none")


class TestStart:
    """A replica that cannot verify opens no port."""

    def start(self, folder: Path, authority: FakeAuthority, **config: Any) -> Replica:
        def authorizer(_: VerifiedModel, _reference: str, _site: str) -> Authorizer:
            return allow_all

        def connect(_: Endpoint) -> Backing:
            return Backing(authority=authority, authorizer=authorizer, clock=lambda: NOW)

        return Replica(str(write_endpoint(folder / "e", MAKER, **config)), connect)

    def test_without_approvals(self, tmp_path: Path) -> None:
        port = free_port()
        with pytest.raises(ApprovalMissingError):
            self.start(tmp_path, FakeAuthority(changed(signed_release(), approvals=[])), port=port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=60)

    def test_for_another_model(self, tmp_path: Path) -> None:
        with pytest.raises(CloisterError):
            self.start(tmp_path, FakeAuthority(), model="another")

    def test_its_errors_cross_processes(self, tmp_path: Path) -> None:
        with pytest.raises(ApprovalMissingError) as caught:
            self.start(tmp_path, FakeAuthority(changed(signed_release(), approvals=[])))
        assert pickle.loads(pickle.dumps(caught.value)).hint == caught.value.hint  # noqa: S301  our own bytes


class TestEndpointDirectory:
    @pytest.mark.parametrize("name", ["", "endpoint.key", "tls.key"])
    def test_open_to_others_is_refused(self, tmp_path: Path, name: str) -> None:
        directory = write_endpoint(tmp_path / "e", MAKER)
        assert open_endpoint(directory).config.model == MODEL
        (directory / name).chmod(0o750)
        with pytest.raises(InputError, match="open to others"):
            open_endpoint(directory)

    @pytest.mark.parametrize("name", ["endpoint.json", "trust.json", "endpoint.key", "tls.key"])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        directory = write_endpoint(tmp_path / "e", MAKER)
        (directory / name).unlink()
        with pytest.raises(NotFoundError):
            open_endpoint(directory)

    @pytest.mark.parametrize(
        "config", [{"port": 70_000}, {"authority_url": "http://x"}, {"decimals": 17}, {"extra": 1}, {"replicas": 0}]
    )
    def test_a_wrong_field_is_named(self, tmp_path: Path, config: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=next(iter(config))):
            open_endpoint(write_endpoint(tmp_path / "e", MAKER, **config))

    def test_trust_that_trusts_nobody(self, tmp_path: Path) -> None:
        directory = write_endpoint(tmp_path / "e", MAKER)
        trust = json.loads((directory / "trust.json").read_text())
        for change in ({"token_keys": {}}, {"required_approvals": 0}):
            (directory / "trust.json").write_text(json.dumps(trust | change))
            with pytest.raises(InputError):
                open_endpoint(directory)
