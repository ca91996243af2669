"""JPEG files as their markers tell, as libjpeg reads them: how many scans, where the picture ends, what is missing."""

import io
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

# A marker: not a byte of the pixels that happens to be 0xff, nor what divides a scan.
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_PROGRESSIVE = (0xC2, 0xCA)
# Bytes.
_AHEAD = 8
_DAMAGED = "damaged inside: part of it may be grey or wrong"
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


def damage(data: bytes) -> str | None:
    """What to know of a JPEG that was decoded nevertheless: libjpeg fills up what is missing, and says nothing."""
    found = [*markers(data)]
    if not found or found[-1][0] != _END:
        return None
    begins = [(place, after) for marker, place, after in found if marker == _START_OF_SCAN]
    ends = [*(place for place, _ in begins[1:]), found[-1][1]]
    restarts = [
        [each[1] & 7 for each in _RESTART.findall(data, after, end)]
        for (_, after), end in zip(begins, ends, strict=True)
    ]
    if any(numbers != [number % 8 for number in range(len(numbers))] for numbers in restarts):
        return _DAMAGED
    if any(marker in _PROGRESSIVE for marker, _, _ in found):
        is_whole = _is_complete([data[place:after] for place, after in begins])
    else:
        # Files with a scan for each channel are rare, and libjpeg reads them in another way.
        is_whole = len(begins) != 1 or _ends_with_its_picture(data, found[-1][1])
    return None if is_whole else _DAMAGED


def _ends_with_its_picture(data: bytes, end: int) -> bool:
    """Whether the last row of pixels appears with the last bytes of the only scan and not before.

    That is tried on an eighth of the size, which takes libjpeg little more than reading the bytes.
    """

    def reaches_last_row(part: bytes) -> bool:
        image = JpegImageFile(io.BytesIO(data))
        image.draft("L", (image.width // 8, image.height // 8))
        shape = (image.height, image.width * len(image.getbands()))
        # Random, so that a row that was written differs from what was there.
        canvas = Image.frombytes(image.mode, image.size, np.random.default_rng(0).bytes(shape[0] * shape[1]))
        before = np.asarray(canvas)[-1].copy()
        decoder: Any = Image._getdecoder(image.mode, "jpeg", image.tile[0].args, image.decoderconfig)
        try:
            decoder.setimage(canvas.im, (0, 0, *canvas.size))
            decoder.decode(part)
        finally:
            decoder.cleanup()
        return not np.array_equal(np.asarray(canvas)[-1], before)

    # Without the mark of its end libjpeg waits for more where bytes are missing; it reads a few ahead.
    return reaches_last_row(data[:end] + bytes(2 * _AHEAD)) and not reaches_last_row(data[: end - _AHEAD])


def _is_complete(scans: Sequence[bytes]) -> bool:
    """Whether a progressive picture's scans, their headers given, hold all bits of all coefficients."""
    missing: dict[tuple[int, int], int] = {}
    for header in scans:
        if len(header) < 5 or len(header) < 8 + 2 * (count := header[4]):
            return False
        first, last, bits = header[5 + 2 * count : 8 + 2 * count]
        for channel in header[5 : 5 + 2 * count : 2]:
            for coefficient in range(64):
                missing.setdefault((channel, coefficient), 1)
            missing |= {(channel, coefficient): bits & 15 for coefficient in range(first, min(last, 63) + 1)}
    return not any(missing.values())
