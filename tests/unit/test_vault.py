"""The key service is sealed, slow, gone, or not the one that is meant; or the authority is no longer welcome there."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import RedirectResponse, Response, StreamingResponse

from cloister.errors import CloisterError, InputError, IntegrityError, KeyServiceError
from cloister.sealing.envelope import new_key
from cloister.stores.keys import version_of
from cloister.stores.keys.settings import AppRoleLogin, JwtLogin, TokenLogin, VaultSettings
from cloister.stores.keys.vault import VaultKeys
from cloister.stores.keys.vault_connection import is_safe
from command_line import ROOT
from vault_server import POLICY, Namespace, RefusedError, VaultServer
from waiting import wait_for

TIMEOUT_S = 60.0
SHORT_S = 0.5
NAME = "dataset/adult"
KEY = new_key()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultServer]:
    with VaultServer(tmp_path_factory.mktemp("vault")) as server:
        yield server


@pytest.fixture
def server(running: VaultServer) -> VaultServer:
    """As it was on its first day."""
    running.namespaces = {"": Namespace()}
    running.sealed, running.fault = False, None
    running.requests.clear()
    return running


@pytest.fixture
def opened(server: VaultServer) -> Iterator[Callable[..., VaultKeys]]:
    """Opens key services over `server`, and closes them."""
    services: list[VaultKeys] = []

    def open_one(environment: dict[str, str] | None = None, **settings: Any) -> VaultKeys:
        if "login" not in settings and environment is None:
            environment = {"VAULT_TOKEN": server.token()}
        known = {"kind": "vault", "address": server.address, "ca_certificate": server.ca, "timeout_s": TIMEOUT_S}
        services.append(VaultKeys(VaultSettings.model_validate(known | settings), environment or {}))
        return services[-1]

    yield open_one
    server.fault = None
    for service in services:
        service.close()


@pytest.fixture
def service(opened: Callable[..., VaultKeys]) -> VaultKeys:
    service = opened()
    service.wrap(NAME, [(KEY, b"")])
    return service


USES: list[tuple[str, Callable[[VaultKeys], Any]]] = [
    ("wrap", lambda s: s.wrap(NAME, [(KEY, b"")])), ("unwrap", lambda s: s.unwrap(NAME, [(b"vault:v1:AAAA", b"")])),
    ("rotate", lambda s: s.rotate(NAME)), ("destroy", lambda s: s.destroy_below(NAME, 1)),
    ("states", lambda s: s.states()),
    ("sign", lambda s: s.signer("release").sign(b"")), ("derive", lambda s: s.derive("subjects", b"")),
    ("secret", lambda s: s.secret("log")), ("store", lambda s: s.store_secret("log", b"")),
    ("remember", lambda s: s.remember(1, "aa")), ("remembered", lambda s: s.remembered()),
]  # fmt: skip
each_use = pytest.mark.parametrize("use", [use for _, use in USES], ids=[name for name, _ in USES])


# ---- it fails ----


@each_use
def test_a_sealed_service_does_nothing_and_is_not_remembered_for(
    server: VaultServer, service: VaultKeys, use: Callable[[VaultKeys], Any]
) -> None:
    use_before = server.namespaces[""].keys["cloister-dataset-adult"].latest
    server.sealed = True
    with pytest.raises(KeyServiceError, match="sealed"):
        use(service)
    assert server.namespaces[""].keys["cloister-dataset-adult"].latest == use_before
    server.sealed = False
    assert service.wrap(NAME, [(KEY, b"")])


@each_use
def test_a_token_that_is_revoked_meanwhile_is_good_for_nothing(
    server: VaultServer, service: VaultKeys, use: Callable[[VaultKeys], Any]
) -> None:
    server.revoke_all()
    with pytest.raises(KeyServiceError, match="refuses"):
        use(service)


def dripping(_path: str) -> Response:
    """One byte now and then, for ever: each comes in time."""

    def drops() -> Iterator[bytes]:
        for _ in range(100):
            yield b" "
            time.sleep(SHORT_S / 5)

    return StreamingResponse(drops(), media_type="application/json")


def sleeping(_path: str) -> None:
    time.sleep(2 * SHORT_S)


@pytest.mark.parametrize("fault", [sleeping, dripping])
def test_a_slow_service_is_not_waited_for(server: VaultServer, service: VaultKeys, fault: Any) -> None:
    service._connection.timeout_s = SHORT_S
    with server.failing(fault), pytest.raises(KeyServiceError, match=f"within {SHORT_S:g} s"):
        service.unwrap(NAME, [(b"vault:v1:AAAA", b"")])
    service._connection.timeout_s = TIMEOUT_S
    assert service.wrap(NAME, [(KEY, b"")])


def status(number: int) -> Callable[[str], None]:
    def fail(_path: str) -> None:
        raise RefusedError(number, "internal: secret-path/secret-value")

    return fail


def text(content: str, media_type: str = "application/json") -> Callable[[str], Response]:
    return lambda _path: Response(content, media_type=media_type)


@pytest.mark.parametrize(
    "fault",
    [status(429), status(500), status(501), status(502), status(503), status(473), text("<html>", "text/html"),
     text(""), text("[]"), text("null"), text('{"data": {}}'), text('{"data": {"batch_results": []}}'),
     text('{"data": {"batch_results": [{"plaintext": "?"}], "keys": 1}}'), text("{" * 100_000)],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error_of_ours_without_its_text(
    server: VaultServer, service: VaultKeys, fault: Any
) -> None:
    sealed = service.wrap(NAME, [(KEY, b"")])[0]
    with server.failing(fault), pytest.raises(KeyServiceError) as caught:
        service.unwrap(NAME, [(sealed, b"")])
    assert "secret" not in str(caught.value.args)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_answer_with_too_few_keys_is_none(server: VaultServer, service: VaultKeys) -> None:
    answer = text('{"data": {"batch_results": [{"ciphertext": "vault:v1:AAAA"}]}}')
    with server.failing(answer), pytest.raises(KeyServiceError):
        service.wrap(NAME, [(KEY, b"a"), (KEY, b"b")])


def test_a_key_that_cannot_be_read_is_no_reason_to_give_another(server: VaultServer, service: VaultKeys) -> None:
    """With status 200 and the error in the item, as some versions answer."""
    sealed = service.wrap(NAME, [(KEY, b"")])[0]

    def fault(path: str) -> Response | None:
        one = '{"data": {"batch_results": [{"error": "invalid ciphertext"}]}}'
        return Response(one, media_type="application/json") if "decrypt" in path else None

    with server.failing(fault), pytest.raises(IntegrityError):
        service.unwrap(NAME, [(sealed, b"")])


def test_a_destruction_that_was_cut_off_is_finished_the_next_time(server: VaultServer, service: VaultKeys) -> None:
    sealed = service.wrap(NAME, [(KEY, b"")])[0]
    service.rotate(NAME)
    failing = status(500)
    fault = lambda path: failing(path) if path.endswith("/trim") else None  # noqa: E731
    with server.failing(fault), pytest.raises(KeyServiceError):
        service.destroy_below(NAME, 2)
    service.destroy_below(NAME, 2)
    (key,) = (each for full, each in server.namespaces[""].keys.items() if full.endswith("dataset-adult"))
    assert (key.min_available, sorted(key.versions)) == (2, [2])
    with pytest.raises(IntegrityError):
        service.unwrap(NAME, [(sealed, b"")])


def test_a_redirect_out_of_tls_is_not_followed(server: VaultServer, service: VaultKeys) -> None:
    with server.failing(lambda _path: RedirectResponse("http://vault.example/v1/x")), pytest.raises(KeyServiceError):
        service.wrap(NAME, [(KEY, b"")])


@pytest.mark.parametrize(
    ("url", "safe"),
    [("https://vault.example", True), ("http://127.0.0.1:8200", True), ("http://[::1]:8200", True),
     ("http://localhost:8200", True), ("http://vault.example", False), ("http://10.0.0.1", False),
     ("http://127.0.0.1.example", False), ("http://localhost.example", False), ("ftp://127.0.0.1", False), ("", False)],
)  # fmt: skip
def test_keys_travel_over_tls_or_not_at_all(url: str, safe: bool) -> None:
    assert is_safe(url) is safe


def test_a_server_that_is_gone_is_said_to_be(opened: Callable[..., VaultKeys]) -> None:
    with pytest.raises(KeyServiceError, match="cannot be reached"):
        opened(address="https://127.0.0.1:1")


def test_a_connection_that_was_closed_meanwhile_is_made_anew(server: VaultServer, service: VaultKeys) -> None:
    left = [1]

    def hang_up(_path: str) -> Response | None:
        if left.pop() if left else 0:
            return StreamingResponse(iter([b""]), headers={"content-length": "5"})
        return None

    with server.failing(hang_up):
        assert service.wrap(NAME, [(KEY, b"")])


# ---- it is not the one that is meant ----


def test_only_the_ca_that_is_named_is_trusted(
    server: VaultServer, opened: Callable[..., VaultKeys], tmp_path: Path
) -> None:
    with VaultServer(tmp_path) as other, pytest.raises(KeyServiceError, match="certificate"):
        opened({"VAULT_TOKEN": other.token()}, address=other.address)
    assert not other.requests
    with pytest.raises(KeyServiceError, match="certificate"):  # the system's do not know it
        opened({"VAULT_TOKEN": server.token()}, ca_certificate=None)
    assert not server.requests


@pytest.mark.parametrize(
    ("settings", "environment"),
    [({"address": "http://vault.example:8200"}, {}), ({"address": None}, {}), ({}, {"VAULT_SKIP_VERIFY": "true"}),
     ({"ca_certificate": "/no/such.pem"}, {}), ({}, {"VAULT_CLIENT_CERT": "/no/such", "VAULT_CLIENT_KEY": "/no/such"}),
     ({"timeout_s": None}, {"VAULT_CLIENT_TIMEOUT": "soon"}), ({}, {}),
     ({"login": {"kind": "token", "token_file": "/no/such"}}, {})],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    server: VaultServer, opened: Callable[..., VaultKeys], settings: dict[str, Any], environment: dict[str, str]
) -> None:
    token = {"VAULT_TOKEN": server.token()} if settings or environment else {}
    with pytest.raises(InputError):
        opened(token | environment, **settings)
    assert not server.requests


def test_variables_say_what_the_settings_do_not(server: VaultServer, opened: Callable[..., VaultKeys]) -> None:
    server.space("team/a")
    known = {
        "VAULT_ADDR": server.address.replace("127.0.0.1", "localhost"), "VAULT_CACERT": str(server.ca),
        "VAULT_TOKEN": server.token(namespace="team/a"), "VAULT_NAMESPACE": "team/a", "VAULT_CLIENT_TIMEOUT": "60000ms",
        "VAULT_TLS_SERVER_NAME": "vault.test",
    }  # fmt: skip
    plain = {"address": None, "ca_certificate": None, "timeout_s": None}
    service = opened(known, **plain)
    service.wrap(NAME, [(KEY, b"")])
    assert list(server.namespaces["team/a"].keys) == ["cloister-dataset-adult"]
    assert not server.namespaces[""].keys
    with pytest.raises(KeyServiceError, match="certificate"):
        opened(known | {"VAULT_TLS_SERVER_NAME": "other.test"}, **plain)
    with pytest.raises(KeyServiceError):  # OpenBao's own go first
        opened(known | {"BAO_ADDR": "https://127.0.0.1:1"}, **plain)


def test_a_namespace_is_a_world_of_its_own(server: VaultServer, opened: Callable[..., VaultKeys]) -> None:
    sealed = opened().wrap(NAME, [(KEY, b"")])[0]
    server.space("team/b")
    other = opened({"VAULT_TOKEN": server.token(namespace="team/b")}, namespace="team/b")
    other.wrap(NAME, [(KEY, b"")])
    with pytest.raises(IntegrityError):
        other.unwrap(NAME, [(sealed, b"")])
    with pytest.raises(KeyServiceError, match="refuses"):
        opened({"VAULT_TOKEN": server.token()}, namespace="team/b")


# ---- logins ----


def role(server: VaultServer, mount: str, proof: dict[str, str], ttl_s: float = 60.0) -> None:
    server.namespaces[""].roles[mount] = {"proof": proof, "ttl_s": ttl_s, "policy": POLICY}


@pytest.fixture
def credential(tmp_path: Path) -> Path:
    (tmp_path / "credential").write_text("proof\n")
    return tmp_path / "credential"


def logins(credential: Path) -> list[tuple[Any, str, dict[str, str]]]:
    return [
        (AppRoleLogin(kind="approle", role_id="authority", secret_id_file=credential), "auth/approle",
         {"role_id": "authority", "secret_id": "proof"}),
        (JwtLogin(kind="jwt", role="authority", jwt_file=credential), "auth/jwt",
         {"role": "authority", "jwt": "proof"}),
        (JwtLogin(kind="kubernetes", role="authority", jwt_file=credential, mount="cluster-1"), "auth/cluster-1",
         {"role": "authority", "jwt": "proof"}),
    ]  # fmt: skip


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_login_gives_a_token_and_another_when_that_is_revoked(
    server: VaultServer, opened: Callable[..., VaultKeys], credential: Path, which: int
) -> None:
    login, mount, proof = logins(credential)[which]
    role(server, mount, proof)
    service = opened(login=login)
    assert service.wrap(NAME, [(KEY, b"")])
    server.revoke_all()
    assert service.wrap(NAME, [(KEY, b"")])
    server.revoke_all()
    role(server, mount, proof | {next(iter(proof)): "another"})  # and now the role is gone too
    with pytest.raises(KeyServiceError, match="refuses"):
        service.unwrap(NAME, [(b"vault:v1:AAAA", b"")])
    with pytest.raises(KeyServiceError, match="refuses"):
        opened(login=login)


def test_closing_ends_the_token(server: VaultServer, opened: Callable[..., VaultKeys], credential: Path) -> None:
    login, mount, proof = logins(credential)[0]
    role(server, mount, proof)
    service = opened(login=login)
    assert len(server.namespaces[""].tokens) == 1
    service.close()
    assert not server.namespaces[""].tokens


def test_a_token_is_renewed_while_nobody_uses_it(server: VaultServer, opened: Callable[..., VaultKeys]) -> None:
    name = server.token(ttl_s=3)
    service = opened({"VAULT_TOKEN": name})
    wait_for(lambda: ("POST", "auth/token/renew-self") in server.requests)
    server.namespaces[""].tokens[name].expires = math.inf  # the machine may be slower than the token lives
    assert service.wrap(NAME, [(KEY, b"")])


def test_a_token_that_may_not_be_renewed_is_replaced_by_another_login(
    server: VaultServer, opened: Callable[..., VaultKeys], credential: Path
) -> None:
    login, mount, proof = logins(credential)[0]
    role(server, mount, proof, ttl_s=0.5)
    service = opened(login=login)
    server.fault = lambda path: Response(status_code=403) if path.endswith("renew-self") else None
    role(server, mount, proof)  # the next one lives as long as the test
    wait_for(lambda: sum(path.endswith("/login") for _, path in server.requests) == 2)
    assert service.wrap(NAME, [(KEY, b"")])


def test_the_token_file_is_read_again_when_its_token_died(
    server: VaultServer, opened: Callable[..., VaultKeys], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(server.token())
    service = opened(login=TokenLogin(token_file=file))
    server.revoke_all()
    file.write_text(server.token() + "\n")  # as Vault Agent does
    assert service.wrap(NAME, [(KEY, b"")])


def test_a_policy_that_is_too_narrow_is_said_and_nothing_is_done(
    server: VaultServer, opened: Callable[..., VaultKeys]
) -> None:
    for missing in POLICY:
        granted = {path: what for path, what in POLICY.items() if path != missing}
        service = opened({"VAULT_TOKEN": server.token(granted)})
        refused = []
        for name, use in USES:
            try:
                use(service)
            except KeyServiceError as error:
                refused += [name] if "refuses" in error.message else []
            except CloisterError:
                continue  # as a use of an empty server may end
        assert refused, missing


def test_the_readme_grants_what_these_tests_run_with() -> None:
    lines = re.findall(r'path "(\S+)" +\{ capabilities = (\[.*\]) \}', (ROOT / "README.md").read_text())
    assert {path: set(json.loads(granted)) for path, granted in lines} == POLICY


# ---- what is kept there ----


def test_many_threads_use_one_connection(service: VaultKeys) -> None:
    failed: list[Exception] = []

    def work(number: int) -> None:
        try:
            for index in range(5):
                data = b"%d/%d" % (number, index)
                key = new_key()
                assert service.unwrap(NAME, list(zip(service.wrap(NAME, [(key, data)]), [data], strict=True))) == [key]
        except Exception as error:  # noqa: BLE001  (shown below)
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_of_two_who_write_at_once_one_is_told(opened: Callable[..., VaultKeys], server: VaultServer) -> None:
    """Another authority remembers more between our reading and our writing."""
    ours, other = opened(), opened()
    ours.remember(3, "aa")
    done = []

    def interrupt(path: str) -> None:
        if path == "secret/data/cloister/anchor" and len(done) == 1:
            done.append("ours writes")
            server.fault = None
            other.remember(9, "bb")
        elif path == "secret/data/cloister/anchor":
            done.append("ours reads")

    with server.failing(interrupt):
        ours.remember(5, "cc")
    assert ours.remembered() == (9, "bb")


def test_a_signature_outlives_a_rotation_that_somebody_made_there(server: VaultServer, service: VaultKeys) -> None:
    signer, derived = service.signer("release"), service.derive("subjects", b"x")
    for key in server.namespaces[""].keys.values():
        key.rotate()
    from cloister.signing import keys

    keys.verify(signer.public_key(), service.signer("release").sign(b"said"), b"said")
    assert service.derive("subjects", b"x") == derived
    assert version_of(service.wrap(NAME, [(KEY, b"")])[0]) == 2


def test_keys_of_others_are_not_ours(server: VaultServer, service: VaultKeys) -> None:
    server.namespaces[""].keys["theirs"] = server.namespaces[""].keys["cloister-dataset-adult"]
    service.derive("subjects/adult", b"")
    assert [state.name for state in service.states()] == [NAME, "subjects/adult"]
