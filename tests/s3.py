"""A real S3 endpoint on loopback: moto's server, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from waiting import wait_for

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-access-key", "AWS_SECRET_ACCESS_KEY": "test-secret-key"}
# Nothing of the machine's own: no profile, no other endpoint, no instance that hands out credentials.
NOTHING_ELSE = {
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}  # fmt: skip
UNSET = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "AWS_REGION")
_PROGRAM = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until whoever started us closes it, or is gone
"""


class Endpoint:
    """`127.0.0.1:port`, and new buckets in it."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"

    def answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"http://{self.address}/", timeout=60).close()
            return True
        return False

    def bucket(self) -> str:
        """A new, empty bucket's name."""
        name = f"bucket-{secrets.token_hex(6)}"
        request = urllib.request.Request(f"http://{self.address}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=60):  # noqa: S310
            return name

    def url(self, prefix: str = "blobs") -> str:
        """The URL of a store in a new bucket."""
        return f"s3://{self.bucket()}/{prefix}?endpoint={self.address}&scheme=http&region=us-east-1"


@contextlib.contextmanager
def server() -> Iterator[Endpoint]:
    environment = {**os.environ, **CREDENTIALS, **NOTHING_ELSE}
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            endpoint = Endpoint(int(process.stdout.readline()))
            wait_for(endpoint.answers)
            yield endpoint
        finally:
            process.kill()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Endpoint]:
    with server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """The endpoint, with credentials for it in the environment."""
    for name, value in {**CREDENTIALS, **NOTHING_ELSE}.items():
        monkeypatch.setenv(name, value)
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    return s3_server
