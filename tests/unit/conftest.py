"""Fixtures that several test files of this folder share."""

from authority_world import empty_template, empty_world, sealed_template, world

__all__ = ["empty_template", "empty_world", "sealed_template", "world"]
