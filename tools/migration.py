"""Writes a migration from what `cloister.stores.tables` says now: `python tools/migration.py 0002 "What changes"`.

It is compared with a database at the newest migration before it; the same number again writes that file anew. Read what
comes out before you commit it, and put the number into `cloister.stores.migrations.HEAD`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

VERSIONS = Path(__file__).resolve().parents[1] / "platform" / "cloister" / "stores" / "migrations" / "versions"


def main() -> None:
    number, message = sys.argv[1:]
    (VERSIONS / f"{number}.py").unlink(missing_ok=True)
    config = Config()
    config.set_main_option("script_location", "cloister.stores:migrations")
    config.set_main_option("file_template", "%%(rev)s")
    with create_engine("sqlite://").begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        command.revision(config, message=message, rev_id=number, autogenerate=True)
    file = VERSIONS / f"{number}.py"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.lstrip().startswith("# ###")))
    for task in (["format"], ["check", "--fix"]):
        subprocess.run([sys.executable, "-m", "ruff", *task, "--quiet", VERSIONS], check=True)


if __name__ == "__main__":
    main()
