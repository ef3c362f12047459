"""The authority's process: `python -m cloister.authority DIRECTORY --settings FILE`. Started by `cloister up`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from pathlib import Path

from cloister.authority import accountant
from cloister.authority.listener import Listener
from cloister.authority.service import Authority
from cloister.authority.settings import AuthoritySettings
from cloister.errors import CloisterError
from cloister.process import Daemon, describe
from cloister.stores.keys.root import PASSPHRASE_VARIABLE, passphrase_in
from cloister.stores.keys.settings import EmbeddedSettings, VaultSettings, open_keys


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--settings", type=Path, required=True, help="AuthoritySettings as JSON")
    parser.add_argument("--operator", required=True)
    parser.add_argument("--operator-key", type=Path, required=True)
    options = parser.parse_args()
    daemon = Daemon(options.directory / "daemon")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")

    def ready() -> None:
        daemon.report("ready", pid=os.getpid())
        threading.Thread(target=accountant.shared.warm, daemon=True).start()

    try:
        settings = AuthoritySettings.model_validate_json(options.settings.read_bytes())
        authority = Authority(
            options.directory, url=settings.url, database=settings.open_database(), issuers=settings.federation(),
            required=settings.approvals, witnesses=settings.witnesses, blobs=settings.blobs,
            retention_check_s=settings.retention_check_s, seals_per_minute=settings.seals_per_minute,
            key_service=open_keys(settings.keys, options.directory / "keys", lambda: _passphrase(settings.keys)),
        )  # fmt: skip
        authority.identities.bootstrap(options.operator, options.operator_key.read_text())
        listener = Listener(authority, settings, ready)
    except CloisterError as error:
        daemon.report("failed", error=describe(error))
        return 1
    authority.note("authority:start")
    if settings.witnesses:
        authority.witnessing.start()
    authority.retention.start()
    listener.run()
    return 0


def _passphrase(settings: EmbeddedSettings | VaultSettings) -> bytes:
    file = os.environ.get(PASSPHRASE_VARIABLE) or getattr(settings, "passphrase_file", None)
    return passphrase_in(Path(file)) if file else sys.stdin.buffer.readline().rstrip(b"\r\n")


if __name__ == "__main__":
    sys.exit(main())
