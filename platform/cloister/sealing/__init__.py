"""Sealing: how bytes are made unreadable to everyone but the holder of a key.

    envelope   a data key wrapped under a key-encryption key
    stream     models and checkpoints: chunked AES-256-GCM
    shard      tables: Parquet Modular Encryption
    lease      keys on the move: HPKE to a one-time public key
    purposes   what such a key is for, the same on both sides

Every function takes values and returns values. The byte formats are in FORMAT.md beside this file.
"""
