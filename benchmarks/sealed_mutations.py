"""Does any of 100,000 changed copies of what Cloister seals open, crash its reader, or show a value in an error?

Random mutations (bits, lengths, cuts, insertions, splices, pages moved within and between files) of shards, subject
indexes, wrapped keys, streams, leases and signed manifests; opened in child processes with 512 MiB to spare.

    python benchmarks/sealed_mutations.py [--quick] [--json] [--seed N]
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _report import Row, options, report, row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mutations import Report, attack

# How many of every hundred mutations go to which targets.
SHARES = {("shard", "groups", "index"): 75, ("wrapped key", "named key", "stream", "lease"): 20, ("manifest",): 5}
MUTATIONS, QUICK_MUTATIONS = 100_000, 20_000
CHILDREN = 2  # at a time; each child takes one part
PARTS = 4


def measure(mutations: int, seed: int) -> list[Row]:
    """Runs all parts and adds up what they found."""
    work = [
        (list(names), mutations * share // 100 // PARTS, seed * PARTS + part)
        for names, share in SHARES.items()
        for part in range(PARTS)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(CHILDREN) as pool:
        reports: list[Report] = list(pool.map(lambda job: attack("mutations", job[0], job[1], job[2]), work))
    seconds = time.perf_counter() - started
    faults = [fault for found in reports for fault in found.faults]
    for fault in faults:
        print(fault, file=sys.stderr)
    tried = sum(found.tried for found in reports)
    return [
        row(f"tried, seed {seed}", tried, "mutations", f">= {mutations * 0.99:,.0f}", tried >= mutations * 0.99),
        row("accepted, crashed, or told a value", len(faults), "mutations", "0", not faults),
        row("opened to the very same", sum(found.equal for found in reports), "manifests"),
        row("speed", tried / seconds, "mutations/s"),
    ]


def main() -> None:
    parser = options(__doc__, quick=f"{QUICK_MUTATIONS:,} mutations instead of {MUTATIONS:,}")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run; by default a new one each time")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    mutations = QUICK_MUTATIONS if arguments.quick else MUTATIONS
    report("sealed_mutations", arguments, lambda: measure(mutations, seed))


if __name__ == "__main__":
    main()
