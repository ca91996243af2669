"""JPEG files as their markers tell, as libjpeg reads them: how many scans, and where the picture ends."""

import re
import struct
from collections.abc import Iterator

# A marker: not a byte of the pixels that happens to be 0xff, nor what divides a scan.
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_START_OF_SCAN, _END, _TEMPORARY, _START = 0xDA, 0xD9, 0x01, 0xD8


def markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, where it stands, where what follows its segment begins) of each, up to the end of the first picture.

    What lies behind it, such as a film, is not looked at; nor what lies inside of a segment, such as a thumbnail.
    """
    place = 0
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == _END:
            yield marker, found.start(), place
            return
        if marker not in (_TEMPORARY, _START) and place + 2 <= len(data):
            place += max(2, *struct.unpack_from(">H", data, place))
        yield marker, found.start(), place


def count_scans(data: bytes) -> int:
    """How often the picture goes over its pixels."""
    return sum(marker == _START_OF_SCAN for marker, _, _ in markers(data))
