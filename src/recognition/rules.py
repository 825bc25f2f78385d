"""
How one workspace is decided: every choice a user makes, checked once, read everywhere.

It holds values and refuses combinations that no table could keep. It never reads a file: that is
`recognition.config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from recognition.attribution import AttributionRules, Policy
from recognition.errors import ConfigurationError, UnsupportedPolicyError
from recognition.identity import IdentityRules
from recognition.layouts import LAYOUTS, Layout, Row, snake_case

#: What must not change once a workspace was decided with it. The target column may: what was
#: decided before is just not written into the new one.
_BINDING = ("policy", "lookback", "types", "hashed")


class References(StrEnum):
    """What is kept of each anonymous event, so that its row can be found again."""

    IDS = "ids"
    """Message id and time: exact, and the time bounds of every update are tight."""
    DAYS = "days"
    """The days on which a device has rows, a few bytes each: updates go by device and day, and only
    where there is something to update. Rows are not told one by one, so that the table needs a
    target column of its own or a version."""
    NONE = "none"
    """Nothing: 0 bytes; updates go by device and the time range of the span."""


class Supersede(StrEnum):
    """How it is known that a row holds what recognition wrote, so that it may be changed again."""

    AUTO = "auto"
    """By references where they are kept, else by a target column of its own."""
    VERSION = "version"
    """The table has a column ``recognition_version``; in each row the greater sequence stands."""
    REFERENCES = "references"
    """Rows are filled while they are empty, and named by message id after that."""
    COLUMN = "column"
    """Nobody else writes to the target column: whole spans are written, whatever they hold."""


class MergeTraits(StrEnum):
    """What becomes of a trait in a row when its person never named it."""

    OVERWRITE = "overwrite"
    """It is emptied: recognised rows hold what the person named, and nothing else."""
    COALESCE = "coalesce"
    """It stays as the event itself had it, as long as the row belonged to nobody before; a row that
    goes from one person to another is emptied, so that it holds nothing of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRules:
    """What is kept and compared for one table."""

    references: References = References.IDS
    supersede: Supersede = Supersede.AUTO

    def __post_init__(self) -> None:
        object.__setattr__(self, "references", References(self.references))
        object.__setattr__(self, "supersede", Supersede(self.supersede))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """
    How one workspace is decided.

    Args:
        workspace: The isolation key; nothing is ever linked across two of them.
        attribution: Policy and look-back.
        identity: Known types, priorities, limits, blocked values.
        layout: Where events live.
        target_column: The column that receives the owner's canonical id. ``None``: the layout's
            user column, and then only rows without a user of their own are ever written.
        traits: The user traits that an update writes too. Recognised rows hold the latest value
            that the person has named, in these columns, and nothing where it never named one.
        merge_traits: Whether a trait that the person never named empties what the event had.
        stamps: Whether the rows are written from what `Recognizer.process` returns. ``False``:
            somebody else writes them as they came, so that every owned row needs an update.
        tables: What is kept and compared, for tables that differ from ``default``.
        default: The same for all other tables.

    Raises:
        UnsupportedPolicyError: The policy may move rows that were recognised before, and nothing
            tells such rows from those of an identified person.
        ConfigurationError: Two settings contradict each other.
    """

    workspace: str = "default"
    attribution: AttributionRules = field(default_factory=AttributionRules)
    identity: IdentityRules = field(default_factory=IdentityRules)
    layout: Layout = LAYOUTS["segment-single-table"]
    target_column: str | None = None
    traits: tuple[str, ...] = ()
    merge_traits: MergeTraits = MergeTraits.OVERWRITE
    stamps: bool = True
    tables: Mapping[str, TableRules] = field(default_factory=dict)
    default: TableRules = field(default_factory=TableRules)

    def __post_init__(self) -> None:
        object.__setattr__(self, "merge_traits", MergeTraits(self.merge_traits))
        if not self.workspace.strip():
            raise ConfigurationError("workspace is empty; every identifier lies inside one")
        plain = [name for name in self.traits if self._is_hashed(name)]
        if plain:
            raise ConfigurationError(
                f"traits names {', '.join(plain)}, which is hashed: graph and updates would hold"
                " the plain value. Take it out of traits, or out of hashed. Nothing was written."
            )
        for table, rules in {"default": self.default, **self.tables}.items():
            kept = rules.references is References.IDS
            supersede = self._resolve(rules)
            if rules.supersede is Supersede.REFERENCES and not kept:
                raise ConfigurationError(
                    f"table {table}: supersede = references needs references = ids"
                )
            if rules.supersede is Supersede.COLUMN and (kept or not self.has_own_column):
                raise ConfigurationError(
                    f"table {table}: supersede = column needs a target_column of its own and"
                    " references = none"
                )
            if supersede is Supersede.COLUMN and not self.has_own_column:
                raise UnsupportedPolicyError(
                    f"table {table}: policy {self.attribution.policy} may move rows that were"
                    " recognised before to another owner, and without references nothing tells"
                    " them from rows of identified people. Keep references = ids, or name a"
                    " target_column of its own, or add a column recognition_version BIGINT and"
                    " set supersede = version. Nothing was written."
                )

    def check_same(self, decided_with: str) -> None:
        """
        Refuse to decide by other rules than those that a graph's decisions were made with.

        Old and new owners would be compared by different rules, and rows that nothing touches
        would keep their owner of before.

        Args:
            decided_with: `fingerprint` of those rules.

        Raises:
            ConfigurationError: They differ; the text names what was found and what is needed.
        """
        # Graphs of before there were hashes say nothing of them.
        found = {"hashed": "nothing", **json.loads(decided_with)}
        asked = json.loads(self.fingerprint)
        differ = [name for name in _BINDING if found[name] != asked[name]]
        if differ:
            held = ", ".join(f"{name} {found[name]}" for name in differ)
            wanted = ", ".join(f"{name} {asked[name]}" for name in differ)
            raise ConfigurationError(
                f"workspace {self.workspace!r} of this graph was decided with {held}; asked for is"
                f" {wanted}. Use the same settings, or another graph, and read the events again"
                " into it. Nothing was written."
            )

    def as_decided(self, decided_with: str, *, attribution: bool, target: bool) -> Rules:
        """
        These rules, with what a graph was decided with in the place of what nobody asked for.

        Args:
            decided_with: `fingerprint` of those rules.
            attribution: Take over policy and look-back.
            target: Take over the target column.
        """
        found = json.loads(decided_with)
        taken = self
        if attribution:
            decided = AttributionRules(policy=found["policy"], lookback=found["lookback"])
            taken = replace(taken, attribution=decided)
        return replace(taken, target_column=found["target_column"]) if target else taken

    @property
    def fingerprint(self) -> str:
        """What all decisions of a workspace have in common, as JSON."""
        identity = self.identity
        known = [f"{name}{'!' if name in identity.unique else ''}" for name in identity.known]
        return json.dumps(
            {
                "policy": self.attribution.policy.value,
                "lookback": self.attribution.lookback,
                "types": " > ".join(known),
                "hashed": identity.hashing,
                "target_column": self.target_column,
            }
        )

    @property
    def has_own_column(self) -> bool:
        """Whether the owner goes to a column of its own, beside the user that the event named."""
        return self.target_column not in (None, self.layout.columns.user_id)

    def target_of(self, table: str) -> str:
        """The column that receives the owner's canonical id."""
        return self.target_column or self.layout.columns_of(table).user_id

    def values_of(
        self,
        table: str,
        owner: str | None,
        traits: Sequence[str | int | float | bool | None],
        *,
        first: bool = False,
    ) -> Row:
        """
        The columns that a row of this owner holds; of nobody's row, all of them are empty.

        A trait that the person never named is empty too: nothing of another owner stays behind. To
        ``coalesce`` leaves such a trait away where the owner is the ``first`` that the row has.
        """
        keeps = first and owner is not None and self.merge_traits is MergeTraits.COALESCE
        values: Row = {self.target_of(table): owner}
        columns = self.layout.columns_of(table)
        for trait, value in zip(self.traits, traits or [None] * len(self.traits), strict=True):
            column = columns.trait_column(trait)
            if column is not None and not (keeps and value is None):
                values[column] = value
        return values

    def supersede_of(self, table: str) -> Supersede:
        """How recognised rows are told apart; never `Supersede.AUTO`."""
        return self._resolve(self.tables.get(table, self.default))

    def references_of(self, table: str) -> References:
        """What is kept of the rows of this table."""
        return self.tables.get(table, self.default).references

    def keeps_references(self, table: str) -> bool:
        """Whether message ids and times are kept for the rows of this table."""
        return self.references_of(table) is References.IDS

    def _is_hashed(self, trait: str) -> bool:
        hashed = {type.lower() for type in self.identity.hashed}
        return not hashed.isdisjoint((trait.lower(), snake_case(trait)))

    @staticmethod
    def _resolve(rules: TableRules) -> Supersede:
        if rules.supersede is not Supersede.AUTO:
            return rules.supersede
        kept = rules.references is References.IDS
        return Supersede.REFERENCES if kept else Supersede.COLUMN

    @property
    def identified_follow_device(self) -> bool:
        """
        Whether rows that carry a known identifier are given to the owner of their device.

        Only ``last_login`` into a column of its own does so (Snowplow's ``stitched_user_id``,
        Adobe's last authentication); everywhere else an identified event owns itself.
        """
        return self.attribution.policy is Policy.LAST_LOGIN and self.has_own_column
