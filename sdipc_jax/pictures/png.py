"""PNG files as chunks, so that those can be left out that no pixel depends on."""

import struct
from collections.abc import Collection

_SIGNATURE_LENGTH = 8
# Names of the chunks that hold what is compressed and may be large.
CHUNKS = {"text": (b"tEXt", b"zTXt", b"iTXt"), "colour profile": (b"iCCP",)}


def without_chunks(data: bytes, *names: Collection[bytes]) -> bytes:
    """The file without the chunks of these names; from where it is no PNG any more, it stays as it is."""
    left_out = {name for each in names for name in each}
    if not left_out:
        return data
    parts, place = [data[:_SIGNATURE_LENGTH]], _SIGNATURE_LENGTH
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name not in left_out:
            parts.append(data[place : place + 12 + length])
        place += 12 + length
    return b"".join([*parts, data[place:]])
