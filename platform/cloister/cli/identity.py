"""`cloister login | logout | token | identity`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, authority_address, common, key_file, session_file
from cloister.errors import CloisterError, ConflictError, InputError, UnavailableError
from cloister.stores.files import private_directory, write_atomic

RESOURCES = ("authority", "inference")


@click.command()
@click.argument("name", type=NAME, required=False)
@click.option("--issuer", help="Log in at this OpenID Connect issuer instead of with a key of your own.")
@click.option("--browser", is_flag=True, help="With --issuer: in this machine's browser, not by a code.")
@click.option("--issuer-ca", type=click.Path(path_type=Path), help="The issuer's CA, if the system does not know it.")
@common
def login(context: Context, name: str | None, issuer: str | None, browser: bool, issuer_ca: Path | None) -> None:
    """Choose who you are on this machine, and check that the authority agrees.

    With a key: `cloister login NAME`. At your organisation's issuer: `cloister login --issuer URL`.
    """
    if issuer:
        name = _login_at(context, issuer, browser, issuer_ca)
    elif name:
        Context(context.home, name, context.json).client().token()
    else:
        raise InputError("who are you?", "cloister login NAME   or cloister login --issuer URL")
    write_atomic(context.home.identities / "current", name.encode())
    if context.json:
        output.value({"identity": name})
    else:
        how = "your session" if issuer else "your key"
        output.say(f"You are {name} on this machine. Tokens live ten minutes and are renewed with {how}.")


def _login_at(context: Context, issuer: str, browser: bool, ca: Path | None) -> str:
    from cloister.client import oidc
    from cloister.client.session import exchange

    url, authority_ca = authority_address(context.home)
    known = {each["issuer"]: each for each in context.pinned().get("issuers", [])}
    if issuer not in known:
        raise InputError(
            f"the authority does not trust {issuer[:200]}", f"it trusts: {', '.join(sorted(known)) or 'no issuer yet'}"
        )
    settings = known[issuer]
    facts: dict[str, Any] = {"resource": settings["audience"], "scope": settings["scope"], "ca": ca}
    if browser:
        tokens = oidc.browser_login(issuer, settings["client_id"], **facts)
    else:
        tokens = oidc.device_login(issuer, settings["client_id"], show=_show_code, **facts)
    return exchange(url, authority_ca, tokens.access_token, context.home.identities)


def _show_code(prompt: Any) -> None:
    where = prompt.verification_uri_complete or prompt.verification_uri
    print(f"Open {where}\nand check that it shows the code {prompt.user_code}", file=sys.stderr, flush=True)


@click.command()
@common
def logout(context: Context) -> None:
    """End your session: its tokens are dead, and this machine forgets who you were. Keys stay."""
    from cloister.client.session import end

    current = context.home.identities / "current"
    name = context.name()
    file = session_file(context.home, name)
    if file.exists():
        url, ca = authority_address(context.home)
        end(url, ca, file)
    current.unlink(missing_ok=True)
    if context.json:
        output.value({"identity": name})
    else:
        output.say(f"{name} is logged out here.")


@click.command()
@click.option("--for", "resource", type=click.Choice(RESOURCES), default="inference", show_default=True)
@common
def token(context: Context, resource: str) -> None:
    """Print a short-lived access token, for curl and other clients. Treat it as a password for ten minutes."""
    from cloister.signing import tokens

    audience = tokens.INFERENCE_AUDIENCE if resource == "inference" else tokens.AUTHORITY_AUDIENCE
    text = context.client().token(audience)
    if context.json:
        output.value({"access_token": text})
    else:
        output.say(text)


@click.group()
def identity() -> None:
    """Register, change, revoke and list identities."""


@identity.command()
@click.argument("name", type=NAME)
@click.option("--role", "roles", multiple=True, required=True, help="May be given more than once.")
@click.option(
    "--public-key", type=click.Path(path_type=Path), help="Their public key (PEM); default: make a pair here."
)
@click.option("--service", is_flag=True, help="A program, not a person.")
@click.option("--issuer", help="With --subject: they log in at this OpenID Connect issuer.")
@click.option("--subject", help="Who they are there (the `sub` of their tokens).")
@common
def add(
    context: Context, name: str, roles: tuple[str, ...], public_key: Path | None, service: bool, issuer: str | None,
    subject: str | None,
) -> None:  # fmt: skip
    """Register somebody. Without --public-key or --issuer a key pair is made on this machine and stays here."""
    from cloister.client.seal import read_file
    from cloister.signing import keys

    body: dict[str, Any] = {"name": name, "roles": list(roles), "kind": "service" if service else "person"}
    private, made = key_file(context.home, name), None
    if bool(issuer) != bool(subject):
        raise InputError("an issuer goes with a subject", "give both --issuer and --subject")
    if issuer:
        body |= {"issuer": issuer, "subject": subject}
    if public_key is not None:
        body["public_key"] = read_file(public_key, "public key file").decode(errors="replace")
    elif not issuer:
        if private.exists():
            raise ConflictError(
                f"a key for {name} is on this machine already", f"use it: --public-key {private.with_suffix('.pub')}"
            )
        made = keys.generate_ed25519()
        body["public_key"] = keys.public_to_pem(made.public_key()).decode()
    client = context.client()
    if made is not None:  # on disk before the authority knows of it
        private_directory(context.home.identities)
        write_atomic(private, keys.private_to_pem(made), replace=False)
        write_atomic(private.with_suffix(".pub"), body["public_key"].encode())
    try:
        shown = client.post("/v1/identities", body)
    except UnavailableError:
        raise  # it may have been recorded: the key stays
    except CloisterError:
        if made is not None:
            private.unlink()
            private.with_suffix(".pub").unlink()
        raise
    if context.json:
        output.value(shown)
    else:
        output.say(f"{name} is registered as {', '.join(roles)}. " + (f"Key: {private} (0600)." if made else ""))


@identity.command(name="list")
@common
def list_(context: Context) -> None:
    """List people, services and nodes, and what they may do."""
    rows = context.client().get("/v1/identities")
    if context.json:
        output.value(rows)
        return
    cells = [
        (r["name"], r["kind"], [*r["roles"], *(f"{e['role']} (lent)" for e in r["elevated"])],
         r["attributes"].get("region", ""), "revoked" if r["disabled"] else "", r["registered_by"])
        for r in rows
    ]  # fmt: skip
    headings = ("name", "kind", "roles", "region", "state", "registered by")
    output.table(headings, cells, empty="Nobody is registered.")


@identity.command()
@click.argument("name", type=NAME)
@click.option("--role", "roles", multiple=True, required=True, help="May be given more than once.")
@common
def roles(context: Context, name: str, roles: tuple[str, ...]) -> None:
    """Give NAME these roles instead of those it has. It takes effect at once, everywhere."""
    shown = context.client().put(f"/v1/identities/{name}/roles", {"roles": list(roles)})
    if context.json:
        output.value(shown)
    else:
        output.say(f"{name} is {', '.join(roles)} from now on. Tokens given before are dead.")


@identity.command()
@click.argument("name", type=NAME)
@common
def revoke(context: Context, name: str) -> None:
    """Shut NAME out, at once, everywhere and for good."""
    shown = context.client().post(f"/v1/identities/{name}/revocation")
    if context.json:
        output.value(shown)
    else:
        output.say(f"{name} is out: no token is given any more, and those that were are dead.")


@identity.command()
@click.argument("name", type=NAME)
@common
def forget(context: Context, name: str) -> None:
    """Forget which log entries are about NAME, who was revoked. The log stays whole and verifiable.

    What they own or have signed keeps their name: datasets, runs, models and approvals, whose ids the log has too.
    """
    shown = context.client().post(f"/v1/identities/{name}/shredding")
    if context.json:
        output.value(shown)
    else:
        output.say(f"The log does not say any more which entries are about {name}. This cannot be undone.")


@identity.command()
@click.argument("name", type=NAME)
@common
def new(context: Context, name: str) -> None:
    """Make a key pair on this machine, for somebody else to register."""
    public = _make_key(context, name)
    if context.json:
        output.value({"name": name, "public_key": str(public)})
    else:
        output.say(f"An operator runs: cloister identity add {name} --role ROLE --public-key {public}")


@identity.command()
@common
def key(context: Context) -> None:
    """Make and register a signing key of your own, or a new one in its place.

    For whoever logs in at an issuer and is to approve or seal; and for a key that has been in use for long enough.
    """
    import time

    from cloister.signing import keys, tokens

    name = context.name()
    client = context.client()
    private = key_file(context.home, name)
    made = keys.generate_ed25519()
    public = keys.public_to_pem(made.public_key())
    body = {"public_key": public.decode()}
    if client.get("/v1/me")["has_key"]:
        audience = tokens.key_proof_audience(client.url, public)
        body["proof"] = tokens.issue_assertion(context.private_key(), subject=name, audience=audience, now=time.time())
    coming = private.with_suffix(".key.new")  # on disk before the authority knows of it
    write_atomic(coming, keys.private_to_pem(made))
    try:
        shown = client.put(f"/v1/identities/{name}/key", body)
    except CloisterError:
        coming.unlink()
        raise
    coming.replace(private)
    write_atomic(private.with_suffix(".pub"), public)
    if context.json:
        output.value(shown)
    else:
        output.say(f"{name} can sign now: {key_file(context.home, name)} (0600) stays on this machine.")


def _make_key(context: Context, name: str) -> Path:
    from cloister.signing import keys

    _require_no_key(context, name)
    made = keys.generate_ed25519()
    return _write_key(context, name, keys.private_to_pem(made), keys.public_to_pem(made.public_key()))


def _require_no_key(context: Context, name: str) -> None:
    private = key_file(context.home, name)
    if private.exists():
        raise ConflictError(
            f"a key for {name} is on this machine already", f"its public half: {private.with_suffix('.pub')}"
        )


def _write_key(context: Context, name: str, private_pem: bytes, public_pem: bytes) -> Path:
    private = key_file(context.home, name)
    private_directory(context.home.make().identities)
    write_atomic(private, private_pem, replace=False)
    write_atomic(private.with_suffix(".pub"), public_pem)
    return private.with_suffix(".pub")
