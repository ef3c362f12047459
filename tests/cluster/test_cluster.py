"""A hardened cluster on real Ray: what listens, what answers without a token, what leaks, and what is left."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from cloister import cluster as cluster_module
from cloister.cluster import RayCluster, clusters_folder, ray_cluster, reap
from cloister.cluster import files as cluster_files
from cloister.cluster.guardian import MARKER
from cloister.errors import InputError, UnavailableError
from cloister.ports import reserved_ports
from waiting import wait_for

pytestmark = pytest.mark.story

SECRET_OF_THE_CALLER = "correct-horse-battery-staple"

# Answered without a token, on loopback: static files, the name of the authentication mode, liveness.
OPEN_PATHS = {"/", "/favicon.ico", "/api/authentication_mode", "/api/local_raylet_healthz", "/api/healthz"}
PROBED_PATHS = [
    *sorted(OPEN_PATHS),
    "/metrics",
    "/api/version",
    "/api/jobs/",
    "/api/job_agent/jobs/x/logs",
    "/api/v0/tasks",
    "/api/v0/logs",
    "/api/serve/applications/",
    "/nodes?view=summary",
    "/logical/actors",
    "/worker/traceback",
    "/get_or_create_runtime_env",
]

TRAIN_JOB = """
import os
import ray, ray.train, torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work(config):
    import torch.distributed as dist
    total = torch.ones(1) * (ray.train.get_context().get_world_rank() + 1)
    dist.all_reduce(total)
    if ray.train.get_context().get_world_rank() == 0:
        with open(os.path.join(config["directory"], "result"), "w") as file:
            file.write(f"{dist.get_backend()} {dist.get_world_size()} {total.item():.0f}")

ray.init()
directory = os.environ["CLOISTER_CLUSTER"]
TorchTrainer(
    work,
    train_loop_config={"directory": directory},
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(name="run", storage_path=directory + "/train", failure_config=FailureConfig(max_failures=0)),
).fit()
print("result", open(directory + "/result").read())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    os.environ["SOME_PASSWORD"] = SECRET_OF_THE_CALLER
    try:
        with ray_cluster(
            num_cpus=4,
            job_api=True,
            environment={
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "RAY_TRAIN_V2_ENABLED": "1",
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
                "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            },
        ) as running:
            yield running
    finally:
        del os.environ["SOME_PASSWORD"]


@pytest.fixture
def parent() -> Path:
    """A folder for the clusters of one test: nobody else's are met in it."""
    return clusters_folder() / secrets.token_hex(2)


def descendants(cluster: RayCluster) -> Iterator[psutil.Process]:
    """The processes of a cluster. Any but the guardian may end at any moment: look with `unless_gone`."""
    guardian = psutil.Process(cluster.pid)
    yield guardian
    yield from guardian.children(recursive=True)


@contextlib.contextmanager
def unless_gone(process: psutil.Process) -> Iterator[None]:
    """For a look at a process of somebody else's, who may end it meanwhile."""
    try:
        yield
    except (OSError, psutil.Error):
        if alive(process):
            raise


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    with unless_gone(process):
        return [(s.laddr.ip, s.laddr.port) for s in process.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
    return []


def alive(process: psutil.Process) -> bool:
    """Neither gone nor a zombie. It may end between any two looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def token(cluster: RayCluster) -> str:
    return (cluster.directory / "token").read_text()


def bearer(cluster: RayCluster) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(cluster)}"}


def submit(cluster: RayCluster, folder: Path, entrypoint: str) -> str:
    """Run a job with the `ray job submit` command and return what it printed."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--working-dir",
            folder,
            "--",
            *entrypoint.split(),
        ],
        env=os.environ | cluster.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_socket_is_on_loopback(cluster: RayCluster) -> None:
    sockets = [address for process in descendants(cluster) for address in listening(process)]
    assert len(sockets) >= 6
    assert {ip for ip, _ in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not {port for _, port in sockets} & {6379, 8265, 10001, 44217, 44227, 52365}


def test_the_job_api_wants_the_token(cluster: RayCluster) -> None:
    url = f"{cluster.jobs_address}/api/jobs/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer " + "0" * 64}).status_code in (401, 403)
    assert httpx.get(url, headers=bearer(cluster)).status_code == 200


def test_without_the_token_http_answers_only_what_the_list_says(cluster: RayCluster) -> None:
    opened = set()
    for process in descendants(cluster):
        for _, port in listening(process):
            for path in PROBED_PATHS:
                try:
                    answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5)
                except httpx.HTTPError:
                    break  # gRPC over TLS, does not speak HTTP
                if answer.is_success:
                    opened.add(path)
                    assert token(cluster) not in answer.text
    assert opened <= OPEN_PATHS


def test_gcs_wants_a_client_certificate_and_the_token(cluster: RayCluster) -> None:
    authority, certificate, key = ((cluster.directory / n).read_bytes() for n in ("ca.crt", "tls.crt", "tls.key"))
    mutual = grpc.ssl_channel_credentials(authority, key, certificate)

    def check_alive(channel: grpc.Channel, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
        with channel:
            try:
                channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=5, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    good = [("authorization", f"Bearer {token(cluster)}")]
    plain = grpc.insecure_channel(cluster.gcs_address)
    anonymous = grpc.secure_channel(cluster.gcs_address, grpc.ssl_channel_credentials(authority))
    assert check_alive(plain, good) is grpc.StatusCode.UNAVAILABLE
    assert check_alive(anonymous, good) is grpc.StatusCode.UNAVAILABLE
    assert check_alive(grpc.secure_channel(cluster.gcs_address, mutual), []) is grpc.StatusCode.UNAUTHENTICATED
    assert check_alive(grpc.secure_channel(cluster.gcs_address, mutual), good) is grpc.StatusCode.OK


def test_a_job_runs_and_sees_no_secret(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import os, ray\nray.init()\n"
        "@ray.remote\ndef environment(): return dict(os.environ)\n"
        "print('answer', 6 * 7, dict(os.environ), ray.get(environment.remote()))\n"
    )
    output = submit(cluster, tmp_path, "python job.py")
    assert "answer 42" in output
    assert SECRET_OF_THE_CALLER not in output
    assert token(cluster) not in output


def test_two_torch_workers_train(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN_JOB)
    assert "result gloo 2 3" in submit(cluster, tmp_path, "python train.py")


def test_no_secret_in_environment_arguments_or_logs(cluster: RayCluster) -> None:
    secrets = [token(cluster), (cluster.directory / "tls.key").read_text().splitlines()[1], SECRET_OF_THE_CALLER]
    looked = 0
    for process in descendants(cluster):
        for name in ("environ", "cmdline"):
            text = ""
            with unless_gone(process):
                text = Path(f"/proc/{process.pid}/{name}").read_bytes().decode(errors="replace")
            assert not [s for s in secrets if s in text], (process.pid, name)
            looked += bool(text)
    assert looked >= 8
    for path in cluster.directory.rglob("*"):
        if path.is_file() and path.parent != cluster.directory:
            with contextlib.suppress(FileNotFoundError):  # Ray removed it meanwhile
                text = path.read_bytes().decode(errors="replace")
                assert not [s for s in secrets if s in text], path
    assert not [s for s in secrets if s in repr(cluster) + repr(cluster.environment())]


def test_processes_make_private_files_and_no_core_dumps(cluster: RayCluster) -> None:
    looked = 0
    for process in descendants(cluster):
        with unless_gone(process):
            limit = process.rlimit(psutil.RLIMIT_CORE)
            status = Path(f"/proc/{process.pid}/status").read_text()
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            assert limit == (0, 0), process
            assert int(status.split("Umask:")[1].split()[0], 8) == 0o077, process
            assert environment.count(f"{MARKER}={cluster.directory}".encode()) == 1
            looked += 1
    assert looked >= 5


def test_the_directory_is_private_and_takes_everything(cluster: RayCluster) -> None:
    for directory in (cluster.directory, cluster.directory.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in ("token", "tls.key", "tls.crt", "ca.crt", "guardian.log"):
        assert stat.S_IMODE((cluster.directory / name).stat().st_mode) == 0o600, name
    session = (cluster.directory / "r" / "session_latest").resolve()
    assert session.is_relative_to(cluster.directory)
    assert not (cluster.directory / "home" / ".ray" / "auth_token").exists()


def test_serving_cluster_has_no_api_server_and_leaves_nothing() -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    daemon = (
        "import ray, subprocess; ray.init(logging_level='ERROR');\n"
        "@ray.remote\n"
        "def escape():\n"
        "    return subprocess.check_output('setsid sleep 300 >/dev/null & echo $!', shell=True, env={}, text=True)\n"
        "print(ray.get(escape.remote()))"
    )
    try:
        with ray_cluster(num_cpus=1, job_api=False) as cluster:
            assert cluster.jobs_address is None
            for process in descendants(cluster):
                with unless_gone(process):
                    assert "dashboard.py" not in " ".join(process.cmdline())
            env = os.environ | cluster.environment()
            escaped = int(
                subprocess.run([sys.executable, "-c", daemon], env=env, capture_output=True, check=True).stdout
            )
            assert psutil.pid_exists(escaped)
            processes = list(descendants(cluster))
        assert not [p for p in processes if p.is_running()]
        assert not psutil.pid_exists(escaped)
        assert not cluster.directory.exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


SOURCE_ROOT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
SUPERVISOR = """
import sys, time
from cloister import cluster as cluster_module
from cloister.cluster import ray_cluster
with ray_cluster(num_cpus=1, job_api=False) as cluster:
    print(cluster.directory, cluster.pid, flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("victim", ["supervisor", "guardian"])
def test_a_killed_process_leaves_no_cluster(victim: str) -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, env=SOURCE_ROOT)
    try:
        assert supervisor.stdout is not None
        directory, pid = supervisor.stdout.readline().split()
        path, guardian = Path(directory.decode()), psutil.Process(int(pid))
        processes = guardian.children(recursive=True)
        assert len(processes) >= 4
        supervisor.kill()
        supervisor.wait()
        if victim == "guardian":
            guardian.kill()
            assert reap(path) >= 1
        wait_for(lambda: not any(map(alive, processes)))
        wait_for(lambda: not path.exists())
    finally:
        supervisor.kill()
        supervisor.wait()


def test_a_cluster_that_does_not_come_up_leaves_nothing(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def marked() -> list[int]:
        """The processes of all clusters there."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if f"{MARKER}={parent}/".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return found

    wait_until_up = cluster_module._wait_until_up

    def look_and_wait(*arguments: Any) -> None:
        wait_for(marked)  # the search is not blind
        wait_until_up(*arguments)

    monkeypatch.setattr(cluster_module, "_wait_until_up", look_and_wait)
    with (
        pytest.raises(UnavailableError) as caught,
        ray_cluster(num_cpus=1, job_api=False, timeout_s=0.5, parent=parent),
    ):
        pass
    assert caught.value.hint
    assert list(parent.iterdir()) == []
    assert marked() == []


def test_who_is_stopped_while_the_directory_is_made_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def interrupted(directory: Path) -> None:
        directory.mkdir()
        made.append(directory)
        raise SystemExit(1)  # as the supervisor's handler of SIGTERM does

    monkeypatch.setattr(cluster_module, "make_directory", interrupted)
    with pytest.raises(SystemExit), ray_cluster(num_cpus=1, job_api=False):
        pass
    assert not made[0].exists()


@pytest.mark.parametrize("fault", ["refused by Ray", "a port is taken", "memory is full"])
def test_a_cluster_that_cannot_start_says_why(fault: str, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:

        @contextlib.contextmanager
        def ports(count: int) -> Iterator[list[int]]:
            with reserved_ports(count) as found:
                yield [taken.getsockname()[1], *found[1:]]

        def full(path: Path, _content: bytes) -> None:
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")

        if fault == "a port is taken":
            monkeypatch.setattr(cluster_module, "reserved_ports", ports)
        if fault == "memory is full":
            monkeypatch.setattr(cluster_files, "write_private", full)
        told = {
            "refused by Ray": "ended while it started", "a port is taken": "port .* taken", "memory is full": "writable"
        }[fault]  # fmt: skip
        cpus = -1 if fault == "refused by Ray" else 1
        with pytest.raises(UnavailableError, match=told), ray_cluster(num_cpus=cpus, job_api=False, parent=parent):
            pass
    assert list(parent.iterdir()) == []


KILLED_HALF_WAY = """
import os, signal, sys
from pathlib import Path
import psutil
from cloister import cluster
step, told = sys.argv[1].split()
def killed(directory, *_):
    if step == "make_directory":
        directory.mkdir()
    if told == "too":
        (guardian,) = psutil.Process().children()
        guardian.terminate()
    os.kill(os.getpid(), signal.SIGKILL)
setattr(cluster, step, killed)
with cluster.ray_cluster(num_cpus=1, job_api=False, parent=Path(sys.argv[2])):
    pass
"""


def test_who_is_killed_before_the_cluster_starts_leaves_no_directory(parent: Path, subtests: pytest.Subtests) -> None:
    steps = ("make_directory", "write_credentials", "_go_on", "_wait_until_up")
    for step in (f"{step} {told}" for step in steps for told in ("alone", "too")):  # the guardian is told to end
        with subtests.test(step):
            died = subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, step, parent], env=SOURCE_ROOT, check=False)
            assert died.returncode == -signal.SIGKILL
            wait_for(lambda: not list(parent.iterdir()))


def test_a_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not a tmpfs"), ray_cluster(num_cpus=1, job_api=False, parent=tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_planted_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/shm")  # noqa: S108
    with pytest.raises(UnavailableError), ray_cluster(num_cpus=1, job_api=False, parent=link):
        pass


def test_reap_refuses_a_directory_that_is_no_clusters(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(InputError):
        reap(tmp_path)
    assert (tmp_path / "kept").exists()


def test_a_token_in_the_environment_is_refused() -> None:
    with pytest.raises(InputError), ray_cluster(num_cpus=1, job_api=False, environment={"RAY_AUTH_TOKEN": "x"}):
        pass
