"""Keys at rest: rotated without touching data, destroyed so that no backup brings them back, used never unseen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import delete, select

from authority_world import ROLES, URL, Person, World, lease_body
from cloister.authority import custody, service
from cloister.authority.core import PLATFORM
from cloister.authority.key_use import MODELS, dataset_key, key_context, model_key_context
from cloister.authority.service import Authority
from cloister.errors import IntegrityError, KeyServiceError, NotFoundError, PermissionDeniedError
from cloister.sealing.envelope import new_key
from cloister.stores.keys import EmbeddedKeys, KeyService, version_of
from cloister.stores.keys.settings import VaultSettings
from cloister.stores.keys.vault import VaultKeys
from cloister.stores.tables import data_keys, key_destructions, models, runs
from databases import Place
from vault_server import RefusedError, VaultServer

ADULT = dataset_key("adult")


def rows(world: World, *columns: Any) -> list[Any]:
    with world.authority.core.database.reading() as connection:
        return list(connection.execute(select(*columns)).all())


def opened(world: World, keys: KeyService | None = None) -> dict[str, bytes]:
    """Every key of the state by what it is for, opened by the key service as it is now."""
    ring = keys or world.authority.core._service
    found = {
        f"{row.version}/{row.file}": ring.unwrap(ADULT, [(row.wrapped, key_context("adult", row.version, row.file))])[0]
        for row in rows(world, data_keys)
    }
    for table, run in ((runs, runs.c.id), (models, models.c.run)):
        for row in rows(world, table.c.model_key, run.label("run")):
            found[f"{table.name} {row.run}"] = ring.unwrap(MODELS, [(row.model_key, model_key_context(row.run))])[0]
    return found


def blobs(world: World) -> dict[str, bytes]:
    folder = world.directory / "blobs"
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rotate(world: World, name: str, who: str = "operator") -> Any:
    return world.post(who, "/v1/keys/rotation", {"name": name})


# ---- rotation ----


def test_rotation_wraps_every_key_anew_and_touches_no_data(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custody, "BATCH", 2)  # several pages
    run = world.train()
    before, files, wrapped = opened(world), blobs(world), rows(world, data_keys)
    with world.recorded("operator", "key:rotate"):
        assert rotate(world, ADULT) == {"name": ADULT, "version": 2, "keys": len(wrapped)}
    assert world.log()[-1].details["key_use"] == f"rotate {ADULT}@2 x1, rewrap {ADULT}@2 x{len(wrapped)}"
    with world.recorded("sofia", "key:rotate"):
        assert rotate(world, MODELS, "sofia")["keys"] == 2  # the run's, and its model's
    assert opened(world) == before
    assert blobs(world) == files
    assert {version_of(row.wrapped) for row in rows(world, data_keys)} == {2}
    assert {version_of(row.model_key) for row in rows(world, models.c.model_key)} == {2}
    assert before[f"models {run}"] == before[f"runs {run}"]
    shown = {each["name"]: each for each in world.get("ada", "/v1/keys")}
    assert (shown[ADULT]["oldest"], shown[ADULT]["newest"], shown[ADULT]["keys"]) == (1, 2, len(wrapped))
    assert (shown["release"]["use"], shown["release"]["keys"]) == ("sign", None)


def test_work_goes_on_after_a_rotation(world: World) -> None:
    run = world.submit()
    for name in (ADULT, MODELS):
        rotate(world, name)
    lease = world.lease(run)
    assert lease.model_key is not None
    world.commit(run)
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease))
    rotate(world, MODELS)
    world.release()
    assert world.client(world.deploy()).lease_model


@pytest.mark.parametrize("name", ["release", "subjects", "dataset/no-such", "../ring", "log"])
def test_what_is_no_wrapping_key_is_not_rotated(calm_world: World, name: str) -> None:
    before = calm_world.authority.core.key_states()
    with calm_world.still():
        assert calm_world.ask("operator", "POST", "/v1/keys/rotation", {"name": name}).status_code in (400, 404)
    assert calm_world.authority.core.key_states() == before


def test_a_rotation_that_fails_halfway_leaves_every_key_good(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(world)

    def fail(*_: Any) -> list[bytes]:
        raise KeyServiceError("the key service cannot be reached", "try again")

    monkeypatch.setattr(EmbeddedKeys, "rewrap", fail)
    with world.still():
        world.refused(503, "operator", "POST", "/v1/keys/rotation", {"name": ADULT})
    monkeypatch.undo()
    assert opened(world) == before
    assert rotate(world, ADULT)["version"] == 3
    assert opened(world) == before


# ---- destruction ----


def shredding(world: World, *, fails: bool = False) -> list[Any]:
    """Delete one data key of `adult` and shred it, as an erasure does; its row as it was."""
    core, keeper = world.authority.core, world.authority.custody
    gone = rows(world, data_keys)[:1]
    with core.action(world.caller("operator"), "key:rotate") as act:
        act.allow(PLATFORM)
        mine = (data_keys.c.file == gone[0].file) & (data_keys.c.version == gone[0].version)
        act.connection.execute(delete(data_keys).where(mine))
        assert keeper.shred(act, "adult") == len(rows(world, data_keys)) - 1
        if fails:
            raise NotFoundError("something else is wrong")
    return gone


def is_noise(world: World, row: Any) -> bool:
    """Whether a wrapped key of `adult` that somebody kept is good for nothing."""
    try:
        world.authority.core._service.unwrap(ADULT, [(row.wrapped, key_context("adult", row.version, row.file))])
    except IntegrityError:
        return True
    return False


def test_a_shredded_key_is_noise_and_the_others_open(world: World) -> None:
    kept = rows(world, data_keys)
    before = opened(world)
    (gone,) = shredding(world)
    assert not is_noise(world, gone)  # committed, not yet done
    assert world.authority.custody.finish() == 1
    assert all(is_noise(world, row) for row in kept)  # all that was wrapped before, in whatever copy
    assert opened(world) == {name: key for name, key in before.items() if name != f"{gone.version}/{gone.file}"}
    assert world.authority.custody.finish() == 0
    entry = world.log()[-1]
    assert (entry.action, entry.details["key"], entry.details["below"]) == ("key:shred", ADULT, 2)
    assert [bool(row.destroyed) for row in rows(world, key_destructions)] == [True]


def test_a_crash_between_commit_and_destruction_is_made_good_at_the_next_start(world: World) -> None:
    (gone,) = shredding(world)
    world.reopen()
    assert is_noise(world, gone)
    assert opened(world)


def test_a_key_service_that_is_away_destroys_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (gone,) = shredding(world)

    def fail(*_: Any) -> None:
        raise KeyServiceError("the key service is sealed", "unseal it")

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedKeys, "destroy_below", fail)
        with pytest.raises(KeyServiceError):
            world.authority.custody.finish()
    assert not is_noise(world, gone)
    assert rows(world, key_destructions)[0].destroyed is None
    assert world.authority.custody.finish() == 1
    assert is_noise(world, gone)


def test_an_action_that_fails_destroys_nothing(world: World) -> None:
    before = opened(world)
    with pytest.raises(NotFoundError, match="something else"):
        shredding(world, fails=True)
    assert world.authority.custody.finish() == 0
    world.reopen()
    assert opened(world) == before


def test_a_state_from_before_the_destruction_says_why_it_opens_nothing(world: World, tmp_path: Path) -> None:
    with world.place.kept(tmp_path / "backup") as restore:
        world.reopen()
        shredding(world)
        world.authority.custody.finish()
        (world.directory / "keys" / "anchor.json").unlink(missing_ok=True)  # or the start would be refused already
        world.authority.close()
        restore()
    world.reopen()
    run = world.submit()
    world.attempt(run)
    answer = world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body())
    assert answer.status_code == 422
    assert "destroyed" in answer.json()["error"]


def test_a_key_service_that_is_older_than_the_state_is_refused(world: World) -> None:
    ring = world.directory / "keys" / "keyring.json"
    old = ring.read_bytes()
    shredding(world)
    world.authority.close()
    ring.write_bytes(old)
    with pytest.raises(Exception, match="no version 2"):
        world.another()


def test_the_keys_of_other_datasets_stay_as_they_are(world: World) -> None:
    with world.authority.core.action(world.caller("operator"), "key:rotate") as act:
        act.allow(PLATFORM)
        first = act.keys.wrap("dataset/other", [(new_key(), b"")])
    shredding(world)
    world.authority.custody.finish()
    assert world.authority.core._service.unwrap("dataset/other", [(first[0], b"")])


# ---- every use leaves its mark ----

USE = re.compile(r"(wrap|unwrap|rewrap|sign|derive) (\S+)@([0-9]+) x([0-9]+)")


class Watched(EmbeddedKeys):
    """Counts what is done with keys, whoever asks for it."""

    done: ClassVar[Counter[tuple[str, str]]] = Counter()
    inside: ClassVar[bool] = False

    def _count(self, verb: str, name: str, count: int, work: Callable[[], Any]) -> Any:
        if self.inside:
            return work()
        self.done[verb, name] += count
        Watched.inside = True
        try:
            return work()
        finally:
            Watched.inside = False

    def wrap(self, name: str, keys: Any) -> list[bytes]:
        return self._count("wrap", name, len(keys), lambda: super(Watched, self).wrap(name, keys))  # type: ignore[no-any-return]

    def unwrap(self, name: str, wrapped: Any) -> list[bytes]:
        return self._count("unwrap", name, len(wrapped), lambda: super(Watched, self).unwrap(name, wrapped))  # type: ignore[no-any-return]

    def rewrap(self, name: str, wrapped: Any) -> list[bytes]:
        return self._count("rewrap", name, len(wrapped), lambda: super(Watched, self).rewrap(name, wrapped))  # type: ignore[no-any-return]

    def derive(self, name: str, context: bytes) -> bytes:
        return self._count("derive", name, 1, lambda: super(Watched, self).derive(name, context))  # type: ignore[no-any-return]

    def signer(self, name: str) -> Any:
        signer, watched = super().signer(name), self

        class Counting:
            public_key = staticmethod(signer.public_key)

            def sign(self, message: bytes) -> bytes:
                return watched._count("sign", name, 1, lambda: signer.sign(message))  # type: ignore[no-any-return]

        return Counting()


def test_every_use_of_a_key_leaves_its_mark(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "EmbeddedKeys", Watched)
    Watched.done = Counter()
    world.reopen()
    size = len(world.log())
    world.seal("olga")
    world.train()
    world.release()
    world.client(world.deploy()).lease_model(list(world.people)[-1])
    rotate(world, ADULT)
    recorded: Counter[tuple[str, str]] = Counter()
    for entry in world.log()[size:]:
        for verb, name, _, count in USE.findall(str(entry.details.get("key_use", ""))):
            recorded[verb, name] += int(count)
    assert {verb for verb, _ in recorded} == {"wrap", "unwrap", "rewrap", "sign", "derive"}
    assert recorded == Watched.done
    assert not any(b"hvs." in entry or b"BEGIN" in entry for entry in world.entries())


def test_an_action_that_leaves_no_entry_has_no_keys(calm_world: World) -> None:
    core = calm_world.authority.core
    for way in (core.reading, core.unlogged):
        with way(calm_world.caller("operator"), "key:list") as act:
            act.allow(PLATFORM)
            with pytest.raises(PermissionDeniedError, match="leaves no entry"):
                _ = act.keys


def test_a_use_that_fails_is_on_record_too(world: World) -> None:
    def use() -> None:
        with world.authority.core.action(world.caller("operator"), "key:rotate") as act:
            act.allow(PLATFORM)
            act.keys.unwrap(ADULT, [(b"\x00\x00\x00\x07" + b"x" * 61, b"")])

    with pytest.raises(IntegrityError):
        use()
    assert (world.log()[-1].outcome, world.log()[-1].details["key_use"]) == ("failure", f"unwrap {ADULT}@7 x1")


def test_many_uses_fit_into_one_entry(world: World) -> None:
    with world.authority.core.action(world.caller("operator"), "key:rotate") as act:
        act.allow(PLATFORM)
        for number in range(40):
            act.keys.wrap(f"dataset/number-{number}", [(new_key(), b"")])
    text = str(world.log()[-1].details["key_use"])
    assert len(text) <= 512
    assert text.endswith(", and more")


# ---- with a Vault ----


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VaultServer]:
    """From here on every authority that is opened keeps its keys there."""
    with VaultServer(tmp_path) as server:
        settings = VaultSettings(kind="vault", address=server.address, ca_certificate=server.ca, timeout_s=60.0)

        def opened_there(_directory: Path) -> VaultKeys:
            return VaultKeys(settings, {"VAULT_TOKEN": server.token()})

        monkeypatch.setattr(service, "EmbeddedKeys", opened_there)
        yield server


@pytest.fixture
def vault_world(vault: VaultServer, tmp_path: Path) -> Iterator[World]:
    directory = tmp_path / "authority"
    directory.mkdir()
    world = World(directory, place=Place.new(tmp_path / "state.db", None))
    world.people = {name: Person(name, given) for name, given in ROLES.items()}
    world.register_everybody()
    world.seal()
    world.set_budget()
    yield world
    world.close()


def test_the_whole_story_with_keys_that_never_leave_a_vault(vault_world: World, vault: VaultServer) -> None:
    world = vault_world
    assert not (world.directory / "keys").exists()
    world.train()
    world.release()
    endpoint = world.deploy()
    assert world.client(endpoint).lease_model(endpoint)
    before = opened(world)
    assert rotate(world, ADULT)["keys"] == len(rows(world, data_keys))
    (gone,) = shredding(world)
    world.authority.custody.finish()
    assert is_noise(world, gone)
    assert opened(world).items() <= before.items()
    assert set(vault.namespaces[""].keys["cloister-dataset-adult"].versions) == {3}
    assert {"anchor", "secrets/log", "secrets/ca"} <= {
        path.removeprefix("cloister/") for path in vault.namespaces[""].values
    }


def test_two_authorities_over_one_state_need_no_folder_of_keys_in_common(
    vault_world: World, vault: VaultServer, tmp_path: Path
) -> None:
    world = vault_world
    (tmp_path / "second").mkdir()
    second = Authority(tmp_path / "second", url=URL, database=world.place.open(), clock=world.clock)
    try:
        first = world.authority
        assert (second.ca_certificate, second.node_ca, second.endpoint_ca) == (
            first.ca_certificate, first.node_ca, first.endpoint_ca,
        )  # fmt: skip
        assert (second.release_public, second.receiving_public) == (first.release_public, first.receiving_public)
        rotate(world, ADULT)
        run = world.submit()
        world.authority, kept = second, world.authority
        assert world.lease(run).keys
        world.authority = kept
    finally:
        second.close()


def test_a_vault_that_seals_itself_in_the_middle_gives_nothing_and_says_so(
    vault_world: World, vault: VaultServer
) -> None:
    world = vault_world
    run = world.submit()
    world.attempt(run)
    world.token(run)  # takes the key service too: what is refused has to be the lease
    vault.sealed = True
    with world.still():
        answer = world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body())
    assert (answer.status_code, answer.json()["kind"]) == (503, "KeyServiceError")
    vault.sealed = False
    assert world.lease(run).keys


def test_a_vault_that_cannot_remember_the_log_keeps_the_keys_in(vault_world: World, vault: VaultServer) -> None:
    """The lease is committed, and yet no key leaves: the anchor comes first."""
    world = vault_world
    run = world.submit()
    world.attempt(run)

    def fault(path: str) -> None:
        if path.endswith("cloister/anchor"):
            raise RefusedError(503, "Vault is sealed")

    with vault.failing(fault):
        assert world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body()).json()["kind"] == "KeyServiceError"
