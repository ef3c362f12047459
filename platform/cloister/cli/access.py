"""`cloister access | node`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common

_UNITS = {"m": 60, "h": 3600}


class Duration(click.ParamType[int]):
    """`30m` or `2h`, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([1-9][0-9]{0,3})([mh])", str(value))
        if not match:
            self.fail("write minutes or hours, such as 30m or 1h", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@click.group()
def access() -> None:
    """Ask for a role for a while."""


@access.command()
@click.option("--role", required=True, help="Which role.")
@click.option("--for", "seconds", type=Duration(), required=True, help="For how long, such as 30m or 1h.")
@click.option("--reason", required=True, help="What you need it for. The approver reads it; the log does not keep it.")
@common
def request(context: Context, role: str, seconds: int, reason: str) -> None:
    """Ask for ROLE for a while. It begins when somebody else approves, and ends by itself."""
    shown = context.client().post("/v1/access", {"role": role, "seconds": seconds, "reason": reason})
    if context.json:
        output.value(shown)
    else:
        output.say(f"Asked for {role} for {seconds // 60} minutes. It begins when it is approved.")
        output.say(f"Next, a security officer runs: cloister approve {shown['approval']}")


@click.group()
def node() -> None:
    """Register the machines that workers and replicas run on."""


@node.command()
@click.argument("name", type=NAME)
@click.option("--region", required=True, help="Where it is: data of other regions is not opened there.")
@click.option("--public-key", type=click.Path(path_type=Path), help="Its public key (PEM).  [default: this machine]")
@common
def add(context: Context, name: str, region: str, public_key: Path | None) -> None:
    """Register a node. Without --public-key: this machine, whose key is made here and stays here."""
    from cloister.client.node import NodeFolder
    from cloister.client.seal import read_file

    if public_key is None:
        public = NodeFolder(context.home.node).make(name)
    else:
        public = read_file(public_key, "public key file").decode(errors="replace")
    shown = context.client().post("/v1/nodes", {"name": name, "public_key": public, "region": region})
    if context.json:
        output.value(shown)
    else:
        output.say(f"{name} is a node in {region}. Its certificates live a day and are renewed by themselves.")


@node.command()
@click.argument("name", type=NAME)
@common
def new(context: Context, name: str) -> None:
    """Make this machine's node key, for an operator elsewhere to register."""
    from cloister.client.node import NodeFolder
    from cloister.stores.files import write_atomic

    folder = NodeFolder(context.home.make().node)
    public = folder.make(name)
    file = folder.directory / "node.pub"
    write_atomic(file, public.encode())
    if context.json:
        output.value({"name": name, "public_key": str(file)})
    else:
        output.say(f"An operator runs: cloister node add {name} --region REGION --public-key {file}")
