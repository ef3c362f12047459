"""The process that holds one endpoint's Ray cluster: `python -m cloister.serving.supervisor DIRECTORY`.

Guarantees: nothing is started for a release that does not verify; when this process ends, for whatever reason, the
cluster and its replicas end with it.

    1. verify    lease and verify the release here first: a bad one is refused in a second, by name
    2. cluster   hardened, without API server or dashboard
    3. deploy    each replica leases and verifies again for itself; ready when the port answers for all of them
    4. hold      until SIGTERM, or until the application fails for good
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from cloister.cluster import ray_cluster
from cloister.errors import CloisterError, UnavailableError
from cloister.process import Daemon, describe, no_core_dumps
from cloister.serving.connect import connect
from cloister.serving.endpoint import Endpoint, open_endpoint
from cloister.serving.replica import leased_model

CHECK_S = 2.0
_CPUS_OF_SERVE = 1


def supervise(directory: Path) -> int:
    """Run one endpoint until told to stop. Reports `ready` or `failed` to `DIRECTORY/serving/status.json`."""
    no_core_dumps()
    daemon = Daemon(directory / "serving")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        endpoint = open_endpoint(directory)
        leased_model(endpoint, connect(endpoint))  # 1
        with ray_cluster(num_cpus=endpoint.config.replicas + _CPUS_OF_SERVE, job_api=False) as cluster:  # 2
            os.environ.update(cluster.environment())
            _deploy(endpoint)  # 3
            signal.signal(signal.SIGTERM, lambda *_: stop.set())  # again: Ray has put a handler of its own there
            daemon.report("ready", port=endpoint.config.port, cluster=str(cluster.directory))
            _hold(stop)  # 4
    except CloisterError as error:
        daemon.report("failed", error=describe(error))
        return 1
    except Exception as error:  # noqa: BLE001  (the edge: a foreign exception's text is not written down)
        failure = UnavailableError(
            f"the endpoint failed with {type(error).__name__}", f"read {daemon.directory / 'log'}"
        )
        daemon.report("failed", error=describe(failure))
        return 1
    daemon.report("stopped")
    return 0


def _deploy(endpoint: Endpoint) -> None:
    # Imported only now: Ray reads its TLS and token settings from the environment once, when it is imported.
    from cloister.serving import deployment

    deployment.run(endpoint.directory)


def _hold(stop: threading.Event) -> None:
    from cloister.serving import deployment

    while not stop.wait(CHECK_S):
        deployment.require_healthy()
    deployment.shut_down()


def main() -> int:
    return supervise(Path(sys.argv[1]).resolve())


if __name__ == "__main__":
    sys.exit(main())
