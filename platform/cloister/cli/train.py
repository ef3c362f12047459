"""`cloister train`."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, authority_address, common
from cloister.errors import NotFoundError, UnavailableError, from_dict
from cloister.process import Daemon
from cloister.stores.home import Home
from cloister.training.run import ENDED, RunFolder

POLL_S = 0.4
LINE_S = 2.0
CLUSTER_TIMEOUT_S = 90.0


@click.group()
def train() -> None:
    """Plan, submit and watch training runs."""


def _read_spec(path: Path) -> dict[str, Any]:
    from cloister.client.seal import read_file
    from cloister.privacy.spec import TrainingSpec

    return TrainingSpec.from_yaml_text(read_file(path, "training spec").decode(errors="replace")).to_dict()


@train.command()
@click.argument("spec", type=click.Path(path_type=Path))
@common
def plan(context: Context, spec: Path) -> None:
    """Show what SPEC would cost. Touches no data."""
    shown = context.client().post("/v1/plans", {"spec": _read_spec(spec)})
    if context.json:
        output.value(shown)
        return
    p = shown["plan"]
    needed = shown["approvals"]
    approvals = f"{needed}, not yours, to train (a reviewer's or {shown['owner']}'s)" if needed else "none to train"
    output.facts({
        "dataset": f"{shown['spec']['dataset']}, {p['rows']:,} training rows, {shown['holdout_rows']:,} holdout rows",
        "columns": shown["columns"],
        "epsilon": f"{p['epsilon']:g} (certified {p['epsilon_certified']:.4f}) at delta {p['delta']:g}",
        "protects": _unit(shown["unit"]),
        "noise multiplier": p["noise_multiplier"],
        "steps": f"{p['steps']} at sample rate {p['sample_rate']:.5f}, clipping norm {p['max_grad_norm']:g}",
        "budget": f"epsilon {shown['budget_before']:.3f} before, {shown['budget_after']:.3f} after",
        "verdict": "the budget pays for it" if shown["affordable"] else "the budget does not pay for it",
        "approvals": approvals,
    })  # fmt: skip
    output.say("No data was touched." + (f" Next: cloister train submit {spec}" if shown["affordable"] else ""))


@train.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--jobs", type=click.Path(path_type=Path), help="The folder that has train.py.  [default: ./jobs]")
@click.option("--hold", is_flag=True, help="Start the cluster only; you submit the job with `ray job submit`.")
@click.option("--watch", "follow", is_flag=True, help="Stay and watch.")
@common
def submit(context: Context, spec: Path, jobs: Path | None, hold: bool, follow: bool) -> None:
    """Start a Ray cluster for one run and submit the training job to it."""
    from cloister.signing import keys
    from cloister.training.code import code_digest

    folder_of_jobs = find_jobs(jobs)
    client = context.client()
    run_key = keys.generate_ed25519()
    body = {
        "spec": _read_spec(spec),
        "code_digest": code_digest(folder_of_jobs),
        "public_key": keys.public_to_pem(run_key.public_key()).decode(),
    }
    shown = client.post("/v1/runs", body)
    try:
        daemon = _start(context, shown, folder_of_jobs, keys.private_to_pem(run_key), hold=hold)
    except BaseException:
        client.post(f"/v1/runs/{shown['run']}/stop")  # or its epsilon would be held for ever
        raise
    if hold:
        with output.progress("starting the cluster"):
            status = daemon.wait_ready(CLUSTER_TIMEOUT_S, what="the cluster of the run")
        _say_how_to_submit(context, shown["run"], folder_of_jobs, status)
        return
    if context.json and not follow:
        output.value(shown)
        return
    if not context.json:
        output.say(f"Run {shown['run']} is accepted; epsilon {shown['plan']['epsilon']:g} is held for it.")
    if follow:
        follow_run(context, shown["run"])
    else:
        output.say(f"Next: cloister train watch {shown['run']}")


def _start(context: Context, shown: dict[str, Any], jobs: Path, run_key: bytes, *, hold: bool) -> Daemon:
    """Write the run's folder and start its supervisor."""
    url, ca = authority_address(context.home)
    resources = shown["spec"]["resources"]
    folder = RunFolder(
        directory=context.home.runs / shown["run"],
        run=shown["run"],
        workers=resources["workers"],
        gpus_per_worker=resources.get("gpus_per_worker", 0),
        authority_url=url,
        authority_ca=str(ca),
        jobs=str(jobs),
        node=str(context.home.node),
    )
    folder.write(run_key)
    daemon = Daemon(folder.directory / "driver")
    daemon.start("cloister.training.driver", [str(folder.directory), *(["--hold"] if hold else [])])
    return daemon


def _unit(unit: dict[str, Any]) -> str:
    """Whose presence in the data epsilon hides."""
    if unit["column"] is None:
        return "one row"
    rows = "one row" if unit["max_rows"] == 1 else f"at most {unit['max_rows']:,} rows"
    return f"one {unit['column']} with {rows}"


def find_jobs(named: Path | None) -> Path:
    """The jobs folder: as named, or `./jobs`, or the one of the source tree.

    Raises:
        NotFoundError: none of them has a train.py.
    """
    candidates = [named] if named else [Path("jobs"), Path(__file__).parents[3] / "jobs"]
    for candidate in candidates:
        if (candidate / "train.py").is_file():
            return candidate.resolve()
    raise NotFoundError("there is no jobs folder with a train.py here", "name it: --jobs FOLDER")


def _say_how_to_submit(context: Context, run: str, jobs: Path, status: dict[str, Any]) -> None:
    if context.json:
        output.value({"run": run, "jobs": str(jobs)} | status)
        return
    output.say(f"The cluster of {run} is up and waits for its job. It ends with the run. Submit it with:")
    output.say()
    for name, value in sorted(status["environment"].items()):
        output.say(f"export {name}={value}")
    output.say(f"ray job submit --working-dir {jobs} -- python train.py --run {run}")


@train.command()
@click.argument("run", type=NAME)
@common
def watch(context: Context, run: str) -> None:
    """Show steps, epsilon spent and throughput until the run ends."""
    follow_run(context, run)


def follow_run(context: Context, run: str) -> dict[str, Any]:
    """Watch until the end.

    Raises:
        CloisterError: what the run failed with.
    """
    try:
        shown = _follow(context, run)
    except KeyboardInterrupt:
        output.say(f"{run} goes on. Watch it: cloister train watch {run}   Stop it: cloister train stop {run}")
        raise
    _wait_until_gone(context, run)
    if context.json:
        output.value(shown)
    if shown["state"] == "failed":
        raise from_dict(shown["error"] or {})
    if not context.json:
        output.say(f"{run} {shown['state']} after {shown['steps_committed']} of {shown['steps']} steps; "
                   f"epsilon {shown['epsilon_charged']:.4f} is charged. Its cluster is gone.")  # fmt: skip
        if shown["state"] == "finished":
            output.say("Next: cloister model list")
    return shown


def _follow(context: Context, run: str) -> dict[str, Any]:
    client = context.client()
    shown: dict[str, Any] = client.get(f"/v1/runs/{run}")
    said = 0.0
    with output.progress(run) as advance:
        while shown["state"] not in ENDED:
            settle_orphan(context.home, run)
            speed = f"{shown['rows_per_s']:,.0f} rows/s" if shown["rows_per_s"] else shown["state"]
            note = f"step {shown['steps_done']}/{shown['steps']}  epsilon {shown['epsilon_spent']:.2f}  {speed}"
            if shown["state"] == "submitted":
                note = "the cluster starts"
            advance(shown["steps_done"], shown["steps"], note)
            if not (context.json or sys.stderr.isatty()) and time.monotonic() - said >= LINE_S:
                said = time.monotonic()  # no bar on a pipe: now and then a line
                output.say(note)
            time.sleep(POLL_S)
            shown = client.get(f"/v1/runs/{run}")
    return shown


def settle_orphan(home: Home, run: str) -> bool:
    """End a run of this machine whose supervisor died without a word, so that its ledger settles. True if it did."""
    from cloister.process import describe

    directory = home.runs / run
    if not (directory / "run.json").exists() or Daemon(directory / "driver").process() is not None:
        return False
    with contextlib.closing(RunFolder.open(directory).client()) as client:
        if client.get(f"/v1/runs/{run}")["state"] in ENDED:
            return False
        lost = UnavailableError("the run's supervisor was killed", "submit it again: cloister train submit SPEC")
        client.post(f"/v1/runs/{run}/failure", {"error": describe(lost)})
    return True


def _wait_until_gone(context: Context, run: str) -> None:
    daemon = Daemon(context.home.runs / run / "driver")
    deadline = time.monotonic() + 30
    while daemon.process() is not None:
        if time.monotonic() > deadline:
            raise UnavailableError(f"the cluster of {run} does not end", f"stop it: cloister train stop {run}")
        time.sleep(0.1)


@train.command()
@click.argument("run", type=NAME)
@common
def status(context: Context, run: str) -> None:
    """Show one run."""
    shown = context.client().get(f"/v1/runs/{run}")
    if context.json:
        output.value(shown)
        return
    output.facts({name: shown[name] for name in ("run", "author", "dataset", "state", "steps_done", "steps",
                                                 "epsilon_spent", "epsilon_charged", "rows_per_s")})  # fmt: skip
    if shown["error"]:
        raise from_dict(shown["error"])


@train.command()
@click.argument("run", type=NAME)
@common
def stop(context: Context, run: str) -> None:
    """Stop a run. What it has committed stays charged; the rest of its epsilon is free again."""
    shown = context.client().post(f"/v1/runs/{run}/stop")
    Daemon(context.home.runs / run / "driver").stop()
    if context.json:
        output.value(shown)
    else:
        output.say(f"{run} is {shown['state']}; epsilon {shown['epsilon_charged']:.4f} is charged.")


@train.command(name="list")
@common
def list_(context: Context) -> None:
    """List runs, newest first."""
    rows = context.client().get("/v1/runs")
    if context.json:
        output.value(rows)
        return
    cells = [
        (r["run"], r["author"], r["dataset"], r["state"], f"{r['steps_committed']}/{r['steps']}", r["epsilon_charged"])
        for r in rows
    ]
    output.table(("run", "author", "dataset", "state", "steps", "epsilon"), cells, empty="No run yet.")
