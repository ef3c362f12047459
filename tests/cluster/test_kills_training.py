"""Real `kill -9` of workers, of the job's driver and of the supervisor: the run goes on, and pays for every step."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cloister.privacy.plan import BLOCK_STEPS
from cloister.process import Daemon
from command_line import ADULT, CommandLine
from waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
SEED = 20261129
RETRIES = 6
START_TIMEOUT_S = 600.0  # of a cluster and its workers, and of some hundred steps
PACE_S = 0.015  # between steps: two ranks on one machine would be through before anybody can aim
# The job as it is, but that each rank writes a byte just before the noisy sum of a step leaves it: what is released is
# counted by the released, and by nobody who also keeps the ledger.
COUNTING = '''
"""Counts steps."""

import os
import time

from cloister.training import worker

LOG = {log!r}
_all_reduce, _train_worker = worker.TorchGroup.all_reduce, worker.train_worker


def all_reduce(group, tensor):
    name = f"{{LOG}}/{{os.environ[worker.MEETING]}}-{{group.rank}}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, b".")
    os.close(descriptor)
    time.sleep({pace})
    _all_reduce(group, tensor)


def train_worker(config):
    worker.TorchGroup.all_reduce = all_reduce
    _train_worker(config)
'''
TRAIN = '''
"""The job, with counted steps."""

import argparse
import sys
from pathlib import Path

import counting
from cloister.stores.home import Home
from cloister.training import worker
from cloister.training.driver import run_job

parser = argparse.ArgumentParser()
parser.add_argument("--run", required=True)
worker.train_worker = counting.train_worker
sys.exit(run_job(Home.find().runs / parser.parse_args().run, jobs=Path(__file__).parent.resolve()))
'''


class Hunted:
    """One run that loses three workers, its driver and its supervisor, each at a random moment of an attempt."""

    def __init__(self, line: CommandLine, folder: Path) -> None:
        self.line = line
        self.chance = random.Random(SEED)  # noqa: S311 (moments, not keys)
        self.log = folder / "steps"
        self.log.mkdir()
        self.jobs = folder / "jobs"
        self.jobs.mkdir()
        (self.jobs / "counting.py").write_text(COUNTING.format(log=str(self.log), pace=PACE_S))
        (self.jobs / "train.py").write_text(TRAIN)
        spec = folder / "train.yaml"
        spec.write_text(
            (ADULT / "train.yaml").read_text().replace("epochs: 20", "epochs: 13").replace(
                "training: {", f"training: {{retries: {RETRIES}, "
            ).replace("workers: 2,", "workers: 2, min_workers: 1,")
        )  # fmt: skip
        line.refused("train", "submit", spec, "--jobs", self.jobs, who="ed")
        line.approve("olga")
        self.run = line.json("train", "submit", spec, "--jobs", self.jobs, who="ed")["run"]
        self.kills: list[str] = []
        for number in range(3):
            self.kill(f"worker {number}", self.workers)
        self.kill("driver", self.drivers)
        self.kill("supervisor", lambda: [self.supervisor] if self.supervisor else [])
        self.told = line.refused("train", "watch", self.run, who="ed")  # which has it say that it has ended
        self.ended = line.json("train", "status", self.run, who="ed")
        self.resumed = line.json("train", "resume", self.run, who="ed")
        self.refused = line.refused("train", "resume", self.run, who="ed")
        assert self.supervisor is not None
        self.supervisor.kill()  # once more, before there is a cluster, let alone an attempt: nothing has ended
        line.json("train", "resume", self.run, who="ed")
        self.watched = line.run("train", "watch", self.run, who="ed", timeout_s=900)
        self.shown = line.json("train", "status", self.run, who="ed")

    @property
    def supervisor(self) -> psutil.Process | None:
        return Daemon(self.line.home / "runs" / self.run / "driver").process()

    def descendants(self, wanted: Callable[[list[str]], bool]) -> list[psutil.Process]:
        """Processes below our own supervisor, by their arguments."""
        found = []
        for process in self.supervisor.children(recursive=True) if self.supervisor else []:
            try:
                if wanted(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        return self.descendants(lambda words: bool(words) and words[0].startswith("ray::RayTrainWorker"))

    def drivers(self) -> list[psutil.Process]:
        return self.descendants(lambda words: words[1:] == ["train.py", "--run", self.run])

    def meetings(self) -> dict[str, int]:
        """How many steps the ranks of each start have begun to release."""
        steps: dict[str, int] = {}
        for path in self.log.iterdir():
            meeting = path.name.partition("-")[0]
            steps[meeting] = max(steps.get(meeting, 0), path.stat().st_size)
        return steps

    @property
    def released(self) -> int:
        return sum(self.meetings().values())

    def kill(self, what: str, victims: Callable[[], list[psutil.Process]]) -> None:
        """Wait for the ranks of a new start, and for a random step of theirs; then one of the victims is no more."""
        known = len(self.kills)
        moment = self.chance.randrange(5, 2 * BLOCK_STEPS)
        wait_for(lambda: len(self.meetings()) > known and self._newest() >= moment, f"{what}'s moment", START_TIMEOUT_S)
        victim = self.chance.choice(sorted(victims(), key=lambda process: process.pid))
        victim.kill()
        self.kills.append(what)

    def _newest(self) -> int:
        newest = max(self.log.iterdir(), key=lambda path: path.stat().st_ctime_ns)
        return newest.stat().st_size


@pytest.fixture(scope="module")
def hunted(line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Hunted:
    return Hunted(line, tmp_path_factory.mktemp("hunted"))


def test_a_run_that_lost_everybody_once_ends_with_a_registered_model(hunted: Hunted) -> None:
    assert hunted.watched.returncode == 0, hunted.watched.stdout + hunted.watched.stderr
    assert hunted.shown["state"] == "finished"
    assert [row["model"] for row in hunted.line.json("model", "list", who="ed")] == ["adult@1"]
    assert hunted.shown["attempt"] == 1 + len(hunted.kills)
    assert hunted.shown["steps_done"] == hunted.shown["steps"]


def test_the_ledger_has_every_step_that_left_and_at_most_a_block_a_kill_more(hunted: Hunted) -> None:
    charged, released = hunted.shown["steps_committed"], hunted.released
    assert len(hunted.meetings()) == 1 + len(hunted.kills)
    assert released >= hunted.shown["steps"], "the test itself: what was counted is what was trained"
    assert released <= charged <= released + BLOCK_STEPS * len(hunted.kills)
    assert hunted.shown["plan"]["epsilon_certified"] < hunted.shown["epsilon_charged"]
    assert hunted.shown["epsilon_charged"] <= hunted.shown["epsilon_at_most"]
    assert hunted.line.budget_left() == pytest.approx(7 - hunted.shown["epsilon_charged"])


def test_nothing_was_redone_but_what_had_no_checkpoint(hunted: Hunted) -> None:
    redone = hunted.shown["steps_committed"] - hunted.shown["steps"]
    assert 0 < redone <= BLOCK_STEPS * len(hunted.kills)
    assert re.search(r"resumed at step [1-9]", hunted.line.run("train", "status", hunted.run, who="ed").stdout)


def test_a_killed_supervisor_settles_the_run_and_resuming_it_reserves_again(hunted: Hunted) -> None:
    assert "supervisor was killed" in hunted.told
    assert f"cloister train resume {hunted.run}" in hunted.told
    assert (hunted.ended["state"], hunted.ended["settled"]) == ("failed", True)
    assert hunted.ended["epsilon_charged"] == hunted.ended["epsilon_spent"]
    assert hunted.resumed["state"] == "training"
    assert hunted.resumed["checkpoint"] == hunted.ended["checkpoint"] > 0
    assert hunted.ended["epsilon_charged"] < hunted.resumed["epsilon_charged"] <= hunted.resumed["epsilon_at_most"]
    assert "lives" in hunted.refused
    assert "finished" in hunted.line.refused("train", "resume", hunted.run, who="ed")


def test_no_checkpoint_is_left_and_nothing_of_the_clusters(hunted: Hunted) -> None:
    folder = hunted.line.home / "authority" / "blobs" / "models" / hunted.run
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [
        f"model-{hunted.shown['attempt']}.onnx.sealed"
    ]
    assert hunted.supervisor is None
    cluster = Daemon(hunted.line.home / "runs" / hunted.run / "driver").status().get("cluster")
    assert cluster is None or not Path(cluster).exists()
