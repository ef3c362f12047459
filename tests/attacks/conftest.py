"""Fixtures that several test files of this folder share."""

from authority_world import empty_template, sealed_template, world, world_server

__all__ = ["empty_template", "sealed_template", "world", "world_server"]
