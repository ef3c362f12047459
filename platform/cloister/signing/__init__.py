"""Signing: who vouches for which bytes.

    keys           P-256 release keys and Ed25519 identity keys
    dsse           signed in-toto statements: provenance, gates, approvals
    oms            OpenSSF Model Signing bundles
    certificates   X.509 of the internal authority
    tokens         access tokens and client assertions
    foreign        tokens of other issuers (OpenID Connect, Kubernetes)

Every function takes values and returns values. The byte formats are in FORMAT.md beside this file.
"""
