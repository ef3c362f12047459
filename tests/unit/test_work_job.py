"""A job is submitted again when it was killed, only then, and only so often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from cloister.errors import UnavailableError
from cloister.training.driver import DIED, see_through, was_killed
from cloister.training.run import RunFolder

RETRIES = 3


def details(code: int | None) -> JobDetails:
    status = JobStatus.FAILED if code != 0 else JobStatus.SUCCEEDED
    return JobDetails(
        type=JobType.SUBMISSION, entrypoint="python train.py", status=status, driver_exit_code=code
    )  # fmt: skip


class Mortal:
    """A Job API whose jobs end with these exit codes, one after the other, the last of them for ever."""

    def __init__(self, *codes: int | None) -> None:
        self.codes = codes
        self.submitted: list[str] = []

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        self.submitted.append(submission_id)
        return submission_id

    def get_job_info(self, _job: str) -> JobDetails:
        return details(self.codes[min(len(self.submitted), len(self.codes)) - 1])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(
        directory=tmp_path, run="run-1", workers=2, min_workers=1, retries=RETRIES, gpus_per_worker=0,
        authority_url="https://127.0.0.1:8443", authority_ca="ca.pem", jobs="jobs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "killed"), [(-9, True), (-15, True), (137, True), (None, True), (DIED, True), (1, False), (2, False)]
)
def test_a_killed_driver_is_told_from_one_that_failed(code: int | None, killed: bool) -> None:
    assert was_killed(details(code)) is killed


@pytest.mark.parametrize(
    ("codes", "submitted"), [((-9,), 1 + RETRIES), ((-9, 137, 1), 3), ((None, DIED, 1), 3), ((1,), 1)]
)
def test_a_job_that_fails_is_given_up(folder: RunFolder, codes: tuple[int | None, ...], submitted: int) -> None:
    jobs = Mortal(*codes)
    with pytest.raises(UnavailableError, match="job failed"):
        see_through(jobs, folder)  # type: ignore[arg-type]  # what it uses of a Job API
    assert len(jobs.submitted) == len(set(jobs.submitted)) == submitted, "each under an id of its own"


def test_a_job_that_was_killed_twice_and_then_succeeds_has_succeeded(folder: RunFolder) -> None:
    jobs = Mortal(-9, 137, 0)
    see_through(jobs, folder)  # type: ignore[arg-type]
    assert len(jobs.submitted) == 3


def test_a_folder_of_before_there_were_attempts_opens(folder: RunFolder) -> None:
    folder.write(b"key")
    facts = (folder.directory / "run.json").read_text()
    assert RunFolder.open(folder.directory) == folder
    old = "\n".join(line for line in facts.splitlines() if "retries" not in line and "min_workers" not in line)
    (folder.directory / "run.json").write_text(old)
    opened = RunFolder.open(folder.directory)
    assert (opened.min_workers, opened.retries) == (opened.workers, 0)
