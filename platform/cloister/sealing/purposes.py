"""What a key that moves is for: the HPKE `info` of each kind of grant, the same on both sides.

Guarantees: a key that was sealed for one purpose does not open as another, nor for another run, attempt, rank or model.
"""

from __future__ import annotations

from cloister.canonical import canonical_json


def data_keys(manifest_digest: str) -> bytes:
    """An owner hands the data keys of one dataset version to the authority."""
    return canonical_json({"use": "cloister.dev/data-keys/v1", "manifest": manifest_digest})


def sealing(name: str, version: int) -> bytes:
    """The authority hands an owner what making the coming version of a dataset takes: keys of subjects and files."""
    return canonical_json({"use": "cloister.dev/sealing/v1", "dataset": name, "version": version})


def training_lease(run: str, attempt: int, rank: int) -> bytes:
    """The authority hands one rank of an attempt of a run the keys of its shards."""
    return canonical_json({"use": "cloister.dev/training-lease/v2", "run": run, "attempt": attempt, "rank": rank})


def model_lease(endpoint: str) -> bytes:
    """The authority hands a replica of an endpoint its model's key."""
    return canonical_json({"use": "cloister.dev/model-lease/v1", "endpoint": endpoint})


def model_export(name: str, version: int) -> bytes:
    """The authority hands a person the key of a production model."""
    return canonical_json({"use": "cloister.dev/model-export/v1", "model": f"{name}@{version}"})
