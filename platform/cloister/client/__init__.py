"""Talking to Cloister from a program: the authority, and the endpoints."""
