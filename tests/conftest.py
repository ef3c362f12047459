"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from command_line import CommandLine
from databases import place, postgres_place
from postgres import postgres_server
from s3 import s3, s3_server

__all__ = ["line", "place", "postgres_place", "postgres_server", "s3", "s3_server"]

pytest_plugins = ["own_root", "outcomes"]
# No deadline: a busy machine is no fault of the example's. Always the same examples: a red run can be repeated.
settings.register_profile("cloister", deadline=None, derandomize=True)
settings.load_profile("cloister")
REAL_SERVERS = {"poor_server", "postgres_server", "provider", "provider_modules", "s3_server"}
# Files that take long: they come first, so that no process is left with one of them at the end.
LONGEST = (
    "cluster/test_story", "oidc/test_login_story", "cluster/test_cluster", "cli/test_bad_input", "cluster/test_serving",
    "attacks/test_faults", "attacks/test_schema_fuzz", "attacks/test_kills", "cli/test_keys", "unit/test_suite",
)  # fmt: skip


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """What needs a server of its own belongs to the story. (Parameters that ask for one have the mark themselves.)"""
    for item in items:
        if REAL_SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("story")
    yield
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition(".py")[0].removeprefix("tests/"), len(order)))


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
