"""The digest of the code that runs here: what made a dataset version, what trains a model. Its own word (L0)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cloister
from cloister.canonical import digest, sha256_hex


def package_files() -> dict[str, str]:
    """SHA-256 of every Python file of the installed package, by its name in the package."""
    package = Path(cloister.__file__).parent
    return {f"cloister/{file.relative_to(package)}": sha256_hex(file.read_bytes()) for file in package.rglob("*.py")}


@cache
def package_digest() -> str:
    """One digest over all of them."""
    return digest("cloister.dev/code/v1", package_files())
