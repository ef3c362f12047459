"""Cloister."""
