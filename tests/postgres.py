"""A real PostgreSQL for tests: one server a session, in a folder of its own, on loopback, with TLS and SCRAM.

`fsync` stays on. Where no server program can be found, tests that need it are skipped, and say so.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pg8000.native
import psutil
import pytest

from cloister.signing import certificates
from ports import free_port
from waiting import wait_for

USER = "cloister"
START_TIMEOUT_S = 120.0
MEMORY_BYTES = 8 << 30  # more than one run of the suite may think so
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "password_encryption": "scram-sha-256",
    "ssl": "on",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "4GB",  # no checkpoint in the middle
    "autovacuum": "off",
    "log_min_messages": "fatal",
}


def find_programs() -> Path | None:
    """The folder of the newest server's programs, on PATH or where Debian puts them."""
    found = shutil.which("postgres")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def _unprivileged() -> dict[str, Any]:
    """The server refuses to run as root: whom to run it as instead."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}
    raise LookupError("there is no account that the server could run as")


def roomy_memory() -> Path | None:
    """A folder in which nothing waits for a disk, on machines that have the room."""
    memory = Path("/dev/shm")  # noqa: S108  (what is made there is closed to others)
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_BYTES else None


@dataclass
class Server:
    """`options(name)` opens a database of it; `new(template)` makes one."""

    folder: Path
    programs: Path
    port: int
    password_file: Path
    ca: Path
    process: subprocess.Popen[bytes]
    superuser: Any = None

    def url(self, name: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{name}"

    def options(self, name: str) -> dict[str, Any]:
        """What `Database` takes."""
        return {"place": self.url(name), "password_file": self.password_file}

    def new(self, template: str = "template1", name: str = "", options: str = "") -> str:
        """The name of a new database, a copy of `template`, to which nobody may be connected."""
        name = name or f"world_{secrets.token_hex(4)}"
        self.admin(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy {options}")
        return name

    def drop(self, name: str) -> None:
        self.admin(f"DROP DATABASE {name} WITH (FORCE)")

    def admin(self, statement: str, **parameters: Any) -> list[Any]:
        """Run a statement as the superuser; its rows."""
        if self.superuser is None:
            self.superuser = self.connect("postgres")
        return list(self.superuser.run(statement, **parameters) or [])

    def __getstate__(self) -> dict[str, Any]:
        """Another process can use it, but neither start nor stop it."""
        return self.__dict__ | {"process": None, "superuser": None}

    def end_connections(self, name: str) -> None:
        """Returns when they are gone."""
        self.admin("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name", name=name)

    def settle(self, name: str) -> None:
        """Wait until nobody does anything in that database, nor holds a transaction open: what hung may go on first."""
        busy = "SELECT 1 FROM pg_stat_activity WHERE datname = :name AND state <> 'idle' AND pid <> pg_backend_pid()"
        wait_for(lambda: not self.admin(busy, name=name))

    def set(self, setting: str, value: str | None) -> None:
        """For all connections, those that are open too. None: as it was."""
        self.admin(f"ALTER SYSTEM SET {setting} = {value}" if value else f"ALTER SYSTEM RESET {setting}")
        self.admin("SELECT pg_reload_conf()")
        ours = "SELECT source = 'configuration file' FROM pg_settings WHERE name = :name"
        wait_for(lambda: self.admin(ours, name=setting) == [[value is not None]])

    def own(self, folder: Path) -> Path:
        """A new folder that belongs to the server."""
        folder.mkdir(mode=0o700)
        if account := _unprivileged():
            os.chown(folder, account["user"], account["group"])
        return folder

    def connect(self, database: str) -> Any:
        return pg8000.native.Connection(
            USER, host="127.0.0.1", port=self.port, database=database,
            password=self.password_file.read_text(), ssl_context=False,
        )  # fmt: skip

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Stopped, every process of it: each is a session of its own."""
        stopped = [psutil.Process(self.process.pid)]
        try:
            stopped[0].suspend()  # first, so that it makes no more
            stopped += stopped[0].children(recursive=True)
            for process in stopped[1:]:
                with contextlib.suppress(psutil.NoSuchProcess):  # its session has ended meanwhile
                    process.suspend()
            yield
        finally:
            for process in reversed(stopped):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def restart(self) -> None:
        """Crash and start again: what was not written down is gone."""
        self.stop(signal.SIGQUIT)
        self.start()

    def start(self) -> None:
        options = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", "", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(self.folder / "log").open("ab"),
            cwd="/", **_unprivileged(),
        )  # fmt: skip
        wait_for(self._answers, "PostgreSQL", START_TIMEOUT_S)

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "log").read_text())
        with contextlib.suppress(pg8000.Error, OSError):
            self.connect("postgres").close()
            return True
        return False

    def stop(self, number: int = signal.SIGINT) -> None:
        self.superuser = None
        self.process.send_signal(number)
        self.process.wait(START_TIMEOUT_S)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server in a new folder; both are gone afterwards."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt install postgresql)")
    account = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="cloister-postgres-", dir=roomy_memory()))
    try:
        password_file = folder / "password"
        password_file.write_text(secrets.token_urlsafe())
        password_file.chmod(0o600)
        ca_key, key = certificates.new_private_key(), certificates.new_private_key()
        ca = certificates.new_ca(ca_key, "test CA")
        request = certificates.signing_request(key, "127.0.0.1")
        (folder / "ca.pem").write_bytes(ca)
        if account:
            for path in (folder, password_file):
                os.chown(path, account["user"], account["group"])
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", USER, "--auth=scram-sha-256", "--pwfile", password_file,
             "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"],
            check=True, stdout=subprocess.DEVNULL, cwd="/", **account,
        )  # fmt: skip
        for name, content in {
            "server.key": key,
            "server.crt": certificates.issue(ca_key, ca, request, hosts=("127.0.0.1", "localhost")),
        }.items():
            file = folder / "data" / name
            file.write_bytes(content)
            file.chmod(0o600)
            if account:
                os.chown(file, account["user"], account["group"])
        server = Server(folder, programs, free_port(), password_file, folder / "ca.pem", None)  # type: ignore[arg-type]
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """One for the whole session, started when first asked for."""
    with running() as server:
        yield server
