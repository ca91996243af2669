"""A tar archive in, its members out, one by one, and with whether it is whole: nothing is skipped, nothing unpacked.

Python's `tarfile` takes a damaged header for the end. Here the end is two blocks of zeros with zeros behind them.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = tarfile.BLOCKSIZE
# A long name, or the records that may take the place of a header's fields.
_LONGEST_EXTENSION = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# POSIX's keywords; others have a vendor's name in capitals.
_PAX = {
    *("atime", "charset", "comment", "ctime", "gid", "gname", "hdrcharset", "linkpath", "mtime", "path", "size"),
    *("uid", "uname"),
}


class DamagedTarError(Exception):
    """An archive that is not whole; the message says from which byte on."""


@dataclass(frozen=True)
class Member:
    """A member.

    Attributes:
        kind: `file`, `link` (hard), `symlink`, `folder`, or what it is called in words.
        start, size: of its content in the archive, in bytes.
        target: of a link, as it stands there.
    """

    name: str
    kind: str
    start: int
    size: int
    target: str = ""


_KINDS = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file"),
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "symlink",
    tarfile.DIRTYPE: "folder",
    # An archive's own name.
    b"V": "folder",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
_EXTENSIONS = {
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
}
# Their headers say a size, but no content follows.
_EMPTY = {"link", "symlink", "folder", "device", "pipe"}


def members(stream: IO[bytes], length: int, notes: list[str]) -> Iterator[Member]:
    """The members in order.

    Args:
        length: of the archive in bytes.
        notes: receives what is odd about a whole archive.

    Raises:
        DamagedTarError: after those that come before the damage.
    """
    offset, shared, own = 0, dict[str, str](), dict[str, str]()
    while True:
        begun = offset
        header = _header(stream, offset, length)
        if header is None:
            if own:
                raise DamagedTarError(f"found its end at byte {begun} where a member should be")
            _check_end(stream, offset, length)
            padded = -(-(offset + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
            if length > padded:
                # Content that was overwritten with zeros up to the end looks so, too.
                notes.append(f"found {length - padded} bytes of zeros after its end, more than fill a record up")
            return
        kind = _KINDS.get(header.type, f"member of type {header.type!r}")
        fields = shared | own
        try:
            size = header.size if header.type in _EXTENSIONS else int(fields.get("size", header.size))
        except ValueError:
            size = -1
        start = offset + BLOCK
        offset = start + (0 if kind in _EMPTY else -(-size // BLOCK) * BLOCK)
        if size < 0 or offset > length:
            raise DamagedTarError(f"found {length} bytes, but a member at byte {begun} that goes on to byte {offset}")
        if header.type in _EXTENSIONS:
            content = _content(stream, start, size, begun)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = _long_name(content, begun)
            elif header.type == tarfile.GNUTYPE_LONGLINK:
                own["linkpath"] = _long_name(content, begun)
            elif header.type == tarfile.XGLTYPE:
                shared |= _pax(content, begun)
            else:
                own |= _pax(content, begun)
            continue
        if any(name.startswith("GNU.sparse.") for name in fields):
            kind = "sparse file"
        name, target = fields.get("path", header.name), fields.get("linkpath", header.linkname)
        if name.endswith("/") and kind == "file":
            kind = "folder"
        yield Member(name, kind, start, size, target)
        own = {}


def _header(stream: IO[bytes], offset: int, length: int) -> tarfile.TarInfo | None:
    """The header at this byte; None for a block of zeros."""
    if offset + BLOCK > length:
        raise DamagedTarError(f"found {length} bytes and no end mark, so that it was cut off")
    stream.seek(offset)
    block = stream.read(BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if len(block) == BLOCK and not any(block):
            return None
        packed = next((name for start, name in _COMPRESSED.items() if offset == 0 and block.startswith(start)), None)
        reason = f"found no header at byte {offset} ({error})" if packed is None else f"found a file packed by {packed}"
        raise DamagedTarError(reason) from None


def _check_end(stream: IO[bytes], offset: int, length: int) -> None:
    if offset + 2 * BLOCK > length:
        raise DamagedTarError(f"found {length} bytes and half an end mark, so that it was cut off")
    stream.seek(offset)
    while block := stream.read(1 << 20):
        if any(block):
            raise DamagedTarError(
                f"found zeros at byte {offset} where a header should be, and data after them: a part was overwritten "
                "or archives stand one after the other"
            )


def _content(stream: IO[bytes], start: int, size: int, begun: int) -> bytes:
    if size > _LONGEST_EXTENSION:
        raise DamagedTarError(f"found a name of {size} bytes at byte {begun}")
    stream.seek(start)
    return stream.read(size)


def _long_name(content: bytes, begun: int) -> str:
    name, end, _ = content.partition(b"\0")
    if not name or not end:
        raise DamagedTarError(f"found a long name without an end at byte {begun}")
    return name.decode("utf-8", "surrogateescape")


def _pax(content: bytes, begun: int) -> dict[str, str]:
    """POSIX's extended header: records of `LENGTH KEYWORD=VALUE\\n`."""
    values, rest = {}, content
    while rest:
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record, rest = rest[:length], rest[length:]
        keyword, separator, value = record[len(digits) + 1 : -1].partition(b"=")
        name = keyword.decode("utf-8", "replace")
        if not separator or not record.endswith(b"\n") or len(record) != length or not _is_keyword(name):
            raise DamagedTarError(f"found a damaged extended header at byte {begun}")
        values[name] = value.decode("utf-8", "surrogateescape")
    return values


def _is_keyword(name: str) -> bool:
    return name in _PAX or name[:1].isupper() or name.startswith(("realtime.", "security."))
