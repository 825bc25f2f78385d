"""Windows whose statements are kept in `golden/`, and the comparison with what is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from recognition.messages import Equals, Messages, UpdateByCriteria
from recognition.testing.sinks import at, between, device, unknown, update

Updates = Sequence[UpdateByCriteria]


def windows() -> Iterator[tuple[str, Updates, Updates]]:
    """What each is about, what was applied before, and the window itself."""
    refs = (("m1", at(1)), ("m2", at(2.5)))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    owner = {"user_id": "u1", "context_traits_email": "a@example.com"}
    yield (
        "a device's rows in an interval, where nobody is known",
        (),
        [update(1, owner, device("a1"), unknown(), between(0, 9))],
    )
    yield (
        "the same, in a table with versions",
        (),
        [update(2, owner, device("a1"), unknown(), between(0, 9), versioned=True)],
    )
    yield (
        "messages of a device",
        (),
        [update(4, {"user_id": "u1"}, device("a1"), named, expected_rows=1)],
    )
    yield (
        "a device's interval, of which a later update named messages",
        [update(9, {"stitched_user_id": "B"}, device("a1"), named)],
        [update(3, {"stitched_user_id": "A"}, device("a1"), between(0, 9))],
    )
    first = update(6, {"user_id": "u1"}, device("a1"), unknown(), between(0, 9))
    yield (
        "two devices' intervals, of which one was applied before",
        [first],
        [first, update(7, {"user_id": "u2"}, device("a2"), unknown(), between(0, 9))],
    )
    yield (
        "a user who became another",
        (),
        [update(5, {"user_id": "u2"}, Equals(column="user_id", value="u1"), versioned=True)],
    )


def check_golden(name: str, found: str) -> None:
    """The same as the file; with RECOGNITION_TEST_WRITE_GOLDEN=1 the file becomes it."""
    path = Path(__file__).parent / "golden" / f"{name}.sql"
    found = found.rstrip("\n") + "\n"
    if os.environ.get("RECOGNITION_TEST_WRITE_GOLDEN") == "1":
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
