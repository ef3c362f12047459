"""Cloister: confidential training and serving on Ray. The map, lowest floor first; a module imports only from below.

errors, canonical                    one exception tree; the only maker of bytes-to-sign and digests
sealing, signing, audit, policy,     pure values in, values out: formats, proofs, decisions,
privacy, datasets, models            the DP mechanism, schemas and manifests
stores                               database, blobs, keys, files
client, cluster, process             talking to the authority; a hardened Ray cluster; processes of our own
authority, training, serving         the three programs
config, cli                          settings; thin commands
"""
