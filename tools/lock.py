"""Writes the two lock files: `python tools/lock.py` (needs pip-tools). Run by `make lock`.

requirements.lock        everything, each with hashes; torch with the hashes of its CPU builds, as this machine's
                         pip configuration offers them, and of the package index's own builds
requirements-cuda.lock   what the index's torch build for Linux needs besides: the CUDA libraries
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
COMPILE = ["--quiet", "--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-header", "--no-annotate",
           "--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host"]  # fmt: skip


def compile_lock(source: Path, *options: str, plain_index: bool = False) -> dict[str, list[str]]:
    """Pinned requirement to its hash options."""
    environment = dict(os.environ)
    if plain_index:  # the package index alone, without local wheels
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock"
        command = [sys.executable, "-m", "piptools", "compile", *COMPILE, *options, "-o", str(out), str(source)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        text = out.read_text().replace("\\\n", " ")
    lock = {}
    for line in text.splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+==\S+)((\s+;[^-]*)?)(.*)", line):
            lock[match[1] + match[2].rstrip()] = sorted(set(re.findall(r"--hash=\S+", match[4])))
    return lock


def write(path: Path, lock: dict[str, list[str]], heading: str) -> None:
    entries = [" \\\n    ".join([name, *hashes]) for name, hashes in sorted(lock.items())]
    path.write_text(f"# {heading} Written by `make lock`.\n" + "\n".join(entries) + "\n")


def main() -> None:
    lock = compile_lock(ROOT / "pyproject.toml", "--extra", "dev")
    with tempfile.NamedTemporaryFile("w", suffix=".in") as wanted:
        wanted.write(TORCH + "\n")
        wanted.flush()
        of_index = compile_lock(Path(wanted.name), plain_index=True)
    hashes = {each for name, found in (lock | of_index).items() if name.startswith(TORCH) for each in found}
    hashes |= {each for name, found in lock.items() if name.startswith("torch==") for each in found}
    lock = {name: found for name, found in lock.items() if not name.startswith("torch==")}
    known = {name.partition("==")[0] for name in lock} | {"torch"}
    cuda = {name: found for name, found in of_index.items() if name.partition("==")[0] not in known}
    write(ROOT / "requirements.lock", lock | {TORCH: sorted(hashes)}, "Every package that Cloister and its tests use.")
    write(ROOT / "requirements-cuda.lock", cuda, "What torch needs on a machine with NVIDIA GPUs, besides.")


if __name__ == "__main__":
    main()
