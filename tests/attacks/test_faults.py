"""An error or a `kill -9` at a write of seal, append, rotate, erase, backup and restore: a consistent state each time.

Each operation runs whole: the owner's client, the authority and its database, in a process of its own. Afterwards, in
another new process: the authority starts, `fsck` finds nothing but what it removes, every live version verifies and
opens, what was acknowledged is there, what was not is there whole or not at all, and no file holds a row in clear.

By default some write of each kind is hit; `CLOISTER_EVERY_FAULT=1` hits every one of them, in each of three ways.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import clinic
import faults
from authority_world import World
from cloister.authority import backup, fsck
from cloister.authority.maintenance import Parts
from cloister.authority.restore import restore
from cloister.client.verify import verify_dataset
from cloister.errors import CloisterError, UnavailableError
from cloister.stores.blobs import Stores
from cloister.stores.database import Database
from cloister.stores.keys import EmbeddedKeys
from databases import Place, add
from faults import Mode, Outcome
from postgres import roomy_memory

NEEDLE = b"patient number"  # in each row, and in nothing that is not one
EVERY = bool(os.environ.get("CLOISTER_EVERY_FAULT"))
ERASED, APPENDED = 3, range(60, 64)


def parts_of(directory: Path) -> Parts:
    return Parts.of(directory, EmbeddedKeys(directory / "keys"), Stores({}, directory / "blobs"))


def back_up(world: World, folder: Path) -> str:
    made = backup.create(world.authority.core, world.authority.stores, world.caller("operator"), folder)
    return made.id


def bring_back(world: World) -> int:
    here = world.directory
    who = "operator", world.people["operator"].private
    return restore(parts_of(here), here.parent / "older", who, accept_rollback=True).log_size


@dataclass(frozen=True)
class Operation:
    """What is done, the states of the versions once it is, and at least how many kinds of writes it has."""

    do: Callable[[World], Any]
    after: dict[str, str]
    kinds: int


BEFORE = {"clinic@1": "live"}
GROWN = BEFORE | {"clinic@2": "live"}
OPERATIONS = {
    "seal": Operation(clinic.seal, GROWN, 15),
    "append": Operation(lambda world: clinic.append(world, clinic.rows(APPENDED[0], len(APPENDED))), GROWN, 15),
    "erase": Operation(
        lambda world: clinic.erase_person(world, ERASED), {"clinic@1": "ended", "clinic@2": "live"}, 25
    ),
    "rotate": Operation(
        lambda world: world.authority.custody.rotate(world.caller("operator"), "dataset/clinic"), BEFORE, 8
    ),
    "backup": Operation(lambda world: back_up(world, world.directory.parent / "newer"), BEFORE, 20),
    "restore": Operation(bring_back, BEFORE, 20),
}  # fmt: skip
HALVES = ("erase", "restore"), ("seal", "append", "rotate", "backup")


class Ground:
    """A template, copied for each fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder / "template"
        (home / "authority").mkdir(parents=True)
        (home / "tmp").mkdir()
        world = World(home / "authority", place=Place.new(home / "authority" / "state.db", None))
        world.register_everybody()
        world.choose_who_is_held_out()
        clinic.seal(world)
        clinic.ages(world, 1)  # so that everybody who speaks has a token
        world.caller("operator")
        back_up(world, home / "older")
        self.entries = world.entries()
        world.authority.close()
        self.world, self.home = world, home

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        here = Path(tempfile.mkdtemp(dir=self.folder)) / "home"
        shutil.copytree(self.home, here)
        yield here
        shutil.rmtree(here.parent)

    def open(self, here: Path) -> World:
        """In a process of its own, whose temporary files are looked at too."""
        tempfile.tempdir = str(here / "tmp")
        world = World(here / "authority", self.world, Place.new(here / "authority" / "state.db", None))
        world.tokens.clear()  # the template's may be old: fetched during the operation, they would be writes of it
        for name in ("olga", "operator"):
            world.token(name)
        return world

    def hit(self, operation: Operation, mode: Mode, at: int) -> tuple[Outcome, list[str]]:
        """What became of the operation, and what is wrong afterwards."""
        with self.copy() as here:
            outcome = faults.in_child(
                operation.do, watched=[here], mode=mode, at=at, setup=lambda: self.open(here)
            )  # fmt: skip
            looked = faults.in_child(lambda _: self.look(here, operation, outcome), watched=[])
            if isinstance(looked.answer, list):
                return outcome, looked.answer
            return outcome, [f"it does not start again: {looked.answer!r}"]

    def look(self, here: Path, operation: Operation, outcome: Outcome) -> list[str]:
        clear = [str(file) for file in here.rglob("*") if file.is_file() and NEEDLE in file.read_bytes()]
        if clear:
            return [f"in clear: {clear}"]
        if isinstance(outcome.answer, Exception) and not isinstance(outcome.answer, CloisterError | OSError):
            return [f"it ended with {outcome.answer!r}"]
        world = self.open(here)
        if operation is OPERATIONS["restore"]:
            world.tokens.clear()
        entries = world.entries()
        if entries[: len(self.entries)] != self.entries:
            return ["the log lost something"]
        problems = self.fsck(world)
        states, done = clinic.states(world), not (outcome.killed or isinstance(outcome.answer, Exception))
        if states not in ((operation.after,) if done else (BEFORE, operation.after)):
            problems.append(f"acknowledged: {done}, and now there is {states}")
        for name in (name for name, state in states.items() if state == "live"):
            version = int(name.rpartition("@")[2])
            verify_dataset(world.client("olga"), "clinic", version)
            ages = clinic.ages(world, version)
            if ERASED in ages and operation.after["clinic@1"] == "ended" and version == 2:
                problems.append("who was erased is there")
            if len(ages) < 2 * (clinic.PEOPLE - 1):
                problems.append(f"{name} has lost rows")
        newer = here / "newer"
        if newer.exists():
            sum(map(len, backup.open_state(parts_of(here / "authority").keys, newer, backup.Header.read(newer))))
        elif done and outcome.answer and str(outcome.answer).startswith("bak-"):
            problems.append("the backup is gone")
        return problems

    def fsck(self, world: World) -> list[str]:
        parts, database, caller = parts_of(world.directory), world.authority.core.database, world.caller("operator")
        report = fsck.check(parts, database, caller, young=True)
        problems = [f"{each.subject}: {each.problem}" for each in report.findings if each.kind == "broken"]
        fsck.repair(parts, database, caller, report)
        again = fsck.check(parts, database, caller, young=True)
        return problems + [f"after repair, {each.subject}: {each.problem}" for each in again.findings
                           if each.kind != "note"]  # fmt: skip


def points(calls: list[str], chance: random.Random) -> list[tuple[Mode, int]]:
    """Which faults to try: all; or a kill at some write of each kind, and an error, of both in turn, at every other."""
    if EVERY:
        return [(mode, number) for number in range(1, len(calls) + 1) for mode in faults.MODES]
    chosen: list[tuple[Mode, int]] = []
    for index, numbers in enumerate(faults.sites(calls).values()):
        chosen.append(("kill", chance.choice(numbers)))
        if index % 2 == 0:
            chosen.append((faults.MODES[1 + index // 2 % 2], chance.choice(numbers)))
    return chosen


def try_faults(folder: Path, names: tuple[str, ...]) -> tuple[Counter[str], list[str]]:
    """In a process of its own, small enough to be forked fast. Returns how many faults hit, and what went wrong."""
    ground, hits, problems = Ground(folder), Counter[str](), []
    for name in names:
        operation = OPERATIONS[name]
        whole, wrong = ground.hit(operation, "kill", 0)
        assert not isinstance(whole.answer, Exception), f"{name}: {whole.answer!r}"
        problems += [f"{name}, undisturbed: {each}" for each in wrong]
        kinds = faults.sites(whole.calls)
        assert len(kinds) >= operation.kinds, f"{name} writes in {len(kinds)} ways only: {list(kinds)}"
        for mode, at in points(whole.calls, random.Random(name)):  # noqa: S311
            outcome, wrong = ground.hit(operation, mode, at)
            hits[f"{name}, {mode}"] += bool(outcome.hit)
            where = outcome.hit.replace(str(folder), "")
            problems += [f"{name}, {mode} at {at} ({where}), {outcome.answer!r:.200}: {each}" for each in wrong]
    return hits, problems


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_fault_at_any_write_leaves_a_consistent_state(capsys: pytest.CaptureFixture[str]) -> None:
    if not faults.usable():
        pytest.skip("this machine's kernel does not let a process answer for another's system calls")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=roomy_memory()) as folder, ProcessPoolExecutor(len(HALVES), spawn) as pool:
        halves = [pool.submit(try_faults, Path(folder, str(index)), names) for index, names in enumerate(HALVES)]
        found = [half.result() for half in halves]
    hits = sum((each for each, _ in found), Counter[str]())
    with capsys.disabled():
        counts = ", ".join(f"{count} {what}" for what, count in hits.items())
        print(f"\nfaults: {sum(hits.values())} ({counts})")  # noqa: T201
    problems = [problem for _, problems in found for problem in problems]
    assert not problems, "\n".join(problems)
    for name, operation in OPERATIONS.items():
        assert hits[f"{name}, kill"] >= operation.kinds * 0.8, f"{name}: the faults did not hit"
        assert hits[f"{name}, EIO"] + hits[f"{name}, ENOSPC"] >= operation.kinds * 0.4


def test_what_was_deleted_and_cannot_be_overwritten_is_told_as_ours(tmp_path: Path) -> None:
    """SQLite's own errors would end as faults of Cloister's, after the deletion."""
    if not faults.usable():
        pytest.skip("this machine's kernel does not let a process answer for another's system calls")
    place = Place({"place": tmp_path / "state.db"})

    def filled() -> Database:
        for file in tmp_path.iterdir():
            file.unlink()
        database = place.open()
        add(database, f"dataset {os.urandom(4).hex()}")
        return database

    calls = faults.in_child(lambda database: database.scrub(), watched=[tmp_path], setup=filled).calls
    assert len(calls) >= 4, calls
    for at in range(1, len(calls) + 1):
        found = faults.in_child(
            lambda database: database.scrub(), watched=[tmp_path], setup=filled, mode="EIO", at=at
        )  # fmt: skip
        assert found.hit
        assert found.answer is None or isinstance(found.answer, UnavailableError), found
