"""What a file is, by its first bytes: its name says nothing.

Guarantees: a file is read only as one of `Kind`; every other kind that is known by its first bytes is refused by
that kind's name, so that an archive, a pickle or a program behind a `.csv` name never reaches a parser. Sources: the
formats' own specifications, collected in the `magic` database of file(1).

Not promised: to know every format. What has no mark of its own is taken for CSV and has to fit the schema.
"""

from __future__ import annotations

import re
from typing import Literal

from cloister.errors import InputError

Kind = Literal["csv", "json lines", "gzip", "parquet", "arrow file", "arrow stream"]

HEAD_BYTES = 1 << 16
_READ = "CSV (also gzipped), Parquet, JSON Lines and Arrow IPC are read"
_UNPACK = "unpack it, and seal the table inside"
_TABLE = f"export the table itself: {_READ}"

_MARKS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or an Office, NumPy or PyTorch file, which are zip archives)", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"PK\x07\x08", "a split zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"MSCF\0\0\0\0", "a cabinet archive", _UNPACK),
    (b"!<arch>\n", "an ar archive", _UNPACK),
    (b"\xfd7zXZ\0", "xz-compressed", _UNPACK),
    (b"BZh", "bzip2-compressed", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK),
    (b"\x04\x22\x4d\x18", "lz4-compressed", _UNPACK),
    (b"\xff\x06\0\0sNaPpY", "snappy-compressed", _UNPACK),
    (b"LZIP\x01", "lzip-compressed", _UNPACK),
    (b"\x5d\0\0", "lzma-compressed", _UNPACK),
    (b"\x1f\x9d", "compressed by compress(1)", _UNPACK),
    (b"PARE", "encrypted Parquet", "decrypt it first: Cloister seals it under its own keys"),
    (b"FEA1", "Feather version 1", "write it as Feather version 2 or Parquet"),
    (b"\x93NUMPY", "a NumPy array", _TABLE),
    (b"\x89HDF\r\n\x1a\n", "HDF5", _TABLE),
    (b"Obj\x01", "Avro", _TABLE),
    (b"ORC", "ORC", _TABLE),
    (b"SQLite format 3\0", "an SQLite database", _TABLE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _TABLE),
    (b"{\\rtf", "an RTF document", _TABLE),
    (b"%!PS", "a PostScript program", _TABLE),
    (b"\x7fELF", "a program (ELF)", _TABLE),
    (b"\xfe\xed\xfa\xce", "a program (Mach-O)", _TABLE),
    (b"\xfe\xed\xfa\xcf", "a program (Mach-O)", _TABLE),
    (b"\xce\xfa\xed\xfe", "a program (Mach-O)", _TABLE),
    (b"\xcf\xfa\xed\xfe", "a program (Mach-O)", _TABLE),
    (b"\xca\xfe\xba\xbe", "a program (Mach-O or Java)", _TABLE),
    (b"\0asm", "a program (WebAssembly)", _TABLE),
    (b"#!", "a script", _TABLE),
    (b"\x89PNG", "a PNG image", _TABLE),
    (b"\xff\xd8\xff", "a JPEG image", _TABLE),
    (b"GIF8", "a GIF image", _TABLE),
    (b"\xff\xfe", "UTF-16 text", "export it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "export it as UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "export it as UTF-8"),
)
# ORC and GIF8 could begin a header; they count only where what follows is no text.
_WEAK = (b"ORC", b"GIF8", b"BZh", b"Obj\x01")
# Protocol 0, strictly enough that a table of one column is not taken for it.
_PICKLE_TEXT = re.compile(
    rb"c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n(?:p\d+\n)?\(|\([dl]p\d+\n|\(i[\w.]+\n[\w.]+\n"
    rb"|[IFSVL][^\n]{0,80}\n(?:p\d+\n)?\.\Z"
)
_MARKUP = re.compile(rb"\s*<(?:!doctype|!--|html|head|body|script|table|\?xml|\?php|svg|xml)", re.IGNORECASE)


def recognise(head: bytes) -> Kind:
    """What the file that begins with `head` (its first `HEAD_BYTES`, or all of it) is read as.

    Raises:
        InputError: nothing that is read; the message names the kind.
    """
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1\0\0"):
        return "arrow file"
    # Arrow IPC: a continuation mark, then the length of the first message's metadata (Arrow columnar format, IPC).
    if head.startswith(b"\xff\xff\xff\xff") and len(head) > 8:
        return "arrow stream"
    what, hint = _known(head) or _binary(head) or ("", "")
    if what:
        raise InputError(f"the file is {what}, whatever its name says", hint)
    return _text_kind(head)


def _known(head: bytes) -> tuple[str, str] | None:
    for mark, what, hint in _MARKS:
        if head.startswith(mark) and (mark not in _WEAK or not _is_texty(head[:256])):
            return what, hint
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[:2] == b"MZ" and not _is_texty(head[:256]):
        return "a program (PE)", _TABLE
    # Pickle protocols 2 to 5 begin with PROTO; 0 and 1 are text and letters (pickletools.py).
    if (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or _PICKLE_TEXT.match(head):
        return "a pickle, which can run code when it is opened", _TABLE
    if head.lstrip().startswith(b"%PDF-"):
        return "a PDF document", _TABLE
    if _MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "HTML or XML", _TABLE
    return None


def _binary(head: bytes) -> tuple[str, str] | None:
    if b"\0" in head:
        return "neither text nor a table format (it has NUL bytes)", f"{_READ}, text in UTF-8"
    return None


def _text_kind(head: bytes) -> Kind:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        return "json lines"
    if text.startswith(b"["):
        raise InputError("the file is a JSON array", "write JSON Lines: one object a line, without brackets around all")
    if b"\n" not in head and b"\r" in head:
        raise InputError("the file's lines end in bare carriage returns", "save it with \\n or \\r\\n at the line ends")
    return "csv"


def _is_texty(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in head)
