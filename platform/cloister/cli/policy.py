"""`cloister policy`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.errors import AuthenticationError, InputError

if TYPE_CHECKING:
    from cloister.policy import Policy

FILE = click.Path(path_type=Path)
KINDS = ("person", "service", "node", "run", "endpoint")


@click.group()
def policy() -> None:
    """Validate, test, explain and change the rules: who may do what."""


@policy.command()
@click.argument("file", type=FILE, required=False)
@common
def validate(context: Context, file: Path | None) -> None:
    """Check a site's own policies in FILE, beside the shipped ones. Needs no authority."""
    from cloister.policy import Policy

    shipped = list(Policy.shipped().rules)
    own = [name for name in _policies(file).rules if name not in shipped]
    if context.json:
        output.value({"shipped": shipped, "site": own})
    else:
        output.say(f"{len(own)} policies of the site and {len(shipped)} shipped ones parse and fit the schema.")


@policy.command()
@click.argument("file", type=FILE)
@click.option("--policies", type=FILE, help="The site's own policies, beside the shipped ones.")
@common
def test(context: Context, file: Path, policies: Path | None) -> None:
    """Ask the questions in FILE and compare the answers. Needs no authority.

    FILE is a YAML list of cases. Left out: kind is person, the resource is Platform/platform, the rest is empty.

    \b
    - name: nobody trains on restricted columns
      principal: ed
      roles: [engineer]
      action: train:submit
      resource: Dataset/adult@1
      attributes: {owner: olga, region: eu, purpose: income-research,
                   class: restricted, epsilon_left_millionths: 3000000}
      expect: deny
      rule: restricted-data-is-never-trained-on
    - principal: run-1
      kind: run
      roles: [run]
      action: run:lease
      resource: Run/run-1
      attributes: {author: ed, owner: olga, region: eu,
                   purpose: income-research, class: internal}
      context: {node: node-1, node_region: eu, node_assurance: 0}
      expect: allow
    """
    from cloister.policy.cases import parse_cases, run_cases

    results = run_cases(_policies(policies), parse_cases(_text(file, "file of cases")))
    failed = [result for result in results if not result.holds]
    if context.json:
        output.value([{"case": result.case.title(), "holds": result.holds, "expected": result.case.expect,
                       "allowed": result.decision.allowed, "rules": result.decision.rules,
                       "reason": result.decision.reason} for result in results])  # fmt: skip
        sys.exit(1 if failed else 0)
    if failed:
        cells = [(one.case.title(), " under ".join(filter(None, (one.case.expect, one.case.rule))), one.decision.reason)
                 for one in failed]  # fmt: skip
        output.table(("case", "expected", "found"), cells, empty="")
        raise InputError(
            f"{len(failed)} of {len(results)} cases do not hold", "see why: cloister policy explain --local"
        )
    output.say(f"All {len(results)} cases hold.")


@policy.command()
@click.option("--action", required=True, help="Such as train:submit.")
@click.option("--resource", "named", default="Platform/platform", show_default=True, metavar="TYPE/NAME")
@click.option("--name", help="Who asks; default: you.")
@click.option("--local", is_flag=True, help="Ask the rules on this machine. So do all options below.")
@click.option("--policies", type=FILE, help="The site's own policies, beside the shipped ones.")
@click.option("--role", "roles", multiple=True, help="A role of theirs; may be given more than once.")
@click.option("--kind", type=click.Choice(KINDS))
@click.option("--attribute", "attributes", multiple=True, metavar="NAME=VALUE", help="What the resource is.")
@click.option("--context", "facts", multiple=True, metavar="NAME=VALUE", help="Such as node=node-1.")
@common
def explain(
    context: Context, action: str, named: str, name: str | None, local: bool, policies: Path | None,
    roles: Sequence[str], kind: str | None, attributes: Sequence[str], facts: Sequence[str],
) -> None:  # fmt: skip
    """Say why something is allowed or denied: the rule, and what is missing.

    Asks the authority about what it has on record. Without one, or with --local, asks the shipped rules about what
    the options say.
    """
    resource_type, _, resource = named.partition("/")
    if not resource:
        raise InputError("a resource is written TYPE/NAME", "such as --resource Dataset/adult@1")
    given = policies or roles or kind or attributes or facts
    if local or given or not (context.home.client / "authority.json").exists():
        from cloister.policy import Request
        from cloister.policy.explain import explain as explain_request

        request = Request(
            principal=name or _own_name(context), kind=kind or "person",  # type: ignore[arg-type]  # click has checked
            roles=frozenset(roles), action=action, resource_type=resource_type, resource=resource,
            attributes=_pairs(attributes), context={"time": int(time.time()), **_pairs(facts)},
        )  # fmt: skip
        answer = explain_request(_policies(policies), request).to_dict()
        shown: dict[str, Any] = {"principal": request.principal, "roles": sorted(roles)} | answer
    else:
        body = {"action": action, "resource_type": resource_type, "resource": resource}
        shown = context.client().post("/v1/policy/explain", body | ({"principal": name} if name else {}))
    if context.json:
        output.value(shown)
        return
    may = "may" if shown["allowed"] else "may not"
    who = f"{shown['principal']} ({', '.join(shown['roles']) or 'no role'})"
    output.say(f"{who} {may} {action} on {named}: {shown['reason']}.")
    if shown["problem"]:
        output.say(f"  {output.printable(shown['problem'])}")
    for finding in shown["findings"]:
        output.say(f"  {'forbidden by' if finding['effect'] == 'forbid' else 'not permitted by'} {finding['rule']}")
        for reason in finding["reasons"]:
            output.say(f"    {output.printable(reason)}")


@policy.command()
@common
def show(context: Context) -> None:
    """Show the site's own policies that are in force, and the names of the shipped ones."""
    from cloister.policy import Policy

    shown = context.client().get("/v1/policy") | {"shipped": list(Policy.shipped().rules)}
    if context.json:
        output.value(shown)
        return
    output.facts({"version": shown["version"], "digest": shown["digest"], "shipped": shown["shipped"]})
    output.say("\n" + (output.printable(shown["text"], lines=True).strip() or "The site has no policies of its own."))


@policy.command()
@click.argument("file", type=FILE)
@click.option("--reason", required=True, help="Why, for those who approve it.")
@common
def propose(context: Context, file: Path, reason: str) -> None:
    """Put the policies in FILE in force, in place of the site's present ones.

    The first time this asks others for approval. Once they have approved, the same command puts it in force at once.
    """
    text = _text(file, "file of policies")
    _policies(file)
    shown = context.client().post("/v1/policy", {"text": text, "reason": reason})
    if context.json:
        output.value(shown)
    else:
        output.say(f"Version {shown['version']} of the site's policies is in force everywhere.")


def _policies(file: Path | None) -> Policy:
    from cloister.policy import Policy

    return Policy.shipped() if file is None else Policy.shipped().with_site(_text(file, "file of policies"))


def _text(file: Path, what: str) -> str:
    from cloister.client.seal import read_file

    try:
        return read_file(file, what).decode()
    except UnicodeDecodeError:
        raise InputError(f"the {what} {file} is not UTF-8", "save it as UTF-8") from None


def _pairs(texts: Sequence[str]) -> dict[str, Any]:
    """`name=value`: a whole number or true/false where it reads like one, a string in quotes or otherwise."""
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError("an attribute is written NAME=VALUE", "such as --attribute owner=olga")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        pairs[name] = read if isinstance(read, str | int) else value
    return pairs


def _own_name(context: Context) -> str:
    try:
        return context.name()
    except AuthenticationError:
        return "somebody"
