"""`cloister audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.errors import InputError, IntegrityError, NotFoundError


@click.group()
def audit() -> None:
    """Search, export and verify the audit log."""


@audit.command()
@click.option("--action", default="", help="Actions that start like this, such as model:")
@click.option("--actor", default="", help="Who did it.")
@click.option("--limit", type=click.IntRange(1, 1000), default=30, show_default=True)
@common
def search(context: Context, action: str, actor: str, limit: int) -> None:
    """Show the newest matching entries."""
    rows = context.client().get("/v1/log", action=action, actor=actor, limit=limit)
    if context.json:
        output.value(rows)
        return
    cells = [(r["index"], r["time"], r["actor"], r["action"], r["resource"], r["outcome"], r["rule"] or r["reason"])
             for r in rows]  # fmt: skip
    output.table(("entry", "time", "who", "what", "on what", "result", "under"), cells, empty="No such entry.")


@audit.command()
@click.argument("file", type=click.Path(path_type=Path))
@common
def export(context: Context, file: Path) -> None:
    """Write the whole log, with its checkpoints, to FILE: anybody can verify it offline."""
    from cloister.stores.files import write_json

    exported = context.client().get("/v1/log/export")
    try:
        write_json(file, exported)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}", "name another file") from error
    shown = {"file": str(file), "entries": len(exported["entries"])}
    if context.json:
        output.value(shown)
    else:
        output.say(f"{shown['entries']} entries are in {file}. Next: cloister audit verify {file}")


@audit.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@common
def verify(context: Context, file: Path | None) -> None:
    """Prove, offline, that the log is whole: FILE (an export), or this machine's own log.

    This machine remembers the newest checkpoint that it has verified and the log's public key: a log that was
    shortened, rewritten or replaced since then is refused.
    """
    report = verify_log_of(context, file)
    if context.json:
        output.value(report)
    else:
        output.say(f"The log is whole: {report['entries']} entries, {report['checkpoints']} signed checkpoints agree.")
        output.facts({"root": report["root"], "since": report["since"]})


def verify_log_of(context: Context, file: Path | None) -> dict[str, Any]:
    """Verify and remember.

    Raises:
        IntegrityError: the log is not whole, or not the one that this machine knows.
    """
    from cloister.audit.checkpoint import parse_verifier_key
    from cloister.audit.verify import verify_log
    from cloister.canonical import unb64
    from cloister.stores.files import private_directory, read_json, write_json

    exported = _exported(context, file)
    pinned = _pinned_key(context)
    if pinned not in (None, exported["verifier_key"]):
        raise IntegrityError("this log is signed with another key than the authority's", "ask for the true export")
    memory_file = context.home.client / "log.json"
    memory = read_json(memory_file, what="memory of the log", hint="") if memory_file.exists() else {}
    if memory.get("verifier_key", exported["verifier_key"]) != exported["verifier_key"]:
        raise IntegrityError(
            "this log is signed with another key than the log that this machine knows",
            f"if the authority was set up anew, remove {memory_file}",
        )
    _, public = parse_verifier_key(exported["verifier_key"])
    entries = [unb64(entry) for entry in exported["entries"]]
    trusted = memory.get("checkpoint")
    report = verify_log(entries, exported["checkpoints"], public, exported["origin"], trusted=trusted)
    private_directory(context.home.client)
    write_json(memory_file, {"verifier_key": exported["verifier_key"], "checkpoint": exported["checkpoints"][-1]})
    since = (
        f"extends the log of {trusted.splitlines()[1]} entries that this machine verified before"
        if trusted
        else ("first verification on this machine: its key and checkpoint are remembered from now on")
    )
    return {
        "entries": report.size, "root": report.root_hex, "checkpoints": report.checkpoints_checked, "since": since,
    }  # fmt: skip


def _pinned_key(context: Context) -> str | None:
    """The log's key as pinned when this machine first met its authority; None on a machine that never did."""
    try:
        return str(context.pinned()["log_verifier_key"])
    except NotFoundError:
        return None


def _exported(context: Context, file: Path | None) -> dict[str, Any]:
    if file is None:
        return _own_log(context)
    from cloister.client.seal import read_file

    try:
        exported = json.loads(read_file(file, "export"))
        fields = {"format", "origin", "verifier_key", "entries", "checkpoints"}
        if not isinstance(exported, dict) or exported.keys() != fields or not exported["checkpoints"]:
            raise ValueError
    except ValueError:
        raise InputError(f"{file} is not an export of a log", "make one: cloister audit export FILE") from None
    return exported


def _own_log(context: Context) -> dict[str, Any]:
    """Straight from the state on this machine, without the authority: it need not run."""
    from cloister.authority.log import read_export

    state = context.home.authority / "state.db"
    if not state.exists():
        raise NotFoundError("there is no log on this machine", "name an export: cloister audit verify FILE")
    return read_export(state, context.home.authority / "log.pub")
