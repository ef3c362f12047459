"""Fixtures that several test files of this folder share."""

from authority_world import calm_world, empty_template, sealed_template, world, world_server

__all__ = ["calm_world", "empty_template", "sealed_template", "world", "world_server"]
