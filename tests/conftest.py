"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from command_line import CommandLine
from databases import place, postgres_place
from postgres import postgres_server
from s3 import s3, s3_server

__all__ = ["line", "place", "postgres_place", "postgres_server", "s3", "s3_server"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For several workers: a file's tests share authorities, and clusters are counted by the whole machine."""
    for item in items:
        group = "cluster" if item.path.parent.name == "cluster" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
