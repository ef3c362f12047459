"""`cloister train`."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, authority_address, common
from cloister.errors import CloisterError, ConflictError, NotFoundError, UnavailableError, from_dict
from cloister.process import Daemon
from cloister.signing.run_end import ENDED
from cloister.stores.home import Home
from cloister.training.run import RunFolder

POLL_S = 0.4
LINE_S = 2.0
TOO_NOISY = 0.05  # what the evaluation's noise may move the accuracy by, before a plan says so
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
        "dataset": f"{shown['spec']['dataset']}, about {p['rows']:,} training rows, about {shown['holdout_rows']:,} "
                   "holdout rows",
        "columns": shown["columns"],
        "epsilon": f"{p['epsilon']:g} (certified {p['epsilon_certified']:.4f}) at delta {p['delta']:g}",
        "if workers die": f"at most epsilon {p['epsilon_at_most']:.4f}, for up to {p['redo_steps']:,} steps again",
        "protects": f"{output.unit(shown['unit'], p['rows_per_unit'])}: whether it is in the data at all",
        **output.replaced(p),
        "evaluation": f"epsilon {p['evaluation_epsilon']:g} for rows that are held out, not trained on; noise moves "
                      f"the accuracy by up to about {_noise(shown)}",
        "noise multiplier": p["noise_multiplier"],
        "steps": f"{p['steps']} at sample rate {p['sample_rate']:.5f}, clipping norm {p['max_grad_norm']:g}",
        "budget": _budget(shown),
        "verdict": _verdict(shown),
        "approvals": approvals,
    })  # fmt: skip
    free = min(p["epsilon_certified"], (p["epsilon_replacing"] or math.inf) / 2)  # the larger of both is charged
    if shown["evaluation_noise"] > TOO_NOISY and p["evaluation_epsilon"] < 0.9 * free:
        output.say(
            "The evaluation will tell little. Up to privacy.evaluation_epsilon: "
            f"{math.floor(10 * free) / 10:g} the run costs no more; whoever is held out pays it."
        )
    output.say("No data was touched." + (f" Next: cloister train submit {spec}" if shown["affordable"] else ""))


def _noise(shown: dict[str, Any]) -> str:
    """How far noise moves the accuracy. How many rows a cap leaves out nobody has published: at most this share."""
    noise, unit, used = shown["evaluation_noise"], shown["unit"], shown["plan"]["rows_per_unit"]
    if used >= unit["max_rows"]:
        return f"{100 * noise:.1f} points"
    most = min(1.0, noise * unit["max_rows"] / used)
    return f"{100 * noise:.1f} points, or {100 * most:.1f} if each {unit['column']} has {unit['max_rows']:,} rows"


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
    public_pem = keys.public_to_pem(run_key.public_key())
    asked = _read_spec(spec)
    body = {"spec": asked, "code_digest": code_digest(folder_of_jobs), "public_key": public_pem.decode()}
    folder = _folder(context, keys.run_name(public_pem), asked, folder_of_jobs)
    # Before there is a run: only with its key can it say that it has ended, and give back what is held for it.
    folder.write(keys.private_to_pem(run_key))
    with folder.turn():
        try:
            shown = client.post("/v1/runs", body)
        except (CloisterError, KeyboardInterrupt) as error:
            _not_submitted(folder, error)
            raise
        daemon = _start(folder, hold=hold, hint="submit it again")
    if hold:
        try:
            with output.progress("starting the cluster"):
                status = daemon.wait_ready(CLUSTER_TIMEOUT_S, what="the cluster of the run")
        except CloisterError:
            with contextlib.suppress(CloisterError):  # where the supervisor could not say that it has ended
                settle_orphan(context.home, shown["run"])
            raise
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


def _folder(context: Context, run: str, spec: dict[str, Any], jobs: Path) -> RunFolder:
    url, ca = authority_address(context.home)
    resources = spec["resources"]
    return RunFolder(
        directory=context.home.runs / run,
        run=run,
        workers=resources["workers"],
        min_workers=resources.get("min_workers", resources["workers"]),
        retries=spec["training"]["retries"],
        gpus_per_worker=resources.get("gpus_per_worker", 0),
        authority_url=url,
        authority_ca=str(ca),
        jobs=str(jobs),
        node=str(context.home.node),
    )


def _not_submitted(folder: RunFolder, error: BaseException) -> None:
    """Forget a run that was refused. Where nobody knows, end it if it is there, and keep its key: it may still come.
    One that comes after all, and that nobody stops, is ended by the authority after a week.
    """
    if isinstance(error, CloisterError) and error.status < 500:
        shutil.rmtree(folder.directory)
    else:
        _end_unstarted(folder, "submit it again")


def _start(folder: RunFolder, *, hint: str, hold: bool = False) -> Daemon:
    """Start the run's supervisor; if that fails, say that the run has ended."""
    daemon = Daemon(folder.directory / "driver")
    try:
        daemon.start("cloister.training.driver", [str(folder.directory), *(["--hold"] if hold else [])])
    except BaseException:
        _end_unstarted(folder, hint)
        raise
    return daemon


def _end_unstarted(folder: RunFolder, hint: str) -> None:
    with contextlib.suppress(CloisterError):
        folder.end(UnavailableError("the run was not started", hint))


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
    """Show steps, epsilon spent and throughput until the run ends. Workers report after each block of steps."""
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
    if not shown["settled"]:  # it says that it has ended when its cluster is gone
        settle_orphan(context.home, run)
        shown = context.client().get(f"/v1/runs/{run}")
    if context.json:
        output.value(shown)
    if shown["state"] == "failed":
        raise from_dict(shown["error"] or {})
    if not context.json:
        output.say(f"{run} {shown['state']} after {_steps(shown)}; "
                   f"epsilon {shown['epsilon_charged']:.4f} is charged. Its cluster is gone.")  # fmt: skip
        if shown["state"] == "finished":
            output.say("Next: cloister model list")
    return shown


def _follow(context: Context, run: str) -> dict[str, Any]:
    client = context.client()
    shown: dict[str, Any] = client.get(f"/v1/runs/{run}")
    said, attempt = 0.0, shown["attempt"]
    told, since = shown["steps_done"], time.monotonic()
    with output.progress(run) as advance:
        while shown["state"] not in ENDED:
            settle_orphan(context.home, run)
            speed = f"{shown['rows_per_s']:,.0f} rows/s" if shown["rows_per_s"] else shown["state"]
            note = f"step {shown['steps_done']}/{shown['steps']}  epsilon {shown['epsilon_spent']:.2f}  {speed}"
            if shown["attempt"] > max(attempt, 1) and not context.json:
                output.say(f"The attempt died. Attempt {shown['attempt']} goes on from step {shown['resumed_from']}; "
                           "what is run again costs epsilon again.")  # fmt: skip
            attempt = shown["attempt"]
            if attempt > 1:
                note += f"  attempt {attempt}, resumed at step {shown['resumed_from']}"
            if shown["state"] == "submitted":
                note = "the cluster starts"
            if shown["steps_done"] != told:
                told, since = shown["steps_done"], time.monotonic()
            advance(about(shown, time.monotonic() - since), shown["steps"], note)
            if not (context.json or sys.stderr.isatty()) and time.monotonic() - said >= LINE_S:
                said = time.monotonic()  # no bar on a pipe: now and then a line
                output.say(note)
            time.sleep(POLL_S)
            shown = client.get(f"/v1/runs/{run}")
    return shown


def about(shown: dict[str, Any], since_s: float) -> float:
    """Which step a run is at about, so many seconds after its last report, which workers make at the end of a block.

    It is reckoned from the planned rows and the speed of the blocks before: no worker tells more.
    """
    from cloister.privacy.plan import BLOCK_STEPS

    done, plan = float(shown["steps_done"]), shown["plan"]
    steps = since_s * (shown["rows_per_s"] or 0.0) / (plan["sample_rate"] * plan["rows"])
    return float(min(done + min(steps, BLOCK_STEPS), shown["steps"]))


def _verdict(shown: dict[str, Any]) -> str:
    if not shown["budget"]["joined"]:
        return "no budget until a security officer has answered: cloister approvals list"
    if not shown["budget"]["before"]["epsilon"]:
        name, _, _ = shown["spec"]["dataset"].partition("@")
        return f"nobody has set a budget: ask {shown['owner']}: cloister budget set {name} --epsilon E --delta D"
    if not shown["affordable"]:
        after = shown["budget"]["after"]
        if after["epsilon_charged"] > after["epsilon"]:
            return ("the budget does not pay for it: it would come to "
                    f"{_rounded_up(after['epsilon_charged'])} of {after['epsilon']:g}")  # fmt: skip
        return ("the budget does not pay for it: the deltas would come to "
                f"{after['delta_added']:g} of {after['delta_of_each_rule']:g}")  # fmt: skip
    return "the budget pays for it" + (
        "" if shown["affordable_at_most"] else ", but not for all of the steps that may have to be run again"
    )


def _rounded_up(epsilon: float) -> str:
    """To three digits after the point, so that more than a budget has is never shown as the same."""
    return f"{math.ceil(1000 * epsilon) / 1000:g}" if math.isfinite(epsilon) else "more than can be told"


def _budget(shown: dict[str, Any]) -> str:
    """What is left of it before and after; and what this run takes, where that is not its own epsilon."""
    before, after, plan = shown["budget"]["before"], shown["budget"]["after"], shown["plan"]
    if not before["epsilon"]:
        return "none yet"
    said = f"epsilon {before['epsilon_left']:.3f} left before, {after['epsilon_left']:.3f} after"
    adds = after["epsilon_charged"] - before["epsilon_charged"]
    if after["rule"] != "renyi":
        return said
    if before["epsilon_added"]:
        return f"{said}; together with the runs before, this one takes {adds:.3f}"
    more = "more" if adds > plan["epsilon"] else "not more"
    half = after["delta_of_each_rule"]
    why = f"its delta {plan['delta']:g} is above half of the budget's ({half:g}), so only the Rényi filter counts it"
    if plan["delta"] <= half:
        why = "by the Rényi filter, at half of the budget's delta"
    return f"{said}; this run takes {adds:.3f}, {more} than its {plan['epsilon']:g}: {why}"


def _steps(shown: dict[str, Any]) -> str:
    done = _done(shown)
    more = shown["steps_committed"] - done  # run again, or not at all
    return f"{done} of {shown['steps']} steps" + (f", {more} more are charged" if more > 0 else "")


def _done(shown: dict[str, Any]) -> int:
    return max(int(shown["steps_done"]), shown["checkpoint"] or 0)  # workers report after whole blocks, if at all


def settle_orphan(home: Home, run: str) -> bool:
    """Say that a run of this machine has ended whose supervisor died without a word; its ledger settles by that.

    True if it did. What is left of its cluster is ended first.
    """
    directory = home.runs / run
    if not (directory / "run.json").exists():
        return False
    folder = RunFolder.open(directory)
    with folder.turn():
        return _settle_orphan(folder)


def _settle_orphan(folder: RunFolder) -> bool:
    daemon = Daemon(folder.directory / "driver")
    if daemon.process() is not None:
        return False
    _reap(daemon)
    with contextlib.closing(folder.client()) as client:
        if client.get(f"/v1/runs/{folder.run}")["settled"]:
            return False
    folder.end(UnavailableError("the run's supervisor was killed", f"go on: cloister train resume {folder.run}"))
    return True


def _reap(daemon: Daemon) -> None:
    """End what is left of a cluster whose supervisor is gone. (The guardian is about to, unless it was killed too.)"""
    from cloister.cluster import reap

    cluster = daemon.status().get("cluster")
    if cluster and Path(cluster).exists():
        reap(Path(cluster))


def _wait_until_gone(context: Context, run: str) -> None:
    daemon = Daemon(context.home.runs / run / "driver")
    deadline = time.monotonic() + 30
    while daemon.process() is not None:
        if time.monotonic() > deadline:
            raise UnavailableError(f"the cluster of {run} does not end", f"stop it: cloister train stop {run}")
        time.sleep(0.1)


@train.command()
@click.argument("run", type=NAME)
@click.option("--watch", "follow", is_flag=True, help="Stay and watch.")
@common
def resume(context: Context, run: str, follow: bool) -> None:
    """Go on with a run of this machine from its last checkpoint, after its supervisor was killed, it failed or was
    stopped. What is run again costs epsilon again."""
    folder = RunFolder.open(context.home.runs / run)
    daemon = Daemon(folder.directory / "driver")
    with folder.turn():
        if daemon.process() is not None:
            raise ConflictError(f"{run} has a supervisor that lives", f"watch it: cloister train watch {run}")
        client = context.client()
        shown = client.get(f"/v1/runs/{run}")
        if shown["state"] in ENDED:
            _settle_orphan(folder)
            shown = client.post(f"/v1/runs/{run}/resume")
        _reap(daemon)
        _start(folder, hint=f"go on: cloister train resume {run}")
    if follow:
        follow_run(context, run)
    elif context.json:
        output.value(shown)
    else:
        output.say(f"{run} goes on at step {shown['checkpoint'] or 0}; epsilon {shown['epsilon_charged']:g} is held "
                   f"for it.\nNext: cloister train watch {run}")  # fmt: skip


@train.command()
@click.argument("run", type=NAME)
@common
def status(context: Context, run: str) -> None:
    """Show one run."""
    shown = context.client().get(f"/v1/runs/{run}")
    if context.json:
        output.value(shown)
        return
    attempts = f"{shown['attempt']} of {1 + shown['spec']['training']['retries']}"
    if shown["attempt"] > 1:
        attempts += f", resumed at step {shown['resumed_from']}"
    facts = {name: shown[name] for name in ("run", "author", "dataset", "state", "steps_done", "steps")}
    facts |= {"attempt": attempts, "last checkpoint": shown["checkpoint"]}
    facts |= {name: shown[name] for name in ("epsilon_spent", "epsilon_charged", "rows_per_s")}
    if shown["error"]:
        failure = from_dict(shown["error"])
        facts |= {"error": failure.message, "next": failure.hint}
    output.facts(facts)


@train.command()
@click.argument("run", type=NAME)
@common
def stop(context: Context, run: str) -> None:
    """Stop a run. What it has committed stays charged; the rest of its epsilon is free again once its cluster is gone,
    which only the machine that it runs on can say. A run that never began is charged nothing, whoever stops it."""
    client = context.client()
    client.post(f"/v1/runs/{run}/stop")
    Daemon(context.home.runs / run / "driver").stop()
    settle_orphan(context.home, run)
    shown = client.get(f"/v1/runs/{run}")
    if context.json:
        output.value(shown)
        return
    output.say(f"{run} is {shown['state']}; epsilon {shown['epsilon_charged']:.4f} is charged.")
    if not shown["settled"]:
        output.say("That is all that was held for it: what it has not used is free when its own machine says so.")


@train.command(name="list")
@common
def list_(context: Context) -> None:
    """List runs, newest first."""
    rows = context.client().get("/v1/runs")
    if context.json:
        output.value(rows)
        return
    cells = [
        (r["run"], r["author"], r["dataset"], r["state"], f"{_done(r)}/{r['steps']}", r["epsilon_charged"])
        for r in rows
    ]
    output.table(("run", "author", "dataset", "state", "steps", "epsilon"), cells, empty="No run yet.")
