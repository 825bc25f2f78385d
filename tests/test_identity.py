"""Who is one person: blocked values, normalisation, and persons as a function of the links."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recognition.events import Identifier
from recognition.identity import (
    IdentityRules,
    Link,
    Persons,
    Seen,
    is_blocked,
    link_of,
    links_of,
    normalise,
    resolve,
)

RULES = IdentityRules()
KEY = b"an example key of 28 letters"
HASHING = IdentityRules(hashed=frozenset({"email", "phone"}), hash_key=KEY)
FAST = settings(max_examples=200, deadline=None, derandomize=True)


def user(value: str) -> Identifier:
    return Identifier("user_id", value)


def email(value: str) -> Identifier:
    return Identifier("email", value)


def phone(value: str) -> Identifier:
    return Identifier("phone", value)


def seen_together(one: Identifier, other: Identifier, time: int = 1, message: str = "m") -> Link:
    return link_of(one, other, alias=False, time=time, message_id=message)


def alias(one: Identifier, other: Identifier, time: int = 1, message: str = "m") -> Link:
    return link_of(one, other, alias=True, time=time, message_id=message)


def decide(links: Sequence[Link], rules: IdentityRules = RULES) -> Persons:
    """All identifiers of the links, each seen at time 1 in a message of its own name."""
    everybody = {end for link in links for end in (link.a, link.b)}
    return resolve({i: Seen(False, 1, i.value) for i in everybody}, links, rules)


def groups(persons: Persons) -> set[frozenset[Identifier]]:
    """The persons as sets."""
    found: dict[Identifier, set[Identifier]] = {}
    for identifier, best in persons.canonical.items():
        found.setdefault(best, set()).add(identifier)
    return {frozenset(person) for person in found.values()}


# ---------------------------------------------------------------- blocked values

DESIGNED = [
    "", "   ", "null", "nil", "none", "undefined", "nan", "true", "false", "0", "-1",
    "anonymous", "guest", "unknown", "not_authenticated", "[object Object]", "distinct_id",
    "email", "id",
]  # fmt: skip


@pytest.mark.parametrize("value", DESIGNED)
@pytest.mark.parametrize("dress", ["{}", " {}\t", "'{}'", '"{}"', "`{}`", "\"'{}'\"", '" {} "'])
def test_a_value_of_the_list_is_blocked_in_any_dress(value: str, dress: str) -> None:
    """Placeholders are blocked bare, padded, and in one or two pairs of quotes."""
    assert is_blocked(dress.format(value), RULES)


@pytest.mark.parametrize("value", DESIGNED)
def test_case_does_not_unblock(value: str) -> None:
    """Placeholders are blocked in upper case and in title case."""
    assert is_blocked(value.upper(), RULES)
    assert is_blocked(value.title(), RULES)


@pytest.mark.parametrize(
    "value",
    [
        "00000000-0000-0000-0000-000000000000",
        "{00000000-0000-0000-0000-000000000000}",
        "00000000000000000000000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "FFFFFFFF-ffff-FFFF-ffff-FFFFFFFFFFFF",
        "11111111-1111-1111-1111-111111111111",
        "{11111111111111111111111111111111}",
        "00",
        "0000000000",
        "0-0",
        "-",
        "----",
        "xxxx",
        "XxXx",
        "9999999999",
        "????",
    ],
)
def test_zeros_and_one_character_over_and_over_are_blocked(value: str) -> None:
    """Zeros of any length and one repeated character, as a UUID or not, identify nobody."""
    assert is_blocked(value, RULES)


@pytest.mark.parametrize(
    "value",
    [
        "1", "7", "-5", "10", "G", "111", "aaa", "u1", "00abc", "000001", "John", "Nullman",
        "nobody", "truely", "id1", "my-id", "email@example.com", "anonymous@example.com",
        "aaaab", "baaaa", "abab", "1111-2222", "1-1-1-1", "O'Neill", "'", "''x", "guest2",
        "\u00e9", "\u674e", "+15550000000", "a@x.com",
    ],
)  # fmt: skip
def test_a_real_id_is_not_blocked(value: str) -> None:
    """Short, odd or placeholder-like ids of real people identify."""
    assert not is_blocked(value, RULES)


@pytest.mark.parametrize("number", [1, 2**64, 2**127 + 12345, 2**128 - 2])
def test_a_normal_uuid_is_not_blocked(number: int) -> None:
    """A UUID that is not one digit throughout identifies, however few digits it has."""
    assert not is_blocked(str(uuid.UUID(int=number)), RULES)


def test_own_values_are_blocked_in_any_case() -> None:
    """The user's list is compared like the built-in one."""
    rules = IdentityRules(blocked=frozenset({"test-user"}))

    assert is_blocked("Test-User", rules)
    assert not is_blocked("test-user2", rules)


def test_own_values_block_however_they_are_written_in_the_list() -> None:
    """A value of the list blocks, though the list itself has capitals."""
    assert is_blocked("test-user", IdentityRules(blocked=frozenset({"Test-User"})))


def test_own_patterns_match_the_whole_value() -> None:
    """A pattern that matches a part of the value does not block it."""
    rules = IdentityRules(blocked_patterns=(r"qa-\d+",))

    assert is_blocked("qa-17", rules)
    assert not is_blocked("qa-17x", rules)


# ---------------------------------------------------------------- normalisation


def test_an_email_is_trimmed_and_lowered() -> None:
    """The case of an email means nothing."""
    assert normalise(email("  Ann@Example.COM "), RULES) == email("ann@example.com")


def test_other_types_are_trimmed_only() -> None:
    """The case of a user id means something."""
    assert normalise(user(" U1 "), RULES) == user("U1")


def test_lowered_types_are_a_setting() -> None:
    """A type that is listed as lowered is lowered."""
    rules = IdentityRules(known=("user_id", "login"), lowered=frozenset({"login"}))

    assert normalise(Identifier("login", "ANN"), rules).value == "ann"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"known": ("user_id", "anonymous_id"), "lowered": frozenset()}, "anonymous_id"),
        ({"known": ("user_id",)}, "email"),
        ({"unique": frozenset({"loyalty"})}, "loyalty"),
        ({"hashed": frozenset({"loyalty"}), "hash_key": KEY}, "loyalty"),
        ({"hashed": frozenset({"user_id"}), "hash_key": KEY}, "user_id cannot be hashed: rows"),
        ({"hashed": frozenset({"anonymous_id"}), "hash_key": KEY}, "anonymous_id cannot be hashed"),
        ({"hashed": frozenset({"email"})}, "hashed names email, and there is no hash_key"),
        ({"hashed": frozenset({"email"}), "hash_key": b""}, "hash_key is bytes, at least 16"),
        ({"hashed": frozenset({"email"}), "hash_key": KEY[:15]}, "hash_key is bytes, at least 16"),
        ({"hashed": frozenset({"email"}), "hash_key": KEY.decode()}, "hash_key is bytes"),
    ],
)
def test_contradicting_rules_are_refused(options: dict[str, object], complaint: str) -> None:
    """Types that are unique, lowered or hashed must be known; a device is no person; keys hide."""
    with pytest.raises(ValueError, match=complaint) as caught:
        IdentityRules(**options)  # type: ignore[arg-type]

    assert KEY.decode()[:15] not in str(caught.value)


@pytest.mark.parametrize("value", ["ann.lee@example.com", "  Ann.Lee@Example.COM\t"])
def test_a_hash_is_what_another_tool_computes(value: str) -> None:
    """The form is fixed: graphs and rows hold it. The digits are those of OpenSSL."""
    # printf 'email\0ann.lee@example.com' | openssl dgst -sha256 -hmac "$KEY"
    digits = "3cde7f743747ade5a36df2e0f8746c3e2085b1fec5dd3c6ee4693064c2f9a4e7"

    assert normalise(email(value), HASHING) == email(f"hmac:{digits}")


def test_equal_values_of_two_types_have_two_hashes() -> None:
    """Nobody learns from two hashes that an e-mail address is also a phone number."""
    both = {normalise(of("1234567"), HASHING).value for of in (email, phone)}

    assert len(both) == 2


@pytest.mark.parametrize("identifier", [user("U1 "), Identifier("anonymous_id", "d1 ")])
def test_types_that_are_not_named_stay_plain(identifier: Identifier) -> None:
    """Only the named types are hashed."""
    assert normalise(identifier, HASHING).value == identifier.value.strip()


def test_a_value_that_is_no_text_has_a_hash() -> None:
    """Broken bytes of a command line are hashed like any value; nothing is told about them."""
    assert normalise(email("\udcff"), HASHING) != normalise(email("\udcfe"), HASHING)


def test_by_hash_a_hash_stands_for_itself() -> None:
    """It is looked up as it is; what only resembles one is hashed, and so is all of an event."""
    hashed = normalise(email("a@example.com"), HASHING)
    bare = email(hashed.value.removeprefix("hmac:"))

    assert normalise(hashed, HASHING, by_hash=True) == hashed
    assert normalise(bare, HASHING, by_hash=True) not in (bare, hashed)
    assert normalise(hashed, HASHING) != hashed


def test_a_fingerprint_tells_keys_and_types_apart() -> None:
    """Equal settings have equal ones, whatever the order; no key can be read from it."""
    both = IdentityRules(hashed=frozenset({"phone", "email"}), hash_key=bytes(KEY))
    other = IdentityRules(hashed=frozenset({"phone", "email"}), hash_key=KEY[::-1])
    fewer = IdentityRules(hashed=frozenset({"email"}), hash_key=KEY)

    assert HASHING.hashing == both.hashing == "email + phone (key fingerprint 8394ce74)"
    assert len({HASHING.hashing, other.hashing, fewer.hashing, RULES.hashing}) == 4
    assert RULES.hashing == IdentityRules(hash_key=KEY).hashing == "nothing"


# ---------------------------------------------------------------- persons


def test_an_event_links_its_strongest_identifier_with_the_others() -> None:
    """Three identifiers of one event make two links."""
    links = links_of([user("u1"), email("a@x.com"), phone("1")], 5, "m1")

    assert {(link.a, link.b) for link in links} == {
        (email("a@x.com"), user("u1")),
        (phone("1"), user("u1")),
    }


def test_a_person_is_transitive() -> None:
    """Who shares an email with a phone and the phone with a user is that user."""
    persons = decide(
        [seen_together(email("a@x.com"), phone("1")), seen_together(phone("1"), user("u1"))]
    )

    assert persons.canonical[email("a@x.com")] == user("u1")


def test_a_second_user_id_is_refused() -> None:
    """The later link that would give a person two user ids does not hold; the reason is kept."""
    late = seen_together(user("u2"), email("a@x.com"), time=2)
    persons = decide([late, seen_together(user("u1"), email("a@x.com"), time=1)])

    assert persons.refused == {late: "unique"}
    assert persons.canonical[email("a@x.com")] == user("u1")


def test_a_refusal_holds_through_a_chain() -> None:
    """Two user ids are kept apart though no link names both."""
    persons = decide(
        [
            seen_together(user("u1"), email("a@x.com"), 1),
            seen_together(user("u2"), phone("1"), 2),
            seen_together(email("a@x.com"), phone("1"), 3),
        ]
    )

    assert list(persons.refused.values()) == ["unique"]


def test_an_alias_merges_two_user_ids() -> None:
    """An explicit alias may do what being seen together may not."""
    persons = decide([alias(user("u1"), user("u2"))])

    assert groups(persons) == {frozenset({user("u1"), user("u2")})}


def test_users_joined_by_an_alias_count_as_one() -> None:
    """Once an alias says that two user ids are one human, other links to both hold."""
    persons = decide(
        [
            seen_together(user("u1"), email("a@x.com"), 1),
            seen_together(user("u2"), email("a@x.com"), 2),
            alias(user("u1"), user("u2"), 9),
        ]
    )

    assert persons.refused == {}


def test_the_later_of_two_links_beyond_the_limit_is_refused() -> None:
    """A person never grows beyond its limit."""
    rules = IdentityRules(max_identifiers=2)
    late = seen_together(user("u1"), phone("1"), 2)
    persons = decide([late, seen_together(user("u1"), email("a@x.com"), 1)], rules)

    assert persons.refused == {late: "limit"}


def test_an_alias_obeys_the_limit_too() -> None:
    """Not even an explicit alias makes a mega-person."""
    persons = decide([alias(user("u1"), user("u2"))], IdentityRules(max_identifiers=1))

    assert list(persons.refused.values()) == ["limit"]


def test_a_limit_per_type_counts_that_type_only() -> None:
    """A second email is refused where one is the limit; a phone is not."""
    rules = IdentityRules(max_per_type={"email": 1})
    second = seen_together(user("u1"), email("b@x.com"), 2)
    persons = decide(
        [
            seen_together(user("u1"), email("a@x.com"), 1),
            second,
            seen_together(user("u1"), phone("1"), 3),
        ],
        rules,
    )

    assert persons.refused == {second: "limit"}


def test_an_unlinked_link_never_joins() -> None:
    """What was removed by hand stays removed."""
    link = seen_together(user("u1"), email("a@x.com"))._replace(unlinked=True)
    persons = decide([link])

    assert persons.refused == {link: "unlinked"}
    assert len(groups(persons)) == 2


def test_the_canonical_id_is_of_the_highest_priority() -> None:
    """A user id beats an email that was seen much earlier."""
    seen = {user("u1"): Seen(False, 900, "m9"), email("a@x.com"): Seen(False, 1, "m1")}
    persons = resolve(seen, [seen_together(user("u1"), email("a@x.com"), 900)], RULES)

    assert set(persons.canonical.values()) == {user("u1")}


def test_among_equals_the_first_seen_is_canonical() -> None:
    """Of two user ids of one person the older one names it."""
    seen = {user("u1"): Seen(False, 5, "m5"), user("u2"): Seen(False, 4, "m4")}
    persons = resolve(seen, [alias(user("u1"), user("u2"), 5)], RULES)

    assert set(persons.canonical.values()) == {user("u2")}


def test_one_that_was_only_ever_a_previous_id_comes_last() -> None:
    """A previous id that no event carried itself does not name the person, however early."""
    seen = {user("u1"): Seen(False, 5, "m5"), user("old"): Seen(True, 1, "m1")}
    persons = resolve(seen, [alias(user("u1"), user("old"), 1)], RULES)

    assert set(persons.canonical.values()) == {user("u1")}


POOL = [user("u1"), user("u2"), user("u3"), email("a"), email("b"), phone("1"), phone("2")]


@st.composite
def link_sets(draw: st.DrawFn) -> list[Link]:
    """A few links with ties in time; aliases between user ids only; some unlinked."""
    found = {}
    for number in range(draw(st.integers(0, 9))):
        one, other = draw(st.permutations(POOL))[:2]
        time, message = draw(st.integers(1, 3)), f"m{number}"
        explicit = one.type == other.type == "user_id" and draw(st.booleans())
        link = link_of(one, other, alias=explicit, time=time, message_id=message)
        found[link.a, link.b, explicit] = link._replace(unlinked=draw(st.integers(0, 5)) == 0)
    return list(found.values())


def plainly(links: Sequence[Link], rules: IdentityRules) -> set[frozenset[Identifier]]:
    """The rules of the module once more: sets in a list, everything looked up by reading all."""
    persons = [frozenset({end}) for link in links for end in (link.a, link.b)]
    persons = list(dict.fromkeys(persons))
    one_human = list(persons)

    def weaker(link: Link) -> int:
        return max(rules.known.index(link.a.type), rules.known.index(link.b.type))

    order = sorted(links, key=lambda k: (not k.alias, k.time, k.message_id, weaker(k), k.a, k.b))
    for link in order:
        one, other = (next(p for p in persons if end in p) for end in (link.a, link.b))
        both = one | other
        if link.unlinked or one is other or len(both) > rules.max_identifiers:
            continue
        if any(
            sum(i.type == type for i in both) > most for type, most in rules.max_per_type.items()
        ):
            continue
        users = {i for i in both if i.type in rules.unique}
        if not link.alias and len(users) > 1 and not any(users <= human for human in one_human):
            continue
        persons = [p for p in persons if p not in (one, other)] + [both]
        if link.alias:
            one_human = list(persons)
    return set(persons)


LIMITS = st.sampled_from(
    [RULES, IdentityRules(max_identifiers=3), IdentityRules(max_per_type={"email": 1, "phone": 1})]
)


@given(links=link_sets(), rules=LIMITS)
@FAST
def test_persons_are_those_of_the_plain_rules(links: list[Link], rules: IdentityRules) -> None:
    """The union-find gives what reading everything again for each link gives."""
    assert groups(decide(links, rules)) == plainly(links, rules)


@given(links=link_sets(), rules=LIMITS, data=st.data())
@FAST
def test_the_order_of_links_decides_nothing(
    links: list[Link], rules: IdentityRules, data: st.DataObject
) -> None:
    """Any permutation of the links gives the same persons and the same refusals."""
    shuffled = data.draw(st.permutations(links))

    assert decide(shuffled, rules) == decide(links, rules)


@given(links=link_sets())
@FAST
def test_without_an_alias_nobody_has_two_user_ids(links: list[Link]) -> None:
    """A unique type has at most one value in each person."""
    persons = groups(decide([link for link in links if not link.alias]))

    assert all(sum(i.type == "user_id" for i in person) <= 1 for person in persons)
