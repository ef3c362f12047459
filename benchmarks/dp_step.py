"""How long does a private training step take, beside plain training and beside Opacus?

One step is the same work on all sides: same model, rows and optimiser (SGD), clipping norm 1, noise multiplier 1.
All sides take turns in one process; a side's figure is the median of its steps, a ratio that of throughputs in the same
round, and its median is reported.

    plain        forward, backward, step
    ours         book-keeping clipping, noise from ChaCha20, step
    opacus MODE  Opacus's clipping and its noise (torch's generator, no CSPRNG), step; the best of its modes counts

Peak memory is that of a process of its own that does nothing but one side's steps, less what it held before them.
On CUDA all sides are compiled and run in bfloat16 under autocast. Opacus and Ray are not needed for our own side.

    python benchmarks/dp_step.py [--quick] [--json] [--device cuda] [--only NAME]
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import CPU, CUDA, Workload
from _report import Row, options, report, row
from torch import nn

from cloister.privacy import products
from cloister.privacy.blocks import Blocks
from cloister.privacy.clipping import BookkeepingGradients, ClippingOptions, row_losses
from cloister.privacy.grid import Grid
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import BLOCK_STEPS
from cloister.privacy.sampling import PoissonSampler
from cloister.training.loop import set_gradients

ROUNDS, ROUNDS_QUICK = 9, 1
OPACUS_MODES = ("ghost", "hooks", "ew")
WARM_S = 3.0
HOPELESS = 6.0  # times as slow as plain: a mode of Opacus that is, is not waited for again
LEARNING_RATE = 0.01
GOALS = {
    "cpu": {
        "opacus": {"": 1.7, "MLP 512-512": 1.5},
        "plain": {"": 0.85, "MLP 512-512": 0.80, "three-layer CNN": 0.75},
    },
    "cuda": {"opacus": {"": 2.0}, "plain": {"ViT-B/16 at 224": 0.80, "": 0.70}},
}
MEMORY_GOAL = 1.3
SHARE_GOAL = 0.10
SAMPLER_ROWS, SAMPLER_RATE = 10**8, 1e-5
_MANY, _UNIT = 10**7, 2.0**-32

Step = Callable[[], None]


def plain(work: Workload, device: str) -> Step:
    model, x, y = _prepared(work, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return row_losses(model(x), y).sum() / work.rows

    run = torch.compile(losses) if device == "cuda" else losses

    def step() -> None:
        for start in range(0, work.rows, work.microbatch if device == "cuda" else work.rows):
            stop = start + work.microbatch if device == "cuda" else work.rows
            run(x[start:stop], y[start:stop]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(work: Workload, device: str) -> Step:
    model, x, y = _prepared(work, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    cuda = device == "cuda"
    grid = Grid.of(1.0, work.rows, 1.0)
    clipped = BookkeepingGradients(
        model, grid,
        ClippingOptions(microbatch_rows=work.microbatch, compiled=True, autocast=torch.bfloat16) if cuda else None,
    )  # fmt: skip
    noise = GaussianNoise(fresh_secret(), run="benchmark", attempt=1, rank=0)
    parameters = list(model.parameters())
    ranges, places = clipped.ranges(x, y), np.random.default_rng(0)
    count = 0

    def step() -> None:
        nonlocal count
        blocks = Blocks(
            places.integers(0, 2**64, work.rows, dtype=np.uint64), ranges
        )  # filled as Poisson's batches are
        sum_P = clipped(x, y, blocks)  # noqa: N806
        noise.add_to(count, sum_P, 1.0, grid.unit)
        set_gradients(parameters, sum_P, work.rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += 1

    return step


def opacus(work: Workload, device: str, mode: str) -> Step:
    """Opacus as its own examples use it.

    Raises:
        Exception: whatever it raises for a model that this mode cannot take.
    """
    from opacus import PrivacyEngine

    model, x, y = _prepared(work, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.cpu(), y.cpu()), batch_size=work.rows)
    criterion = nn.CrossEntropyLoss()
    made: Any = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0,
        poisson_sampling=False, grad_sample_mode=mode, **({"criterion": criterion} if mode == "ghost" else {}),
    )  # fmt: skip
    model, optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else criterion
    size = min(work.rows, work.microbatch * 4) if device == "cuda" else work.rows

    def step() -> None:
        for start in range(0, work.rows, size):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(x[start : start + size])
            target = y[start : start + size]
            if logits.dim() == 3:
                logits, target = logits.flatten(0, 1), target.flatten()
            criterion(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _prepared(work: Workload, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, y = work.draw(work.rows)
    return work.build().to(device), x.to(device), y.to(device)


def sides(work: Workload, device: str) -> dict[str, Step]:
    found = {"plain": plain(work, device), "ours": ours(work, device)}
    if importlib.util.find_spec("opacus") is None:
        return found
    found["plain"]()
    limit = HOPELESS * _seconds(found["plain"], device)
    for mode in OPACUS_MODES:
        try:
            step = opacus(work, device, mode)
            step()
            taken = _seconds(step, device)
        except Exception as error:  # noqa: BLE001  (a mode that cannot take this model is not compared)
            print(f"Opacus {mode} does not run {work.name}: {type(error).__name__}", file=sys.stderr)
            continue
        if taken <= limit:
            found[f"opacus {mode}"] = step
        else:
            print(f"Opacus {mode} takes {taken / limit * HOPELESS:.0f} times as long as plain", file=sys.stderr)
        gc.collect()
    return found


def _seconds(step: Step, device: str) -> float:
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(work: Workload, device: str, rounds: int) -> list[Row]:
    """One workload's rows."""
    steps = sides(work, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # compiles, and lets libraries prepare for the sizes of blocks: training is long
        until = time.perf_counter() + WARM_S
        while time.perf_counter() < until:
            _seconds(step, device)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
    best = min((name for name in times if name.startswith("opacus")), key=lambda n: min(times[n]), default=None)
    results = [row(f"{work.name}: {name}", statistics.median(times[name]) * 1000, "ms a step") for name in times]
    for against, peer in (("plain", "plain"), ("opacus", best)):
        if peer:
            goal = GOALS[device][against].get(work.name, GOALS[device][against][""])
            ratio = statistics.median(a / b for a, b in zip(times[peer], times["ours"], strict=True))
            results.append(row(f"{work.name}: ours vs {peer}", ratio, "ratio", f">= {goal:.2f}", ratio >= goal))
    return results


def memory(work: Workload, device: str) -> list[Row]:
    """Peak memory of plain and of ours, each in processes of its own; the allocator makes it vary."""
    peaks = {}
    for side in ("plain", "ours"):
        command = [sys.executable, __file__, "--peak", side, "--only", work.name, "--device", device]
        answers = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(5)]
        peaks[side] = statistics.median(map(json.loads, answers))
    ratio = peaks["ours"] / peaks["plain"]
    return [
        row(f"{work.name}: peak memory of plain", peaks["plain"] / 1e6, "MB"),
        row(f"{work.name}: peak memory, ours vs plain", ratio, "ratio", f"<= {MEMORY_GOAL}", ratio <= MEMORY_GOAL),
    ]


def peak(work: Workload, device: str, side: str) -> int:
    """Bytes that steps of one side add, at their highest, to what its process held with model and rows."""
    step = {"plain": plain, "ours": ours}[side](work, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        step()
        step()
        return torch.cuda.max_memory_allocated() - before
    warm = torch.rand(512, 512)  # neither side is charged for the code of the libraries that it loads
    products.product(warm, warm)
    torch.mm(warm, warm)
    ctypes.CDLL(None).malloc_trim(0)  # what was needed to try the device, before the first step, is not counted either
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def overhead(work: Workload, rounds: int) -> list[Row]:
    """What privacy adds to a plain step: all of it together with the ledger's part, and its parts by themselves."""
    from cloister.privacy import clipping

    steps = {"plain": plain(work, "cpu"), "ours": ours(work, "cpu")}
    noise = GaussianNoise(fresh_secret(), run="benchmark", attempt=1, rank=0)
    size = sum(p.numel() for p in work.build().parameters())
    spent = 0.0
    squared_norms = clipping._Parameters.squared_norms

    def timed(self: Any, gradients: Any, **options: bool) -> Any:
        nonlocal spent
        started = time.perf_counter()
        try:
            return squared_norms(self, gradients, **options)
        finally:
            spent += time.perf_counter() - started

    shares: dict[str, list[float]] = {"noise": [], "norms of rows": [], "ledger": [], "all that privacy adds": []}
    clipping._Parameters.squared_norms = timed  # type: ignore[method-assign]  # a stop-watch
    try:
        for step in steps.values():
            step()
        for turn, ledger_s in enumerate(_blocks_on_record(rounds)):
            spent = 0.0
            bare, private = (_seconds(step, "cpu") for step in steps.values())
            started = time.perf_counter()
            noise.add_to(turn, torch.zeros(size, dtype=torch.float64), 1.0, _UNIT)
            noise_s, ledger_s = time.perf_counter() - started, ledger_s / BLOCK_STEPS
            whole = private + ledger_s
            for name, part in zip(shares, [noise_s, spent, ledger_s, whole - bare], strict=True):
                shares[name].append(part / whole)
    finally:
        clipping._Parameters.squared_norms = squared_norms  # type: ignore[method-assign]
    results = [row(f"{work.name}: {name}", 100 * statistics.median(shares[name]), "% of a step") for name in shares]
    share = statistics.median(shares["all that privacy adds"])
    told = row(f"{work.name}: all that privacy adds", 100 * share, "% of a step", "<= 10", share <= SHARE_GOAL)
    return [*results[:-1], told]


def _blocks_on_record(count: int) -> list[float]:
    """How long a real authority takes to put one block of steps on record: seconds each."""
    from _world import sealed_world  # only here: our own side runs without what an authority needs

    from authority_world import STEPS

    times: list[float] = []
    with sealed_world(shards=2) as world:
        while len(times) < count:
            run = world.submit()
            world.lease(run)
            for first in range(min(STEPS, count - len(times))):
                started = time.perf_counter()
                world.commit(run, first, first + 1)
                times.append(time.perf_counter() - started)
    return times


def sampler(rounds: int) -> list[Row]:
    drawn = PoissonSampler(SAMPLER_ROWS, SAMPLER_RATE, os.urandom(32))
    times = []
    for _ in range(20 * rounds):
        started = time.perf_counter()
        drawn.next_batch()
        times.append(time.perf_counter() - started)
    value = statistics.median(times) * 1000
    return [row("sampler, N 1e8, q 1e-5", value, "ms a step", "<= 1", value <= 1)]


def noise(rounds: int) -> list[Row]:
    """Of a large model, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    drawn, values = GaussianNoise(fresh_secret(), run="benchmark", attempt=1, rank=0), torch.zeros(_MANY).double()
    times = []
    for turn in range(rounds + 1):
        started = time.perf_counter()
        drawn.add_to(turn, values, 1.0, _UNIT)
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    value = statistics.median(times[1:] or times)
    return [row("noise, 10M values, one core", value, "s", "<= 0.6", value <= 0.6)]


def main() -> None:
    parser = options(__doc__, "one round, neither memory nor parts: within a minute", ("cpu", "cuda"))
    parser.add_argument("--only", metavar="NAME", help="the workload whose name starts so")
    parser.add_argument("--peak", choices=("plain", "ours"), help="print the bytes of one side and end")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("highest")
    workloads = CUDA if arguments.device == "cuda" else CPU
    chosen = [work for work in workloads if work.name.startswith(arguments.only or "")]
    if arguments.peak:
        print(peak(chosen[0], arguments.device, arguments.peak))
        return
    rounds = ROUNDS_QUICK if arguments.quick else ROUNDS

    def results() -> list[Row]:
        found: list[Row] = []
        for work in chosen:
            found += measure(work, arguments.device, rounds)
            if not arguments.quick:
                found += memory(work, arguments.device)
            gc.collect()
        if arguments.device == "cpu" and not arguments.only:
            found += sampler(rounds) + noise(rounds) + ([] if arguments.quick else overhead(chosen[-1], rounds))
        return found

    report("dp_step", arguments, results)


if __name__ == "__main__":
    main()
