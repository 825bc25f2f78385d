"""
A warehouse of dictionaries that takes update messages literally, one after the other.

It has no planner and no SQL, so that tests of the decisions do not rest on those: an update is
carried out on each row that meets its criteria, in the order of the sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from recognition.layouts import Row
from recognition.messages import (
    VERSION_COLUMN,
    Between,
    Empty,
    Equals,
    Messages,
    OneOf,
    UpdateByCriteria,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Warehouse:
    """Tables of rows by message id."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Row]] = {}

    def load(
        self, table: str, rows: Iterable[Mapping[str, object]], key: str = "message_id"
    ) -> None:
        """Insert rows whose key is new."""
        held = self.tables.setdefault(table, {})
        for row in rows:
            held.setdefault(str(row[key]), dict(row))  # type: ignore[arg-type]

    def apply(self, updates: Iterable[UpdateByCriteria]) -> int:
        """Carry out updates; gives the number of rows changed."""
        changed = 0
        for update in sorted(updates, key=lambda update: update.sequence):
            for row in self.tables.get(update.table, {}).values():
                if self._meets(row, update) and any(
                    row.get(column) != value for column, value in update.set.items()
                ):
                    row.update(update.set)
                    changed += 1
        return changed

    def _meets(self, row: Row, update: UpdateByCriteria) -> bool:
        if VERSION_COLUMN in update.set:
            version = row.get(VERSION_COLUMN)
            if isinstance(version, int) and version >= update.sequence:
                return False
        for criterion in update.where:
            match criterion:
                case Equals(column=column, value=value):
                    if row.get(column) != value:
                        return False
                case OneOf(column=column, values=values):
                    if row.get(column) not in values:
                        return False
                case Empty(column=column):
                    written = column in update.set and row.get(VERSION_COLUMN) is not None
                    if row.get(column) is not None and not written:
                        return False
                case Between(column=column, start=start, end=end):
                    at = EPOCH + timedelta(microseconds=int(row[column] or 0))
                    if not start <= at < end:
                        return False
                case Messages(id_column=column, refs=refs):
                    if row.get(column) not in {message_id for message_id, _ in refs}:
                        return False
        return True
