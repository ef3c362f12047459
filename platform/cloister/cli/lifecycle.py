"""`cloister data list | show | erase | rectify | expire | certificate`: what there is, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common
from cloister.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from cloister.client.erase import Owner

REASONS = ("request", "consent-withdrawn", "objection", "no-longer-needed", "unlawful", "legal-obligation")
STDIN = "-"
_SOON_S = 30 * 24 * 3600


@click.command(name="list")
@common
def list_(context: Context) -> None:
    """List dataset versions, and when each is due to be destroyed."""
    rows = context.client().get("/v1/datasets")
    if context.json:
        output.value(rows)
        return
    cells = [
        (r["dataset"], r["owner"], f"{r['rows']:,}", r["files"], _state(r), _due(r), _left(r["budget"]))
        for r in rows
    ]  # fmt: skip
    output.table(("dataset", "owner", "rows, about", "files", "state", "due", "epsilon left"), cells,
                 empty="No dataset is sealed yet.")  # fmt: skip


@click.command()
@click.argument("dataset")
@common
def show(context: Context, dataset: str) -> None:
    """Show a version's public facts, and the lineage: what it was made from, and what was trained on it."""
    from cloister.datasets.manifest import DatasetManifest, parse_reference

    name, version = parse_reference(dataset)
    shown = context.client().get(f"/v1/datasets/{name}/versions/{version}")
    if context.json:
        output.value(shown)
        return
    schema = shown["manifest"]["dataset_schema"]
    unit = schema["unit"]
    rows = f"about {shown['published']['train']:,} to train on, about {shown['published']['holdout']:,} held out"
    if shown["envelope"]:  # its owner's
        manifest = DatasetManifest.parse(shown["manifest"])
        rows += f" (exactly {manifest.rows('train'):,} and {manifest.rows('holdout'):,}: nobody else is told)"
    output.facts({"dataset": shown["dataset"], "state": _state(shown), "owner": shown["owner"],
                  "purpose": schema["purpose"], "region": schema["region"],
                  "retention": f"{schema['retention']}, until {_day(shown['due'])}",
                  "rows": rows,
                  "unit of privacy": unit if unit == "row" else f"{unit['column']}, up to {unit['max_rows']} rows",
                  "made by code": shown["manifest"]["lineage"]["code"], "digest": shown["digest"],
                  "epsilon left": _left(shown["budget"])})  # fmt: skip
    cells = [(c["name"], c["type"], c["class"], c.get("role")) for c in schema["columns"]]
    output.table(("column", "type", "class", "role"), cells, empty="No columns.")
    output.say()
    for line in tree(shown["lineage"], shown["dataset"]):
        output.say(line)


def _left(budget: dict[str, Any]) -> Any:
    """What a budget has left; of one that a version has to wait for, that it is asked about."""
    return budget["epsilon_left"] if budget["joined"] else "asked"


def tree(lineage: list[dict[str, Any]], marked: str) -> Iterator[str]:
    """The versions of a dataset as lines of a tree, with the runs and models of each below it."""
    own = {each["dataset"] for each in lineage}
    children: dict[str | None, list[dict[str, Any]]] = {}
    for each in lineage:
        children.setdefault(next((parent for parent in each["parents"] if parent in own), None), []).append(each)

    def draw(each: dict[str, Any], before: str, last: bool) -> Iterator[str]:
        foreign = [parent for parent in each["parents"] if parent not in own]
        made = f" from {', '.join(foreign)}" if foreign else ""
        star = " *" if each["dataset"] == marked else ""
        yield (f"{before}{'└─' if last else '├─'} {each['dataset']}{star}  {each['kind']}{made}, about "
               f"{each['rows']:,} rows, {_day(each['created'])}, {_state(each)}")  # fmt: skip
        inner = before + ("   " if last else "│  ")
        below = children.get(each["dataset"], [])
        for run in each["runs"]:
            model = f" → {run['model']} ({run['stage']})" if run["model"] else ""
            flags = f", learned what is gone: {', '.join(run['flags'])}" if run["flags"] else ""
            yield f"{inner}{'│' if below else ' '}  {run['run']} {run['state']}{model}{flags}"
        for child in below:
            yield from draw(child, inner, child is below[-1])

    roots = children.get(None, [])
    for root in roots:
        yield from draw(root, "", root is roots[-1])


def _subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--subject", metavar="VALUE", help="Whose rows, as the data names them. Other users of this machine see what "
        "stands in a command line: with `-` it is asked for, or read from standard input.",
    )(command)  # fmt: skip


@click.command()
@click.argument("dataset", type=NAME)
@_subject_options
@click.option("--subjects-file", type=click.Path(path_type=Path), help="Several of them, one in each line.")
@click.option("--reason", type=click.Choice(REASONS), default="request", show_default=True,
              help="The ground, after GDPR article 17. It goes on record; the subject does not.")  # fmt: skip
@common
def erase(context: Context, dataset: str, subject: str | None, subjects_file: Path | None, reason: Any) -> None:
    """Erase all rows of somebody from every live version of DATASET, and have it certified.

    Only the shards that hold them are opened, here, and sealed again as the next version. In the moment in which that
    is registered the old keys are destroyed, the versions before end, and models that were trained on them are flagged.
    """
    from cloister.client.erase import erase as erase_rows

    subjects = _subjects(subject, subjects_file)
    with output.progress(f"erasing from {dataset}") as advance:
        done = erase_rows(_owner(context), dataset, subjects, reason=reason, progress=advance)
    if context.json:
        output.value(done)
        return
    missing = done["subjects_asked"] - done["subjects_found"]
    output.say(f"Erased {done['rows']:,} rows of {done['subjects_found']:,} subject(s) from {dataset}.")
    if missing:
        output.say(f"{missing:,} of {done['subjects_asked']:,} subjects are in no live version.")
    _tell(done)


@click.command()
@click.argument("dataset", type=NAME)
@_subject_options
@click.option("--set", "changes", multiple=True, metavar="COLUMN=VALUE", required=True,
              help="What is right; repeatable. VALUE may be `-`: then it is asked for.")  # fmt: skip
@common
def rectify(context: Context, dataset: str, subject: str | None, changes: tuple[str, ...]) -> None:
    """Correct values in all rows of somebody, in the next version of DATASET. Versions with the wrong ones end."""
    from cloister.client.erase import rectify as rectify_rows

    (who,) = _subjects(subject, None)
    values: dict[str, str] = {}
    for change in changes:
        column, found, value = change.partition("=")
        if not found or not column or column in values:
            raise InputError("a correction is written as --set column=value, once for each column", "see --help")
        values[column] = _asked(f"The right value of {column}") if value == STDIN else value
    with output.progress(f"correcting {dataset}") as advance:
        done = rectify_rows(_owner(context), dataset, who, values, progress=advance)
    if context.json:
        output.value(done)
        return
    output.say(f"Corrected {len(values)} column(s) in {done['rows']:,} rows of {dataset}.")
    _tell(done)


@click.command()
@click.argument("dataset")
@click.option("--now", "early", is_flag=True, help="Before it is due. That takes the approvals of destroying keys.")
@common
def expire(context: Context, dataset: str, early: bool) -> None:
    """Destroy a version whose retention is over: its keys, its files, and with them every copy.

    The authority does that by itself when a version is due. Files that other live versions list stay. A version
    that was appended to is due, whole, when the oldest of its parts is: seal what is to be kept longer anew before.
    """
    from cloister.datasets.manifest import parse_reference

    name, version = parse_reference(dataset)
    done = context.client().post(f"/v1/datasets/{name}/versions/{version}/expiry", {"early": early})
    if context.json:
        output.value(done)
        return
    output.say(f"{dataset} has ended: {done['keys_destroyed']:,} data keys are destroyed.")
    tell_certificate(done)


@click.command()
@click.argument("certificate")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Keep it in this file, for whoever asks for it.")
@common
def certificate(context: Context, certificate: str, target: Path | None) -> None:
    """Show what a certificate says, once its signature holds.

    CERTIFICATE is the id of an erasure, or a file. A file is verified offline, against the release key that this
    machine has pinned.
    """
    from cloister.client.erase import verified_certificate
    from cloister.client.seal import read_file
    from cloister.datasets.erasure import sentences
    from cloister.signing.dsse import strict_json
    from cloister.stores.files import write_json

    if certificate.startswith("ers-") and not Path(certificate).exists():
        envelope = context.client().get(f"/v1/erasures/{certificate}")["certificate"]
        if envelope is None:
            raise UnavailableError(
                f"{certificate} is not signed yet: the authority is still destroying keys", "ask again in some minutes"
            )
    else:
        envelope = strict_json(read_file(Path(certificate), "certificate"))
    facts = verified_certificate(envelope, context.pinned()["release_public_key"].encode())
    if target is not None:
        write_json(target, envelope)
    if context.json:
        output.value({"certificate": envelope, "facts": facts.model_dump(mode="json")})
        return
    for sentence in sentences(facts):
        output.say(sentence)
    output.say(f"Signed by this authority's release key{f'; kept in {target}' if target else ''}.")


def _tell(done: dict[str, Any]) -> None:
    """What is protected now, and what is not."""
    facts = done["facts"]
    if done["dataset"]:
        output.say(f"In place of what ended: {done['dataset']}. Name it in training specs from now on.")
    if facts is None:
        tell_certificate(done)
        return
    ended = ", ".join(each["version"] for each in facts["ended"])
    output.say(f"Ended: {ended}. {facts['keys']['data_keys']:,} data keys are destroyed; backups open none of it.")
    for model in facts["models"]:
        bound = model["subject"] or model["unit"]
        each = f" for up to {bound['rows']:,} rows" if facts["unit"] == "row" else ""
        output.say(f"{model['model']} learned from it (epsilon {bound['epsilon']:g}{each}): {model['advice']} it.")
    for version in facts["derived"]:
        output.say(f"Not changed: {version}, which was made from it. Erase there too.")
    output.say("Not changed: your own files, and copies of them.")
    tell_certificate(done)


def tell_certificate(done: dict[str, Any]) -> None:
    """The next command after something ended."""
    if done["certificate"] is None:
        output.say("The certificate is not signed yet: the authority goes on destroying what is left.")
    output.say(f"Next: cloister data certificate {done['erasure']}")


def _owner(context: Context) -> Owner:
    from cloister.canonical import unb64
    from cloister.client.erase import Owner

    pinned = context.pinned()
    return Owner(
        client=context.client(), private_key_pem=context.private_key(), receiving_key=unb64(pinned["receiving_key"]),
        release_key=pinned["release_public_key"].encode(),
    )  # fmt: skip


def _subjects(subject: str | None, file: Path | None) -> list[str]:
    from cloister.client.seal import read_file

    if (subject is None) == (file is None):
        raise InputError("whose rows?", "give one of --subject and --subjects-file")
    if file is not None:
        try:
            # Spreadsheets put a mark at the beginning. A name may have any other character that ends a line.
            lines = read_file(file, "file of subjects").decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise InputError("the file of subjects is not UTF-8", "write one subject in each line") from None
        return [line.removesuffix("\r") for line in lines if line.strip()]
    assert subject is not None  # noqa: S101  (one of the two was given)
    return [_asked("Subject") if subject == STDIN else subject]


def _asked(what: str) -> str:
    """A value that is not to stand in a command line."""
    text = click.prompt(what, hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    if not text.strip():
        raise InputError("nothing was given on standard input", "type it, or pipe one line")
    return str(text).strip()


def _state(shown: dict[str, Any]) -> str:
    if shown["state"] == "live":
        return "live"
    # Without an erasure: the state was restored from a backup of before it, which does not know of it.
    why = shown["erasure"] or "keys destroyed after the backup that was restored"
    return f"ended {_day(shown['ended'])} ({why})"


def _due(shown: dict[str, Any]) -> str | None:
    if shown["state"] != "live":
        return None
    left = shown["due"] - datetime.now(UTC).timestamp()
    return _day(shown["due"]) + (" (due)" if left <= 0 else " (soon)" if left < _SOON_S else "")


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()
