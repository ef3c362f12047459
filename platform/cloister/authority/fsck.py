"""Whether everything on the authority's machine fits together: log, database, keys, manifests, blobs, certificates.

Guarantees: what is wrong is named, each thing by itself, and one broken part does not hide the others; every data key
and model key is opened under its context (and not kept), every ledger is compared with its seal and with what the log
says of it, every stored file with its digest, once; nothing is changed but by `repair`, which is on record, removes
only what no version and no model lists, and finishes what earlier erasures have left to do. What may be of an upload
under way is left alone, whatever time of day it is: to be left over, files have to lie unchanged between two checks an
hour apart. Memory grows with the number of files, not with their sizes.

Not guaranteed: that a blob decrypts (its digest is the one that its owner signed); that the log is the only one: ask
its witnesses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, select

from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.verify import verify_log
from cloister.authority import ledger_seals
from cloister.authority.core import PLATFORM, Caller
from cloister.authority.custody import Custody
from cloister.authority.journal import LOG_ORIGIN
from cloister.authority.key_use import MODELS, RELEASE, dataset_key, key_context, model_key_context
from cloister.authority.ledger_log import LedgerLog
from cloister.authority.log import read_export
from cloister.authority.maintenance import Parts, Recorded, dataset_names, keyed_refs, manifest_row, recorded_blobs
from cloister.authority.populations import ledger_names, members
from cloister.authority.restore import STAGED
from cloister.authority.shredding import Shredding
from cloister.canonical import sha256_hex
from cloister.datasets.erasure import ERASURE_PREDICATE, Erasure, subject_digest
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest
from cloister.errors import CloisterError, IntegrityError
from cloister.models.manifest import MANIFEST_FILE
from cloister.models.release import PROVENANCE_PREDICATE
from cloister.process import since_boot
from cloister.signing import dsse, oms
from cloister.signing.keys import ed25519_public_from_pem, key_id, key_id_of
from cloister.stores.blobs import Blobs
from cloister.stores.database import Database
from cloister.stores.files import write_json
from cloister.stores.tables import data_keys, datasets, deletions, erasures, key_destructions, models, runs

ORPHAN_AGE_S = 3600.0
"""How long files lie unchanged before they are left over. Others may be of a seal or a run that is under way: they are
uploaded before they are registered."""
SEEN_FILE = "fsck-seen.json"
BATCH = 5_000
TOPS = ("datasets", "models")
Progress = Callable[[int, int], None]
Kind = Literal["broken", "repairable", "note"]
_LEFT = re.compile(r"\..+\.([0-9a-f]{16}|[0-9a-f]{32})")  # what `write_atomic` leaves when it is killed


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about `subject`. `broken`: not as it must be; `repairable`: left over; `note`: worth knowing."""

    kind: Kind
    subject: str
    problem: str


@dataclass(slots=True)
class Report:
    """What was looked at, by kind, and what was found."""

    checked: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    orphans: list[tuple[Blobs, str]] = field(default_factory=list)
    """What `repair` removes: files that nothing lists, by their store."""
    temporaries: list[Path] = field(default_factory=list)
    unfinished: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong. Notes are not."""
        return all(finding.kind == "note" for finding in self.findings)

    def broken(self, subject: str, problem: str) -> None:
        self.findings.append(Finding("broken", subject, problem))

    def left(self, subject: str, problem: str) -> None:
        self.findings.append(Finding("repairable", subject, problem))

    def note(self, subject: str, problem: str) -> None:
        self.findings.append(Finding("note", subject, problem))


def check(
    parts: Parts, database: Database, caller: Caller, *, quick: bool = False, young: bool = False,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Look at everything. `quick` leaves out the digests of blobs; `young` counts all that nothing lists as left over,
    however new it is.

    Raises:
        PermissionDeniedError: the caller is no operator.
        UnavailableError: the database, the key service or a store cannot be had.
    """
    core, report = parts.core(database), Report()
    logged = _log(parts, database, report)
    try:
        with core.action(caller, "state:check", quick=quick) as act:  # keys are opened: on record before
            act.allow(PLATFORM)
    except IntegrityError as error:
        report.broken("log", f"nothing can be recorded ({error}), so no key was opened")
        return report
    _database(database, report)
    with database.reading() as connection:
        _keys(parts, connection, report)
        _ledgers(parts, connection, logged, report)
        _datasets(connection, report)
        _models(parts, connection, report)
        _certificates(parts, connection, report)
        needed = list(recorded_blobs(connection))
        pending = {(row.region, row.path) for row in connection.execute(select(deletions)).all()}
    seen = None if young else _Seen(parts.directory / SEEN_FILE)
    _blobs(parts, needed, pending, report, quick=quick, seen=seen, progress=progress)
    _temporaries(parts, report, seen)
    if seen:
        seen.keep(report)
    return report


def repair(parts: Parts, database: Database, caller: Caller, report: Report) -> None:
    """Remove what `report` says is left over, and finish what erasures have left to do. On record.

    Raises:
        PermissionDeniedError: the caller is no operator.
        UnavailableError: a store or the key service cannot be had.
    """
    core = parts.core(database)
    with core.outside(
        caller, "state:check", PLATFORM, repair=True, orphans=len(report.orphans), temporaries=len(report.temporaries)
    ):
        with database.reading() as connection:  # what was registered meanwhile stays
            listed = {blob.path for blob in recorded_blobs(connection)}
        for store, path in report.orphans:
            if path not in listed:
                store.remove(path)
        for file in report.temporaries:
            file.unlink(missing_ok=True)
        if report.unfinished:
            Shredding(core, Custody(core), parts.stores).settle()


# ---- the log and the database ----


def _log(parts: Parts, database: Database, report: Report) -> LedgerLog:
    """The log is whole; returns what it tells of ledgers."""
    logged = LedgerLog()
    try:
        exported, entries = read_export(database, parts.verifier_key)
        public = parse_verifier_key(parts.verifier_key)[1]
        size = verify_log(logged.noting(entries), exported.checkpoints, public, LOG_ORIGIN).size
        report.checked["log entries"] = size
        parts.core(database).require_anchored()
    except IntegrityError as error:
        report.broken("log", str(error))
    return logged


def _database(database: Database, report: Report) -> None:
    """What the database can say about itself: SQLite's own check. (PostgreSQL keeps its promises by itself.)"""
    with database.reading() as connection:
        if connection.dialect.name != "sqlite":
            return
        for (line,) in connection.exec_driver_sql("PRAGMA integrity_check(20)").all():
            if line != "ok":
                report.broken("database", str(line)[:200])
        for row in connection.exec_driver_sql("PRAGMA foreign_key_check").all()[:20]:
            report.broken("database", f"a row of {row[0]} belongs to one of {row[2]} that is not there")


# ---- keys ----


def _keys(parts: Parts, connection: Connection, report: Report) -> None:
    """Every wrapped key opens under its context."""
    for name in connection.execute(select(data_keys.c.name).distinct()).scalars().all():
        rows = connection.execute(select(data_keys).where(data_keys.c.name == name)).all()
        wrapped = [
            (f"{name} {row.version}/{row.file}", row.wrapped, key_context(name, row.version, row.file)) for row in rows
        ]
        _open_all(parts, dataset_key(name), wrapped, "data keys", report)
    held = [
        (f"run {row.id}", row.model_key, model_key_context(row.id))
        for row in connection.execute(select(runs.c.id, runs.c.model_key)).all()
    ]
    held += [
        (f"model {row.name}@{row.version}", row.model_key, model_key_context(row.run))
        for row in connection.execute(select(models.c.name, models.c.version, models.c.run, models.c.model_key)).all()
    ]
    _open_all(parts, MODELS, held, "model keys", report)
    waiting = select(key_destructions.c.name).where(key_destructions.c.destroyed.is_(None)).distinct()
    for name in connection.execute(waiting).scalars().all():
        report.unfinished = True
        report.left(f"key {name}", "old versions are to be destroyed, and are not yet")


def _ledgers(parts: Parts, connection: Connection, logged: LedgerLog, report: Report) -> None:
    """Every ledger is as it was sealed, after the last change that the log tells of."""
    names = ledger_names(connection)
    for name in sorted({*names, *logged.last}):
        report.checked["ledgers"] += 1
        number, problem = ledger_seals.check(connection, parts.keys, name)
        last, of = logged.last.get(name, ledger_seals.UNSEALED), ", ".join(members(connection, name)) or name
        if problem and number == last == ledger_seals.UNSEALED and name in names:
            report.note(f"ledger of {of}", f"it {problem} yet: the authority makes it when it starts")
        elif problem:
            report.broken(f"ledger of {of}", f"it {problem}; no key of {of} leaves for training")
        elif problem := logged.disagrees(name, number):
            report.broken(f"ledger of {of}", f"it {problem}")


def _open_all(
    parts: Parts, name: str, wrapped: Sequence[tuple[str, bytes, bytes]], what: str, report: Report
) -> None:  # fmt: skip
    for start in range(0, len(wrapped), BATCH):
        some = wrapped[start : start + BATCH]
        report.checked[what] += len(some)
        with contextlib.suppress(IntegrityError):
            parts.keys.unwrap(name, [(sealed, context) for _, sealed, context in some])
            continue
        for subject, sealed, context in some:  # which of them
            try:
                parts.keys.unwrap(name, [(sealed, context)])
            except IntegrityError as error:
                report.broken(subject, f"its key does not open: {error}")


# ---- datasets ----


def _datasets(connection: Connection, report: Report) -> None:
    """Manifests are the signed ones; each live version has all its keys; there is no key that no version lists."""
    for name in dataset_names(connection):
        keyed = keyed_refs(connection, name)
        listed: set[str] = set()
        query = select(datasets.c.version).where(datasets.c.name == name).order_by(datasets.c.version)
        for version in connection.execute(query).scalars().all():
            row = manifest_row(connection, name, version)
            report.checked["dataset versions"] += 1
            try:
                manifest = _signed(row)
            except CloisterError as error:
                report.broken(f"{name}@{version}", str(error))
                continue
            refs = {file.ref for file in manifest.files}
            listed |= refs
            if row.ended is None and (missing := sorted(refs - keyed)):
                report.broken(f"{name}@{version}", f"the keys of {len(missing)} files are gone, such as {missing[0]}")
            elif row.ended is not None and row.erasure is None:
                report.note(f"{name}@{version}", "its keys were destroyed after the backup that the state came from")
        for ref in sorted(keyed - listed):
            report.broken(f"{name} {ref}", "there is a key that belongs to no version")


def _signed(row: Any) -> DatasetManifest:
    """The manifest of a version, once it is known to be the one that its owner signed.

    Raises:
        CloisterError: it is not.
    """
    public = row.owner_key.encode()
    trusted = {key_id(public): ed25519_public_from_pem(public)}
    digest = row.manifest_digest.removeprefix("sha256:")
    verified = dsse.verify(row.envelope, trusted, predicate_type=MANIFEST_PREDICATE, subject_digest=digest)
    manifest = DatasetManifest.parse(verified.predicate)
    if manifest.digest != row.manifest_digest or row.manifest != manifest.model_dump(mode="json"):
        raise IntegrityError("the manifest is not the one that its owner signed", "restore a backup")
    if (manifest.name, manifest.version) != (row.name, row.version):
        raise IntegrityError("the manifest is another version's", "restore a backup")
    return manifest


# ---- models and certificates ----


def _models(parts: Parts, connection: Connection, report: Report) -> None:
    """The signatures of every model are the release key's, over what is stored."""
    public = parts.keys.signer(RELEASE).public_key()
    trusted = {key_id_of(public): public}
    for name, version in connection.execute(select(models.c.name, models.c.version)).all():
        row = connection.execute(select(models).where(models.c.name == name, models.c.version == version)).one()
        report.checked["models"] += 1
        try:
            files = _signed_digests(row.bundle) | {MANIFEST_FILE: sha256_hex(row.manifest)}
            root = oms.verify_model(row.bundle, files, public)
            if root != row.root_digest:
                raise IntegrityError("its digest is not the signed one", "restore a backup")
            dsse.verify(row.provenance, trusted, predicate_type=PROVENANCE_PREDICATE, subject_digest=root)
        except CloisterError as error:
            report.broken(f"model {name}@{version}", str(error))


def _signed_digests(bundle: bytes) -> dict[str, str]:
    """What a bundle says that it signs. It is `verify_model` that believes it."""
    try:
        payload = json.loads(b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
        return {str(each["name"]): str(each["digest"]) for each in payload["predicate"]["resources"]}
    except (ValueError, KeyError, TypeError):
        raise IntegrityError("its signature is damaged", "restore a backup") from None


def _certificates(parts: Parts, connection: Connection, report: Report) -> None:
    """What was certified as gone has no key; each certificate is signed, about its erasure."""
    public = parts.keys.signer(RELEASE).public_key()
    trusted = {key_id_of(public): public}
    for row in connection.execute(select(erasures)).all():
        report.checked["erasures"] += 1
        try:
            facts = Erasure.parse(row.facts)
            if row.certificate is None:
                report.unfinished = True
                report.left(row.id, "its certificate is not signed yet")
            else:
                verified = dsse.verify(
                    row.certificate, trusted, predicate_type=ERASURE_PREDICATE, subject_digest=subject_digest(facts)
                )
                said = Erasure.parse(verified.predicate)
                if said.model_copy(update={"blobs": facts.blobs}) != facts:
                    raise IntegrityError("its certificate says something else", "restore a backup")
            back = {file.file for file in facts.files} & keyed_refs(connection, row.dataset)
            if back:
                raise IntegrityError(f"{len(back)} keys are there that it says are gone", "restore a newer backup")
        except CloisterError as error:
            report.broken(row.id, str(error))


# ---- blobs and temporaries ----


class _Seen:
    """What this check and those before it, within this boot, have seen of files that nothing lists, in `file`.

    Neither the time of day nor a file's own time makes one old: a clock that was set would make all of them old. After
    a boot the hour begins anew.
    """

    def __init__(self, file: Path) -> None:
        self._file, (self._boot, self._now) = file, since_boot()
        self._before: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._young = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged: all is new
            known = json.loads(file.read_bytes())
            if known["boot"] == self._boot:
                self._before = dict(known["seen"])

    def is_old(self, name: str, state: list[float]) -> bool:
        """Whether what is called `name` was in this `state` an hour ago already, and at each check since."""
        before = self._before.get(name)
        since = float(before["since"]) if before and before["state"] == state else self._now
        self._seen[name] = {"state": state, "since": since}
        old = self._now - since > ORPHAN_AGE_S
        self._young += not old
        return old

    def keep(self, report: Report) -> None:
        """For the next check."""
        if self._young:
            report.note("blobs", f"{self._young} folders or half-written files may be of uploads under way: look again "
                                 "in an hour")  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk: the next check sees them for the first time
            write_json(self._file, {"boot": self._boot, "seen": self._seen})


def _blobs(
    parts: Parts, needed: Sequence[Recorded], pending: set[tuple[str, str]], report: Report, *, quick: bool,
    seen: _Seen | None, progress: Progress | None,
) -> None:  # fmt: skip
    """Every blob that is needed is there, and is what it was; what else is there is left over."""
    listings: dict[str, tuple[Blobs, dict[str, float]]] = {}
    for store in parts.stores.all():
        listings[store.url] = (store, {path: time for top in TOPS for path, time in store.list(top).items()})
    for done, blob in enumerate(needed, start=1):
        report.checked["files"] += 1
        try:
            store = parts.stores.for_region(blob.region)
            if blob.path not in listings[store.url][1]:
                report.broken(blob.what, f"its file is missing from the store of {blob.region}: {blob.path}")
            elif not quick and _digest(store, blob.path) != blob.sha256:
                report.broken(blob.what, f"its file is not the one that was sealed: {blob.path}")
        except CloisterError as error:  # it went meanwhile, or there is no store for its region any more
            report.broken(blob.what, str(error))
        if progress:
            progress(done, len(needed))
    waiting = {path for _, path in pending}
    if waiting:
        report.unfinished = True
        report.left("blobs", f"{len(waiting)} files of what was erased are not deleted yet")
    kept = {blob.path for blob in needed} | waiting
    for store, listing in listings.values():
        states: dict[str, list[float]] = {}  # of each folder: what is still being uploaded changes it
        unlisted: dict[str, list[str]] = {}
        for path, time in listing.items():
            folder = path.rpartition("/")[0]
            count, newest = states.get(folder, (0, 0.0))
            states[folder] = [count + 1, max(time, newest)]
            if path not in kept:
                unlisted.setdefault(folder, []).append(path)
        left = [
            path
            for folder, paths in unlisted.items()
            if seen is None or seen.is_old(f"{store.url} {folder}", states[folder])
            for path in paths
        ]
        report.orphans += [(store, path) for path in left]
        if left:
            report.left("blobs", f"{len(left)} files that nothing lists, such as {left[0]}")


def _digest(store: Blobs, path: str) -> str:
    digest = hashlib.sha256()
    for chunk in store.chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _temporaries(parts: Parts, report: Report, seen: _Seen | None) -> None:
    """Half-written files in the authority's folder: what a killed writer left. None is ever read."""
    for file in _half_written(parts.directory):
        status, name = file.stat(), str(file.relative_to(parts.directory))
        if seen is None or seen.is_old(name, [status.st_size, status.st_mtime]):
            report.temporaries.append(file)
            report.left("folder", f"a half-written file: {name}")
    for kept in sorted(parts.directory.glob("replaced-*")):
        report.note("folder", f"{kept.name} is a state that was replaced: remove it when you need it no more")


def _half_written(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / "keys", directory / "daemon"):
        if folder.is_dir():
            yield from sorted(file for file in folder.iterdir() if _LEFT.fullmatch(file.name) and file.is_file())
    yield from sorted(file for file in directory.glob(f"{STAGED}*") if file.is_file())
