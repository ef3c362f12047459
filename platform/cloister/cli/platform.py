"""`cloister up | down | doctor`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common, key_file, require_free_port
from cloister.cluster import clusters_folder, reap
from cloister.config import AuthoritySettings, Settings
from cloister.errors import CloisterError, InputError, UnavailableError
from cloister.process import Daemon
from cloister.stores.files import private_directory, write_atomic, write_json
from cloister.stores.home import Home
from cloister.stores.keys.root import PASSPHRASE_VARIABLE, SEALED_FILE
from cloister.stores.keys.settings import EmbeddedSettings, VaultSettings

OPERATOR = "operator"
NODE = "local"
START_TIMEOUT_S = 30.0


@click.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on.  [default: 8470]")
@click.option("--region", help="Where this machine is: only data of this region is opened on it.  [default: eu]")
@common
def up(context: Context, host: str | None, port: int | None, region: str | None) -> None:
    """Start the authority on this machine.

    The first start makes its keys, its CA and your first identity, `operator`.
    """
    home = context.home.make()
    settings = Settings.load(home).authority
    settings = AuthoritySettings.model_validate(
        settings.model_dump()
        | {name: value for name, value in (("host", host), ("port", port), ("region", region)) if value is not None}
    )
    settings.require_safe()
    shown = start_authority(home, settings)
    _settle_orphans(home)
    if context.json:
        output.value(shown)
    elif shown["started"]:
        state = "PostgreSQL" if settings.database else "SQLite"
        service = "Vault" if isinstance(settings.keys, VaultSettings) else "embedded keys"
        output.say(f"The authority is up at {shown['url']} (TLS, own CA, {service}, {state}).")
        output.say("Protected now: keys rest encrypted, every call is authenticated, every grant is logged.")
        output.say("Not protected: from whoever controls this machine or this home (assurance level L0).")
        output.say("Next: cloister identity add NAME --role data-owner|engineer|reviewer|consumer")
    else:
        output.say(f"The authority is running already at {shown['url']}.")


def start_authority(home: Home, settings: AuthoritySettings) -> dict[str, Any]:
    """Start it unless it runs; remember its address.

    Raises:
        UnavailableError: the port is taken, or it did not come up.
    """
    daemon = Daemon(home.authority / "daemon")
    url = settings.url
    if daemon.process() is not None and daemon.status()["state"] == "ready":
        return {"url": _known_url(home) or url, "started": False}
    require_free_port(settings.host, settings.port)
    public = _operator_key(home)
    private_directory(home.authority)
    write_atomic(home.authority / "settings.json", settings.model_dump_json(indent=2).encode())
    arguments = [str(home.authority), "--settings", str(home.authority / "settings.json"), "--operator", OPERATOR,
                 "--operator-key", str(public)]  # fmt: skip
    ca = settings.tls_certificate or home.authority / "ca.pem"
    daemon.start("cloister.authority", arguments, *_for_keys(home, settings.keys))
    with output.progress("starting the authority"):
        daemon.wait_ready(START_TIMEOUT_S, what="the authority")
    private_directory(home.client)
    write_atomic(home.client / "ca.pem", ca.read_bytes())
    # Pinned from here on: nobody who can answer at this address later can put keys of their own in their place.
    pinned = Context(home, OPERATOR, False).client_of(url).public("/v1/info")
    write_atomic(home.client / "endpoint-ca.pem", pinned["endpoint_ca"].encode())
    write_json(home.client / "authority.json", {"url": url, "pinned": pinned})
    current = home.identities / "current"
    if not current.exists():
        write_atomic(current, OPERATOR.encode())
    _register_this_machine(home, url, settings.region)
    return {"url": url, "started": True}


def _for_keys(home: Home, settings: EmbeddedSettings | VaultSettings) -> tuple[dict[str, str], bytes]:
    """What the key service takes: variables, and the passphrase if somebody must type it."""
    if isinstance(settings, VaultSettings):
        from cloister.stores.keys.vault_connection import variables

        return variables(os.environ), b""
    if not settings.passphrase:
        return {}, b""
    if named := os.environ.get(PASSPHRASE_VARIABLE):
        return {PASSPHRASE_VARIABLE: str(Path(named).absolute())}, b""
    if settings.passphrase_file:
        return {}, b""
    if not sys.stdin.isatty():
        raise InputError(
            "nobody is there to type the passphrase", f"name a file of mode 0600 in ${PASSPHRASE_VARIABLE}"
        )
    new = not (home.authority / "keys" / SEALED_FILE).exists()
    typed = click.prompt("Passphrase of the root key", hide_input=True, confirmation_prompt=new)
    return {}, str(typed).encode() + b"\n"


def _register_this_machine(home: Home, url: str, region: str) -> None:
    """What is started on this machine runs on a node: this one, under the name `local`."""
    from cloister.client.node import NodeFolder

    folder = NodeFolder(home.node)
    if folder.exists:
        return
    body = {"name": NODE, "public_key": folder.make(NODE), "region": region}
    with contextlib.closing(Context(home, OPERATOR, False).client_of(url)) as client:
        try:
            client.post("/v1/nodes", body)
        except CloisterError:
            (folder.directory / "node.json").unlink()  # or the next start would believe that it is registered
            raise


def _known_url(home: Home) -> str | None:
    from cloister.cli.context import authority_address

    try:
        return authority_address(home)[0]
    except CloisterError:
        return None


def _operator_key(home: Home) -> Path:
    from cloister.signing import keys

    private_directory(home.identities)
    private = key_file(home, OPERATOR)
    if not private.exists():
        write_atomic(private, keys.private_to_pem(keys.generate_ed25519()))
    public = private.with_suffix(".pub")
    write_atomic(public, keys.public_to_pem(keys.ed25519_from_pem(private.read_bytes()).public_key()))
    return public


@click.command()
@common
def down(context: Context) -> None:
    """Stop everything that this Cloister started: endpoints, training runs, the authority. Nothing else."""
    home = context.home
    stopped = []
    for kind, folder, part in (("endpoint", home.endpoints, "serving"), ("run", home.runs, "driver")):
        for directory in sorted(folder.glob("*/")):
            daemon = Daemon(directory / part)
            cluster = daemon.status().get("cluster")
            if daemon.stop():
                stopped.append(f"{kind} {directory.name}")
            if cluster and Path(cluster).exists():  # its supervisor and its guardian were both killed
                reap(Path(cluster))
    _settle_orphans(home)
    if Daemon(home.authority / "daemon").stop():
        stopped.append("authority")
    if context.json:
        output.value({"stopped": stopped})
    else:
        output.say(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")
        output.say("What is left on disk is ciphertext, public facts and key files that only you can read.")


def _settle_orphans(home: Home) -> None:
    """Tell the authority of runs whose supervisor is gone, while it can be told; `cloister up` does so again."""
    from cloister.cli.train import settle_orphan

    for directory in sorted(home.runs.glob("*/")):
        with contextlib.suppress(CloisterError):
            settle_orphan(home, directory.name)


@click.command()
@common
def doctor(context: Context) -> None:
    """Explain what runs and how well it is protected."""
    findings = list(_findings(context.home))
    if context.json:
        output.value([{"check": name, "state": state, "detail": detail} for name, state, detail in findings])
    else:
        output.table(("check", "state", "detail"), findings, empty="Nothing to check.")
    if any(state == "bad" for _, state, _ in findings):
        raise UnavailableError("something needs attention", "see the rows marked bad")


def _findings(home: Home) -> Any:
    daemon = Daemon(home.authority / "daemon")
    runs = daemon.process() is not None
    yield "authority", "good" if runs else "off", _known_url(home) or "not started: cloister up"
    if runs:
        yield from _findings_of_authority(home)
    for name, path in (("home", home.path), ("authority", home.authority), ("identities", home.identities)):
        if path.exists():
            closed = not path.stat().st_mode & 0o077
            yield f"{name} folder", "good" if closed else "bad", "closed to others" if closed else f"chmod 700 {path}"
    loose = [key for key in sorted(home.path.rglob("*.key")) if key.stat().st_mode & 0o077]
    yield "key files", "bad" if loose else "good", f"chmod 600 {loose[0]}" if loose else "readable only by you"
    yield "key service", *_key_service(Settings.load(home).authority.keys)
    swap = _swap_bytes()
    yield "swap", "weak" if swap else "good", "keys may be swapped out: turn swap off or encrypt it" if swap else "off"
    clusters = clusters_folder()
    place = clusters if clusters.exists() else clusters.parent
    writable = os.access(place, os.W_OK)
    yield "tmpfs for Ray", "good" if writable else "bad", str(place) if writable else f"make {place} a writable tmpfs"
    for directory in sorted(home.endpoints.glob("*/")):
        daemon = Daemon(directory / "serving")
        if daemon.process():
            yield f"endpoint {directory.name}", "good", "HTTPS on loopback, tokens, quota, filtered answers"
        elif daemon.status()["state"] == "ready":
            yield f"endpoint {directory.name}", "bad", f"its supervisor is gone: cloister serve stop {directory.name}"
    for directory in sorted(home.runs.glob("*/")):
        daemon = Daemon(directory / "driver")
        if daemon.process():
            yield f"run {directory.name}", "good", "a Ray cluster of its own, on loopback, gone when the run ends"
        elif daemon.status()["state"] == "ready":
            yield f"run {directory.name}", "bad", f"its supervisor is gone: cloister train watch {directory.name}"
    yield "assurance", "L0", "software only: whoever controls a worker's machine sees what the worker sees"


def _key_service(settings: EmbeddedSettings | VaultSettings) -> tuple[str, str]:
    if isinstance(settings, VaultSettings):
        return "good", "a Vault: wrapping and signing keys never leave it"
    sealed = "sealed by a passphrase" if settings.passphrase else "a file: whoever can read it opens every key"
    return "good" if settings.passphrase else "weak", f"embedded; the root key is {sealed}"


def _findings_of_authority(home: Home) -> Any:
    """What only the authority knows, and tells anybody."""
    from cloister.client.node import NodeFolder
    from cloister.signing.certificates import remaining

    url = _known_url(home) or ""
    with contextlib.closing(Context(home, OPERATOR, False).client_of(url)) as client:
        shown = client.public("/v1/checkpoint")
        issuers = client.public("/v1/info")["issuers"]
    size, cosigned = int(shown["note"].splitlines()[1]), shown["cosigned"]
    if cosigned:
        yield "witnesses", "good", f"{cosigned.splitlines()[1]} of {size} entries of the log are cosigned"
    else:
        yield "witnesses", "weak", "nobody would notice a log that was rewritten: cloister audit witness DIR, elsewhere"
    logins = "keys of their own" + "".join(f", {each['issuer']}" for each in issuers)
    yield "logins", "good", f"{logins}; no passwords; tokens of ten minutes"
    certificate = NodeFolder(home.node).directory / "tls.pem"
    if certificate.exists():
        left = remaining(certificate.read_bytes())
        yield "node certificate", "good" if left > 0 else "weak", f"{max(0.0, left) * 24:.0f} of 24 hours left"


def _swap_bytes() -> int:
    import psutil

    return int(psutil.swap_memory().total)
