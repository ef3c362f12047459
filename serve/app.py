"""The Serve application, as `serve run` and `serve deploy` import it: `app:build`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from ray.serve import Application

from cloister.serving import deployment


class Arguments(BaseModel):
    """`directory`: an endpoint directory that `cloister serve deploy` wrote; readable on every node with a replica."""

    directory: Path


def build(args: Arguments) -> Application:
    """Build the application of one endpoint."""
    return deployment.build(args.directory)
