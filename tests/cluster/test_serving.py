"""Ray Serve as a supervisor only: real cluster, real replicas, each with its own TLS port; no proxy anywhere."""

from __future__ import annotations

import contextlib
import os
import pickle
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cloister.client.inference import infer
from cloister.cluster import RayCluster, ray_cluster
from cloister.errors import UnavailableError
from ports import free_port
from serving_world import GOOD_COLUMNS, MODEL, TokenMaker, body, signed_release, write_endpoint
from waiting import wait_for

pytestmark = pytest.mark.story
ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT / "platform"), str(ROOT / "tests")])
MAKER = TokenMaker()

DRIVER = """
import sys
from pathlib import Path
import ray
from ray import serve
from cloister.serving import deployment
from ports import free_port
from serving_world import connect_to_fake
ray.init(log_to_driver=False)
serve.start(proxy_location="Disabled")
serve.run(deployment.build(Path(sys.argv[1]), connect=connect_to_fake), name="cloister", route_prefix=None)
"""


class Deployed:
    """A cluster with one endpoint of two replicas. Drivers are processes of their own: no Ray state in pytest."""

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        self.port = free_port()
        self.cluster = cluster
        self.directory = write_endpoint(folder / "endpoint", MAKER, port=self.port, replicas=2)
        (folder / "release").write_bytes(pickle.dumps(signed_release()))
        self.url = f"https://127.0.0.1:{self.port}"
        self.ca = self.directory / "ca.crt"

    def drive(self, code: str) -> str:
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = subprocess.run(
            [sys.executable, "-c", code, str(self.directory)],
            env=environment | self.cluster.environment() | {"PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def ask(self) -> list[tuple[str, float]]:
        return infer(self.url, MODEL, GOOD_COLUMNS, MAKER.token(), self.ca)

    def replicas(self) -> list[int]:
        """The processes that listen on the endpoint's port."""
        members = [psutil.Process(self.cluster.pid), *psutil.Process(self.cluster.pid).children(recursive=True)]
        return sorted({p.pid for p in members for c in _listening(p) if c.laddr.port == self.port})


def _listening(process: psutil.Process) -> list[Any]:
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("PYTHONPATH", PYTHONPATH)  # replicas unpickle `connect_to_fake` by name
        cluster = stack.enter_context(ray_cluster(num_cpus=2, job_api=False))
        print(f"\ncluster up after {time.monotonic() - start:.1f} s")  # noqa: T201  shown with -s
        world = Deployed(tmp_path_factory.mktemp("serving"), cluster)
        world.drive(DRIVER)
        print(f"two replicas after {time.monotonic() - start:.1f} s")  # noqa: T201
        yield world


def test_both_replicas_answer_on_one_port(deployed: Deployed) -> None:
    assert [label for label, _ in deployed.ask()] == ["yes", "no"]
    assert len(deployed.replicas()) == 2


def test_the_driver_is_gone_and_the_endpoint_is_not(deployed: Deployed) -> None:
    """`serve.run` from a process that ended: the application belongs to the cluster, not to the driver."""
    time.sleep(1)
    assert deployed.ask()


def test_no_proxy_and_nothing_in_the_clear(deployed: Deployed) -> None:
    """Whatever listens, the endpoint's port speaks TLS only, and Serve's own HTTP port 8000 does not exist."""
    members = psutil.Process(deployed.cluster.pid).children(recursive=True)
    assert not [p for p in members if "ProxyActor" in " ".join(p.cmdline())]
    assert not [c for p in members for c in _listening(p) if c.laddr.port in (8000, 9000, 8404, 9101)]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{deployed.port}/v2", timeout=5, trust_env=False)


def test_ray_never_sees_a_secret(deployed: Deployed) -> None:
    """Constructor arguments reach Ray's files: they are a path and a name."""
    secret = deployed.directory.joinpath("endpoint.key").read_text().splitlines()[1].encode()
    seen = [path for path in deployed.cluster.directory.rglob("*") if path.is_file() and not path.is_symlink()]
    assert seen
    assert not [path for path in seen if path.stat().st_size < 50_000_000 and secret in path.read_bytes()]


def test_a_killed_replica_is_replaced_while_the_other_answers(deployed: Deployed) -> None:
    before = deployed.replicas()
    os.kill(before[0], 9)
    wait_for(lambda: before[0] not in deployed.replicas())
    for _ in range(20):
        assert deployed.ask()
    took_s = wait_for(lambda: len(deployed.replicas()) == 2)
    print(f"\nreplaced after {took_s:.1f} s")  # noqa: T201
    assert before[0] not in deployed.replicas()


def test_throughput_is_not_that_of_a_proxy(deployed: Deployed) -> None:
    """Not a benchmark: one kept-alive connection must be far from the 3 ms that a request through Serve costs."""
    context = ssl.create_default_context(cafile=deployed.ca)
    headers = {"authorization": f"Bearer {MAKER.token()}"}
    with httpx.Client(base_url=deployed.url, verify=context, headers=headers, trust_env=False) as client:
        start, count = time.monotonic(), 500
        for _ in range(count):
            assert client.post(f"/v2/models/{MODEL}/infer", json=body()).status_code == 200
    print(f"\n{count / (time.monotonic() - start):.0f} requests/s over one connection")  # noqa: T201


def test_a_redeployment_loses_no_request_of_new_connections_for_long(deployed: Deployed) -> None:
    before = deployed.replicas()
    refused = answered = 0
    redeploy = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(deployed.directory)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": PYTHONPATH} | deployed.cluster.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while redeploy.poll() is None:
        try:
            deployed.ask()
            answered += 1
        except UnavailableError:
            refused += 1
        time.sleep(0.02)
    print(f"\nredeployment: {answered} answered, {refused} refused")  # noqa: T201
    assert redeploy.returncode == 0
    assert not set(before) & set(deployed.replicas())
    # The connection that was in a closing replica's backlog: one at a time is asked, and two replicas close.
    assert refused <= max(len(before), answered / 50)


def test_deleting_the_application_closes_the_port(deployed: Deployed) -> None:
    deployed.drive("import ray\nfrom ray import serve\nray.init(log_to_driver=False)\nserve.delete('cloister')")
    wait_for(lambda: not deployed.replicas())
    with pytest.raises(UnavailableError):
        deployed.ask()


def test_the_config_file_is_one_that_serve_takes(deployed: Deployed) -> None:
    """`serve deploy` reads this file: no proxy, and an application that builds."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    out = deployed.drive(
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'serve')!r})\n"
        "import app\n"
        "from ray.serve.schema import ServeDeploySchema\n"
        f"schema = ServeDeploySchema.model_validate({config!r})\n"
        "assert schema.applications[0].import_path == 'app:build'\n"
        "print(schema.proxy_location.value, type(app.build(app.Arguments(directory=sys.argv[1]))).__name__)\n"
    )
    assert out.split() == ["Disabled", "Application"]
