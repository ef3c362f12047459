"""How fast does the authority decide and lease, and does it decide as it should?

Decisions are made one by one with the shipped policies, over a mix of what people, runs and endpoints ask. The
oracle is the shipped rules a second time in plain Python (tests/policy_oracle.py), compared on random requests.

    python benchmarks/authority.py [--quick] [--json]
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _report import Row, options, report, row
from _world import sealed_world

from cloister.authority.listener import Listener
from cloister.authority.nodes import Peer
from cloister.authority.service import Authority
from cloister.authority.settings import AuthoritySettings
from cloister.client.authority import AuthorityClient
from cloister.client.node import NodeFolder
from cloister.policy import Policy, Request
from cloister.sealing.lease import OneTimeKey

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from authority_world import CODE, World
from policy_oracle import differences
from ports import free_port

GOAL_DECISION_US = 150
GOAL_LEASES = 200
WORKERS = 32  # of one run: so many leases in a round
REQUESTS, REQUESTS_QUICK = 1_000_000, 20_000
SEED = 20261122

DATASET = {"owner": "olga", "region": "eu", "purpose": "research", "class": "internal", "epsilon_left_millionths": 1}
RUN = {"author": "me", "owner": "olga", "region": "eu", "purpose": "research", "class": "internal"}
NODE = {"time": 1_793_000_000, "node": "node-1", "node_region": "eu", "node_assurance": 0}
# kind, roles, action, resource, attributes, context
MIX: tuple[tuple[str, str, str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("person", "engineer", "train:submit", "Dataset/adult@1", DATASET, {"time": 1_793_000_000}),
    ("person", "consumer", "model:infer", "Model/adult@1", {"author": "ed", "stage": "production"}, {}),
    ("person", "reviewer", "approval:vote", "Approval/a1", {"kind": "promotion", "author": "ed", "owner": "olga"}, {}),
    ("person", "auditor security-officer", "audit:read", "Platform/platform", {}, {"time": 1_793_000_000}),
    ("person", "engineer", "run:stop", "Run/run-1", RUN, {"time": 1_793_000_000}),
    ("run", "run", "run:lease", "Run/me", RUN, NODE),
    ("endpoint", "endpoint", "endpoint:work", "Endpoint/me", {"model": "adult@1"}, NODE),
    ("node", "", "node:certify", "Platform/platform", {}, NODE),
)


def measure_decision(quick: bool) -> list[Row]:
    """Microseconds for one decision: the median over all, and the slowest kind of request."""
    policy = Policy.shipped()
    medians, everything = [], []
    for kind, roles, action, named, attributes, context in MIX:
        resource_type, _, resource = named.partition("/")
        request = Request(
            principal="me", kind=kind, roles=frozenset(roles.split()), action=action,  # type: ignore[arg-type]
            resource_type=resource_type, resource=resource, attributes=attributes, context=context,
        )  # fmt: skip
        if not policy.decide(request).allowed:
            raise SystemExit(f"{action} is not measured as an allowed request")
        taken = []
        for _ in range(2_000 if quick else 20_000):
            start = time.perf_counter()
            policy.decide(request)
            taken.append(1e6 * (time.perf_counter() - start))
        medians.append(statistics.median(taken))
        everything += taken
    middle = statistics.median(everything)
    return [
        row("decision", middle, "µs, median", f"<= {GOAL_DECISION_US}", middle <= GOAL_DECISION_US),
        row("decision, slowest kind of request", max(medians), "µs, median"),
    ]


def measure_oracle(quick: bool) -> list[Row]:
    """Random requests on which Cedar and the oracle disagree."""
    count = REQUESTS_QUICK if quick else REQUESTS
    found = sum(1 for _ in differences(Policy.shipped(), count, SEED))
    return [row("oracle differences", found, f"of {count:,} requests", "== 0", found == 0)]


def measure_leases(quick: bool) -> list[Row]:
    """Training leases a second, each authenticated, decided, recorded, anchored and sealed, asked for by two threads.

    Once by calling the service, and once over HTTPS with mutual TLS, where the clients take their part of the cores.
    """
    rounds = 2 if quick else 8
    with sealed_world(shards=WORKERS) as world:
        called = [round_of_leases(world, by_call(world)) for _ in range(rounds)]
        with served(world, world.directory.parent) as by_https:
            asked = [round_of_leases(world, by_https) for _ in range(rounds)]
    direct = statistics.median(called)
    return [
        row("leases", direct, "1/s, median, SQLite", f">= {GOAL_LEASES}", direct >= GOAL_LEASES),
        row("leases over HTTPS, clients on the same cores", statistics.median(asked), "1/s, median, SQLite"),
    ]


Lease = Callable[[str, int], object]


def round_of_leases(world: World, lease_of: Callable[[str], Lease]) -> float:
    """Leases a second for all the workers of a new run."""
    run = world.submit(resources={"workers": WORKERS, "region": "eu"})
    world.attempt(run, WORKERS)
    lease = lease_of(run)
    lease(run, 0)  # the token, and the connection
    with ThreadPoolExecutor(2) as threads:
        start = time.perf_counter()
        list(threads.map(lambda rank: lease(run, rank), range(1, WORKERS)))
        return (WORKERS - 1) / (time.perf_counter() - start)


def by_call(world: World) -> Callable[[str], Lease]:
    peer = Peer.from_der(world.peer or b"")

    def lease_of(run: str) -> Lease:
        header = f"Bearer {world.token(run)}"

        def lease(run: str, rank: int) -> object:
            caller = world.authority.sessions.authenticate(header, "127.0.0.1", peer)
            return world.authority.attempts.lease(caller, run, 1, rank, OneTimeKey.generate().public, CODE)

        return lease

    return lease_of


@contextlib.contextmanager
def served(world: World, folder: Path) -> Iterator[Callable[[str], Lease]]:
    """The same authority on a real port; workers speak from a node of their own."""
    settings = AuthoritySettings(port=free_port())
    authority = Authority(world.directory, url=settings.url)  # a second one over the same state, with this address
    node = NodeFolder(folder / "node")
    body = {"name": "bench", "public_key": node.make("bench"), "region": "eu"}
    world.post("operator", "/v1/nodes", body)
    ready = threading.Event()
    listener = Listener(authority, settings, ready.set)
    thread = threading.Thread(target=listener.run)
    thread.start()
    ready.wait(20)

    def lease_of(run: str) -> Lease:
        client = AuthorityClient(
            settings.url, ca_path=world.directory / "ca.pem", name=run, private_key_pem=world.people[run].private,
            node=node,
        )  # fmt: skip
        return lambda run, rank: client.lease_shards(run, 1, rank, CODE)

    try:
        yield lease_of
    finally:
        listener.should_exit = True
        thread.join(20)


# Every part of the benchmark: called in turn with `quick`, gives its rows.
PARTS: tuple[Callable[[bool], list[Row]], ...] = (measure_decision, measure_leases, measure_oracle)


def main() -> None:
    arguments = options(__doc__, "20,000 requests, within 60 s").parse_args()
    report("authority", arguments, lambda: [result for part in PARTS for result in part(arguments.quick)])


if __name__ == "__main__":
    main()
