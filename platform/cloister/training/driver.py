"""Ray around training: the job inside the cluster, and the supervisor that makes and ends the cluster.

Guarantees: each run has a Ray cluster of its own, which is gone when the run ends, however it ends; only then does the
supervisor say, signed by the run's key, that the run has ended, which settles the ledger. Workers that were killed are
started again, and so is the job if its driver was, at most as often as the spec says; each start opens an attempt at
the authority, which decides. What fails by itself, our code or the authority's refusal, is not tried again.

    supervise   start a hardened cluster → submit `jobs/train.py` by Ray's Job API → follow → tear down → end
    run_job     in that job: a TorchTrainer with as many workers as planned, or as there are machines left for

If the supervisor is killed, its cluster goes with it (the guardian sees to that): `cloister train resume`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cloister.cluster import ray_cluster
from cloister.errors import CloisterError, UnavailableError
from cloister.process import Daemon, describe, no_core_dumps
from cloister.signing.run_end import ENDED
from cloister.stores.home import HOME_VARIABLE
from cloister.training.run import RunFolder

POLL_S = 0.3
FAREWELL_S = 5.0  # for whoever follows the job with `ray job submit`, to read that it is over
GONE_S = 10.0
NEVER_S = 1e9  # workers that train are not interrupted for more of them: that would cost an attempt
DIED = 75  # EX_TEMPFAIL of sysexits.h: the job's exit code when the run has not ended although its workers have
# Gloo must listen on loopback only, and one thread a rank keeps two ranks out of each other's way.
JOB_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon the end of a worker is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts a cluster that lives for one run
}


def run_job(folder_path: Path, jobs: Path) -> int:
    """The Ray job: train with as many workers as planned. Returns the exit code."""
    # Here, not above: these imports cost seconds, and the supervisor does without them.
    import ray
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig  # type checkers get others of ray.train
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from cloister.training.worker import NoProcessGroup, train_worker

    folder = RunFolder.open(folder_path)
    ray.init(log_to_driver=False, configure_logging=False)
    workers: int | tuple[int, int] = folder.workers
    if folder.min_workers < folder.workers:
        workers = (folder.min_workers, folder.workers)
        _forget_the_dead()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"folder": str(folder.directory), "jobs": str(jobs)},
        torch_config=NoProcessGroup(),  # the workers make their own
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=NEVER_S,
            use_gpu=folder.gpus_per_worker > 0,
            resources_per_worker={"CPU": 1, **({"GPU": folder.gpus_per_worker} if folder.gpus_per_worker else {})},
        ),
        run_config=RunConfig(
            name=folder.run,
            storage_path=os.environ["TMPDIR"],  # the cluster's own tmpfs
            # Ray's other two limits are endless by default. Each start is an attempt, which the authority counts too.
            failure_config=FailureConfig(
                max_failures=folder.retries,
                controller_failure_limit=folder.retries,
                max_preemption_failures=folder.retries,
            ),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  (workers died too often, or could not tell the authority what happened)
        print(f"training failed: {type(error).__name__}", file=sys.stderr)  # noqa: T201  (a job's log)
    with contextlib.closing(folder.client()) as client:
        state = client.get(f"/v1/runs/{folder.run}")["state"]
    if state == "finished":
        return 0
    return 1 if state in ENDED else DIED


def _forget_the_dead() -> None:
    """Have Ray give back what it reserves, for three minutes still, for workers of a job whose driver was killed.

    The name is private to Ray: one without it only makes the next job wait that long.
    """
    import ray

    with contextlib.suppress(ValueError):  # there is none, or none any more
        for _ in range(round(GONE_S / POLL_S)):
            ray.kill(ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"))
            time.sleep(POLL_S)


def supervise(folder_path: Path, *, submit: bool) -> int:
    """Hold a cluster for one run until the run ends. Without `submit`, somebody else submits the job."""
    no_core_dumps()
    folder = RunFolder.open(folder_path)
    daemon = Daemon(folder_path / "driver")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failure: CloisterError | None = None
    try:
        environment = {HOME_VARIABLE: str(folder_path.parents[1]), **JOB_ENVIRONMENT}
        with ray_cluster(num_cpus=folder.workers, num_gpus=folder.workers * folder.gpus_per_worker, job_api=True,
                         environment=environment) as cluster:  # fmt: skip
            assert cluster.jobs_address is not None  # noqa: S101  (job_api=True)
            # By header, because Ray reads its token settings once, when it is imported: too early here.
            jobs = JobSubmissionClient(
                cluster.jobs_address, headers={"Authorization": f"Bearer {(cluster.directory / 'token').read_text()}"}
            )
            daemon.report(
                "ready", jobs_address=cluster.jobs_address, environment=cluster.environment(),
                cluster=str(cluster.directory),
            )  # fmt: skip
            if submit:
                see_through(jobs, folder)
            else:
                _wait_for_the_end(jobs, folder)
    except CloisterError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  (the edge: only its type is written down)
        failure = CloisterError(
            f"the run's cluster failed with {type(error).__name__}", f"read {daemon.directory / 'log'}"
        )
    finally:
        # The cluster is gone. If the run has ended by itself, this changes nothing but what is still held for it.
        reason = failure or UnavailableError("the training job ended without a result", _next_step(folder))
        with contextlib.suppress(CloisterError):  # an authority that is down hears of it at the next `cloister up`
            folder.end(reason)
        daemon.report("ended", error=describe(failure) if failure else None)
    return 1 if failure else 0


def see_through(jobs: JobSubmissionClient, folder: RunFolder) -> None:
    """Submit the job, and once more each time that its driver, or more workers than Ray takes, were killed.

    Raises:
        UnavailableError: it failed by itself, or once too often.
    """
    for _ in range(1 + folder.retries):
        job = jobs.submit_job(
            entrypoint=f"python train.py --run {folder.run}",
            submission_id=f"{folder.run}-{secrets.token_hex(3)}",
            runtime_env={"working_dir": folder.jobs, "excludes": ["examples"]},
        )
        while not (shown := jobs.get_job_info(job)).status.is_terminal():
            time.sleep(POLL_S)
        if shown.status == JobStatus.SUCCEEDED:
            return
        if not was_killed(shown):
            break
    raise UnavailableError("the training job failed", _next_step(folder))


def was_killed(job: JobDetails) -> bool:
    """Whether a job that failed did not end by its own doing. (A shell says 128 + n of what signal n has killed.)"""
    code = job.driver_exit_code
    return code is None or code < 0 or code > 128 or code == DIED


def _next_step(folder: RunFolder) -> str:
    return f"while it has attempts left, go on from its last checkpoint: cloister train resume {folder.run}"


def _wait_for_the_end(jobs: JobSubmissionClient, folder: RunFolder) -> None:
    """Return when the run has ended, whose job is somebody else's."""
    client = folder.client()
    while client.get(f"/v1/runs/{folder.run}")["state"] not in ENDED or not _all_over(jobs):
        time.sleep(POLL_S)
    time.sleep(FAREWELL_S)


def _all_over(jobs: JobSubmissionClient) -> bool:
    return all(job.status.is_terminal() for job in jobs.list_jobs())


def main() -> int:
    """`python -m cloister.training.driver FOLDER [--hold]`, started by `cloister train submit` and `resume`."""
    return supervise(Path(sys.argv[1]), submit="--hold" not in sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
