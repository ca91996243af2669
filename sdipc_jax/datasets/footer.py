"""A Parquet file's footer in, the rows of its groups out, if it does not contradict itself: it has no checksum.

pyarrow ends the process when it is asked about some damaged footers, and so is not asked. The format is Thrift's
compact protocol: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from collections.abc import Iterator
from typing import IO, Any

_MAGIC = b"PAR1"
_TAIL = 8
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Fields of the footer's structures, by their numbers in the specification.
_SCHEMA, _ALL_ROWS, _GROUPS = 2, 3, 4
_COLUMNS, _GROUP_ROWS = 1, 3
_COLUMN = 3
_VALUES, _SIZE, _DATA, _DICTIONARY = 5, 7, 9, 11
_REPETITION, _CHILDREN = 3, 5
_REPEATED = 2

_Struct = dict[int, Any]


def rows_of_groups(stream: IO[bytes], length: int) -> tuple[int, ...]:
    """The rows of each group of a file.

    Args:
        length: of the file in bytes.

    Raises:
        ValueError: the file is not whole, or its footer says what cannot be.
    """
    footer = _footer(stream, length)
    groups, everything = footer[_GROUPS], footer[_ALL_ROWS]
    rows = tuple(group[_GROUP_ROWS] for group in groups)
    if sum(rows) != everything or min(rows, default=0) < 0:
        raise ValueError(f"found {everything} rows in all, and {sum(rows)} in its groups")
    flat = list(_flat(footer[_SCHEMA]))
    places = []
    for group in groups:
        columns = [column[_COLUMN] for column in group[_COLUMNS]]
        if len(columns) != len(flat):
            raise ValueError(f"found {len(columns)} columns in a group, and {len(flat)} in its schema")
        for column, is_flat in zip(columns, flat, strict=True):
            if is_flat and column[_VALUES] != group[_GROUP_ROWS]:
                raise ValueError(f"found {column[_VALUES]} values of a column for {group[_GROUP_ROWS]} rows")
            if not group[_GROUP_ROWS]:
                continue  # It lies nowhere.
            start = min(column[_DATA], column.get(_DICTIONARY) or column[_DATA])
            places.append((start, start + column[_SIZE]))
    places.sort()
    ends = [len(_MAGIC), *(end for _, end in places)]
    if ends[-1] > length or any(start < end for (start, _), end in zip(places, ends, strict=False)):
        raise ValueError("found columns that overlap, or lie outside of it")
    return rows


def _footer(stream: IO[bytes], length: int) -> _Struct:
    stream.seek(max(0, length - _TAIL))
    tail = stream.read(_TAIL)
    size = int.from_bytes(tail[:4], "little")
    if len(tail) < _TAIL or tail[4:] != _MAGIC or size > length - _TAIL - len(_MAGIC):
        raise ValueError("found no footer at its end")
    stream.seek(length - _TAIL - size)
    try:
        footer, end = _struct(stream.read(size), 0)
        if end != size:
            raise ValueError("found a damaged footer")
    except (IndexError, RecursionError):
        raise ValueError("found a damaged footer") from None
    return footer


def _flat(schema: list[_Struct]) -> Iterator[bool]:
    """Of each column, in order, whether it has one value a row."""
    elements = iter(schema[1:])

    def columns(count: int, flat: bool) -> Iterator[bool]:
        for _ in range(count):
            element = next(elements, None)
            if element is None:
                raise ValueError("found a schema that ends too soon")
            own = flat and element.get(_REPETITION) != _REPEATED
            if element.get(_CHILDREN):
                yield from columns(element[_CHILDREN], own)
            else:
                yield own

    yield from columns(schema[0].get(_CHILDREN, 0), True)


def _struct(data: bytes, place: int) -> tuple[_Struct, int]:
    fields: _Struct = {}
    number = 0
    while header := data[place]:
        place += 1
        if header >> 4:
            number += header >> 4
        else:
            number, place = _integer(data, place)
        kind = header & 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], place = _value(kind, data, place)
    return fields, place + 1


def _value(kind: int, data: bytes, place: int) -> tuple[Any, int]:
    if kind in (_I16, _I32, _I64):
        return _integer(data, place)
    if kind == _BINARY:
        size, place = _unsigned(data, place)
        if place + size > len(data):
            raise IndexError
        return data[place : place + size], place + size
    if kind == _STRUCT:
        return _struct(data, place)
    if kind in (_LIST, _SET):
        header, place = data[place], place + 1
        size, kind = header >> 4, header & 15
        if size == 15:
            size, place = _unsigned(data, place)
        items = []
        for _ in range(size):
            item, place = _value(kind, data, place)
            items.append(item)
        return items, place
    if kind == _MAP:
        size, place = _unsigned(data, place)
        kinds, place = (data[place], place + 1) if size else (0, place)
        for _ in range(size):
            _, place = _value(kinds >> 4, data, place)
            _, place = _value(kinds & 15, data, place)
        return None, place
    if kind in (_TRUE, _FALSE, _BYTE):
        return data[place], place + 1
    if kind == _DOUBLE:
        return None, place + 8
    raise ValueError(f"found the type {kind} in its footer")


def _integer(data: bytes, place: int) -> tuple[int, int]:
    value, place = _unsigned(data, place)
    return (value >> 1) ^ -(value & 1), place


def _unsigned(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, place = data[place], place + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("found a number of more than 64 bits in its footer")
