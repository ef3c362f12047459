"""`cloister key`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.errors import InputError

_USES = {"wrap": "wraps keys", "sign": "signs", "derive": "derives keys"}


@click.group()
def key() -> None:
    """List, rotate and destroy keys."""


@key.command("list")
@common
def list_(context: Context) -> None:
    """List the keys of the key service: what each is for, its versions, how many keys are wrapped under it."""
    shown = context.client().get("/v1/keys")
    if context.json:
        output.value(shown)
        return
    rows = [
        (each["name"], _USES[each["use"]], _versions(each), each["keys"], _day(each["rotated"]))
        for each in shown
    ]  # fmt: skip
    output.table(("key", "use", "versions", "keys under it", "rotated"), rows, empty="There is no key yet.")


@key.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Every key that wraps others.")
@click.option("--tokens", is_flag=True, help="The key that signs access tokens.")
@click.option("--compromised", is_flag=True, help="With --tokens: the old key is in wrong hands, its tokens die now.")
@common
def rotate(context: Context, name: str | None, everything: bool, tokens: bool, compromised: bool) -> None:
    """Rotate the wrapping key NAME, such as dataset/adult: what it wraps is wrapped anew, and no data is touched."""
    if sum((name is not None, everything, tokens)) != 1 or (compromised and not tokens):
        raise InputError("which key?", "cloister key rotate NAME, or --all, or --tokens; cloister key list shows them")
    if tokens:
        _rotate_tokens(context, compromised)
        return
    with output.progress("rotating") as advance:
        client = context.client()
        names = [name] if name else [each["name"] for each in client.get("/v1/keys") if each["use"] == "wrap"]
        shown: list[Any] = []
        for done, each in enumerate(names):
            advance(done, len(names), each)
            shown.append(client.post("/v1/keys/rotation", {"name": each}))
    if context.json:
        output.value(shown)
        return
    for each in shown:
        output.say(f"{each['name']} is at version {each['version']}: {each['keys']} keys are wrapped under it now.")
    if not shown:
        output.say("There is no wrapping key yet.")
    else:
        output.say("No data was touched. Older versions still open older backups of the state.")


def _rotate_tokens(context: Context, compromised: bool) -> None:
    shown = context.client().post("/v1/token-keys", {"compromised": compromised})
    if context.json:
        output.value(shown)
    else:
        rest = "Every token given before is dead." if compromised else "Tokens given before live out their ten minutes."
        output.say(f"New access tokens are signed with key {shown['key_id'][:16]}…. {rest}")


@key.command()
@click.argument("dataset")
@common
def destroy(context: Context, dataset: str) -> None:
    """Destroy the data keys of DATASET@VERSION, once enough others agree. Every copy of its files is noise then.

    Later versions that list one of its files end too, with all that they alone have: appended rows as well.
    """
    from cloister.datasets.manifest import parse_reference

    name, version = parse_reference(dataset)
    shown = context.client().post(f"/v1/datasets/{name}/versions/{version}/key-destruction")
    if context.json:
        output.value(shown)
    else:
        output.say(f"{shown['keys_destroyed']} keys of {dataset} are destroyed. Nobody can open it any more.")
        if shown["ended"] != [dataset]:
            output.say(f"Ended with all they alone had, since they list its files: {', '.join(shown['ended'])}.")
        output.say(f"Next: cloister data certificate {shown['erasure']}")


def _versions(shown: dict[str, Any]) -> str:
    oldest, newest = shown["oldest"], shown["newest"]
    return str(newest) if oldest == newest else f"{oldest} to {newest}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
