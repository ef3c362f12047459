"""`cloister model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.errors import ConflictError, IntegrityError

MOST_LABELS = 20


def _reference(text: str) -> tuple[str, int]:
    from cloister.datasets.manifest import parse_reference

    return parse_reference(text, what="model")


@click.group()
def model() -> None:
    """List, show, verify, promote and export models."""


@model.command(name="list")
@common
def list_(context: Context) -> None:
    """List registered models."""
    rows = context.client().get("/v1/models")
    if context.json:
        output.value(rows)
        return
    cells = [
        (r["model"], r["stage"], r["author"], r["run"], r["metrics"].get("holdout_accuracy"),
         ", ".join(r["flags"]) or None)
        for r in rows
    ]  # fmt: skip
    output.table(("model", "stage", "author", "run", "accuracy", "learned what is gone"), cells, empty="No model yet.")


@model.command()
@click.argument("name")
@common
def show(context: Context, name: str) -> None:
    """Show where a model comes from and who approved it."""
    wanted, version = _reference(name)
    shown = context.client().get(f"/v1/models/{wanted}/versions/{version}")
    if context.json:
        output.value(shown)
        return
    made = made_from(shown)
    metrics = shown["metrics"]
    output.facts({
        "model": shown["model"], "stage": shown["stage"], "author": shown["author"], "run": shown["run"],
        "dataset": f"{made['dataset']['name']} ({made['dataset']['digest'][:23]}…)",
        "privacy": f"epsilon {made['privacy']['epsilon']:.4f}, delta {made['privacy']['delta']:g} for {_unit(made)}",
        **output.replaced(made["privacy"]),
        **_evaluation(metrics),
        **_proof(made["privacy"], made["spec"]["privacy"].get("engine", "bookkeeping")),
        "code": made["code_digest"], "root digest": shown["root_digest"], "assurance": made["assurance"],
    })  # fmt: skip
    _tables(metrics)
    for assumption in made["privacy"].get("assumptions", ()):
        output.say(f"Assumed: {assumption}")
    for flag in shown["flags"]:
        where = f"what that means: cloister data certificate {flag}"
        if not flag.startswith("ers-"):
            where = f"its erasure was forgotten when the backup {flag} was restored"
        output.say(f"It learned from data that is gone since; {where}")


def _unit(made: dict[str, Any]) -> str:
    most = f"at most {made['privacy']['plan'].get('rows_per_unit', 1):,}"
    if made["spec"]["privacy"].get("rows_per_unit") is None:
        return f"a unit of {most} row(s)"
    return f"a unit, of whose rows {most} are used"


def made_from(shown: dict[str, Any]) -> dict[str, Any]:
    """What a model's provenance says, unverified: `cloister model verify` checks it."""
    import json

    from cloister.canonical import unb64

    predicate: dict[str, Any] = json.loads(unb64(shown["provenance"]["payload"]))["predicate"]
    return predicate


def _evaluation(metrics: dict[str, Any]) -> dict[str, str]:
    on = f"on about {metrics['holdout_rows']:,} held-out rows (itself epsilon {metrics['evaluation_epsilon']:g})"
    if "histogram" not in metrics:  # of before there was more than one number
        return {"accuracy": f"{metrics['holdout_accuracy']:.4f} {on}"}
    facts = {"accuracy": f"{_share(metrics['accuracy'])} {on}",
             "  balanced": f"{_share(metrics['balanced_accuracy'])}, the mean over labels"}  # fmt: skip
    if metrics["auroc"]:
        facts["  AUROC"] = _share(metrics["auroc"])
    return facts


def _share(told: dict[str, Any]) -> str:
    if told["value"] is None:
        return "too few rows to tell"
    return f"{told['value']:.4f} ({told['low']:.3f} to {told['high']:.3f})"


def _tables(metrics: dict[str, Any]) -> None:
    """What is worth a table: accuracy by label, the worst first, and by confidence."""
    if "histogram" not in metrics:
        return
    by_label = sorted(metrics["by_label"], key=lambda each: 2.0 if each["value"] is None else each["value"])
    output.say()
    output.table(("label", "accuracy (95 %)"), [(each["label"], _share(each)) for each in by_label[:MOST_LABELS]],
                 empty="")  # fmt: skip
    if len(by_label) > MOST_LABELS:
        output.say(f"The {MOST_LABELS} lowest of {len(by_label):,} labels; --json has all.")
    rows = [
        (f"{each['from']:.3f} to {each['to']:.3f}", f"{each['rows']:,}", _share(each), each["verdict"])
        for each in metrics["calibration"]
    ]
    output.table(("confidence", "rows, about", "accuracy (95 %)", ""), rows, empty="")


def _proof(privacy: dict[str, Any], engine: str) -> dict[str, str]:
    """How its epsilon was computed and attacked; nothing of models of before that was told."""
    if "audit" not in privacy:
        return {}
    accounts, audit = privacy["accountants"], privacy["audit"]
    step, run = audit["mechanism"], audit["one_run"]
    return {
        "engine": engine,
        "accountants": f"PRV {accounts['prv']:.4f}, PLD {accounts['pld']:.4f}; the larger counts" + (
            f", or RDP's {accounts['rdp']:.4f} where it is less" if "rdp" in accounts else ""
        ),
        "audit": f"{audit['verdict']}",
        "  of the steps": f"an attack shows epsilon {step['epsilon_lower_bound']:.4f} at least, {step['ratio']:.0%} of "
                          f"what the plan says ({100 * step['confidence']:g} % sure)",
        "  of the model": f"an attack shows epsilon {run['epsilon_lower_bound']:.4f} at least; it could have shown "
                          f"{run['epsilon_detectable']:.4f} ({run['correct']} of {run['guesses']} guesses about "
                          f"{run['canaries']} canaries, {100 * run['confidence']:g} % sure)",
    }  # fmt: skip


@model.command()
@click.argument("name")
@common
def verify(context: Context, name: str) -> None:
    """Check a model's stored bytes and signatures. Needs no key and opens nothing."""
    from cloister.canonical import sha256_hex
    from cloister.models.release import PROVENANCE_PREDICATE
    from cloister.signing import dsse, keys
    from cloister.stores.blobs import open_blobs

    wanted, version = _reference(name)
    client = context.client()
    shown = client.get(f"/v1/models/{wanted}/versions/{version}")
    if sha256_hex(open_blobs(shown["blobs"]).get(shown["blob"])) != shown["blob_sha256"]:
        raise IntegrityError(
            f"the sealed bytes of {name} changed since it was registered",
            "restore the blob from a backup, or train again",
        )
    release = context.pinned()["release_public_key"].encode()
    trusted = {keys.key_id(release): keys.p256_public_from_pem(release)}
    dsse.verify(shown["provenance"], trusted, predicate_type=PROVENANCE_PREDICATE, subject_digest=shown["root_digest"])
    if context.json:
        output.value({"model": name, "root_digest": shown["root_digest"]})
    else:
        output.say(f"{name} is whole: its sealed bytes are the registered ones and its provenance is signed.")


@model.command()
@click.argument("name")
@click.option("--to", "stage", type=click.Choice(["production"]), default="production", show_default=True)
@common
def promote(context: Context, name: str, stage: str) -> None:
    """Make an approved model the production one. Without approval: asks for it and refuses."""
    wanted, version = _reference(name)
    shown = context.client().post(f"/v1/models/{wanted}/versions/{version}/promotion")
    if context.json:
        output.value(shown)
    else:
        output.say(f"{shown['model']} is in {stage}, approved by {', '.join(shown['approvals'])}.")
        output.say(f"Next: cloister serve deploy {wanted}")


@model.command()
@click.argument("name")
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), required=True, help="A folder that does not exist yet."
)
@common
def export(context: Context, name: str, folder: Path) -> None:
    """Write a production model in clear, with its signature, for use outside Cloister. The disclosure is logged."""
    from cloister.models.manifest import MANIFEST_FILE, MODEL_FILE
    from cloister.sealing.stream import open_sealed
    from cloister.stores.files import private_directory, write_atomic

    if folder.exists():
        raise ConflictError(f"{folder} exists", "name a folder that does not exist yet")
    wanted, version = _reference(name)
    client = context.client()
    release = context.pinned()["release_public_key"].encode()
    lease = client.export_model(wanted, version)
    plain = open_sealed(lease.model_key, lease.model_onnx_sealed, lease.seal_context)
    private_directory(folder / "model")
    write_atomic(folder / "model" / MODEL_FILE, plain)
    write_atomic(folder / "model" / MANIFEST_FILE, lease.manifest)
    write_atomic(folder / "model.sig", lease.bundle)
    write_atomic(folder / "release.pub", release)
    if context.json:
        output.value({"model": name, "folder": str(folder)})
        return
    output.say(f"{name} is in {folder / 'model'}, in clear: from here on it is yours to protect.")
    output.say(
        f"Check it with the reference verifier: model_signing verify key {folder}/model "
        f"--signature {folder}/model.sig --public_key {folder}/release.pub"
    )
