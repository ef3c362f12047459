"""Audit: an append-only log that anyone can check offline.

    event        one entry: who did what to what, and how it ended
    merkle       the RFC 6962 tree over the entries, with its proofs
    checkpoint   the signed state of the tree (C2SP tlog-checkpoint)
    verify       a whole log against its checkpoints

Every function takes values and returns values. The byte formats are in FORMAT.md beside this file.
"""
