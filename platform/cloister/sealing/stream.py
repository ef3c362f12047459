"""Sealed files of any size: the STREAM construction over AES-256-GCM (FORMAT.md, "Stream").

Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance" (2015),
with the nonce layout of the age file format (C2SP age, "Payload").

Guarantees: a changed, cut, extended or reordered file is refused; a file under another context (another model,
another run) is refused; no plaintext is released before every chunk has been checked (but by `OpeningStream`, which
says so); a key may seal any number of files, because each file has its own subkey, derived with a random 256-bit salt.

Does not guarantee: hiding the length of the plaintext; commitment to the key (AES-GCM does not commit: whoever knows
two keys can make a file that opens under both); freshness (an old file under the same context still opens).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BytesIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError

MAGIC = b"CLSTREAM"
VERSION = b"\x01"
KEY_BYTES = 32
SALT_BYTES = 32
TAG_BYTES = 16
CHUNK_BYTES = 1 << 20
HEADER_BYTES = len(MAGIC) + len(VERSION) + SALT_BYTES
_SUBKEY_LABEL = b"cloister.dev/stream/v1"
_SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
_COUNTER_BYTES = 11


def seal(key: bytes, plaintext: bytes | bytearray | memoryview, context: Mapping[str, str]) -> bytes:
    """Seal `plaintext` under `key`, bound to `context`, which is not stored: the reader must know it.

    Raises:
        InputError: the key is not 32 bytes or the context is not a map of strings.
    """
    header = MAGIC + VERSION + os.urandom(SALT_BYTES)
    return _seal_with_header(key, plaintext, context, header)


def open_sealed(key: bytes, sealed: bytes | bytearray | memoryview, context: Mapping[str, str]) -> bytes:
    """The plaintext that `seal` took.

    Raises:
        InputError: the key is not 32 bytes or the context is not a map of strings.
        IntegrityError: another key, another context, or changed, cut or reordered bytes.
    """
    memory = BytesIO(bytes(plaintext_bytes(sealed)))  # written in place and handed out: no second copy
    open_into(key, sealed, context, memory.getbuffer())
    return memory.getvalue()


def open_into(
    key: bytes, sealed: bytes | bytearray | memoryview, context: Mapping[str, str], buffer: bytearray | memoryview
) -> int:
    """Open into the caller's buffer, which may be reused from file to file; return the number of bytes written.

    Several times faster than `open_sealed` on large files, since fresh memory costs more than AES. When it raises,
    whatever it had written to `buffer` has been overwritten with zeros.

    Raises:
        InputError: the key, the context or the size of the buffer is wrong.
        IntegrityError: another key, another context, or changed, cut or reordered bytes.
    """
    size = plaintext_bytes(sealed)
    if len(buffer) < size:
        raise InputError("the buffer is smaller than the plaintext", "size it with plaintext_bytes(sealed)")
    source, out = memoryview(sealed).cast("B"), memoryview(buffer).cast("B")[:size]
    header = bytes(source[:HEADER_BYTES])
    cipher, aad = _cipher(key, header), _aad(header, context)
    body = source[HEADER_BYTES:]
    last = (len(body) - 1) // _SEALED_CHUNK_BYTES
    try:
        for index in range(last + 1):
            chunk = body[index * _SEALED_CHUNK_BYTES : (index + 1) * _SEALED_CHUNK_BYTES]
            start = index * CHUNK_BYTES
            cipher.decrypt_into(_nonce(index, index == last), chunk, aad, out[start : start + len(chunk) - TAG_BYTES])
    except InvalidTag:
        out[:] = bytes(size)
        raise _broken() from None
    return size


def plaintext_bytes(sealed: bytes | bytearray | memoryview) -> int:
    """How many bytes `sealed` holds, from its length alone.

    Raises:
        IntegrityError: not a sealed file of a known version, or a length that no sealed file has.
    """
    view = memoryview(sealed).cast("B")
    _check_header(bytes(view[:HEADER_BYTES]))
    body = len(view) - HEADER_BYTES
    chunks = -(-body // _SEALED_CHUNK_BYTES)
    last = body - (chunks - 1) * _SEALED_CHUNK_BYTES
    # Only the empty file has an empty chunk: one plaintext length has one sealed length.
    if chunks < 1 or last < TAG_BYTES or (last == TAG_BYTES and chunks > 1):
        raise _cut()
    return body - chunks * TAG_BYTES


def _check_header(header: bytes) -> None:
    if not header.startswith(MAGIC):
        raise IntegrityError("this is not a sealed file", "name a file that Cloister sealed")
    if header[len(MAGIC) : len(MAGIC) + 1] != VERSION:
        raise IntegrityError("this sealed file has an unknown version", "upgrade Cloister")


def _cut() -> IntegrityError:
    return IntegrityError("this sealed file is cut short", "fetch it again")


def _broken() -> IntegrityError:
    return IntegrityError(
        "the sealed file does not open: it was changed, cut, moved, or sealed under another key",
        "fetch it again; if it still does not open, do not use it and look at the audit log",
    )


class SealingStream:
    """Seals what comes in pieces, in constant memory: the same format, byte for byte, as `seal`."""

    def __init__(self, key: bytes, context: Mapping[str, str]) -> None:
        """Raises InputError as `seal`."""
        header = MAGIC + VERSION + os.urandom(SALT_BYTES)
        self._chunks = _Chunks(CHUNK_BYTES, key, header, context)
        self._out = header

    def update(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """The sealed bytes that are ready once `plaintext` has come too."""
        return self._take() + b"".join(map(self._chunks.sealed, self._chunks.add(plaintext)))

    def finish(self) -> bytes:
        """The rest of the sealed bytes. Nothing can come after."""
        return self._take() + self._chunks.sealed(self._chunks.last(), final=True)

    def _take(self) -> bytes:
        out, self._out = self._out, b""
        return out


class OpeningStream:
    """Opens what comes in pieces, in constant memory.

    What `update` returns has been authenticated chunk by chunk, but only `finish` says that it was the whole: do
    nothing that cannot be undone before.
    """

    def __init__(self, key: bytes, context: Mapping[str, str]) -> None:
        self._key, self._context = key, dict(context)
        self._header = b""
        self._chunks: _Chunks | None = None

    def update(self, sealed: bytes | bytearray | memoryview) -> bytes:
        """The plaintext that is known once `sealed` has come too.

        Raises:
            InputError: as `open_sealed`.
            IntegrityError: another key, another context, or changed or reordered bytes.
        """
        view = memoryview(sealed).cast("B")
        if self._chunks is None:
            missing = HEADER_BYTES - len(self._header)
            self._header += bytes(view[:missing])
            if len(self._header) < HEADER_BYTES:
                return b""
            _check_header(self._header)
            self._chunks = _Chunks(_SEALED_CHUNK_BYTES, self._key, self._header, self._context)
            view = view[missing:]
        return b"".join(map(self._chunks.opened, self._chunks.add(view)))

    def finish(self) -> bytes:
        """The rest of the plaintext.

        Raises:
            IntegrityError: as `update`; or the file is cut.
        """
        if self._chunks is None:
            raise _cut()
        last = self._chunks.last()
        if len(last) < TAG_BYTES or (len(last) == TAG_BYTES and self._chunks.count):
            raise _cut()
        return self._chunks.opened(last, final=True)


class _Chunks:
    """Cuts pieces into chunks of `size` bytes, always keeping the last one back: only it is sealed as the last."""

    def __init__(self, size: int, key: bytes, header: bytes, context: Mapping[str, str]) -> None:
        self._size = size
        self._cipher, self._aad = _cipher(key, header), _aad(header, context)
        self._kept = bytearray()
        self.count = 0

    def add(self, piece: bytes | bytearray | memoryview) -> list[bytes]:
        self._kept += piece
        whole = max(0, (len(self._kept) - 1) // self._size)
        chunks = [bytes(self._kept[index * self._size : (index + 1) * self._size]) for index in range(whole)]
        del self._kept[: whole * self._size]
        return chunks

    def last(self) -> bytes:
        return bytes(self._kept)

    def sealed(self, chunk: bytes, final: bool = False) -> bytes:
        self.count += 1
        return self._cipher.encrypt(_nonce(self.count - 1, final), chunk, self._aad)

    def opened(self, chunk: bytes, final: bool = False) -> bytes:
        self.count += 1
        try:
            return self._cipher.decrypt(_nonce(self.count - 1, final), chunk, self._aad)
        except InvalidTag:
            raise _broken() from None


def _seal_with_header(
    key: bytes, plaintext: bytes | bytearray | memoryview, context: Mapping[str, str], header: bytes
) -> bytes:
    cipher, aad = _cipher(key, header), _aad(header, context)
    source = memoryview(plaintext).cast("B")
    chunks = max(1, -(-len(source) // CHUNK_BYTES))
    memory = BytesIO(bytes(HEADER_BYTES + len(source) + chunks * TAG_BYTES))
    sealed = memory.getbuffer()
    sealed[:HEADER_BYTES] = header
    out = sealed[HEADER_BYTES:]
    for index in range(chunks):
        chunk = source[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        start = index * _SEALED_CHUNK_BYTES
        nonce = _nonce(index, index == chunks - 1)
        cipher.encrypt_into(nonce, chunk, aad, out[start : start + len(chunk) + TAG_BYTES])
    return memory.getvalue()


def _cipher(key: bytes, header: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise InputError("the key is not 32 bytes", "make it with cloister.sealing.envelope.new_key()")
    salt = header[-SALT_BYTES:]
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_SUBKEY_LABEL).derive(key))


def _aad(header: bytes, context: Mapping[str, str]) -> bytes:
    """The header has a fixed length, so header ‖ context reads one way only."""
    if not all(isinstance(name, str) and isinstance(value, str) for name, value in context.items()):
        raise InputError("a seal context maps strings to strings", "turn numbers into text first")
    return header + canonical_json(dict(context))


def _nonce(index: int, final: bool) -> bytes:
    return index.to_bytes(_COUNTER_BYTES, "big") + (b"\x01" if final else b"\x00")
