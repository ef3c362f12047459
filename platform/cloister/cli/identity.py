"""`cloister login | token | identity`."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common, key_file
from cloister.errors import ConflictError, NotFoundError
from cloister.stores.files import private_directory, write_atomic

RESOURCES = ("authority", "inference")


@click.command()
@click.argument("name", type=NAME)
@common
def login(context: Context, name: str) -> None:
    """Choose who you are on this machine, and check that the authority agrees."""
    chosen = Context(context.home, name, context.json)
    chosen.client().token()
    write_atomic(context.home.identities / "current", name.encode())
    if context.json:
        output.value({"identity": name})
    else:
        output.say(f"You are {name} on this machine. Tokens live ten minutes and are renewed with your key.")


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
    """Register and list identities."""


@identity.command()
@click.argument("name", type=NAME)
@click.option("--role", "roles", multiple=True, required=True, help="May be given more than once.")
@click.option(
    "--public-key", type=click.Path(path_type=Path), help="Their public key (PEM); default: make a pair here."
)
@common
def add(context: Context, name: str, roles: tuple[str, ...], public_key: Path | None) -> None:
    """Register a person. Without --public-key a key pair is made on this machine and stays here."""
    from cloister.client.seal import read_file
    from cloister.signing import keys

    private = key_file(context.home, name)
    made = None
    if public_key is not None:
        public = read_file(public_key, "public key file")
    else:
        if private.exists():
            raise ConflictError(
                f"a key for {name} is on this machine already", f"use it: --public-key {private.with_suffix('.pub')}"
            )
        made = keys.generate_ed25519()
        public = keys.public_to_pem(made.public_key())
    body = {"name": name, "roles": list(roles), "public_key": public.decode(errors="replace")}
    shown = context.client().post("/v1/identities", body)
    if made is not None:
        private_directory(context.home.identities)
        write_atomic(private, keys.private_to_pem(made), replace=False)
        write_atomic(private.with_suffix(".pub"), public)
    if context.json:
        output.value(shown)
    else:
        output.say(f"{name} is registered as {', '.join(roles)}. " + (f"Key: {private} (0600)." if made else ""))


@identity.command(name="list")
@common
def list_(context: Context) -> None:
    """List people and their roles."""
    rows = context.client().get("/v1/identities")
    if context.json:
        output.value(rows)
    else:
        cells = [(row["name"], row["roles"], row["registered_by"]) for row in rows]
        output.table(("name", "roles", "registered by"), cells, empty="Nobody is registered.")


@identity.command()
@click.argument("name", type=NAME)
@common
def new(context: Context, name: str) -> None:
    """Make a key pair on this machine, for somebody else to register."""
    from cloister.signing import keys

    private = key_file(context.home, name)
    if private.exists():
        raise ConflictError(
            f"a key for {name} is on this machine already", f"its public half: {private.with_suffix('.pub')}"
        )
    key = keys.generate_ed25519()
    private_directory(context.home.make().identities)
    write_atomic(private, keys.private_to_pem(key), replace=False)
    public = private.with_suffix(".pub")
    write_atomic(public, keys.public_to_pem(key.public_key()))
    if not public.is_file():
        raise NotFoundError("the key was not written", "check the disk")
    if context.json:
        output.value({"name": name, "public_key": str(public)})
    else:
        output.say(f"An operator runs: cloister identity add {name} --role ROLE --public-key {public}")
