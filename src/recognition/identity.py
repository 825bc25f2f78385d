"""
Who is one person: which known identifiers belong together, and which never identify anybody.

All rules of identity are in this file; it knows no device, no table and no store. The persons are
a pure function of the *set* of links: the order in which links arrive decides nothing, their own
order (explicit ones first, then by time and message id) decides everything.

1. A link joins two known identifiers: seen together on one event, or named by an ``alias``.
2. A link that would give a person two values of a unique type is refused; an ``alias`` may.
3. A link that would make a person larger than the limits is refused.
4. A link that was unlinked never joins again.
5. The canonical identifier of a person is the one of the highest priority; among equals the one
   seen first. One that was only ever named as somebody's previous id comes after those seen.
6. A value of a hashed type is compared, and handed on, as its keyed hash only.
"""

from __future__ import annotations

import hmac
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from recognition.events import Identifier

ANONYMOUS = "anonymous_id"

# Bytes. Whoever guesses the key finds every phone number by trying all of them; 128 bits are beyond
# guessing if they are random (https://www.rfc-editor.org/rfc/rfc2104#section-3 advises 256).
_SHORTEST_KEY = 16

# Says in rows and messages that it is a hash, and tells it from a plain value that looks like one:
# e-mail addresses do arrive as bare SHA-256.
_HASH = re.compile(r"hmac:[0-9a-f]{64}")

# PostHog's and Segment's published lists together, and JavaScript's and Python's ways to print
# "nothing" (https://posthog.com/docs/product-analytics/identify,
# https://segment.com/docs/unify/identity-resolution/identity-resolution-settings/).
BLOCKED = frozenset(
    {
        "null", "nil", "none", "undefined", "nan", "true", "false", "0", "-1",
        "anonymous", "guest", "unknown", "not_authenticated", "[object object]",
        "distinct_id", "distinctid", "email", "id",
    }
)  # fmt: skip

# Zeros of any length, with or without dashes (Segment's rule); one character over and over from
# four on (shorter ones are real ids), dashes aside only where it has the length of a UUID.
_ZEROS = re.compile(r"[0-]+")
_SAME = re.compile(r"(.)\1{3,}", re.DOTALL)
_SAME_UUID = re.compile(r"\{?([^-])(?:-?\1){31}\}?")
_QUOTES = "\"'`"
_LONGEST = max(map(len, BLOCKED))
_SUSPECT = frozenset(_QUOTES + "0- \t\r\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRules:
    """
    How persons are decided.

    Args:
        known: The types of known identifiers, highest priority first.
        unique: The types of which a person has at most one value.
        lowered: The types whose case means nothing.
        max_identifiers: The most identifiers that a person may have.
        max_per_type: The most that a person may have of one type, where it differs.
        blocked: Values that never identify anybody, beside the built-in ones; any case.
        blocked_patterns: Regular expressions of such values; they match the whole value.
        hashed: The types whose values leave the process as keyed hashes only. Neither
            ``anonymous_id`` nor ``user_id``: rows are found by the one and receive the other.
        hash_key: The secret of these hashes, at least 16 bytes, the same for all workers of a
            graph. Another key makes other persons.

    Raises:
        ValueError: Two of these contradict each other; the text never holds the key.
    """

    known: tuple[str, ...] = ("user_id", "email", "phone")
    unique: frozenset[str] = frozenset({"user_id"})
    lowered: frozenset[str] = frozenset({"email"})
    max_identifiers: int = 1000
    max_per_type: Mapping[str, int] = field(default_factory=dict)
    blocked: frozenset[str] = frozenset()
    blocked_patterns: tuple[str, ...] = ()
    hashed: frozenset[str] = frozenset()
    hash_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if ANONYMOUS in self.known:
            raise ValueError("anonymous_id is no known identifier")
        for type, why in ((ANONYMOUS, "rows are found by it"), ("user_id", "rows receive it")):
            if type in self.hashed:
                raise ValueError(f"{type} cannot be hashed: {why}")
        unknown = (self.unique | self.lowered | self.hashed) - set(self.known)
        if unknown:
            raise ValueError(
                f"unique, lowered or hashed names a type that is not known: {sorted(unknown)}"
            )
        if self.hashed and self.hash_key is None:
            raise ValueError(
                f"hashed names {', '.join(sorted(self.hashed))}, and there is no hash_key: it needs"
                f" a secret of at least {_SHORTEST_KEY} bytes, the same for all workers"
            )
        key = self.hash_key
        if key is not None and not (isinstance(key, bytes) and len(key) >= _SHORTEST_KEY):
            raise ValueError(f"hash_key is bytes, at least {_SHORTEST_KEY} of them")
        if self.max_identifiers < 1 or any(limit < 1 for limit in self.max_per_type.values()):
            raise ValueError("a limit is at least 1")
        object.__setattr__(self, "blocked", frozenset(value.lower() for value in self.blocked))
        for pattern in self.blocked_patterns:
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ValueError(f"blocked pattern {pattern!r}: {exc}") from None

    def priority(self, type: str) -> int:
        """0 is the highest; a type that is not listed comes last."""
        return self.known.index(type) if type in self.known else len(self.known)

    @property
    def hashing(self) -> str:
        """
        The hashed types and a fingerprint of the key; ``nothing`` where no type is hashed.

        Equal for equal persons; it tells two keys apart and gives neither away.
        """
        if not self.hashed or self.hash_key is None:
            return "nothing"
        # No identifier is hashed like this: those have a NUL between type and value.
        mark = hmac.digest(self.hash_key, b"recognition hash key", "sha256").hex()[:8]
        return f"{' + '.join(sorted(self.hashed))} (key fingerprint {mark})"


def normalise(identifier: Identifier, rules: IdentityRules, *, by_hash: bool = False) -> Identifier:
    """
    The form in which identifiers are compared; what was seen is kept elsewhere.

    A value of a hashed type becomes ``hmac:`` and the HMAC-SHA256, in hexadecimal digits, of its
    type, a NUL and the value that would be compared otherwise, in UTF-8.

    Args:
        identifier: As seen.
        rules: Whose case means nothing, and what is hashed with which key.
        by_hash: Such a hash stands for itself. Never for events, where it is hashed again: nobody
            becomes another person by sending what a row shows.
    """
    value = identifier.value.strip()
    if identifier.type in rules.lowered:
        value = value.lower()
    if (
        rules.hash_key is not None
        and identifier.type in rules.hashed
        and not (by_hash and _HASH.fullmatch(value))
    ):
        # What comes from a command line may hold bytes that are no text.
        message = f"{identifier.type}\0{value}".encode("utf-8", "surrogatepass")
        value = f"hmac:{hmac.digest(rules.hash_key, message, 'sha256').hex()}"
    return identifier if value == identifier.value else Identifier(identifier.type, value)


def is_blocked(value: str, rules: IdentityRules) -> bool:
    """Whether the value never identifies anybody: a placeholder, not an id."""
    if (
        len(value) > _LONGEST
        and value[0] not in _SUSPECT
        and value[1] != value[2]
        and not (rules.blocked or rules.blocked_patterns)
    ):
        return False  # longer than every built-in value, and no repetition: nearly all real ids
    bare = value.strip()
    while len(bare) > 1 and bare[0] == bare[-1] and bare[0] in _QUOTES:
        bare = bare[1:-1].strip()
    folded = bare.lower()
    # In the order of cost: for almost every real id the first comparisons decide.
    return bool(
        not bare
        or folded in BLOCKED
        or folded in rules.blocked
        or (bare[0] in "0-" and _ZEROS.fullmatch(bare) is not None)
        or (len(folded) > 3 and folded[1] == folded[2] and _repeats(folded))
        or (rules.blocked_patterns and _matches(bare, rules.blocked_patterns))
    )


def _repeats(folded: str) -> bool:
    return _SAME.fullmatch(folded) is not None or _SAME_UUID.fullmatch(folded) is not None


def _matches(bare: str, patterns: tuple[str, ...]) -> bool:
    return any(pattern.fullmatch(bare) for pattern in _compiled(patterns))


@lru_cache(maxsize=32)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in patterns)


class Seen(NamedTuple):
    """
    When an identifier was seen first, by its own order: (as its own before as previous, time, id).

    The smallest of two is the truth: `min` merges what two workers saw.
    """

    only_previous: bool
    time: int
    message_id: str


class Link(NamedTuple):
    """
    Two known identifiers, normalised, ``a < b``, and the earliest message that links them.

    ``alias`` links are explicit; ``unlinked`` ones were removed by hand and never join again.
    """

    a: Identifier
    b: Identifier
    alias: bool
    time: int
    message_id: str
    unlinked: bool = False


class Persons(NamedTuple):
    """
    Who is who among the identifiers of some links.

    ``canonical`` maps each identifier to the canonical one of its person; ``refused`` maps each
    link that does not hold to the reason: ``unique``, ``limit`` or ``unlinked``.
    """

    canonical: dict[Identifier, Identifier]
    refused: dict[Link, str]


def links_of(known: Sequence[Identifier], time: int, message_id: str) -> list[Link]:
    """
    The links that one event makes: its strongest identifier with each of the others.

    Args:
        known: Normalised, not blocked, highest priority first.
    """
    first = known[0]
    return [
        link_of(first, other, alias=False, time=time, message_id=message_id)
        for other in known[1:]
        if other != first
    ]


def link_of(one: Identifier, other: Identifier, *, alias: bool, time: int, message_id: str) -> Link:
    """A link between two different identifiers, whichever comes first."""
    a, b = (one, other) if one < other else (other, one)
    return Link(a, b, alias, time, message_id)


def resolve(
    seen: Mapping[Identifier, Seen], links: Iterable[Link], rules: IdentityRules
) -> Persons:
    """
    Decide the persons of a set of identifiers.

    Args:
        seen: All identifiers in question, each with its first sighting.
        links: All links among them, in any order.
        rules: Types, priorities and limits.
    """
    parent = {identifier: identifier for identifier in seen}

    def find(identifier: Identifier) -> Identifier:
        root = identifier
        while parent[root] != root:
            root = parent[root]
        while parent[identifier] != root:
            parent[identifier], identifier = root, parent[identifier]
        return root

    sizes = {identifier: Counter((identifier.type,)) for identifier in seen}
    # Which value of a unique type a person has; those that an alias joined count as one.
    holders: dict[Identifier, dict[str, Identifier]] = {identifier: {} for identifier in seen}
    refused: dict[Link, str] = {}

    def too_large(one: Identifier, other: Identifier) -> bool:
        total = sizes[one] + sizes[other]
        return total.total() > rules.max_identifiers or any(
            total[type] > limit for type, limit in rules.max_per_type.items()
        )

    def join(one: Identifier, other: Identifier) -> None:
        if sizes[one].total() < sizes[other].total():
            one, other = other, one
        parent[other] = one
        sizes[one] += sizes.pop(other)
        holders[one].update(holders.pop(other))

    ordered = sorted(links, key=lambda link: (not link.alias, *_strength(link, rules)))
    aliases_done = False
    for link in ordered:
        if not link.alias and not aliases_done:
            aliases_done = True
            _hold_unique(parent, find, holders, rules)
        if link.unlinked:
            refused[link] = "unlinked"
            continue
        a, b = find(link.a), find(link.b)
        if a == b:
            continue
        if not link.alias and any(
            holders[b].get(type, holder) != holder for type, holder in holders[a].items()
        ):
            refused[link] = "unique"
        elif too_large(a, b):
            refused[link] = "limit"
        else:
            join(a, b)

    members: dict[Identifier, list[Identifier]] = {}
    for identifier in seen:
        members.setdefault(find(identifier), []).append(identifier)
    canonical: dict[Identifier, Identifier] = {}
    for person in members.values():
        best = min(
            person,
            key=lambda member: (rules.priority(member.type), seen[member], member.value),
        )
        canonical.update(dict.fromkeys(person, best))
    return Persons(canonical, refused)


def _strength(link: Link, rules: IdentityRules) -> tuple[int, str, int, Identifier, Identifier]:
    """Earlier links hold against later ones; on one event the stronger type comes first."""
    weaker = max(rules.priority(link.a.type), rules.priority(link.b.type))
    return link.time, link.message_id, weaker, link.a, link.b


def _hold_unique(
    parent: Mapping[Identifier, Identifier],
    find: Callable[[Identifier], Identifier],
    holders: dict[Identifier, dict[str, Identifier]],
    rules: IdentityRules,
) -> None:
    for identifier in parent:
        if identifier.type in rules.unique:
            root = find(identifier)
            holders[root][identifier.type] = root
