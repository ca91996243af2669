"""Records: what a run says of its work, as JSON has it, and how much of it is done."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
# Called with how much is done, from 0 to 1.
Report = Callable[[float], None]


def digest_of(content: Any) -> str:
    """The sha256 of anything that JSON can hold, of bytes by their own digest."""

    def encode(value: Any) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)

    return hashlib.sha256(json.dumps(content, sort_keys=True, default=encode).encode()).hexdigest()


def name_row(row: int, place: str) -> str:
    """A row for a person: its number in the job, and where it stands in the data set.

    >>> name_row(2, "rows.jsonl, line 3"), name_row(2, "")
    ('row 2 (rows.jsonl, line 3)', 'row 2')
    """
    return f"row {row} ({place})" if place else f"row {row}"
