"""The folder that one user's Cloister lives in: `$CLOISTER_HOME`, or `~/.cloister`. Closed to others (0700)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cloister.stores.files import private_directory

HOME_VARIABLE = "CLOISTER_HOME"


@dataclass(frozen=True, slots=True)
class Home:
    """Where each part keeps its files. The folders are made when they are first written to."""

    path: Path

    @classmethod
    def find(cls) -> Home:
        return cls(Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".cloister").absolute())

    def make(self) -> Home:
        private_directory(self.path)
        return self

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def authority(self) -> Path:
        """The authority's keys, state and blobs: on the machine that it runs on."""
        return self.path / "authority"

    @property
    def client(self) -> Path:
        """What a client knows of its authority: address, CA, remembered checkpoint."""
        return self.path / "client"

    @property
    def identities(self) -> Path:
        return self.path / "identities"

    @property
    def node(self) -> Path:
        """What this machine is as a node: its key and its certificate of a day."""
        return self.path / "node"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def endpoints(self) -> Path:
        return self.path / "endpoints"
