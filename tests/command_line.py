"""The real command line on a home of its own: real processes, real TLS, real files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.cluster.files import CLUSTERS_FOLDER, clusters_folder
from cloister.stores.database import Database
from cloister.stores.keys import EmbeddedKeys
from cloister.stores.tables import token_keys
from ports import free_port

ROOT = Path(__file__).parents[1]
ADULT = ROOT / "jobs" / "examples" / "adult"
PEOPLE = {
    "olga": "data-owner", "ed": "engineer", "rita": "reviewer", "carl": "consumer", "aud": "auditor",
    "sofia": "security-officer",
}  # fmt: skip


def readme_session(name: str) -> list[tuple[str, int]]:
    """The commands of the README's blocks of that name, in order, each with the exit code that it must end with."""
    blocks = re.findall(rf"```sh\n# {name}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("   #") for block in blocks for line in block.splitlines()]
    return [(command.strip(), 1 if "refused" in comment else 0) for command, _, comment in lines]


@dataclass
class CommandLine:
    """Runs `cloister` with one `CLOISTER_HOME`."""

    home: Path

    @property
    def clusters(self) -> Path:
        """The folder of this home's Ray clusters, and of nobody else's."""
        return clusters_folder() / hashlib.sha256(os.fsencode(self.home)).hexdigest()[:6]

    @property
    def environment(self) -> dict[str, str]:
        """What tells a command which home and which folder for clusters are its own."""
        return {"CLOISTER_HOME": str(self.home), CLUSTERS_FOLDER: str(self.clusters)}

    def run(
        self, *words: str | Path, who: str = "operator", timeout_s: float = 300, program: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`program`: other Python code in place of the command line's, with the same words."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")}
        return subprocess.run(
            [sys.executable, *(["-c", program] if program else ["-m", "cloister.cli"]), *map(str, words)],
            env=environment | self.environment | {"CLOISTER_AS": who},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
        )

    def json(self, *words: str | Path, who: str = "operator", timeout_s: float = 300) -> Any:
        done = self.run(*words, "--json", who=who, timeout_s=timeout_s)
        assert done.returncode == 0, f"cloister {words}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def refused(self, *words: str | Path, who: str = "operator", timeout_s: float = 300, code: int = 1) -> str:
        """Standard error of a command that must be refused as every refusal is: two lines, exit code 1."""
        done = self.run(*words, who=who, timeout_s=timeout_s)
        assert done.returncode == code, f"cloister {words}: {done.returncode} {done.stdout}{done.stderr}"
        error, hint = done.stderr.splitlines()
        assert re.fullmatch("error: .{10,}", error)
        assert re.fullmatch("hint:  .{5,}", hint)
        assert "Traceback" not in done.stdout + done.stderr
        return done.stderr

    def up(self) -> None:
        self.json("up", "--port", str(free_port()))
        for name, role in PEOPLE.items():
            self.json("identity", "add", name, "--role", role)

    def seal_adult(self) -> None:
        self.json("data", "seal", ADULT / "adult.csv.gz", "--schema", ADULT / "schema.yaml", who="olga")
        self.json("budget", "set", "adult", "--epsilon", "7", "--delta", "2e-5", who="olga")

    def approve(self, who: str = "rita") -> None:
        """Approve the one request that is open."""
        (request,) = self.json("approvals", "list", who=who)
        self.json("approve", request["approval"], who=who)

    def log_size(self) -> int:
        return int(self.json("audit", "search", "--limit", "1")[-1]["index"]) + 1

    def budget_left(self) -> float:
        """With all runs added up: what a run is charged is seen so, whichever rule counts."""
        shown = self.json("budget", "show", "adult", who="olga")
        return float(shown["epsilon"] - shown["epsilon_added"])

    def blobs(self) -> set[Path]:
        return {path for path in (self.home / "authority" / "blobs").rglob("*") if path.is_file()}

    def signing_key(self) -> tuple[bytes, str]:
        """The private key (PEM) that signs access tokens now, and its id."""
        database = Database(self.home / "authority" / "state.db")
        with database.reading() as connection:
            row = connection.execute(token_keys.select().where(token_keys.c.retired.is_(None))).one()
        database.close()
        return EmbeddedKeys(self.home / "authority" / "keys").secret(row.secret), row.key_id
