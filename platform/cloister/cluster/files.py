"""A cluster's directory on tmpfs, and the secrets in it.

Guarantees: the directory and its parent are this user's, 0700, no symbolic link and on a tmpfs; every file made here
is 0600 from its first moment; the certificate authority's key is never written, so nobody can sign with it again.
Does not guarantee that a tmpfs is not swapped.
"""

from __future__ import annotations

import os
import secrets
import stat
from datetime import timedelta
from pathlib import Path

import psutil

from cloister.errors import InputError, UnavailableError
from cloister.ports import LOOPBACK
from cloister.signing import certificates

CLUSTERS_FOLDER = "CLOISTER_TMPFS"  # the environment variable that names another folder on a tmpfs
CERTIFICATE_LIFETIME = timedelta(days=365)  # Ray reads certificates once: a cluster must end before this does
MAX_UNIX_PATH_BYTES = 107  # sockaddr_un.sun_path less its NUL, unix(7)
RAY_SOCKET_PATH = "r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"  # the longest


def clusters_folder() -> Path:
    """Where this user's clusters have their directories, 0700."""
    return Path(os.environ.get(CLUSTERS_FOLDER) or f"/dev/shm/cloister-{os.getuid()}")  # noqa: S108  (our own)


def choose_directory(parent: Path) -> Path:
    """The path of a cluster's directory below `parent`, which is made if need be. It is not there yet."""
    hint = (
        f"Cloister keeps Ray's files in memory: mount a writable tmpfs at /dev/shm, or name one by ${CLUSTERS_FOLDER}"
    )
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        status = parent.lstat()
        # /dev/shm is open to everybody, so somebody else may have made this name first.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise UnavailableError(f"{parent} is not this user's directory", f"remove {parent}")
        parent.chmod(0o700)
    except OSError as error:
        raise UnavailableError(f"{parent} is not writable", hint) from error
    directory = parent / secrets.token_hex(4)
    if _filesystem(parent) not in ("tmpfs", "ramfs"):
        raise UnavailableError(f"{parent} is not a tmpfs", hint)
    if len(os.fsencode(directory / RAY_SOCKET_PATH)) > MAX_UNIX_PATH_BYTES:
        raise InputError(f"{parent} is too long a path for UNIX sockets", "choose a shorter one")
    return directory


def make_directory(directory: Path) -> None:
    """Make what `choose_directory` chose. Whoever calls it removes it again, also if it is interrupted half-way."""
    directory.mkdir(mode=0o700)
    for name in ("home", "tmp", "spill"):
        (directory / name).mkdir(mode=0o700)


def _filesystem(path: Path) -> str:
    mounts = [m for m in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(m.mountpoint)]
    return str(max(mounts, key=lambda m: len(m.mountpoint)).fstype) if mounts else ""


def write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def write_credentials(directory: Path) -> None:
    """A token, and a certificate authority that signs one certificate and is then forgotten."""
    write_private(directory / "token", secrets.token_hex(32).encode())
    authority_key, key = certificates.new_private_key(), certificates.new_private_key()
    authority = certificates.new_ca(authority_key, f"cloister cluster {directory.name}")
    request = certificates.signing_request(key, "localhost")
    write_private(directory / "ca.crt", authority)
    write_private(
        directory / "tls.crt",
        certificates.issue(
            authority_key, authority, request, hosts=(LOOPBACK, "localhost"), lifetime=CERTIFICATE_LIFETIME
        ),
    )
    write_private(directory / "tls.key", key)
