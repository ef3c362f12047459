"""Ray around training: the job inside the cluster, and the supervisor that makes and ends the cluster.

Guarantees: each run has a Ray cluster of its own, which is gone when the run ends, however it ends; a run whose job
died without a word is reported as failed, so that the ledger settles.

    supervise   start a hardened cluster → submit `jobs/train.py` by Ray's Job API → follow → tear down
    run_job     in that job: a TorchTrainer with the planned number of workers, no retries
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from cloister.cluster import ray_cluster
from cloister.errors import CloisterError, UnavailableError
from cloister.process import Daemon, describe, no_core_dumps
from cloister.stores.home import HOME_VARIABLE
from cloister.training.run import ENDED, RunFolder

POLL_S = 0.3
FAREWELL_S = 5.0  # for whoever follows the job with `ray job submit`, to read that it is over
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
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cloister.training.worker import NoProcessGroup, train_worker

    folder = RunFolder.open(folder_path)
    ray.init(log_to_driver=False, configure_logging=False)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"folder": str(folder.directory), "jobs": str(jobs)},
        torch_config=NoProcessGroup(),  # the workers make their own
        scaling_config=ScalingConfig(
            num_workers=folder.workers,
            use_gpu=folder.gpus_per_worker > 0,
            resources_per_worker={"CPU": 1, **({"GPU": folder.gpus_per_worker} if folder.gpus_per_worker else {})},
        ),
        run_config=RunConfig(
            name=folder.run,
            storage_path=os.environ["TMPDIR"],  # the cluster's own tmpfs
            # A retry would be charged again: the ledger decides on retries, not Ray.
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  (Ray wraps the worker's error; the worker has reported it already)
        print(f"training failed: {type(error).__name__}", file=sys.stderr)  # noqa: T201  (a job's log)
        return 1
    return 0


def supervise(folder_path: Path, *, submit: bool) -> int:
    """Hold a cluster for one run until the run ends. Without `submit`, somebody else submits the job."""
    no_core_dumps()
    folder = RunFolder.open(folder_path)
    daemon = Daemon(folder_path / "driver")
    client = folder.client()
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
            job = _submit(jobs, folder) if submit else None
            daemon.report(
                "ready", jobs_address=cluster.jobs_address, environment=cluster.environment(),
                cluster=str(cluster.directory),
            )  # fmt: skip
            _follow(jobs, job, folder)
    except CloisterError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  (the edge: only its type is written down)
        failure = CloisterError(
            f"the run's cluster failed with {type(error).__name__}", f"read {daemon.directory / 'log'}"
        )
    finally:
        # Idempotent: if the run has ended by itself this changes nothing.
        reason = failure or UnavailableError(
            "the training job ended without a result", "submit it again: cloister train submit SPEC"
        )
        with contextlib.suppress(CloisterError):  # an authority that is down hears of it at the next `cloister up`
            client.post(f"/v1/runs/{folder.run}/failure", {"error": describe(reason)})
        daemon.report("ended", error=describe(failure) if failure else None)
    return 1 if failure else 0


def _submit(jobs: JobSubmissionClient, folder: RunFolder) -> str:
    return str(
        jobs.submit_job(
            entrypoint=f"python train.py --run {folder.run}",
            submission_id=folder.run,
            runtime_env={"working_dir": folder.jobs, "excludes": ["examples"]},
        )
    )


def _follow(jobs: JobSubmissionClient, job: str | None, folder: RunFolder) -> None:
    """Return when the job, or, if it is somebody else's, the run has ended."""
    client = folder.client()
    while True:
        if job is not None:
            status = jobs.get_job_status(job)
            if status.is_terminal():
                if status != JobStatus.SUCCEEDED:
                    raise UnavailableError("the training job failed", f"cloister train status {folder.run}")
                return
        elif client.get(f"/v1/runs/{folder.run}")["state"] in ENDED and _all_over(jobs):
            time.sleep(FAREWELL_S)
            return
        time.sleep(POLL_S)


def _all_over(jobs: JobSubmissionClient) -> bool:
    return all(job.status.is_terminal() for job in jobs.list_jobs())


def main() -> int:
    """`python -m cloister.training.driver FOLDER [--hold]`, started by `cloister train submit`."""
    return supervise(Path(sys.argv[1]), submit="--hold" not in sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
