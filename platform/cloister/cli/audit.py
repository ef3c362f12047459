"""`cloister audit`."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.errors import CloisterError, InputError, IntegrityError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from cloister.audit.cosignature import Cosignature, WitnessKey
    from cloister.audit.export import Header

SYSLOG_PORT = 6514  # RFC 5425, section 4.1
TIMEOUT_S = 30.0
_WITNESS = click.option(
    "--witness-key", "witness_keys", multiple=True, metavar="KEY",
    help="A witness that must have cosigned: its verifier key, or a file with it. Repeat for several.",
)  # fmt: skip
_LOG_KEY = click.option("--log-key", metavar="KEY", help="The log's verifier key, or a file with it.")


@click.group()
def audit() -> None:
    """Search, prove, export and verify the audit log."""


@audit.command()
@click.option("--action", default="", help="Actions that start like this, such as model:")
@click.option("--actor", default="", help="Who did it.")
@click.option("--outcome", type=click.Choice(["success", "denied", "failure"]), default=None)
@click.option("--since", default="", metavar="TIME", help="Not before this, such as 2026-11-22T09:30:00Z.")
@click.option("--until", default="", metavar="TIME", help="Not after this.")
@click.option("--limit", type=click.IntRange(1, 1000), default=30, show_default=True)
@common
def search(
    context: Context, action: str, actor: str, outcome: str | None, since: str, until: str, limit: int
) -> None:  # fmt: skip
    """Show the newest matching entries."""
    rows = context.client().get(
        "/v1/log", action=action, actor=actor, outcome=outcome or "", since=since, until=until, limit=limit
    )
    if context.json:
        output.value(rows)
        return
    cells = [(r["index"], r["time"], r["actor"], r["action"], r["resource"], r["outcome"], r["rule"] or r["reason"])
             for r in rows]  # fmt: skip
    output.table(("entry", "time", "who", "what", "on what", "result", "under"), cells, empty="No such entry.")


@audit.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--format", "form", type=click.Choice(["cloister", "ocsf", "cef"]), default="cloister", show_default=True)
@click.option("--from", "first", type=click.IntRange(0), default=0, metavar="INDEX", help="Begin with this entry.")
@click.option("--syslog", metavar="HOST[:PORT]", help="Send the entries there as RFC 5424 syslog over TLS, instead.")
@click.option("--ca", type=click.Path(path_type=Path), help="PEM of the CA of the syslog server.")
@common
def export(
    context: Context, file: Path | None, form: str, first: int, syslog: str | None, ca: Path | None
) -> None:  # fmt: skip
    """Write the log to FILE, or send it to a syslog server.

    In the format cloister, FILE holds the whole log with its checkpoints, and anybody can verify it offline. In ocsf
    it is OCSF 1.9 in JSON Lines, in cef ArcSight's Common Event Format.
    """
    if (file is None) == (syslog is None):
        raise InputError("an export goes to a file or to a syslog server", "cloister audit export FILE")
    if syslog is not None:
        _send_to_syslog(context, syslog, ca, first)
        return
    assert file is not None  # noqa: S101  (the lines above)
    lines = _write(file, context.client().lines("/v1/log/export", form=form, first=first))
    shown = {"file": str(file), "format": form, "entries": lines - (form == "cloister")}
    if context.json:
        output.value(shown)
    elif form == "cloister":
        output.say(f"{shown['entries']} entries are in {file}. Next: cloister audit verify {file}")
    else:
        output.say(f"{shown['entries']} entries are in {file}. It cannot be verified: for that, leave out --format.")


@audit.command()
@click.argument("what", metavar="INDEX|growth")
@click.argument("file", type=click.Path(path_type=Path))
@common
def prove(context: Context, what: str, file: Path) -> None:
    """Write a proof to FILE that anybody can verify offline: that entry INDEX is in the log, as it is; or, with
    `growth`, that the log of now extends the one that this machine verified last.
    """
    from cloister.audit import proof
    from cloister.stores.files import write_json

    memory = _Memory(context)
    key = memory.key()
    if what == "growth":
        bundle = context.client().get("/v1/log/consistency", first=memory.size()) | {"first": memory.checkpoint}
        grown = proof.verify_consistency(bundle, key)
        shown = {"first": grown.first.size, "second": grown.second.size}
        said = f"{file} proves that the log of {shown['second']} entries extends that of {shown['first']}."
    elif what.isascii() and what.isdigit():
        bundle = context.client().get(f"/v1/log/entries/{int(what)}/proof")
        included = proof.verify_inclusion(bundle, key)
        shown = {"index": included.index, "size": included.checkpoint.size}
        said = f"{file} proves that entry {shown['index']} is in the log of {shown['size']} entries."
    else:
        raise InputError("a proof is of an entry's index, or of growth", "cloister audit search shows the indexes")
    _writable(file, lambda: write_json(file, bundle))
    if context.json:
        output.value(shown | {"file": str(file)})
    else:
        output.say(f"{said} Next, anywhere: cloister audit verify {file} --log-key '{key}'")


@audit.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_WITNESS
@_LOG_KEY
@common
def verify(context: Context, file: Path | None, witness_keys: Sequence[str], log_key: str | None) -> None:
    """Prove, offline, that the log is whole: FILE (an export or a proof), or this machine's own log.

    This machine remembers the newest checkpoint that it has verified and the log's public key: a log that was
    shortened, rewritten or replaced since then is refused. With --log-key, FILE is judged by that key alone.
    """
    from cloister.audit.cosignature import WitnessKey

    witnesses = [WitnessKey.parse(_text_or_file(key)) for key in witness_keys]
    key = _text_or_file(log_key) if log_key else None
    if file is not None and (bundle := _bundle(file)) is not None:
        _show_proof(context, bundle, key or _Memory(context).key(), witnesses)
        return
    report = verify_log_of(context, file, witnesses, key)
    if context.json:
        output.value(report)
        return
    output.say(f"The log is whole: {report['entries']} entries, {report['checkpoints']} signed checkpoints agree.")
    output.facts({"root": report["root"], "since": report["since"]} | _cosigned(report["witnesses"]))


@audit.command()
@click.argument("directory", type=click.Path(path_type=Path))
@common
def witness(context: Context, directory: Path) -> None:
    """Be a witness of the log, once: see that it extends what this DIRECTORY has seen, and cosign it.

    Meant for cron on a machine that the authority's keepers cannot reach. DIRECTORY holds the witness's key and all
    that it remembers. A log that was shortened or rewritten since the last time is refused, with exit code 1.
    """
    from cloister.audit import checkpoint
    from cloister.authority.journal import Head
    from cloister.authority.witness import FileWitness, ask

    client = context.client()
    key = _Memory(context).key()
    origin, public = checkpoint.parse_verifier_key(key)
    here = FileWitness(directory, log_verifier_key=key)
    client.token()  # which leaves an entry: the log is looked at after it
    note = str(client.public("/v1/checkpoint")["note"])
    known = checkpoint.verify(note, public, origin)

    def consistency(old: int) -> list[bytes]:
        from cloister.canonical import unb64

        proof = client.get("/v1/log/consistency", first=old, second=known.size)["proof"] if old else []
        return [unb64(value) for value in proof]

    lines = ask(here, Head(known.size, known.root, note), here.size, consistency)
    try:
        client.post("/v1/log/cosignatures", {"note": note + "".join(lines)})
        taken = True
    except NotFoundError:
        taken = False
    if context.json:
        output.value({"entries": known.size, "witness_key": here.key.to_text(), "taken_by_authority": taken})
        return
    output.say(f"The log of {known.size} entries extends all that {directory} has seen; it is cosigned.")
    output.facts({"witness key": here.key.to_text()})
    if not taken:
        output.say("The authority does not know this witness: name its key under authority.witnesses in config.yaml.")


def verify_log_of(
    context: Context, file: Path | None, witnesses: Sequence[WitnessKey] = (), log_key: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """Verify, and remember if it was not by a given key alone.

    Raises:
        IntegrityError: the log is not whole, or not the one that this machine knows.
    """
    from cloister.audit.export import verify_export

    memory = _Memory(context)
    with _opened(context, file) as (header, entries):
        memory.require_key(header.verifier_key, log_key)
        trusted = memory.checkpoint if log_key is None or log_key == memory.verifier_key else None
        report = verify_export(header, entries, trusted=trusted, witnesses=witnesses)
        since = (
            f"extends the log of {trusted.splitlines()[1]} entries that this machine verified before"
            if trusted
            else "first verification on this machine: its key and checkpoint are remembered from now on"
        )
        if log_key is None:
            memory.keep(header.verifier_key, header.checkpoints[-1])
        elif not trusted:
            since = "judged by the given key alone; nothing is remembered"
    return {
        "entries": report.size, "root": report.root_hex, "checkpoints": report.checkpoints_checked, "since": since,
        "witnesses": [{"witness": w.witness, "entries": w.size, "time": w.timestamp} for w in report.witnessed],
    }  # fmt: skip


class _Memory:
    """What this machine knows of the log: its key, and the newest checkpoint that it has verified."""

    def __init__(self, context: Context) -> None:
        from cloister.stores.files import read_json

        self._context = context
        self._file = context.home.client / "log.json"
        known = read_json(self._file, what="memory of the log", hint="") if self._file.exists() else {}
        self.verifier_key: str | None = known.get("verifier_key")
        self.checkpoint: str | None = known.get("checkpoint")

    def key(self) -> str:
        """The log's key, as this machine knows it.

        Raises:
            NotFoundError: it has never met an authority or a log.
        """
        if key := self._pinned() or self.verifier_key:
            return key
        raise NotFoundError("this machine does not know the log's key", "name it: --log-key KEY")

    def size(self) -> int:
        """The size of the remembered checkpoint.

        Raises:
            NotFoundError: there is none.
        """
        if self.checkpoint is None:
            raise NotFoundError("this machine has not verified the log before", "cloister audit verify FILE")
        return int(self.checkpoint.split("\n")[1])

    def require_key(self, verifier_key: str, given: str | None) -> None:
        """Refuse a log that is signed with another key than the one given, or else than the one known.

        Raises:
            IntegrityError: it is.
        """
        if given is not None:
            if verifier_key != given:
                raise IntegrityError(
                    "this log is signed with another key than the one given", "ask for the true export"
                )
            return
        if self._pinned() not in (None, verifier_key):
            raise IntegrityError("this log is signed with another key than the authority's", "ask for the true export")
        if self.verifier_key not in (None, verifier_key):
            raise IntegrityError(
                "this log is signed with another key than the log that this machine knows",
                f"if the authority was set up anew, remove {self._file}",
            )

    def keep(self, verifier_key: str, note: str) -> None:
        from cloister.stores.files import private_directory, write_json

        private_directory(self._context.home.client)
        write_json(self._file, {"verifier_key": verifier_key, "checkpoint": note})

    def _pinned(self) -> str | None:
        """The key as pinned when this machine first met its authority; None on a machine that never did."""
        try:
            return str(self._context.pinned()["log_verifier_key"])
        except NotFoundError:
            return None


@contextlib.contextmanager
def _opened(context: Context, file: Path | None) -> Iterator[tuple[Header, Iterator[bytes]]]:
    """An export; or, without a file, this machine's own log, for which the authority need not run."""
    from cloister.audit.export import open_export

    if file is not None:
        with contextlib.ExitStack() as stack:
            try:
                opened = stack.enter_context(file.open("rb"))
            except FileNotFoundError as error:
                raise NotFoundError(f"there is no export {file}", "check the path") from error
            except OSError as error:
                raise InputError(f"the export {file} cannot be read: {error.strerror}", "check its path") from error
            yield open_export(opened)
        return
    from cloister.authority.log import read_export
    from cloister.config import Settings
    from cloister.stores.database import Database

    state, key_file = context.home.authority / "state.db", context.home.authority / "log.pub"
    database = Settings.load(context.home).authority.open_database() if key_file.exists() else None
    if database is None:
        if not state.exists() or not key_file.exists():
            raise NotFoundError("there is no log on this machine", "name an export: cloister audit verify FILE")
        database = Database(state)
    try:
        yield read_export(database, key_file.read_text().strip())
    finally:
        database.close()


def _bundle(file: Path) -> dict[str, Any] | None:
    """The proof in a file; None if it holds no proof."""
    from cloister.audit import proof
    from cloister.client.seal import read_file

    try:
        if file.stat().st_size > proof.MAX_BYTES:
            return None
    except OSError:
        pass  # which `read_file` explains
    try:
        return proof.parse(read_file(file, "proof"))
    except InputError:
        return None


def _show_proof(context: Context, bundle: dict[str, Any], key: str, witnesses: Sequence[WitnessKey]) -> None:
    from cloister.audit import proof

    if bundle["format"] == proof.CONSISTENCY:
        grown = proof.verify_consistency(bundle, key, witnesses)
        seen: dict[str, Any] = {"first": grown.first.size, "second": grown.second.size}
        said, shown = f"The log of {grown.second.size} entries extends that of {grown.first.size}.", {}
        cosignatures = _seen_by(grown.cosignatures, grown.second.size)
    else:
        included = proof.verify_inclusion(bundle, key, witnesses)
        event = included.event
        seen = {"index": included.index, "size": included.checkpoint.size, "event": event.to_ocsf()}
        said = f"Entry {included.index} is in the log of {included.checkpoint.size} entries, as it is:"
        shown = {"when": event.time, "who": event.actor, "what": event.action, "on what": event.resource,
                 "result": event.outcome, "under": event.rule or event.reason}  # fmt: skip
        cosignatures = _seen_by(included.cosignatures, included.checkpoint.size)
    if context.json:
        output.value(seen | {"witnesses": cosignatures})
        return
    output.say(said)
    if facts := shown | _cosigned(cosignatures):
        output.facts(facts)


def _seen_by(cosignatures: Sequence[Cosignature], size: int) -> list[dict[str, Any]]:
    return [{"witness": one.witness, "entries": size, "time": one.timestamp} for one in cosignatures]


def _cosigned(witnesses: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What to say about each witness."""
    return {
        f"seen by {one['witness']}": f"{one['entries']} entries, {datetime.fromtimestamp(one['time'], UTC).isoformat()}"
        for one in witnesses
    }


def _text_or_file(text: str) -> str:
    """A key, or what a file of that name holds."""
    path = Path(text)
    try:
        return path.read_text().strip() if path.is_file() else text
    except (OSError, ValueError):
        raise InputError("the file with that key cannot be read", "name the key itself: name+hash+key") from None


def _writable(file: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}", "name another file") from error


def _write(file: Path, lines: Iterable[bytes]) -> int:
    """All the lines under that name, or nothing. Returns how many there are."""
    partial = file.with_name(f".{file.name}.partial")
    count = 0

    def write() -> None:
        nonlocal count
        with partial.open("wb") as opened:
            for line in lines:
                opened.write(line)
                count += 1
        partial.replace(file)

    try:
        _writable(file, write)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _send_to_syslog(context: Context, address: str, ca: Path | None, first: int) -> None:
    """RFC 5424 over TLS (RFC 5425): done once the server has taken all and said goodbye."""
    from cloister.audit import siem
    from cloister.audit.event import Event

    host, port = _host_and_port(address)
    try:
        trust = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{ca} is not a usable CA certificate", "name a PEM file: --ca FILE") from error
    trust.minimum_version = ssl.TLSVersion.TLSv1_2
    hostname, sent = socket.gethostname(), 0
    lines = context.client().lines("/v1/log/export", form="ocsf", first=first)
    try:
        with (
            socket.create_connection((host, port), timeout=TIMEOUT_S) as plain,
            trust.wrap_socket(plain, server_hostname=host) as secure,
        ):
            for line in lines:
                event = Event.from_bytes(line.removesuffix(b"\n"))
                secure.sendall(siem.frame(siem.syslog(first + sent, event, hostname)))
                sent += 1
            secure.unwrap()
    except CloisterError:
        raise
    except OSError as error:
        raise UnavailableError(
            f"the syslog server {host} did not take the log ({type(error).__name__}); {sent} entries were sent",
            f"check its address and its CA, then go on: --from {first + sent}",
        ) from error
    if context.json:
        output.value({"server": address, "first": first, "entries": sent})
    else:
        output.say(f"{sent} entries were sent to {address}. Next time: --from {first + sent}")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        host, port = address, str(SYSLOG_PORT)
    if not 0 < int(port) < 65536:
        raise InputError("that is no port", "write HOST:PORT, such as siem.example:6514")
    return host.strip("[]"), int(port)
