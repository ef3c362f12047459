"""What a worker's end tells whom: the authority hears of failures, Ray of deaths only, and nobody of a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from authority_world import CODE, STEPS, World
from cloister.cli import train
from cloister.client.authority import AuthorityClient
from cloister.errors import CloisterError, ConflictError, InputError, UnavailableError
from cloister.process import Daemon
from cloister.signing import keys
from cloister.training import driver, worker
from cloister.training.run import RunFolder
from cloister.training.worker import BrokenGroupError, train_worker

pytestmark = pytest.mark.parametrize("world_server", ["sqlite"], indirect=True)


class Lasting(AuthorityClient):
    """The real client over the world's connection, which is not its own to close."""

    def close(self) -> None:
        pass


class Stage:
    """A run whose one rank does what the test says in place of training."""

    def __init__(self, world: World, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.run = run = world.submit(resources={"workers": 2, "min_workers": 1, "region": "eu"})
        self.folder = RunFolder(
            directory=directory / run, run=run, workers=2, min_workers=1, retries=3, gpus_per_worker=0,
            authority_url="https://127.0.0.1:8443", authority_ca=str(world.directory / "ca.pem"), jobs="jobs",
        )  # fmt: skip
        self.folder.write(world.people[run].private)
        self.down = False
        monkeypatch.setattr(RunFolder, "client", lambda _folder, key=None: self._client(key))
        monkeypatch.setattr(worker, "process_group", self._group)
        monkeypatch.setattr(worker, "code_digest", lambda _jobs: CODE)
        self.in_group: Callable[[], None] = lambda: None
        self.monkeypatch = monkeypatch

    def _client(self, key: bytes | None) -> AuthorityClient:
        if self.down:
            raise UnavailableError("the authority does not answer", "")
        private = key or self.world.people[self.run].private
        client = Lasting("https://127.0.0.1:8443", ca_path=self.world.directory / "ca.pem", name=self.run,
                         private_key_pem=private)  # fmt: skip
        client._http = self.world.http
        return client

    @contextlib.contextmanager
    def _group(self) -> Iterator[Any]:
        yield SimpleNamespace(rank=0, world_size=1, share=lambda message: message)
        self.in_group()

    def train(self, work: Callable[..., Any]) -> None:
        self.monkeypatch.setattr(worker, "work", work)
        train_worker({"folder": str(self.folder.directory), "jobs": "jobs"})

    @property
    def shown(self) -> dict[str, Any]:
        return dict(self.world.get("ed", f"/v1/runs/{self.run}"))


@pytest.fixture
def stage(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(world, tmp_path, monkeypatch)


def failing(error: BaseException) -> Callable[..., Any]:
    def work(*_: Any, **__: Any) -> None:
        raise error

    return work


def test_a_job_that_ray_does_not_take_leaves_nothing_held(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret")
    cluster = SimpleNamespace(jobs_address="http://127.0.0.1:1", directory=tmp_path, environment=dict)
    monkeypatch.setattr(driver, "no_core_dumps", lambda: None)
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)
    monkeypatch.setattr(driver, "ray_cluster", lambda **_: contextlib.nullcontext(cluster))
    monkeypatch.setattr(driver, "JobSubmissionClient", lambda *_, **__: Refusing())
    (stage.folder.directory / "driver").mkdir()
    assert driver.supervise(stage.folder.directory, submit=True) == 1
    assert (stage.shown["state"], stage.shown["settled"], stage.shown["epsilon_charged"]) == ("failed", True, 0.0)
    assert stage.world.budget()["epsilon_charged"] == 0.0


class Refusing:
    def submit_job(self, **_: Any) -> str:
        raise RuntimeError("Ray has no room for it")


def test_a_supervisor_that_does_not_start_leaves_nothing_held(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(Daemon, "start", no_memory)
    with pytest.raises(OSError, match="no memory"):
        train._start(stage.folder, hint="submit it again")
    assert (stage.shown["state"], stage.shown["settled"], stage.shown["epsilon_charged"]) == ("failed", True, 0.0)


@pytest.mark.parametrize("error", [CloisterError("the server answered 504"), KeyboardInterrupt()])
def test_a_submission_whose_answer_did_not_come_leaves_nothing_held(stage: Stage, error: BaseException) -> None:
    train._not_submitted(stage.folder, error)
    assert (stage.shown["state"], stage.shown["settled"], stage.shown["epsilon_charged"]) == ("failed", True, 0.0)
    assert stage.folder.directory.exists()


def test_a_failure_of_ours_ends_the_run_by_its_own_signed_word_and_ray_hears_nothing(stage: Stage) -> None:
    stage.train(failing(InputError("the layer is not supported", "use another")))
    after = stage.shown
    assert (after["state"], after["settled"], after["epsilon_charged"]) == ("failed", True, 0.0)
    assert after["error"]["error"] == "the layer is not supported"
    assert after["end"]["signatures"]


def test_a_foreign_errors_text_is_in_no_record(stage: Stage) -> None:
    stage.train(failing(ValueError("row 17: age 39, Adm-clerical")))
    assert "ValueError" in stage.shown["error"]["error"]
    assert "Adm-clerical" not in str(stage.shown) + str(stage.world.content())


def test_a_lost_rank_is_told_to_ray_and_ends_nothing(stage: Stage) -> None:
    with pytest.raises(BrokenGroupError):
        stage.train(failing(BrokenGroupError("another rank is gone")))
    assert (stage.shown["state"], stage.shown["attempt"]) == ("training", 1)
    stage.train(failing(InputError("not this time either", "")))
    assert stage.shown["attempt"] == 2


def test_a_rank_whose_group_broke_because_the_run_has_ended_is_not_started_again(stage: Stage) -> None:
    def work(*_: Any, **__: Any) -> None:
        stage.folder.end(InputError("said by another rank", ""), 1)
        raise BrokenGroupError("another rank is gone")

    stage.train(work)
    assert stage.shown["error"]["error"] == "said by another rank"


def test_the_failure_of_a_left_over_does_not_end_the_attempt_that_goes_on(stage: Stage) -> None:
    def work(*_: Any, **__: Any) -> None:
        stage.world.attempt(stage.run, 1)  # Ray believed this worker dead
        raise ConflictError("attempt 1 is over", "stop this worker")

    stage.train(work)
    assert (stage.shown["state"], stage.shown["attempt"], stage.shown["error"]) == ("training", 2, None)


def test_a_worker_that_cannot_say_why_it_ends_is_not_taken_for_one_that_is_done(stage: Stage) -> None:
    def work(*_: Any, **__: Any) -> None:
        stage.down = True
        raise InputError("said to nobody", "")

    with pytest.raises(UnavailableError):
        stage.train(work)
    assert stage.shown["state"] == "training"


def test_an_end_of_another_attempt_or_by_another_key_gives_nothing_back(stage: Stage) -> None:
    world, run = stage.world, stage.run
    world.lease(run)
    world.commit(run, 0, 4)
    held = stage.shown["epsilon_charged"]
    with pytest.raises(ConflictError, match="not its last"):
        stage.folder.end(InputError("too early", ""), 7)
    assert stage.shown["epsilon_charged"] == held
    stranger = keys.private_to_pem(keys.generate_ed25519())
    stage.monkeypatch.setattr(RunFolder, "_key", lambda _folder: stranger)
    with pytest.raises(Exception, match="no trusted key"):
        stage.folder.end(InputError("not mine", ""))
    assert (stage.shown["state"], stage.shown["epsilon_charged"]) == ("training", held)


def test_the_end_of_a_finished_or_settled_run_changes_nothing(stage: Stage) -> None:
    world, run = stage.world, stage.run
    lease = world.lease(run)
    world.commit(run, 0, STEPS)
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease))
    before = stage.shown
    assert stage.folder.end(InputError("the supervisor says so at the end", ""))["state"] == "finished"
    assert stage.shown == before


def test_a_stopped_run_says_stopped_and_only_then_is_its_epsilon_free(stage: Stage) -> None:
    stage.world.attempt(stage.run)
    stage.world.post("ed", f"/v1/runs/{stage.run}/stop")
    assert (stage.shown["epsilon_charged"], stage.shown["settled"]) == (3.0, False)
    assert stage.folder.end(UnavailableError("its cluster is gone", ""))["state"] == "stopped"
    assert (stage.shown["epsilon_charged"], stage.shown["settled"], stage.shown["error"]) == (0.0, True, None)
