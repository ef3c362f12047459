"""The digest of the code that trains: what is approved is what runs, as far as software can tell (assurance L0)."""

from __future__ import annotations

from pathlib import Path

from cloister.canonical import digest, sha256_hex
from cloister.client.code import package_files
from cloister.errors import NotFoundError

SKIPPED = frozenset({"examples", "__pycache__"})  # data for people to try; what Python writes by itself


def code_digest(jobs: Path) -> str:
    """Digest over every Python file of the installed package, and over all of the jobs folder but its examples.

    Raises:
        NotFoundError: `jobs` holds no `train.py`.
    """
    if not (jobs / "train.py").is_file():
        raise NotFoundError(f"{jobs} holds no train.py", "name the folder of the jobs with --jobs")
    shipped = (path.relative_to(jobs) for path in jobs.rglob("*") if path.is_file())
    job = {f"jobs/{path}": sha256_hex((jobs / path).read_bytes()) for path in shipped if not SKIPPED & set(path.parts)}
    return digest("cloister.dev/code/v1", package_files() | job)
