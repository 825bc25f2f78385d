"""
What each way to change the rows of a ClickHouse table costs, and which one is taken.

Pure: what is known before the run goes in as values, a `Choice` comes out, equal input gives an
equal choice. Nothing here connects or makes a statement.

The constants are CPU seconds of one core, fitted to runs of ClickHouse 26.9 on a table of 10
million rows, 32 columns and 12 monthly partitions (`docs/clickhouse.md`, and `benchmarks/
clickhouse.py`, which repeats it); rows are in millions. They are used to compare strategies with
each other, not to promise a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: A lightweight ``UPDATE``: the changed values go into patch parts.
UPDATE = "update"
#: ``ALTER TABLE .. UPDATE``: the columns of each part that holds a matching row are rewritten.
ALTER = "alter"
#: ``INSERT .. SELECT`` of the whole rows with a higher version, into a ReplacingMergeTree.
INSERT = "insert"
#: The whole rows again, under the key that they will have, and then the old ones are deleted.
MOVE = "delete-and-insert"
#: The whole partition again, beside the table, and then swapped in by ``REPLACE PARTITION``.
SWAP = "replace-partition"
#: Nothing is written: the values are published beside the table, for a view that readers query.
OVERRIDE = "override"

STRATEGIES = (UPDATE, ALTER, INSERT, MOVE, SWAP, OVERRIDE)

#: Strategies that are right only where somebody knows what the tables do not say, and says so.
ONLY_FORCED = {
    SWAP: "only where it is forced: rows that come in during the swap would be lost",
    OVERRIDE: "only where it is forced: what is set is seen in a view alone",
}

#: How many rows a visitor has, where nobody says: about 20 in the event files that we measured.
VISITOR_ROWS = 20

# A statement's own cost: analysis, snapshot, commit, and that of the staged rows' tables.
_START = 0.3
# To find the rows: the key of the update and the columns that must be empty are decoded.
_SCAN = 0.12
# ALTER does it twice: once to see whether a part has such rows, once to write it.
_ALTER_SCAN = 0.24
# Per column that is set: of ALTER each row of the part, of both each changed row.
_ALTER_COLUMN, _ALTER_CHANGED = 0.07, 0.33
_UPDATE_CHANGED = 0.5
# APPLY PATCHES rewrites the same columns and no other.
_APPLY_COLUMN, _APPLY_CHANGED = 0.067, 0.2
# Whole rows: all columns of the granules that hold one, merged by FINAL, and written.
_WHOLE_READ, _FINAL, _WHOLE_CHANGED = 0.6, 0.2, 10.8
# Rows that are moved are found again by their numbers, to look for new ones, to delete and to
# verify; each is compared with what came since.
_MOVE_SCAN, _MOVE_CHANGED = 0.12, 35.0
# To publish lines, per million, and the bytes of one; a million that stand already add 2.
_PUBLISH, _PUBLISH_LINE, _LINE_BYTES = 0.07, 12.0, 290
# All columns of all rows are read, sorted by the key and written, whatever changes.
_SWAP_ROW = 3.6
# Patches of the format v2 hold the sorting key, per megabyte that its columns have compressed.
_V2_MEGABYTE = 0.007

GRANULE = 8192  # rows, https://clickhouse.com/docs/operations/settings/merge-tree-settings
_VISIT = 7  # rows of a visitor that lie together, where the sorting key brings them together
_PATCH_BYTES = 4  # per changed row and column, and twice that for the row's address

#: From this share of a partition's rows on, or so many patch parts, readers of a partition that no
#: merge will clean by itself pay more than it costs to apply the patches: 2.3 times the CPU where
#: 20 % of the rows are patched, 1.2 times at 2 %.
PATCHED_SHARE = 0.02
PATCH_PARTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """
    One partition that the updates may touch.

    Args:
        id: As ``system.parts`` has it.
        rows: How many it has.
        bytes: Compressed, all columns.
        matched: How many rows are expected to change.
        patched: How many rows of patch parts wait in it.
        patch_parts: How many patch parts that is.
        cold: Nothing was written to it for an hour, so that no merge is to be waited for.
    """

    id: str
    rows: int
    bytes: int
    matched: float
    patched: int = 0
    patch_parts: int = 0
    cold: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """
    What is the same in all partitions.

    Args:
        columns: How many are set.
        column_share: Which part of the table's compressed bytes they hold.
        key_share: Which part the columns of the sorting key hold.
        unavailable: By strategy, why the table cannot have it.
        preferred: A strategy that is right where others may be undone, whatever it costs, and why.
        applies: ``auto``, or whether patches are always or never applied at once.
        v2: Patch parts have the format v2.
    """

    columns: int
    column_share: float
    key_share: float
    unavailable: Mapping[str, str] = field(default_factory=dict)
    preferred: tuple[str, str] | None = None
    applies: str = "auto"
    v2: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one strategy would cost in all partitions together; or why it is not possible."""

    strategy: str
    cpu_seconds: float = 0.0
    bytes_written: float = 0.0
    unavailable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """
    Args:
        by_partition: The strategy of each partition, by its id.
        apply: The partitions whose patches are applied afterwards.
        estimates: One for each strategy, in the order of `STRATEGIES`.
        reason: Why, in a sentence.
    """

    by_partition: Mapping[str, str]
    apply: tuple[str, ...]
    estimates: tuple[Estimate, ...]
    reason: str

    def partitions(self, strategy: str) -> tuple[str, ...]:
        """The ids of the partitions that get this strategy."""
        return tuple(id for id, chosen in self.by_partition.items() if chosen == strategy)


def choose(work: Work, partitions: Sequence[Partition], forced: str | None = None) -> Choice:
    """
    The cheapest strategy that the table can have, partition by partition.

    Those of `ONLY_FORCED` are estimated, and never taken by themselves.

    Only between `UPDATE` and `ALTER` can partitions differ: the others are taken for a whole table.

    Args:
        forced: Take this one. The caller has seen that it is possible.

    Raises:
        ValueError: The table can have none; the caller has seen to it that it can.
    """
    estimates = tuple(_total(work, partitions, strategy) for strategy in STRATEGIES)
    possible = [e for e in estimates if not e.unavailable and e.strategy not in ONLY_FORCED]
    if not possible and forced is None:
        raise ValueError("no strategy is possible")
    if forced is not None:
        chosen, reason = dict.fromkeys((p.id for p in partitions), forced), "the settings force it"
    elif work.preferred is not None and work.preferred[0] not in work.unavailable:
        strategy, reason = work.preferred
        chosen = dict.fromkeys((p.id for p in partitions), strategy)
    else:
        least = min(possible, key=lambda each: each.cpu_seconds).strategy
        chosen = dict.fromkeys((p.id for p in partitions), least)
        reason = "it costs the least"
        if len(possible) == 1:
            reason = "no other is possible"
        elif least in (UPDATE, ALTER) and not {UPDATE, ALTER} & work.unavailable.keys():
            chosen = {p.id: _cheaper(work, p) for p in partitions}
            if len({*chosen.values()}) > 1:
                reason = "each partition has what costs the least"
    patching = (UPDATE, MOVE)
    apply = tuple(p.id for p in partitions if chosen[p.id] in patching and _applies(work, p))
    return Choice(by_partition=chosen, apply=apply, estimates=estimates, reason=reason)


def _cheaper(work: Work, partition: Partition) -> str:
    # A statement more costs nothing here: both kinds are sent at most once.
    update, alter = (_cost(work, partition, strategy)[0] for strategy in (UPDATE, ALTER))
    return UPDATE if update <= alter else ALTER


def _applies(work: Work, partition: Partition) -> bool:
    if work.applies != "auto":
        return work.applies == "always"
    patched = partition.patched + partition.matched
    crowded = partition.patch_parts >= PATCH_PARTS
    return crowded or (partition.cold and patched > PATCHED_SHARE * partition.rows)


def _total(work: Work, partitions: Sequence[Partition], strategy: str) -> Estimate:
    if strategy in work.unavailable:
        return Estimate(strategy=strategy, unavailable=work.unavailable[strategy])
    if strategy == OVERRIDE:
        lines = sum(min(p.matched, p.rows) for p in partitions) / VISITOR_ROWS
        return Estimate(
            strategy=strategy,
            cpu_seconds=_PUBLISH + _PUBLISH_LINE * lines / 1e6,
            bytes_written=_LINE_BYTES * lines,
        )
    costs = [_cost(work, partition, strategy) for partition in partitions]
    return Estimate(
        strategy=strategy,
        cpu_seconds=_START + sum(cpu for cpu, _ in costs),
        bytes_written=sum(written for _, written in costs),
    )


def _cost(work: Work, partition: Partition, strategy: str) -> tuple[float, float]:
    """CPU seconds and bytes written, without the statement's own cost."""
    rows = partition.rows / 1e6
    matched = min(partition.matched, partition.rows)
    changed = matched / 1e6
    columns = work.columns
    column_bytes = work.column_share * partition.bytes
    patch_bytes = matched * _PATCH_BYTES * (columns + 2)
    if strategy == UPDATE:
        cpu = _SCAN * rows + _UPDATE_CHANGED * columns * changed
        written = patch_bytes
        if work.v2:
            cpu += _V2_MEGABYTE * work.key_share * partition.bytes / 1e6
            written += work.key_share * partition.bytes * matched / max(partition.rows, 1)
        if _applies(work, partition):
            patched = changed + partition.patched / 1e6
            cpu += _APPLY_COLUMN * columns * rows + _APPLY_CHANGED * columns * patched
            written += column_bytes + patch_bytes
        return cpu, written
    if strategy == ALTER:
        cpu = (_ALTER_SCAN + _ALTER_COLUMN * columns) * rows + _ALTER_CHANGED * columns * changed
        return cpu, column_bytes + patch_bytes
    if strategy == SWAP:
        return (_ALTER_SCAN + _SWAP_ROW) * rows if matched else 0.0, float(partition.bytes)
    granules = max(partition.rows / GRANULE, 1.0)
    touched = 1 - math.exp(-matched / _VISIT / granules)
    again, each = (_FINAL, _WHOLE_CHANGED) if strategy == INSERT else (_MOVE_SCAN, _MOVE_CHANGED)
    cpu = (_SCAN + again + _WHOLE_READ * touched) * rows + each * changed
    return cpu, 2 * partition.bytes * matched / max(partition.rows, 1)
