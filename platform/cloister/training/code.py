"""The digest of the code that trains: what is approved is what runs, as far as software can tell (assurance L0)."""

from __future__ import annotations

from pathlib import Path

import cloister
from cloister.canonical import digest, sha256_hex
from cloister.errors import NotFoundError

SKIPPED = frozenset({"examples", "__pycache__"})  # data for people to try; what Python writes by itself


def code_digest(jobs: Path) -> str:
    """Digest over every Python file of the installed package, and over all of the jobs folder but its examples.

    Raises:
        NotFoundError: `jobs` holds no `train.py`.
    """
    if not (jobs / "train.py").is_file():
        raise NotFoundError(f"{jobs} holds no train.py", "name the folder of the jobs with --jobs")
    package = Path(cloister.__file__).parent
    files = {f"cloister/{file.relative_to(package)}": file for file in package.rglob("*.py")}
    shipped = (path.relative_to(jobs) for path in jobs.rglob("*") if path.is_file())
    files |= {f"jobs/{path}": jobs / path for path in shipped if not SKIPPED & set(path.parts)}
    return digest("cloister.dev/code/v1", {name: sha256_hex(file.read_bytes()) for name, file in files.items()})
