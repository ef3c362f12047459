"""`cloister backup | restore | fsck`: work on the authority's own machine, not over HTTP."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.config import AuthoritySettings, Settings
from cloister.errors import ConflictError, InputError, IntegrityError, NotFoundError
from cloister.process import Daemon
from cloister.stores.home import Home

if TYPE_CHECKING:
    from cloister.authority.fsck import Report
    from cloister.authority.maintenance import Parts
    from cloister.stores.database import Database


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--no-blobs", is_flag=True, help="Leave out the sealed files: their store is backed up otherwise.")
@common
def backup(context: Context, folder: Path, no_blobs: bool) -> None:
    """Back the authority up to FOLDER, which must not exist: its state, sealed under the key service, and its files.

    It works on the authority's machine, also while it runs.
    """
    from cloister.authority import backup as backups

    with _parts(context.home) as opened, output.progress("copying sealed files") as advance:
        caller = opened.caller(context)
        header = backups.create(
            opened.parts.core(opened.database), opened.parts.stores, caller, folder.absolute(),
            with_blobs=not no_blobs, progress=advance,
        )  # fmt: skip
        where = _key_service(opened.settings, context.home)
    if context.json:
        output.value(header.model_dump() | {"folder": str(folder)})
        return
    files = "no sealed files" if header.blobs is None else f"{header.blobs:,} sealed files"
    output.say(f"{folder} holds the state with {header.log_size:,} entries of the log, and {files}.")
    output.say("Protected: it opens only with the key service, and what is destroyed from now on does not come back.")
    output.say(
        f"Not in it: the key service ({where}) and config.yaml. Keep the newest copy of both, apart from backups:"
    )
    output.say("without the key service a backup is noise; with an old copy of it, what was destroyed since is back.")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--accept-rollback", is_flag=True, help="Restore an older state, and answer for it: it is on record.")
@click.option("--blobs", is_flag=True, help="Only sealed files that are missing or changed; the state stays as it is.")
@common
def restore(context: Context, folder: Path, accept_rollback: bool, blobs: bool) -> None:
    """Restore the authority from the backup in FOLDER. It must not run; `--as` names who was an operator then.

    A backup that is older than what the key service remembers, or than the state that is there, is refused. For
    sealed files alone (`--blobs`) it may be of any age, and the authority may run.
    """
    from cloister.authority.restore import restore as put_back
    from cloister.authority.restore import restore_blobs

    if blobs:
        with _parts(context.home) as opened, output.progress("checking and putting back") as advance:
            caller = opened.caller(context)
            put, lost = restore_blobs(opened.parts, opened.database, folder.absolute(), caller, progress=advance)
        if context.json:
            output.value({"blobs_put": put, "blobs_lost": list(lost)})
            return
        output.say(f"Put back: {put} sealed files. The state is as it was.")
        if lost:
            output.say(f"Lost: {len(lost)} sealed files are in no store and not in the backup.")
        output.say("Next: cloister fsck")
        return

    if Daemon(context.home.authority / "daemon").process() is not None:
        raise ConflictError("the authority runs, and would write into what is restored", "stop it: cloister down")
    context.home.make()
    with _parts(context.home, empty=True) as opened, output.progress("checking and putting back") as advance:
        done = put_back(
            opened.parts, folder.absolute(), (context.name(), context.private_key()), accept_rollback=accept_rollback,
            database=opened.database if opened.settings.database else None, progress=advance,
        )  # fmt: skip
    if context.json:
        output.value(asdict(done))
        return
    output.say(
        f"The state is that of {done.backup}, with {done.log_size:,} entries of the log; this restore is the last."
    )
    if done.kept:
        output.say(f"What was there before is in {done.kept}: remove it when you need it no more.")
    ended = f"; {done.runs_ended} runs ended, charged for their whole plan" if done.runs_ended else ""
    output.say(f"Every token, lent role and open request for approval has ended{ended}.")
    if done.ended:
        output.say(f"Destroyed since, and still so: {', '.join(done.ended)}.")
    if done.blobs_lost:
        output.say(f"Lost: {len(done.blobs_lost)} sealed files are in no store and not in the backup: cloister fsck")
    if done.rolled_back_from is not None:
        output.say(f"Rolled back from {done.rolled_back_from:,} entries of the log, on record as yours.")
        output.say("No dataset has budget left until it is raised, with approval: what was spent since is not known.")
        output.say(
            "Do again what was done since: revocations, forgetting, policies. Witnesses refuse this log from now"
        )
        output.say("on, as they should: tell who runs them, and give the authority new ones.")
    output.say("Next: cloister fsck, then cloister up")


@click.command()
@click.option("--repair", is_flag=True, help="Remove what is left over, and finish what erasures have left to do.")
@click.option(
    "--all",
    "young",
    is_flag=True,
    help="With --repair, also what no check has seen an hour ago. Not while it runs.",
)
@click.option("--quick", is_flag=True, help="Do not read the sealed files.")
@common
def fsck(context: Context, repair: bool, young: bool, quick: bool) -> None:
    """Check that log, state, keys, sealed files and certificates on the authority's machine fit together."""
    from cloister.authority import fsck as checks

    if young and Daemon(context.home.authority / "daemon").process() is not None:
        raise ConflictError(
            "the authority runs: a young file may be of a seal under way", "leave --all out, or stop it"
        )
    with _parts(context.home) as opened, output.progress("comparing sealed files") as advance:
        caller = opened.caller(context)
        look: dict[str, Any] = {"quick": quick, "young": young}
        report = checks.check(opened.parts, opened.database, caller, **look, progress=advance)
        repaired = repair and (report.orphans or report.temporaries or report.unfinished)
        if repaired:
            checks.repair(opened.parts, opened.database, caller, report)
            report = checks.check(opened.parts, opened.database, caller, **look, progress=advance)
    _show(context, report, repaired=bool(repaired), quick=quick)


def _show(context: Context, report: Report, *, repaired: bool, quick: bool) -> None:
    rows = [(finding.kind, finding.subject, finding.problem) for finding in report.findings]
    if context.json:
        found = [asdict(finding) for finding in report.findings]
        output.value({"clean": report.clean, "repaired": repaired, "checked": report.checked, "findings": found})
    else:
        output.table(("state", "what", "finding"), rows, empty="Everything fits together.")
        output.say("Checked: " + ", ".join(f"{count:,} {what}" for what, count in report.checked.items()) + ".")
        if quick:
            output.say("Not checked: what is in the sealed files.")
        if repaired:
            output.say("Repaired: what was left over is removed, on record.")
    if not report.clean and context.json:
        sys.exit(1)  # one value on standard output, and it says why
    if not report.clean:
        broken = any(finding.kind == "broken" for finding in report.findings)
        hint = "cloister fsck --repair"
        if broken:
            hint = "sealed files: cloister restore FOLDER --blobs   anything else: cloister restore FOLDER"
        raise IntegrityError(f"{sum(kind != 'note' for kind, *_ in rows)} findings", hint)


# ---- the parts on this machine ----


@dataclass(frozen=True, slots=True)
class _Opened:
    parts: Parts
    database: Database
    settings: AuthoritySettings

    def caller(self, context: Context) -> Any:
        from cloister.authority.maintenance import local_caller

        return local_caller(self.database, context.name(), context.private_key())


@contextlib.contextmanager
def _parts(home: Home, *, empty: bool = False) -> Iterator[_Opened]:
    """The authority's parts, opened here. `empty`: SQLite's file need not be there, and is not opened.

    Raises:
        NotFoundError: there is no authority here, or no key service.
    """
    from cloister.authority.maintenance import Parts
    from cloister.stores.blobs import Stores
    from cloister.stores.database import Database
    from cloister.stores.keys.settings import EmbeddedSettings, open_keys

    settings, directory = Settings.load(home).authority, home.authority
    if isinstance(settings.keys, EmbeddedSettings) and not (directory / "keys" / "keyring.json").exists():
        raise NotFoundError(
            "there is no key service on this machine", f"put its newest copy into {directory / 'keys'}, or: cloister up"
        )
    state = directory / "state.db"
    if not settings.database and not empty and not state.exists():
        raise NotFoundError(
            "there is no authority on this machine", "start one: cloister up; or cloister restore FOLDER"
        )
    keys = open_keys(settings.keys, directory / "keys", lambda: _passphrase(settings.keys))
    try:
        parts = Parts.of(directory, keys, Stores(settings.blobs, directory / "blobs"))
        database = settings.open_database() or (None if empty else Database(state))
        try:
            yield _Opened(parts, database, settings)  # type: ignore[arg-type]  # none only where it is not used
        finally:
            if database is not None:
                database.close()
    finally:
        keys.close()


def _passphrase(settings: Any) -> bytes:
    from cloister.stores.keys.root import PASSPHRASE_VARIABLE, passphrase_in

    file = os.environ.get(PASSPHRASE_VARIABLE) or settings.passphrase_file
    if file:
        return passphrase_in(Path(file))
    if not sys.stdin.isatty():
        raise InputError(
            "the root key is sealed by a passphrase, and nobody is there to type it",
            f"name a file that holds it: {PASSPHRASE_VARIABLE}",
        )
    return str(click.prompt("Passphrase of the root key", hide_input=True)).encode()


def _key_service(settings: AuthoritySettings, home: Home) -> str:
    from cloister.stores.keys.settings import VaultSettings

    return "Vault" if isinstance(settings.keys, VaultSettings) else str(home.authority / "keys")
