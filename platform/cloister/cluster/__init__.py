"""One hardened Ray cluster on one machine: started, shown to be up, and taken away again without a trace.

Guarantees:
  1. Every TCP socket that the cluster itself opens is on loopback; gRPC needs the cluster's own certificate (mutual
     TLS, P-256) and every call a fresh random token. Neither outlives the cluster.
  2. Whatever Ray writes (logs, sockets, object store, job packages) is on tmpfs below a directory that only this
     user can enter. Nothing spills, nothing dumps core, nothing goes to `~/.ray`, no usage report is sent.
  3. Secrets exist as 0600 files. Environment, arguments, logs and errors carry their paths only, and the caller's
     environment reaches the cluster through an allow list.
  4. When the context ends, or the caller dies, every process of the cluster ends, also one that made itself a
     daemon. No process outside of the cluster is touched. `reap` cleans up if the guardian itself was killed.

Does not guarantee: any protection between jobs of one cluster, or from this user's other processes or root (the
token is root on the cluster, so one cluster is one trust domain); that tmpfs is not swapped (swap must be off or
encrypted). A Serve replica opens its own ports. Ray's HTTP (the agents and, with `job_api`, the API server) is
plain on loopback: the token guards it, TLS does not. Without a token the API server still hands out the static
files of the dashboard's page, since the Job API cannot be had without them, and the agent says whether it is alive.

How: the caller starts a guardian, a child subreaper, then makes the directory, and then tells the guardian to go on:
it starts `ray start --block`. All processes of the cluster stay below the guardian. It ends, and removes the directory,
when its standard input does, that is with the caller.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cloister.cluster.files import choose_directory, clusters_folder, make_directory, write_credentials, write_private
from cloister.cluster.guardian import GRACE_S, LOG, MARKER, reap
from cloister.errors import InputError, UnavailableError
from cloister.ports import LOOPBACK, reserved_ports
from cloister.stores.blobs import aws_places

__all__ = ["RayCluster", "clusters_folder", "ray_cluster", "reap"]

RUN_GUARDIAN = "import sys; from cloister.cluster.guardian import guard; guard(sys.argv[1:])"

# What Ray and Python need from the caller's environment. Everything else may be a secret and stays out.
INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USE_TLS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without this, Ray rewrites 127.0.0.1 to the machine's outside address and listens there.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "DASHBOARD_METRIC_PORT": "-1",  # not a port: the API server logs that and goes on without its Prometheus endpoint
}

SYSTEM_CONFIG = {
    "automatic_object_spilling_enabled": False,
    "enable_metrics_collection": False,  # no Prometheus endpoint in the agent
    "task_events_report_interval_ms": 0,  # arguments' names and exception texts stay out of the State API
    "prestart_worker_first_driver": False,  # would start workers that no job asked for
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """Where a running cluster is. Holds paths and addresses, never a secret."""

    directory: Path
    gcs_address: str
    jobs_address: str | None
    pid: int
    """The guardian, ancestor of every process of the cluster."""

    def environment(self) -> dict[str, str]:
        """What a driver or client process must add to its environment to reach this cluster."""
        address = {"RAY_ADDRESS": self.gcs_address}
        if self.jobs_address:
            address["RAY_API_SERVER_ADDRESS"] = self.jobs_address
        return address | _credentials(self.directory)


@contextlib.contextmanager
def ray_cluster(
    *,
    num_cpus: int,
    job_api: bool,
    num_gpus: int = 0,
    object_store_bytes: int = 200_000_000,
    environment: Mapping[str, str] | None = None,
    parent: Path | None = None,
    timeout_s: float = 60.0,
) -> Iterator[RayCluster]:
    """Start a cluster, wait until it answers, yield it, and remove it with all that it wrote.

    `environment` is added to what every process of the cluster sees, hence nothing secret belongs there.

    Raises:
        UnavailableError: no tmpfs, no free port, or not up within `timeout_s`. Nothing is left behind.
    """
    if "RAY_AUTH_TOKEN" in (environment or {}):
        raise InputError("a token does not belong in an environment variable", "the cluster makes its own")
    directory = choose_directory(parent or clusters_folder())
    guardian: subprocess.Popen[bytes] | None = None
    try:
        with reserved_ports(7) as (gcs_port, *ports):
            command = _ray_start(directory, gcs_port, ports, num_cpus, num_gpus, object_store_bytes, job_api)
            # Before the directory is made, so that there is somebody to remove it whenever this process is killed.
            with _later(signal.SIGTERM):  # the guardian inherits that, and takes it when it can
                guardian = subprocess.Popen(
                    [sys.executable, "-c", RUN_GUARDIAN, *command],
                    stdin=subprocess.PIPE,  # one byte says that the directory is there; that it closes, to end
                    stdout=subprocess.DEVNULL,  # until it has the directory: then its log
                    stderr=subprocess.DEVNULL,
                    env=_environment(directory, environment or {}),
                    cwd="/",  # likewise
                    start_new_session=True,  # a Ctrl-C on the caller's terminal must not race with its clean-up
                )
            with _filled(directory) as log:
                _go_on(guardian)
                _wait_until_up(log, guardian, timeout_s)
        yield RayCluster(
            directory=directory,
            gcs_address=f"{LOOPBACK}:{gcs_port}",
            jobs_address=f"http://{LOOPBACK}:{ports[0]}" if job_api else None,
            pid=guardian.pid,
        )
    finally:
        if guardian is not None:
            if guardian.stdin:
                guardian.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                guardian.wait(GRACE_S + 5)
        reap(directory)  # nothing left to do, unless the guardian is stuck or was killed


def _credentials(directory: Path) -> dict[str, str]:
    return RAY_ENVIRONMENT | {
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "RAY_TLS_CA_CERT": str(directory / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(directory / "tls.crt"),
        "RAY_TLS_SERVER_KEY": str(directory / "tls.key"),
    }


def _environment(directory: Path, extra: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ} | aws_places()
    python_path = [os.path.abspath(entry) for entry in inherited.pop("PYTHONPATH", "").split(os.pathsep) if entry]  # noqa: PTH100
    source = str(Path(__file__).parents[2])
    if source != sysconfig.get_path("purelib"):  # not installed: the guardian and the hook must find this module
        python_path.append(source)
    return (
        inherited
        | dict(extra)
        | _credentials(directory)
        | {
            "HOME": str(directory / "home"),
            "TMPDIR": str(directory / "tmp"),
            # A job's entry point says `python`: it must be this one.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), inherited.get("PATH", os.defpath))),
            "PYTHONPATH": os.pathsep.join(python_path),
            "RAY_START_HOOK": "cloister.cluster.guardian.start_less",
            "SPT_NOENV": "1",  # Ray's setproctitle would overwrite the marker
            MARKER: str(directory),
        }
    )


def _ray_start(
    directory: Path, gcs_port: int, ports: Sequence[int], cpus: int, gpus: int, store_bytes: int, job_api: bool
) -> list[str]:
    jobs, node, objects, agent_http, agent_grpc, runtime_env = ports
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--no-monitor", "--include-log-monitor=false", "--log-color=false"),
        f"--include-dashboard={str(job_api).lower()}",
        f"--node-ip-address={LOOPBACK}",
        f"--dashboard-host={LOOPBACK}",
        f"--port={gcs_port}",
        f"--dashboard-port={jobs}",
        f"--node-manager-port={node}",
        f"--object-manager-port={objects}",
        f"--dashboard-agent-listen-port={agent_http}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={runtime_env}",
        *("--min-worker-port=0", "--max-worker-port=0"),
        f"--num-cpus={cpus}",
        f"--num-gpus={gpus}",
        f"--object-store-memory={store_bytes}",
        f"--temp-dir={directory / 'r'}",
        f"--plasma-directory={directory}",
        f"--object-spilling-directory={directory / 'spill'}",
        f"--system-config={json.dumps(SYSTEM_CONFIG)}",
    ]


@contextlib.contextmanager
def _later(number: signal.Signals) -> Iterator[None]:
    """Within the block this signal waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _filled(directory: Path) -> Iterator[BinaryIO]:
    """Make the directory with all that the guardian needs. Yields the log: it can be read until the block ends, also
    when the guardian has removed it."""
    try:
        make_directory(directory)
        write_credentials(directory)
        write_private(directory / LOG, b"")
        log = (directory / LOG).open("rb")
    except FileNotFoundError as error:  # the guardian was told to end, and removed it
        raise UnavailableError("the Ray cluster ended while it started", "try again") from error
    except OSError as error:
        place = directory.parent
        raise UnavailableError(f"{place} is not writable", f"free memory: {place} may be full") from error
    with log:
        yield log


def _go_on(guardian: subprocess.Popen[bytes]) -> None:
    """Tell the guardian that the directory is there."""
    with contextlib.suppress(BrokenPipeError):  # it has ended: seen by whoever waits for it
        if guardian.stdin:
            os.write(guardian.stdin.fileno(), b"\n")


def _wait_until_up(log: BinaryIO, guardian: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    text = b""
    # Ray prints this when GCS, raylet, agents and, if wanted, the API server have registered themselves.
    while b"will now block forever" not in text:
        ended = guardian.poll() is not None
        text += log.read()
        if ended:
            if b"ddress already in use" in text or b"already occupied" in text:
                raise UnavailableError("a port that Ray needs was taken", "try again")
            raise UnavailableError("the Ray cluster ended while it started", "check that `ray start --head` works here")
        if time.monotonic() > deadline:
            raise UnavailableError("the Ray cluster did not come up in time", "free some CPU or raise the timeout")
        time.sleep(0.02)
