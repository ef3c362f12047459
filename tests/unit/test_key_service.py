"""One contract, every key service: what is wrapped opens only as it was wrapped, and what was destroyed never again.

A real Vault or OpenBao takes part where `VAULT_ADDR` is set, with transit and KV version 2 mounted, and a token that
may do what `vault_server.POLICY` says under any prefix: each run has its own, and leaves its keys there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nacl import pwhash

from cloister.errors import ConflictError, InputError, IntegrityError, NotFoundError
from cloister.sealing.envelope import new_key
from cloister.signing import keys as signing
from cloister.stores.keys import EmbeddedKeys, KeyService, root, version_of
from cloister.stores.keys.settings import VaultSettings
from cloister.stores.keys.vault import BATCH, VaultKeys
from cloister.stores.keys.vault_connection import variables
from vault_server import VaultServer

PASSPHRASE = b"correct horse battery staple"
SERVICES = ["key file", "passphrase", "test server", "real server"]
REAL = variables(os.environ)


@dataclass
class Kind:
    """A kind of key service, of which `open` gives one over the same keys each time."""

    name: str
    directory: Path
    server: VaultServer | None

    def open(self) -> KeyService:
        if self.name == "key file":
            return EmbeddedKeys(self.directory)
        if self.name == "passphrase":
            return EmbeddedKeys(self.directory, passphrase=lambda: PASSPHRASE)
        if self.server is None:
            return VaultKeys(
                VaultSettings(kind="vault", prefix=self.directory.name), REAL | {"HOME": os.environ["HOME"]}
            )
        settings = VaultSettings(
            kind="vault", address=self.server.address, ca_certificate=self.server.ca, timeout_s=60.0
        )
        return VaultKeys(settings, {"VAULT_TOKEN": self.server.token()})


@pytest.fixture(scope="module", params=SERVICES)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    directory = tmp_path_factory.mktemp("keys") / ("t" + secrets.token_hex(6))
    if request.param == "real server" and not any(name.endswith("_ADDR") for name in REAL):
        pytest.skip("no Vault or OpenBao: VAULT_ADDR is not set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, "COST", (pwhash.argon2id.OPSLIMIT_MIN, pwhash.argon2id.MEMLIMIT_MIN))
        if request.param == "test server":
            directory.mkdir()
            with VaultServer(directory) as server:
                yield Kind(request.param, directory, server)
        else:
            yield Kind(request.param, directory, None)


@pytest.fixture
def service(kind: Kind) -> Iterator[KeyService]:
    opened = kind.open()
    yield opened
    opened.close()


@pytest.fixture
def name() -> str:
    return f"dataset/t-{secrets.token_hex(4)}"


def pairs(count: int, about: bytes = b"here") -> list[tuple[bytes, bytes]]:
    return [(new_key(), about + b"/%d" % index) for index in range(count)]


def wrapped(service: KeyService, name: str, keys: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(each, data) for each, (_, data) in zip(service.wrap(name, keys), keys, strict=True)]


def plain(keys: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [key for key, _ in keys]


def states(service: KeyService) -> dict[str, Any]:
    return {state.name: state for state in service.states()}


def test_what_is_wrapped_opens_here_and_after_a_new_start(kind: Kind, service: KeyService, name: str) -> None:
    keys = pairs(3)
    sealed = wrapped(service, name, keys)
    assert service.unwrap(name, sealed) == plain(keys)
    assert not any(key in each for key in plain(keys) for each, _ in sealed)
    again = kind.open()
    assert again.unwrap(name, sealed) == plain(keys)
    again.close()


def test_a_batch_of_any_size_keeps_its_order(service: KeyService, name: str) -> None:
    keys = pairs(BATCH + 1)
    assert service.unwrap(name, wrapped(service, name, keys)) == plain(keys)
    assert service.wrap(name, []) == service.unwrap(name, []) == []


def test_a_wrapped_key_opens_only_where_it_belongs(service: KeyService, name: str) -> None:
    ((sealed, data),) = wrapped(service, name, pairs(1))
    other = name + "-other"
    service.wrap(other, pairs(1))
    middle = len(sealed) // 2
    edited = sealed[:middle] + (b"A" if sealed[middle : middle + 1] != b"A" else b"B") + sealed[middle + 1 :]
    tries = [
        (name, sealed, b"elsewhere"), (name, sealed, b""), (other, sealed, data), (name, edited, data),
        (name, sealed[:-4], data), (name, b"", data), (name, b"\xff" * 65, data), ("dataset/never-made", sealed, data),
    ]  # fmt: skip
    for where, what, about in tries:
        with pytest.raises(IntegrityError):
            service.unwrap(where, [(what, about)])
    with pytest.raises(IntegrityError):  # one that is bad spoils the batch
        service.unwrap(name, [(sealed, data), (edited, data)])
    assert service.unwrap(name, [(sealed, data)])


def test_what_is_no_key_is_not_wrapped(service: KeyService, name: str) -> None:
    with pytest.raises(InputError):
        service.wrap(name, [(b"short", b"")])


@pytest.mark.parametrize(
    "bad", ["", "Dataset", "dataset/", "dataset/A", "dataset/a/b", "../x", "a b", "dataset/" + "a" * 200]
)
def test_what_is_no_name_is_refused(service: KeyService, bad: str) -> None:
    for use in (lambda: service.wrap(bad, pairs(1)), lambda: service.signer(bad), lambda: service.rotate(bad)):
        with pytest.raises(InputError):
            use()


def test_rotation_makes_a_version_and_the_old_one_still_opens(kind: Kind, service: KeyService, name: str) -> None:
    other = kind.open()
    keys = pairs(2)
    sealed = wrapped(service, name, keys)
    assert {version_of(each) for each, _ in sealed} == {1}
    assert service.rotate(name) == 2
    assert [version_of(each) for each in other.wrap(name, keys)] == [2, 2]  # another process knows it at once
    assert other.unwrap(name, sealed) == plain(keys)
    again = [(each, data) for each, (_, data) in zip(service.rewrap(name, sealed), sealed, strict=True)]
    assert {version_of(each) for each, _ in again} == {2}
    assert service.unwrap(name, again) == plain(keys)
    state = states(service)[name]
    assert (state.use, state.oldest, state.newest) == ("wrap", 1, 2)
    assert 0 < state.created <= state.rotated
    other.close()


def test_a_destroyed_version_opens_nothing_anywhere(kind: Kind, service: KeyService, name: str) -> None:
    other = kind.open()
    keys = pairs(2)
    old = wrapped(service, name, keys)
    assert other.unwrap(name, old) == plain(keys)
    service.rotate(name)
    new = [(each, data) for each, (_, data) in zip(service.rewrap(name, old), old, strict=True)]
    service.destroy_below(name, 2)
    service.destroy_below(name, 2)  # twice does no harm
    service.destroy_below(name, 1)
    fresh = kind.open()
    for each in (service, other, fresh):
        with pytest.raises(IntegrityError, match="destroyed"):
            each.unwrap(name, old)
        assert each.unwrap(name, new) == plain(keys)
    assert (states(service)[name].oldest, states(service)[name].newest) == (2, 2)
    assert service.rotate(name) == 3
    for each in (fresh, other):
        each.close()


def test_the_newest_version_is_never_destroyed(service: KeyService, name: str) -> None:
    sealed = wrapped(service, name, pairs(1))
    for version in (0, -1, 2, 99):
        with pytest.raises(InputError):
            service.destroy_below(name, version)
    for use in (service.rotate, lambda missing: service.destroy_below(missing, 1)):
        with pytest.raises(NotFoundError):
            use("dataset/never-made")
    assert service.unwrap(name, sealed)


def test_a_signature_is_by_the_one_key_of_that_name(kind: Kind, service: KeyService) -> None:
    signer = service.signer("release")
    signing.verify(signer.public_key(), signer.sign(b"said"), b"said")
    with pytest.raises(IntegrityError):
        signing.verify(signer.public_key(), signer.sign(b"said"), b"unsaid")
    again = kind.open()
    signing.verify(signer.public_key(), again.signer("release").sign(b"said"), b"said")
    again.close()
    for change in (service.rotate, lambda name: service.destroy_below(name, 1)):
        with pytest.raises(InputError):
            change("release")


def test_a_derived_key_is_stable_and_its_own(kind: Kind, service: KeyService) -> None:
    derived = service.derive("subjects", b"adult/index")
    assert len(derived) == 32
    again = kind.open()
    assert again.derive("subjects", b"adult/index") == derived
    again.close()
    others = [service.derive("subjects", b"adult/pseudonym"), service.derive("subjects/adult", b"adult/index")]
    assert len({derived, *others}) == 3
    assert states(service)["subjects/adult"].use == "derive"
    with pytest.raises(InputError):
        service.rotate("subjects")


def test_a_secret_is_stored_once(kind: Kind, service: KeyService) -> None:
    name = "s-" + secrets.token_hex(4)
    with pytest.raises(NotFoundError):
        service.secret(name)
    service.store_secret(name, b"\x00first\xff")
    other = kind.open()
    for each in (service, other):
        with pytest.raises(ConflictError):
            each.store_secret(name, b"second")
        assert each.secret(name) == b"\x00first\xff"
    other.close()
    for bad in ("", "../anchor", "a/b", "A"):
        with pytest.raises(InputError):
            service.store_secret(bad, b"value")


def test_what_is_remembered_of_the_log_only_grows(kind: Kind, service: KeyService) -> None:
    start, _ = service.remembered() or (0, "")  # something, where the test is run again
    other = kind.open()
    service.remember(start + 5, "aa")
    other.remember(start + 9, "bb")
    service.remember(start + 7, "cc")
    assert service.remembered() == other.remembered() == (start + 9, "bb")
    other.close()
