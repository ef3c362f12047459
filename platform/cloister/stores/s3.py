"""Blobs in a bucket of S3, or of a store that speaks its protocol, through `pyarrow.fs`.

    s3://bucket/prefix?region=eu-central-1
    s3://bucket/prefix?endpoint=minio.hospital.example:9000

Credentials come from where AWS's own tools look for them, never from the URL: for commands also from the environment;
for processes that stay (authority, workers) from configuration files, a web identity or the instance alone, since a
secret in their environment would reach more than them. `AWS_CA_BUNDLE` names a private CA. The endpoint is asked over
HTTPS; over plain HTTP only where the URL says `scheme=http` and the endpoint is this machine.

Guarantees: an object appears whole or not at all (S3's own promise), but that a writer which is interrupted just before
it writes may leave an empty one; a path that is taken is refused before anything is written; an error shows S3's error
code and neither credentials nor what the endpoint said.
Not guaranteed: that of two writers who take the *same* path within the same moment one is refused: the last one wins,
since `pyarrow` has no conditional write. Writers therefore draw the folder's name at random (64 bits), so that no two
of them ever name the same path; and whoever reads compares digests, so that a replaced object is refused, not used.
Where that is not enough, turn on the bucket's versioning or object lock. A writer that is killed can leave parts of an
upload that no listing shows: give the bucket a rule that ends incomplete multipart uploads.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterator
from typing import NoReturn
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from cloister.errors import InputError, NotFoundError, UnavailableError
from cloister.stores.blobs import CHUNK_BYTES, check_path, missing, taken

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0  # of silence, in each attempt: a dead store is given up after half a minute
ATTEMPTS = 3
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ENDPOINT = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?")
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_CODE = re.compile(r"AWS Error ([A-Z_]{3,60})\b")
_OPTIONS = {"endpoint", "region", "scheme"}


class S3Blobs:
    """Blobs below a prefix of one bucket. Implements `Blobs`."""

    def __init__(self, url: str) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            InputError: not such a URL. It is not quoted, since it may hold a password.
        """
        self._bucket, self._prefix, options = _parse(url)
        self._url = url
        self._fs = pafs.S3FileSystem(
            region=options.get("region"),
            endpoint_override=options.get("endpoint"),
            scheme=options.get("scheme", "https"),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
            tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE") or None,
        )

    @property
    def url(self) -> str:
        return self._url

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._bucket, self._prefix, check_path(path)) if part)

    def put(self, path: str, data: bytes | memoryview) -> None:
        key = self._key(path)
        with self._explained("take", path):
            is_taken = self._fs.get_file_info(key).type != pafs.FileType.NotFound
        if is_taken:
            raise taken(path)
        with self._explained("take", path):
            stream = self._fs.open_output_stream(key)
            stream.write(data)
            stream.close()  # not in a `with`: after an error, closing would make an object of what came so far

    def get(self, path: str) -> bytes:
        key = self._key(path)
        with self._explained("give", path), self._fs.open_input_stream(key) as stream:
            return bytes(stream.read())

    def chunks(self, path: str) -> Iterator[bytes]:
        key = self._key(path)
        with self._explained("give", path), self._fs.open_input_stream(key) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield bytes(chunk)

    def list(self, prefix: str) -> dict[str, float]:
        key = self._key(prefix)
        below = len(key) - len(prefix)
        with self._explained("list", prefix):
            found = self._fs.get_file_info(pafs.FileSelector(key, allow_not_found=True, recursive=True))
        # Folders are names of their own here, which nobody wrote.
        files = [info for info in found if info.type == pafs.FileType.File]
        return {info.path[below:]: info.mtime.timestamp() for info in sorted(files, key=lambda info: str(info.path))}

    def remove(self, path: str) -> None:
        key = self._key(path)
        with contextlib.suppress(NotFoundError), self._explained("remove", path):
            self._fs.delete_file(key)

    def remove_tree(self, prefix: str) -> None:
        key = self._key(prefix)
        with contextlib.suppress(NotFoundError, UnavailableError), self._explained("remove", prefix):
            self._fs.delete_dir(key)

    @contextlib.contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        """Raise what a store's failure means. The library's text is dropped: it quotes the endpoint's answer."""
        code = ""
        try:
            yield
            return
        except FileNotFoundError:
            code = "NOT_FOUND"
        except (OSError, pa.ArrowException) as error:
            match = _CODE.search(str(error))
            code = match[1] if match else type(error).__name__
        self._fail(verb, path, code)

    def _fail(self, verb: str, path: str, code: str) -> NoReturn:
        if code in ("NOT_FOUND", "NO_SUCH_KEY"):
            raise missing(path)
        raise UnavailableError(
            f"the blob store s3://{self._bucket} did not {verb} {path}: {code}",
            "check the bucket, its region and endpoint, and the AWS credentials of this process",
        )


def _parse(url: str) -> tuple[str, str, dict[str, str]]:
    """Bucket, prefix and options of a store's URL.

    Raises:
        InputError: not one.
    """
    parts = urlsplit(url)
    if "@" in url:
        raise InputError(
            "the URL of a blob store holds no credentials",
            "put them into ~/.aws/credentials, where AWS's own tools look for them too",
        )
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options, prefix = dict(pairs), parts.path.strip("/")
    endpoint = _ENDPOINT.fullmatch(options.get("endpoint", "x"))
    if (
        parts.scheme != "s3"
        or parts.fragment
        or not _BUCKET.fullmatch(parts.netloc)
        or len(options) != len(pairs)
        or not _OPTIONS.issuperset(options)
        or not endpoint
        or not _REGION.fullmatch(options.get("region", "x"))
        or options.get("scheme", "https") not in ("http", "https")
    ):
        raise InputError(
            "this is not the URL of an S3 store",
            "write s3://bucket/prefix?region=eu-central-1 or s3://bucket/prefix?endpoint=host:port",
        )
    if prefix:
        check_path(prefix)
    if options.get("scheme") == "http" and ("endpoint" not in options or not _is_loopback(endpoint["host"])):
        raise InputError("a blob store on a network is asked over HTTPS only", "leave scheme=http out of its URL")
    return parts.netloc, prefix, options


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
