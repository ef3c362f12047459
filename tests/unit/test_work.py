"""Ranks die at every place of an attempt: the run goes on, pays for every step that left, and repeats no noise.

The ranks are threads, the authority is the real one over its HTTP application; only Ray is missing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import clinic
from authority_world import CODE, DELTA, STEPS, World
from cloister.authority.costs import settle
from cloister.client.authority import AuthorityClient
from cloister.errors import CloisterError, ConflictError, InputError, IntegrityError, UnavailableError, from_dict
from cloister.privacy import sampling
from cloister.privacy.grid import SLACK
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.sampling import PoissonSampler
from cloister.process import describe
from cloister.sealing.stream import open_sealed
from cloister.stores.blobs import FolderBlobs
from cloister.training import audit, checkpoint, trial
from cloister.training import work as work_module
from cloister.training.loop import PUBLIC_SHARD
from cloister.training.work import open_attempt, work

torch.set_num_threads(1)
# What dies here is workers, not databases: those do in tests/attacks.
pytestmark = pytest.mark.parametrize("world_server", ["sqlite"], indirect=True)

BLOCK = 4  # of ten steps: 0-4, 4-8, 8-10
SHARED = {"resources": {"workers": 2, "min_workers": 1, "region": "eu"}}


class Killed(BaseException):
    """A rank is gone in the middle of something: it reports nothing."""


class Ranks:
    """The ranks of one attempt, as threads that really meet; `at(rank, event)` may kill one of them."""

    def __init__(self, size: int, at: Callable[[int, str], None] = lambda _rank, _event: None) -> None:
        self.size, self.at = size, at
        self.changed = threading.Condition()
        self.meetings: dict[int, dict[int, Any]] = {}
        self.met = [0] * size
        self.gone = False
        self.released = 0
        self.results: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank brings to this meeting, unless one of them is gone before it comes."""
        with self.changed:
            meeting = self.meetings.setdefault(self.met[rank], {})
            self.met[rank] += 1
            meeting[rank] = value
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(meeting) == self.size or self.gone, timeout=60)
            if len(meeting) < self.size:
                raise ConnectionError
            return [meeting[each] for each in range(self.size)]

    def run(self, world: World, run: str, **options: Any) -> list[Any]:
        """What each rank's `work` gave, or the error that it ended with."""
        clients = [Client.of(world, run, rank, self) for rank in range(self.size)]

        def body(rank: int) -> None:
            group = Group(self, rank)
            try:
                attempt = open_attempt(clients[rank], run, CODE, group)
                self.results[rank] = work(clients[rank], run, CODE, group, attempt, block_steps=BLOCK, **options)
            except BaseException as error:  # noqa: BLE001 - looked at by the test
                self.results[rank] = error
                with self.changed:
                    self.gone = True
                    self.changed.notify_all()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results


class Group:
    """One rank's view of them."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.world_size = ranks, rank, ranks.size

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.ranks.at(self.rank, "sum")
        total = torch.stack(self.ranks.exchange(self.rank, tensor.clone())).sum(dim=0)
        if self.rank == 0:
            self.ranks.released += 1
        tensor.copy_(total)

    def share(self, message: bytes) -> bytes:
        return bytes(self.ranks.exchange(self.rank, message)[0])

    def gather(self, message: bytes) -> list[bytes]:
        return self.ranks.exchange(self.rank, message)


class Client(AuthorityClient):
    """The real client, whose rank may die before or after each request. One request at a time: threads share HTTP."""

    lock = threading.Lock()
    rank: int
    ranks: Ranks

    @classmethod
    def of(cls, world: World, run: str, rank: int, ranks: Ranks) -> Client:
        client = cls("https://127.0.0.1:8443", ca_path=world.directory / "ca.pem", name=run,
                     private_key_pem=world.people[run].private)  # fmt: skip
        client.close()
        client._http, client.rank, client.ranks = world.http, rank, ranks
        return client

    def post(self, path: str, body: Any = None) -> Any:
        step = path.rpartition("/")[2]
        self.ranks.at(self.rank, f"before {step}")
        with self.lock:
            answer = super().post(path, body)
        self.ranks.at(self.rank, f"after {step}")
        return answer


def dies(event: str, number: int = 1, rank: int = 0) -> Callable[[int, str], None]:
    """Kills that rank at the `number`-th such event."""
    seen = 0

    def at(who: int, what: str) -> None:
        nonlocal seen
        if (who, what) == (rank, event):
            seen += 1
            if seen == number:
                raise Killed

    return at


@pytest.fixture
def run(world: World) -> str:
    return world.submit(**SHARED)


@pytest.fixture(autouse=True)
def _one_export(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export to ONNX takes seconds and always gives the same kind of bytes: one test has the real one."""
    if "real_export" not in request.fixturenames:
        for module in (trial, work_module):
            monkeypatch.setattr(module, "to_onnx", lambda _model, _width: b"onnx")


@pytest.fixture
def real_export() -> None:
    """For a test that wants it."""


def shown(world: World, run: str) -> dict[str, Any]:
    return dict(world.get("ed", f"/v1/runs/{run}"))


def stored(world: World, run: str) -> list[str]:
    folder = world.directory / "blobs" / "models" / run
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("real_export")
def test_two_ranks_train_to_a_registered_model_and_their_checkpoints_go(world: World, run: str) -> None:
    registered, nothing = Ranks(2).run(world, run)
    assert registered["model"] == "adult@1"
    assert nothing is None
    after = shown(world, run)
    assert (after["state"], after["steps_committed"], after["attempt"]) == ("finished", STEPS, 1)
    assert stored(world, run) == ["model-1.onnx.sealed"]


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """The first input of each row that is loaded, by role."""
    loaded: dict[str, list[float]] = {"train": [], "holdout": []}
    real = work_module.Rows.load

    def load(self: Any, role: str) -> Any:
        opened = real(self, role)
        loaded[role] += opened.x[:, 0].tolist()
        return opened

    monkeypatch.setattr(work_module.Rows, "load", load)
    return loaded


def of_clinic(world: World, version: int, **privacy: float) -> str:
    """A run on the clinic's patients, whose first input is about their number."""
    return world.submit(
        name="clinic", dataset=f"clinic@{version}", label="ill", features=["age"], **SHARED,
        privacy={"epsilon": 3.0, "delta": 1e-3} | privacy,
        training={"epochs": 2, "expected_batch_size": 8, "learning_rate": 0.1},
    )  # fmt: skip


def test_a_rank_that_has_no_row_to_use_trains_with_the_others(world: World) -> None:
    """All that was appended comes after what there was of its patients, beyond the cap."""
    clinic.seal(world, clinic.rows(each=2), shards=1)
    clinic.append(world, clinic.rows(each=2))
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 9.0, "delta": 5e-3})
    assert Ranks(2).run(world, of_clinic(world, 2, rows_per_unit=1))[0]["model"] == "clinic@1"


def test_whether_an_erasure_left_anybody_held_out_is_not_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.seal(world, clinic.rows(people=20))
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 9.0, "delta": 5e-3})
    loaded = watch_loading(monkeypatch)
    first = of_clinic(world, 1)
    Ranks(1).run(world, first)
    ages = sorted({round(age * 120) for age in loaded["holdout"]})
    clinic.erase_person(world, *ages)
    loaded["holdout"].clear()
    second = of_clinic(world, 2)
    assert Ranks(1).run(world, second)[0]["model"] == "clinic@2"
    assert loaded["holdout"] == [], "they are gone"
    assert shown(world, second)["plan"] == shown(world, first)["plan"]


@pytest.mark.parametrize(("cap", "rows"), [(None, 2), (1, 1)])
def test_ranks_train_and_evaluate_with_as_many_rows_of_a_unit_as_the_plan_has(
    world: World, monkeypatch: pytest.MonkeyPatch, cap: int | None, rows: int
) -> None:
    """Every patient of the clinic has two rows, of four that they may have."""
    clinic.seal(world)
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 9.0, "delta": 9e-3})
    privacy = {"epsilon": 3.0, "delta": 1e-3} | ({} if cap is None else {"rows_per_unit": cap})
    run = world.submit(
        name="clinic", dataset="clinic@1", label="ill", features=["age"], privacy=privacy, **SHARED,
        training={"epochs": 2, "expected_batch_size": 8, "learning_rate": 0.1},
    )  # fmt: skip
    loaded = watch_loading(monkeypatch)
    registered, _ = Ranks(2).run(world, run)
    assert registered["model"] == "clinic@1"
    counted = {role: Counter(ages) for role, ages in loaded.items()}
    assert set(counted["train"].values()) == set(counted["holdout"].values()) == {rows}
    assert len(counted["train"] + counted["holdout"]) == clinic.PEOPLE


def test_a_checkpoint_follows_each_block_and_only_the_newest_is_kept(world: World, run: str) -> None:
    seen: list[tuple[Any, list[str]]] = []

    def look(rank: int, event: str) -> None:
        if rank == 0 and event == "before blocks":
            seen.append((shown(world, run)["checkpoint"], stored(world, run)))

    Ranks(1, look).run(world, run)
    assert seen == [(None, []), (4, ["checkpoints/1-4.sealed"]), (8, ["checkpoints/1-8.sealed"])]


# (what the victim does when it dies, how often it has done it by then, which rank, steps that leave, committed, kept)
DEATHS = [
    ("before attempts", 1, 0, 0, 0, None),
    ("after attempts", 1, 0, 0, 0, None),
    ("before blocks", 1, 0, 0, 0, None),
    ("after blocks", 1, 0, 0, 4, None),
    ("sum", 1, 1, 0, 4, None),
    ("sum", 4, 0, 3, 4, None),
    ("before checkpoints", 1, 0, 4, 4, None),
    ("after checkpoints", 1, 0, 4, 4, 4),
    ("before blocks", 2, 0, 4, 4, 4),
    ("after blocks", 2, 0, 4, 8, 4),
    ("sum", 7, 1, 6, 8, 4),
    ("before checkpoints", 2, 0, 8, 8, 4),
    ("sum", 10, 1, 9, 10, 8),
    ("after checkpoints", 3, 0, 10, 10, 10),
    ("before model", 1, 0, 10, 10, 10),
]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "number", "rank", "left", "committed", "kept"), DEATHS, ids=[f"{d[0]} {d[1]}" for d in DEATHS]
)
def test_a_death_costs_at_most_the_open_block_and_the_run_goes_on_with_one_worker(
    world: World, run: str, event: str, number: int, rank: int, left: int, committed: int, kept: int | None
) -> None:
    first = Ranks(2, dies(event, number, rank))
    results = first.run(world, run)
    assert isinstance(results[rank], Killed)
    assert not any(isinstance(result, CloisterError) for result in results), "a death is nobody's own failure"
    before = shown(world, run)
    assert first.released == left
    assert (before["steps_committed"], before["checkpoint"]) == (committed, kept)
    assert left <= committed <= left + BLOCK, "never too little, and at most a block too much"
    second = Ranks(1)
    (registered,) = second.run(world, run)
    assert registered["model"] == "adult@1"
    after = shown(world, run)
    assert second.released == STEPS - (kept or 0)
    assert after["steps_committed"] == committed + second.released
    assert after["resumed_from"] == (kept or 0)
    assert after["epsilon_charged"] == settle(after["plan"], after["steps_committed"])[0]
    assert after["epsilon_charged"] <= after["epsilon_at_most"]
    assert stored(world, run) == [f"model-{after['attempt']}.onnx.sealed"], "what the dead have left goes too"


def test_the_next_attempt_starts_where_the_checkpoint_was_on_every_rank(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[int, list[torch.Tensor]] = {}
    began: list[list[torch.Tensor]] = []
    real_save, real_train = checkpoint.save, work_module.train

    def save(model: Any, optimizer: Any, step: int, **options: Any) -> bytes:
        saved[step] = [parameter.detach().clone() for parameter in model.parameters()]
        return real_save(model, optimizer, step, **options)

    def train(model: Any, *rest: Any, **options: Any) -> None:
        began.append([parameter.detach().clone() for parameter in model.parameters()])
        real_train(model, *rest, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(work_module, "train", train)
    Ranks(2, dies("sum", 6)).run(world, run)
    began.clear()
    Ranks(2).run(world, run)
    assert len(began) == 2
    for weights in began:
        assert all(torch.equal(a, b) for a, b in zip(weights, saved[4], strict=True))


def test_however_many_ranks_share_them_every_row_is_sampled_alike_and_the_noise_sums_to_the_plans(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, list[tuple[str, int]]] = {}
    noise: dict[int, float] = {}
    secrets: list[bytes] = []
    real_train, add_to = work_module.train, GaussianNoise.add_to

    def train(*rest: Any, **options: Any) -> None:
        size = options["world_size"]
        held.setdefault(size, []).extend(options["shards"])
        secrets.append(options["secret"])
        real_train(*rest, **options)

    def watched(self: GaussianNoise, *arguments: Any) -> None:
        if self._run == run:  # and not an audit's
            noise.setdefault(attempts[-1].size, arguments[-2])
        add_to(self, *arguments)

    monkeypatch.setattr(work_module, "train", train)
    monkeypatch.setattr(GaussianNoise, "add_to", watched)
    attempts: list[Ranks] = []
    for size, at in ((2, dies("sum", 6)), (1, dies("never"))):
        attempts.append(Ranks(size, at))
        attempts[-1].run(world, run)
    plan = shown(world, run)["plan"]
    assert sorted(held[1]) == sorted(held[2]), "the same shards, each by its own sampler, once"
    assert sum(rows for name, rows in held[1] if name != PUBLIC_SHARD) == plan["rows"]
    assert 2 * noise[2] ** 2 == pytest.approx(noise[1] ** 2)
    assert noise[1] == pytest.approx(plan["noise_multiplier"] * plan["max_grad_norm"] * (1 + SLACK))
    assert len(set(secrets)) == 3, "randomness is new in every process and attempt"


def test_what_resumed_attempts_release_has_nothing_in_common_with_what_was_redone(world: World, run: str) -> None:
    """The noise of a step that is run again is fresh: its difference to the first is noise again, not zero."""
    sums: list[list[torch.Tensor]] = []

    class Watched(Ranks):
        def exchange(self, rank: int, value: Any) -> list[Any]:
            if isinstance(value, torch.Tensor):
                sums[-1].append(value.clone())
            return super().exchange(rank, value)

    for at in (dies("before checkpoints", 1), dies("never")):
        sums.append([])
        Watched(1, at).run(world, run)
    plan = shown(world, run)["plan"]
    first, again = sums[0][0], sums[1][0]
    std = plan["noise_multiplier"] * plan["max_grad_norm"]
    assert float((first - again).std()) > std


def test_a_worker_whose_steps_are_less_private_than_planned_trains_nothing(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PoissonSampler", lambda n, rate, key: PoissonSampler(n, min(1.0, 1.5 * rate), key))
    group = Ranks(1)
    (refused,) = group.run(world, run)
    assert isinstance(refused, IntegrityError)
    assert "an attack on this worker's steps" in str(refused)
    after = shown(world, run)
    assert (group.released, after["steps_committed"], stored(world, run)) == (0, 0, [])
    assert leased(world) == []


class Mixing(nn.Module):
    """Subtracts what its rows have in common."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))  # type: ignore[no-any-return]


def leased(world: World) -> list[str]:
    """What the record has of keys that were given out to runs."""
    entries = [entry.resource for entry in world.log() if entry.action == "run:lease"]
    return [*entries, *("a row",) * world.counts()["leases"]]


REFUSALS = [
    ("build_model", lambda _spec, width, classes, _seed: Mixing(width, classes), (0, 1), "depends on the other rows"),
    ("to_onnx", lambda _model, _width: raises(IntegrityError("another export", "release it not")), (0,), "another exp"),
    ("TriedEngine", lambda *_, **__: raises(InputError("this device", "use another")), (1,), "this device"),
    ("attack_steps", lambda _plan, **_engine: raises(IntegrityError("too few", "report it")), (0,), "too few"),
    ("take_steps", lambda *_: raises(ZeroDivisionError("0")), (1,), "ZeroDivisionError"),
]  # fmt: skip


def raises(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(("name", "broken", "ranks", "told"), REFUSALS, ids=[refusal[0] for refusal in REFUSALS])
def test_what_is_refused_on_one_rank_is_refused_on_all_before_any_has_a_key(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, ranks: tuple[int, ...], told: str
) -> None:
    mine = threading.local()
    sound, try_out = getattr(trial, name), work_module.try_out

    def tries(run: str, attempt: Any, group: Any) -> Any:
        mine.rank = group.rank
        return try_out(run, attempt, group)

    monkeypatch.setattr(work_module, "try_out", tries)
    monkeypatch.setattr(
        trial, name, lambda *given, **named: (broken if mine.rank in ranks else sound)(*given, **named)
    )  # fmt: skip
    asked: list[str] = []
    group = Ranks(2, lambda _rank, event: asked.append(event))
    results = group.run(world, run)
    errors = [from_dict(describe(result)) for result in results]
    assert all(told in error.message for error in errors)
    assert errors[0].to_dict() == errors[1].to_dict()
    assert asked == ["before attempts", "after attempts"], "nobody asked for a lease"
    assert leased(world) == []
    world.attempts[run] = 1
    ended = world.end(run)
    assert (ended["state"], ended["epsilon_charged"], group.released) == ("failed", 0.0, 0)


def test_no_rank_asks_for_a_key_before_all_have_tried(world: World, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    try_out = work_module.try_out

    def tries(*given: Any) -> Any:
        assert leased(world) == []
        tried = try_out(*given)
        seen.append("tried")
        return tried

    monkeypatch.setattr(work_module, "try_out", tries)
    Ranks(2, lambda _rank, event: seen.append(event) if event.endswith("leases") else None).run(world, run)
    assert seen[:2] == ["tried", "tried"]
    assert sorted(seen[2:]) == ["after leases"] * 2 + ["before leases"] * 2
    assert len(leased(world)) == 4


def test_a_lease_for_something_else_than_was_tried_opens_nothing(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(1)
    client = Client.of(world, run, 0, ranks)
    opened = client.open_attempt(run, 1, CODE)
    quieter = replace(opened, plan=opened.plan | {"noise_multiplier": opened.plan["noise_multiplier"] * 2})
    monkeypatch.setattr(work_module.Rows, "load", lambda *_: pytest.fail("rows were opened"))
    with pytest.raises(IntegrityError, match="something else than was tried"):
        work(client, run, CODE, Group(ranks, 0), quieter)
    assert ranks.released == 0


def test_progress_is_told_in_whole_blocks_of_planned_rows(world: World, run: str) -> None:
    told: list[tuple[int, float]] = []

    def look(rank: int, event: str) -> None:
        if event == "after progress":
            assert rank == 0
            told.append((shown(world, run)["steps_done"], shown(world, run)["rows_per_s"]))

    Ranks(2, look).run(world, run)
    assert [steps for steps, _ in told] == [4, 8, 10]
    assert all(speed == float(f"{speed:.2g}") > 0 for _, speed in told)


def test_progress_of_an_attempt_that_resumes_counts_its_own_blocks(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ranks(1, dies("before blocks", 2)).run(world, run)
    told: list[int] = []

    def look(_rank: int, event: str) -> None:
        if event == "after progress":
            told.append(shown(world, run)["steps_done"])

    Ranks(1, look).run(world, run)
    assert told == [8, 10]


def test_a_model_that_knows_its_canaries_is_not_registered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After training, rank 0 goes on for hundreds of steps without noise, on the canaries that are in its rows."""
    monkeypatch.setattr(audit, "_CANARIES", (200, 200))
    model = {"architecture": "mlp", "hidden": [128]}
    run = world.submit(**SHARED, model=model, privacy={"epsilon": 1.0, "delta": DELTA})
    real_train = work_module.train

    def overfit(model: Any, optimizer: Any, x: Any, y: Any, plan: Any, **options: Any) -> None:
        real_train(model, optimizer, x, y, plan, **options)
        name, rows = options["shards"][-1]
        assert name == PUBLIC_SHARD
        bare = replace(plan, noise_multiplier=0.0, sample_rate=1.0, steps=800, max_grad_norm=1e3)
        alone = options | {"shards": [(name, rows)], "world_size": 1, "commit_block": lambda _first, _stop: None,
                           "all_reduce": lambda _sum: None, "checkpoint": None, "on_step": None,
                           "clipped_gradients": None}  # fmt: skip
        real_train(model, torch.optim.Adam(model.parameters(), 0.005), x[-rows:], y[-rows:], bare, **alone)

    monkeypatch.setattr(work_module, "train", overfit)
    (refused,) = Ranks(1).run(world, run)
    assert isinstance(refused, IntegrityError)
    assert f"the audits of {run} falsify its epsilon" in str(refused)
    assert world.get("ed", "/v1/models") == []


def test_a_worker_of_an_attempt_that_is_over_releases_nothing_more(world: World, run: str) -> None:
    """A left-over of a group that Ray believes dead wakes up after the next attempt has opened."""
    wait, goes_on = threading.Event(), threading.Event()

    def paused(_rank: int, event: str) -> None:
        if event == "before blocks" and stale.released == BLOCK:
            wait.set()
            assert goes_on.wait(60)

    stale = Ranks(1, paused)
    thread = threading.Thread(target=stale.run, args=(world, run))
    thread.start()
    assert wait.wait(60)
    opened = Client.of(world, run, 0, Ranks(1)).open_attempt(run, 1, CODE)
    before = shown(world, run)
    goes_on.set()
    thread.join()
    assert isinstance(stale.results[0], ConflictError)
    assert stale.released == BLOCK
    assert shown(world, run) == before
    assert (opened.number, opened.resume_from) == (2, 4)


@pytest.mark.parametrize("how", ["changed", "gone", "older"])
def test_a_checkpoint_that_is_not_the_registered_one_is_not_resumed_from(world: World, run: str, how: str) -> None:
    older: list[bytes] = []
    path = world.directory / "blobs" / "models" / run / "checkpoints"

    def keep(_rank: int, event: str) -> None:
        if event == "before blocks" and (path / "1-4.sealed").exists():
            older.append((path / "1-4.sealed").read_bytes())
        if event == "after checkpoints" and (path / "1-8.sealed").exists():
            raise Killed

    Ranks(1, keep).run(world, run)
    newest = path / "1-8.sealed"
    content = newest.read_bytes()
    newest.unlink()
    if how != "gone":
        newest.write_bytes(older[0] if how == "older" else content[:-1] + bytes([content[-1] ^ 1]))
    committed = shown(world, run)["steps_committed"]
    second = Ranks(2)
    results = second.run(world, run)
    assert any(isinstance(result, CloisterError) for result in results)
    assert second.released == 0
    assert shown(world, run)["steps_committed"] == committed


def test_an_older_checkpoint_does_not_open_as_a_newer_one_even_if_the_record_says_so(world: World, run: str) -> None:
    Ranks(1, dies("before blocks", 2)).run(world, run)
    ranks = Ranks(1)
    client = Client.of(world, run, 0, ranks)
    opened = client.open_attempt(run, 1, CODE)
    assert opened.checkpoint is not None
    moved = opened.checkpoint.blob.replace("1-4", "1-8")
    blobs = FolderBlobs(world.directory / "blobs")
    blobs.put(moved, blobs.get(opened.checkpoint.blob))
    for claim in ({"blob": moved}, {"step": 8}):
        kept = type(opened.checkpoint)(**{
            "step": 4, "blob": opened.checkpoint.blob, "sha256": opened.checkpoint.sha256
        } | claim)  # fmt: skip
        forged = replace(opened, resume_from=kept.step, checkpoint=kept)
        with pytest.raises(IntegrityError, match=r"does not open|another model"):
            work(client, run, CODE, Group(ranks, 0), forged)
        opened = client.open_attempt(run, 1, CODE)
    assert ranks.released == 0


def test_a_store_that_is_away_costs_a_checkpoint_and_not_the_run(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FolderBlobs.put

    def full(self: FolderBlobs, path: str, data: bytes) -> None:
        if "checkpoints" in path:
            raise UnavailableError("no space left", "")
        put(self, path, data)

    monkeypatch.setattr(FolderBlobs, "put", full)
    ranks = Ranks(2)
    registered, _ = ranks.run(world, run)
    assert registered["model"] == "adult@1"
    assert shown(world, run)["steps_committed"] == ranks.released == STEPS


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_lost_registration_leaves_a_checkpoint_that_is_there(world: World, run: str, lost: str) -> None:
    """Whichever of the two the authority holds for the newest, its blob is in the store."""
    seen = 0

    def lose(_rank: int, event: str) -> None:
        nonlocal seen
        if event == ("before checkpoints" if lost == "request" else "after checkpoints"):
            seen += 1
            if seen == 2:
                raise UnavailableError("the line is dead", "")
        if event == "before blocks" and seen == 2:
            raise Killed

    Ranks(1, lose).run(world, run)
    kept = shown(world, run)["checkpoint"]
    assert kept == (4 if lost == "request" else 8)
    assert {"checkpoints/1-4.sealed", "checkpoints/1-8.sealed"} <= set(stored(world, run))
    (registered,) = Ranks(1).run(world, run)
    assert registered["model"] == "adult@1"
    assert shown(world, run)["resumed_from"] == kept


def test_what_the_authority_refuses_rank_0_is_raised_on_every_rank(world: World, run: str) -> None:
    def stop(rank: int, event: str) -> None:
        if rank == 0 and event == "before blocks" and ranks.released:
            world.post("ed", f"/v1/runs/{run}/stop")

    ranks = Ranks(2, stop)
    first, second = ranks.run(world, run)
    assert isinstance(first, ConflictError)
    assert isinstance(second, ConflictError)
    assert str(first) == str(second)
    assert ranks.released == BLOCK


def test_a_foreign_error_on_rank_0_does_not_tell_the_others_its_text(world: World, run: str) -> None:
    def fail(rank: int, event: str) -> None:
        if rank == 0 and event == "before blocks":
            raise ZeroDivisionError("row 17: age 39, Adm-clerical")

    first, second = Ranks(2, fail).run(world, run)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, CloisterError)
    assert "ZeroDivisionError" in str(second)
    assert "39" not in str(second)


def test_when_the_attempts_are_used_up_the_run_ends_and_keeps_its_checkpoint(world: World, run: str) -> None:
    retries = shown(world, run)["spec"]["training"]["retries"]
    Ranks(1, dies("sum", 6)).run(world, run)
    for _ in range(retries):
        Ranks(2, dies("after attempts")).run(world, run)
    (refusal,) = Ranks(1).run(world, run)
    assert isinstance(refusal, ConflictError)
    after = shown(world, run)
    assert (after["state"], after["attempt"], after["checkpoint"]) == ("failed", 1 + retries, 4)
    assert stored(world, run) == ["checkpoints/1-4.sealed"]


def test_a_checkpoint_holds_no_key(world: World, run: str) -> None:
    Ranks(1, dies("before blocks", 2)).run(world, run)
    client = world.client(run)
    opened = client.open_attempt(run, 1, CODE)
    lease = client.lease_shards(run, opened.number, 0, CODE)
    assert opened.checkpoint is not None
    path = opened.checkpoint.blob
    sealed = FolderBlobs.from_url(lease.blobs).get(path)
    plain = open_sealed(lease.checkpoint_key, sealed, lease.checkpoint_context | {"blob": path})
    assert lease.model_key is not None
    for secret in (lease.checkpoint_key, lease.model_key, *lease.keys.values()):
        assert secret not in plain
