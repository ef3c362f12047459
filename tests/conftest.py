"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from command_line import CommandLine
from databases import place, postgres_place
from postgres import postgres_server
from s3 import s3, s3_server

__all__ = ["line", "place", "postgres_place", "postgres_server", "s3", "s3_server"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For several workers: each gets whole files, whose tests share authorities; and one of them all of `cluster`,
    where the clusters of the whole machine are counted."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "cluster" if "/cluster/" in file else file

    return ByFile(config, log)


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
