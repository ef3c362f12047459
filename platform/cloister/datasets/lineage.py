"""How one version of a dataset may follow from those before it.

Guarantees: `check_lineage` lets past only versions whose rows can have come about as their lineage says: nothing that
is kept was changed, nothing is listed that is not this dataset's, every file that an erasure or a correction puts
another one in the place of is named as one that ends, and published numbers of rows tell nothing of erased ones.
Not guaranteed: that the rows within a file are the right ones. Nobody but the owner and workers can see them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from cloister.datasets.manifest import DatasetManifest, SealedFile, parse_reference
from cloister.errors import ConflictError, InputError, NotFoundError

_AGAIN = "look at what there is, and make the version again: cloister data show"


def shards_of(files: Iterable[SealedFile]) -> dict[str, list[SealedFile]]:
    """Files by the name of their shard."""
    shards: dict[str, list[SealedFile]] = {}
    for file in files:
        shards.setdefault(file.shard, []).append(file)
    return shards


def check_lineage(
    manifest: DatasetManifest, live: Sequence[DatasetManifest], ends: AbstractSet[str], taken: AbstractSet[str]
) -> None:
    """Check a version that is to be registered against those that are live (oldest first), of the same name.

    `ends` are the files (`SealedFile.ref`) whose keys are to be destroyed with it; `taken` are the paths that versions
    of that name have ever listed, ended ones too: to delete one file must never delete another.

    Raises:
        NotFoundError: there is no live version that it could follow.
        ConflictError: it follows another one than the newest that is live.
        InputError: it does not follow.
    """
    lineage, kind = manifest.lineage, manifest.lineage.kind
    if lineage.rows_after != manifest.all_rows:
        raise InputError("the lineage counts other rows than the files have", _AGAIN)
    if taken & {file.path for file in manifest.files if file.sealed_in == manifest.version}:
        raise InputError("a new file lies where another one does or did", _AGAIN)
    if kind in ("seal", "append") and manifest.published is not None:
        raise InputError("only what was erased from, or corrected, keeps numbers that were published before", _AGAIN)
    if kind == "seal":
        _check_sealed(manifest, ends)
        return
    if not live:
        raise NotFoundError(f"there is no live version of {manifest.name}", "seal it: cloister data seal")
    parent = live[-1]
    if lineage.parents != (f"{parent.name}@{parent.version}",):
        raise ConflictError(f"this version does not follow {parent.name}@{parent.version}, the newest live one", _AGAIN)
    if manifest.dataset_schema != parent.dataset_schema:
        raise InputError("the schema is not that of the version before", "seal the data anew under another schema")
    if lineage.rows_before != parent.all_rows:
        raise InputError("the lineage counts other rows than the version before has", _AGAIN)
    before, after = {file.ref: file for file in parent.files}, {file.ref: file for file in manifest.files}
    kept, new = after.keys() & before.keys(), [file for ref, file in after.items() if ref not in before]
    if any(after[ref] != before[ref] for ref in kept):
        raise InputError("a file of the version before was changed", _AGAIN)
    if any(file.sealed_in != manifest.version for file in new):
        raise InputError("a file is listed that neither this version sealed nor the one before has", _AGAIN)
    if kind == "append":
        _check_appended(before.keys() - after.keys(), parent, new, ends)
    else:
        _check_replaced(manifest, parent, before.keys() - after.keys(), new)
        check_ends(live, ends, before.keys() - after.keys())
        if ends & after.keys():
            raise InputError("a file both ends and stays", _AGAIN)
        if manifest.all_published != parent.all_published:
            raise InputError(
                "erasing and correcting keep the published numbers of rows", "make the version with a newer Cloister"
            )


def _check_sealed(manifest: DatasetManifest, ends: AbstractSet[str]) -> None:
    if ends or manifest.lineage.rows_before or any(file.sealed_in != manifest.version for file in manifest.files):
        raise InputError("a version that is sealed from a file lists its own files, and ends none", _AGAIN)
    for parent in manifest.lineage.parents:
        if parse_reference(parent)[0] == manifest.name:
            raise InputError("a version that is sealed from a file has no parent of its own name", _AGAIN)


def _check_appended(
    dropped: AbstractSet[str], parent: DatasetManifest, new: list[SealedFile], ends: AbstractSet[str]
) -> None:
    if dropped or ends:
        raise InputError("appending drops no file", "to drop rows, erase: cloister data erase")
    if not new or {file.shard for file in new} & {file.shard for file in parent.files}:
        raise InputError("appending adds shards, with names of their own", _AGAIN)


def _check_replaced(
    manifest: DatasetManifest, parent: DatasetManifest, dropped: AbstractSet[str], new: list[SealedFile]
) -> None:
    """Each shard of the parent stayed as it was, or has fewer rows (erasing), or other ones (correcting).

    That it stays, is replaced or is dropped as a whole follows from `check_ends`.
    """
    erasing = manifest.lineage.kind == "erase"
    now = shards_of(manifest.files)
    if now.keys() - shards_of(parent.files).keys():
        raise InputError("a shard is new, which only appending makes", _AGAIN)
    replaced = {file.shard for file in new}
    for shard, files in shards_of(parent.files).items():
        if shard not in replaced and not any(file.ref in dropped for file in files):
            continue
        successors = now.get(shard, [])
        rows = successors[0].rows if successors else 0
        if {file.role for file in successors} - {files[0].role}:
            raise InputError("a shard stays what it is for, training or evaluation", _AGAIN)
        if rows >= files[0].rows if erasing else rows != files[0].rows:
            raise InputError(
                "erasing leaves fewer rows in a shard, and correcting as many as there were",
                "erase and rectify change only the shards that hold the subject",
            )
    if not dropped:
        raise InputError("nothing was changed", "the subject has no row in this version")


def check_ends(live: Sequence[DatasetManifest], ends: AbstractSet[str], needed: AbstractSet[str] = frozenset()) -> None:
    """Check which files are to end: whole shards that live versions list, and all of those in `needed`.

    Raises:
        InputError: a file of no live version, a part of a shard, or one of `needed` is missing.
    """
    if needed - ends:
        raise InputError("a file that was replaced is not among those that end", _AGAIN)
    shards: dict[tuple[int, str], set[str]] = {}
    for manifest in live:
        for file in manifest.files:
            shards.setdefault((file.sealed_in, file.shard), set()).add(file.ref)
    listed = set().union(*shards.values()) if shards else set()
    if not ends <= listed:
        raise InputError("a file is to end that no live version of this dataset lists", _AGAIN)
    if any(parts & ends and not parts <= ends for parts in shards.values()):
        raise InputError("the files of a shard end together", _AGAIN)
