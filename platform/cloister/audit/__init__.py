"""Audit: an append-only log that anyone can check offline.

    event        one entry: who did what to what, and how it ended
    merkle       the RFC 6962 tree over the entries, with its proofs
    checkpoint   the signed state of the tree (C2SP tlog-checkpoint)
    cosignature  what a witness adds to it (C2SP tlog-cosignature)
    witness      who cosigns (C2SP tlog-witness)
    proof        that one entry is in the log, or that the log has only grown, as a file
    verify       a whole log against its checkpoints
    export       a whole log as a file
    siem         events for collectors: syslog, CEF

Every function takes values and returns values. The byte formats are in FORMAT.md beside this file.
"""
