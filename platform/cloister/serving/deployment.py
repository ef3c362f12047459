"""The Serve application of one endpoint.

Guarantees: what Ray gets to see of an endpoint is the path of its directory and the name of a function. Serve starts,
watches, replaces and stops replicas; it is not on the path of a request. Run it with `proxy_location: Disabled`.

Not guaranteed: isolation between endpoints of one Ray cluster; that the port answers while a single replica is
replaced (take two); or autoscaling: Serve counts requests that pass through Serve, and none do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import ApplicationStatus

from cloister.errors import InputError, UnavailableError
from cloister.serving.connect import connect
from cloister.serving.endpoint import Endpoint, open_endpoint
from cloister.serving.listener import DRAIN_S
from cloister.serving.replica import Backing, Replica

APPLICATION = "cloister"
HEALTH_PERIOD_S = 2.0  # a replica that died is noticed at once, one that hangs after three periods


def build(directory: Path, *, connect: Callable[[Endpoint], Backing] = connect, num_cpus: float = 0.5) -> Application:
    """The application for an endpoint directory. `connect` must be importable where the replicas run.

    Raises:
        CloisterError: the directory is not in order; see `endpoint.open_endpoint`.
    """
    endpoint = open_endpoint(directory.resolve())
    if endpoint.config.port == 0:
        raise InputError("an endpoint needs a port that does not change", "choose one above 1023")
    deployment = serve.deployment(
        name=endpoint.config.endpoint,
        num_replicas=endpoint.config.replicas,
        ray_actor_options={"num_cpus": num_cpus},
        max_ongoing_requests=1,  # no request comes through Serve
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=3 * HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,  # Serve's own drain: nothing to wait for
        graceful_shutdown_timeout_s=DRAIN_S + 5,  # ours, in `Replica.close`
    )
    return deployment(LoopbackReplica).bind(str(endpoint.directory), connect)


class LoopbackReplica(Replica):
    """A replica whose port for Serve's own calls is on loopback too.

    Ray 2.60 binds that port to all interfaces, with no setting for it, after this constructor and in this process. The
    name below is private to Ray: without it no replica starts, and `tests/cluster` looks at what really listens.
    """

    def __init__(self, directory: str, connect: Callable[[Endpoint], Backing]) -> None:
        """As `Replica`."""
        serve_replica: Any = sys.modules["ray.serve._private.replica"]
        add_port = serve_replica.add_port_to_grpc_server
        serve_replica.add_port_to_grpc_server = lambda server, address: add_port(
            server, address.replace("[::]", "127.0.0.1")
        )
        super().__init__(directory, connect)


def run(directory: Path) -> None:
    """Deploy an endpoint into the cluster of this process's environment; return when every replica answers.

    Raises:
        UnavailableError: the replicas do not come up.
    """
    ray.init(log_to_driver=False, configure_logging=False)
    serve.start(proxy_location="Disabled")
    try:
        serve.run(build(directory), name=APPLICATION, route_prefix=None)
    except RuntimeError as error:  # Serve's own word for a deployment that failed; its text quotes tracebacks
        raise UnavailableError("the replicas did not start", "cloister doctor, then deploy again") from error


def require_healthy() -> None:
    """Return if the application is up or being repaired.

    Raises:
        UnavailableError: Serve has given up on it.
    """
    status = serve.status().applications[APPLICATION].status
    if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.NOT_STARTED):
        raise UnavailableError("the replicas do not start any more", "cloister serve deploy, again")


def shut_down() -> None:
    """Stop the application; replicas finish what is in flight."""
    serve.shutdown()  # type: ignore[no-untyped-call]  # Ray has no types here
    ray.shutdown()
