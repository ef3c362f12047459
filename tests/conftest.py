"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from command_line import CommandLine
from databases import place, postgres_place
from postgres import postgres_server

__all__ = ["line", "place", "postgres_place", "postgres_server"]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """An authority that runs, with people and the sealed Adult table."""
    line = CommandLine(tmp_path_factory.mktemp("home") / "cloister")
    try:
        line.up()
        line.seal_adult()
        yield line
    finally:
        line.run("down")
