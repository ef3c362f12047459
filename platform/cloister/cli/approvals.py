"""`cloister approvals | approve | deny`."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common
from cloister.errors import CloisterError, NotFoundError


@click.group()
def approvals() -> None:
    """List what waits for approval, and look at it."""


@approvals.command(name="list")
@common
def list_(context: Context) -> None:
    """List open requests."""
    rows = context.client().get("/v1/approvals")
    if context.json:
        output.value(rows)
        return
    cells = [
        (
            r["approval"],
            r["kind"],
            r["subject"],
            _epsilon(r["details"]),
            r["requested_by"],
            f"{r['approved']} of {r['required']}",
            _left(r["expires"]),
        )
        for r in rows
    ]
    headings = ("approval", "kind", "subject", "epsilon", "author", "approved", "expires in")
    output.table(headings, cells, empty="Nothing waits for approval.")


def _epsilon(details: dict[str, Any]) -> str | None:
    """What a request would cost, or how large a budget would become; None where epsilon is no part of it."""
    epsilon = details.get("epsilon")
    if isinstance(epsilon, list):
        delta = details["delta"]
        grows = 0 < delta[0] < delta[1]  # a first budget's is as good as its epsilon
        return output.change(epsilon) + (f", delta {output.change(delta)}" if grows else "")
    if epsilon is None:
        return None
    most = details.get("epsilon_at_most", epsilon)
    return f"{epsilon:g}" + (f", at most {most:.4g}" if most > epsilon else "")


@approvals.command()
@click.argument("approval", type=NAME)
@common
def show(context: Context, approval: str) -> None:
    """Show exactly what an approval would be about."""
    import yaml

    request = _find(context, approval)
    if context.json:
        output.value(request)
        return
    votes = [f"{vote['person']}: {vote['decision']}" for vote in request["votes"]] or ["none"]
    output.facts({
        "approval": request["approval"], "kind": request["kind"], "subject": request["subject"],
        "author": request["requested_by"], "needs": f"{request['required']}, has {request['approved']}",
        "votes": votes, "expires in": _left(request["expires"]), "digest": request["digest"],
    } | {f"details: {name}": _detail(name, value) for name, value in request["details"].items()
         if value and not isinstance(value, dict)})  # fmt: skip
    for name, value in request["details"].items():
        if isinstance(value, dict):
            output.say(f"\n  details: {name}")
            for line in yaml.safe_dump(value, sort_keys=False).splitlines():
                output.say(f"    {output.printable(line)}")


def _detail(name: str, value: Any) -> Any:
    """A detail for people: of epsilon and delta, two numbers are what is there and what is asked for."""
    return output.change(value) if name in ("epsilon", "delta") and isinstance(value, list) else value


@click.command()
@click.argument("approval", type=NAME)
@common
def approve(context: Context, approval: str) -> None:
    """Approve a request, signed with your own key over exactly what it says."""
    _vote(context, approval, "approve")


@click.command()
@click.argument("approval", type=NAME)
@common
def deny(context: Context, approval: str) -> None:
    """Refuse a request, signed with your own key. One refusal outweighs any number of approvals."""
    _vote(context, approval, "deny")


def _find(context: Context, approval: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = context.client().get("/v1/approvals")
    for row in rows:
        if row["approval"] == approval:
            return row
    raise NotFoundError(f"there is no open approval {approval[:40]}", "list them: cloister approvals list")


def _vote(context: Context, approval: str, decision: str) -> None:
    from cloister.models.release import APPROVAL_PREDICATE, approval_predicate
    from cloister.signing import dsse
    from cloister.signing.keys import ed25519_from_pem

    request = _find(context, approval)
    predicate = approval_predicate(request, context.name(), decision) | {"time": int(time.time())}
    statement = dsse.statement(request["subject"], request["digest"], APPROVAL_PREDICATE, predicate)
    envelope = dsse.sign(statement, ed25519_from_pem(context.private_key()))
    shown = context.client().post(f"/v1/approvals/{approval}/votes", {"envelope": envelope})
    if context.json:
        output.value(shown)
        return
    if decision == "deny":
        output.say(f"You refused {shown['subject']}. A refusal is final.")
        if shown["kind"] == "population":
            output.say(f"Next, {shown['requested_by']} seals it again with the population and the unit of the others: "
                       "they share one budget then.")  # fmt: skip
        return
    output.say(f"You approved {shown['subject']} ({shown['kind']}, {shown['digest'][:16]}…).")
    missing = shown["required"] - shown["approved"]
    if missing > 0:
        output.say(f"It needs {missing} more.")
    elif shown["kind"] == "access":
        output.say("The role is lent from now on, and gone by itself.")
    elif shown["kind"] == "population":
        output.say(_joined(context, shown))
    else:
        output.say(f"Next, {shown['requested_by']} repeats the command that asked for it.")


def _joined(context: Context, shown: dict[str, Any]) -> str:
    """What came of an answer: a budget of its own, or one with others that were told apart before."""
    name, version, together = shown["details"]["dataset"], shown["details"]["version"], []
    with contextlib.suppress(CloisterError):  # the vote is cast, and must not be told as if it were not
        budget = context.client().get(f"/v1/datasets/{name}/budget?version={version}")
        together = [each for each in budget["datasets"] if each != name]
    if together:
        return f"{name} shares one budget with {', '.join(together)} now: cloister budget show {name}"
    return (f"{name} has a budget of its own now. Next, {shown['requested_by']}: cloister budget set {name} "
            "--epsilon E --delta D")  # fmt: skip


def _left(expires: float) -> str:
    seconds = max(0, int(expires - time.time()))
    days, hours, minutes = seconds // 86400, seconds % 86400 // 3600, seconds % 3600 // 60
    return f"{days} d" if days else f"{hours} h {minutes} min"
