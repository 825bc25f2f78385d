"""What is to be seen of an identifier: who, by which links, on which devices, and since when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs import GRAPHS
from oracle import make_event
from recognition.attribution import BEGINNING, DAY, END, AttributionRules, Policy
from recognition.errors import ConfigurationError
from recognition.events import Identifier
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.showing import Device, LeftOut, Person, Picture
from recognition.identity import IdentityRules, normalise
from recognition.recognizer import Recognizer
from recognition.rules import Rules

U1, U2 = Identifier("user_id", "u1"), Identifier("user_id", "u2")
MAIL, PHONE = Identifier("email", "a@x.com"), Identifier("phone", "1")
DEVICE = Identifier("anonymous_id", "d1")
T = 100 * DAY
HASHING = IdentityRules(hashed=frozenset({"email"}), hash_key=b"an example key of 28 letters")


@pytest.fixture(params=[*GRAPHS, "rehearsal"])
def graph(request: pytest.FixtureRequest) -> Iterator[Graph]:
    """Each graph, empty; and one laid over another."""
    if request.param in GRAPHS:
        opened = GRAPHS[request.param]()
        yield opened
        opened.close()
        return
    with GRAPHS["sqlite"]() as below:  # type: ignore[attr-defined]
        over = below.rehearse()
        yield over
        over.close()


@pytest.fixture
def recognizer(graph: Graph) -> Recognizer:
    """Ann on two devices, one of them shared with a second user, who shares her mail, too."""
    made = Recognizer(graph)
    made.process(
        [
            make_event("m1", T + 1, "d1"),
            make_event("m2", T + 2, "d1", user_id="u1", email="A@x.com"),
            make_event("m3", T + 3, "d2", email="a@x.com", phone="1"),
            make_event("m4", T + 4, "d1", user_id="u2", email="a@x.com"),
            make_event("m5", T + 5, "lonely"),
        ]
    )
    return made


def only(picture: Picture) -> tuple[Person, Device]:
    (person,), (device,) = picture.persons, picture.devices
    return person, device


@pytest.mark.parametrize("asked", [U1, MAIL, PHONE, Identifier("email", " A@X.com ")])
def test_any_identifier_shows_its_person(recognizer: Recognizer, asked: Identifier) -> None:
    """All identifiers, by any of them; the canonical one first, then the one asked for."""
    picture = recognizer.show(asked)
    (person,) = picture.persons
    shown = [member.identifier for member in person.identifiers]

    assert picture.found
    assert person.canonical == shown[0] == U1
    assert set(shown) == {U1, MAIL, PHONE}
    if asked != U1:
        assert picture.subject == shown[1]
    assert picture.left_out == ()


def test_an_identifier_is_shown_with_its_first_sighting(recognizer: Recognizer) -> None:
    """The value as first seen, and the message and time of it."""
    (person,) = recognizer.show(U1).persons
    seen = {m.identifier: (m.seen_as, m.first_seen, m.message_id) for m in person.identifiers}

    assert seen == {
        U1: ("u1", T + 2, "m2"),
        MAIL: ("A@x.com", T + 2, "m2"),
        PHONE: ("1", T + 3, "m3"),
    }


def test_links_are_shown_with_their_provenance(recognizer: Recognizer) -> None:
    """The message, the time, and why one was refused; whose the other end is, is known."""
    picture = recognizer.show(U1)
    (person,) = picture.persons

    assert [(x.a, x.b, x.kind, x.time, x.message_id, x.refused) for x in person.links] == [
        (MAIL, U1, "seen", T + 2, "m2", ""),
        (MAIL, PHONE, "seen", T + 3, "m3", ""),
        (MAIL, U2, "seen", T + 4, "m4", "unique"),
    ]
    assert picture.person_of[U2] == U2
    assert picture.person_of[PHONE] == U1


def test_devices_are_shown_with_all_of_their_owners(recognizer: Recognizer) -> None:
    """Each device that the person claimed, last one first, with everybody's claims and spans."""
    second, shared = recognizer.show(U1).devices

    assert (shared.anonymous_id, second.anonymous_id) == ("d1", "d2")
    assert [(c.time, c.message_id, c.identifier, c.person) for c in shared.claims] == [
        (T + 2, "m2", U1, U1),
        (T + 4, "m4", U2, U2),
    ]
    assert [(span.start, span.end, span.owner) for span in shared.spans] == [
        (BEGINNING, T + 2 - 30 * DAY, None),
        (T + 2 - 30 * DAY, T + 4, U1),
        (T + 4, END, U2),
    ]
    assert [(c.identifier, c.person) for c in second.claims] == [(MAIL, U1)]
    assert second.spans[-1].owner == U1


def test_spans_agree_with_what_explain_says(recognizer: Recognizer) -> None:
    """Both repeat the same decision."""
    (device,) = recognizer.show(DEVICE).devices
    explained = recognizer.explain(DEVICE).spans

    assert len(explained) == 3
    assert [(s.start, s.end, s.owner and s.owner.value) for s in device.spans] == [
        (s.start, s.end, s.owner) for s in explained
    ]


@given(
    st.sampled_from(Policy),
    st.sampled_from([DAY, 3, 30 * DAY]),
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from(["", "u1", "u2", "x@x.com"]),
            st.sampled_from(["", "x@x.com", "y@x.com"]),
        ),
        max_size=14,
    ),
    st.sampled_from(["", "unlink", "release", "forget"]),
)
def test_spans_are_what_the_rows_are_told(
    policy: Policy, lookback: int, seen: list[tuple[int, str, str]], undo: str
) -> None:
    """Whoever owns a span of a device owns its anonymous rows in it; `explain` says the same."""
    rules = Rules(attribution=AttributionRules(policy=policy, lookback=lookback))
    with MemoryGraph() as graph:
        recognizer = Recognizer(graph, rules)
        events = [
            make_event(f"m{n}", T + time, "d1", user_id=user or None, email=mail or None)
            for n, (time, user, mail) in enumerate(seen)
        ]
        probes = [make_event(f"p{time}", T + time, "d1") for time in range(-1, 14)]
        recognizer.process([*events, *probes])
        if undo == "unlink":
            recognizer.unlink(DEVICE, U1)
        elif undo == "release":
            recognizer.release("d1", T + 6)
        elif undo == "forget":
            recognizer.forget(U1, T + 6)
        (device,) = recognizer.show(DEVICE, limit=1_000).devices
        explained = recognizer.explain(DEVICE).spans
        told = {probe.time: recognizer.explain(probe.message_id).owner for probe in probes}

    assert [(s.start, s.end, s.owner and s.owner.value) for s in device.spans] == [
        (s.start, s.end, s.owner) for s in explained
    ]
    for time, owner in told.items():
        of = [s.owner for s in device.spans if s.start <= time < s.end] or [None]
        assert [each and each.value for each in of] == [owner]


def test_a_device_shows_the_persons_who_own_it(recognizer: Recognizer) -> None:
    """The latest owner first, each with identifiers and links."""
    picture = recognizer.show(DEVICE)

    assert [person.canonical for person in picture.persons] == [U2, U1]
    assert [len(person.identifiers) for person in picture.persons] == [1, 3]
    assert [device.anonymous_id for device in picture.devices] == ["d1"]
    assert picture.people == (U2, U1)


@pytest.mark.parametrize(
    "policy", [Policy.FIRST_CLAIM, Policy.LAST_LOGIN, Policy.SINCE_LAST_IDENTIFY]
)
def test_whoever_claims_without_owning_is_shown_too(graph: Graph, policy: Policy) -> None:
    """Under a policy where one claim has it all, the other claimant is a person as well."""
    recognizer = Recognizer(graph, Rules(attribution=AttributionRules(policy=policy)))
    recognizer.process(
        [make_event("m1", T, "d1", user_id="u1"), make_event("m2", T + 1, "d1", user_id="u2")]
    )
    picture = recognizer.show(DEVICE)

    assert {person.canonical for person in picture.persons} == {U1, U2}
    assert picture.attribution.policy is policy


def test_an_alias_is_called_an_alias(graph: Graph) -> None:
    """A link that somebody declared is told from those that were seen."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event("m1", T, user_id="u2", previous_id="u1", type="alias")])
    (person,) = recognizer.show(U1).persons

    assert [(link.kind, link.message_id) for link in person.links] == [("alias", "m1")]


def test_an_unlinked_pair_is_shown_once(recognizer: Recognizer) -> None:
    """What was seen, with its message; nothing beside it that nobody ever saw."""
    recognizer.unlink(MAIL, PHONE)
    (person,) = recognizer.show(PHONE).persons

    assert [(x.a, x.b, x.kind, x.message_id, x.refused) for x in person.links] == [
        (MAIL, PHONE, "seen", "m3", "unlinked")
    ]


def test_a_link_that_was_unlinked_unseen_has_no_time(recognizer: Recognizer) -> None:
    """It is shown once, and so is the identifier that no event ever named."""
    ghost = Identifier("email", "ghost@x.com")
    recognizer.unlink(U1, ghost)
    (person,) = recognizer.show(ghost).persons
    (member,) = person.identifiers

    assert [(x.a, x.b, x.time, x.message_id, x.refused) for x in person.links] == [
        (ghost, U1, END, "", "unlinked")
    ]
    assert (member.first_seen, member.message_id) == (None, "")


def test_a_device_that_was_unlinked_is_shown_as_such(recognizer: Recognizer) -> None:
    """The claim stays in the timeline without effect, and the device says for whom it is closed."""
    recognizer.unlink(DEVICE, U1)
    device = next(d for d in recognizer.show(U1).devices if d.anonymous_id == "d1")

    assert device.unlinked == (U1,)
    assert [(c.identifier, c.unlinked, c.until) for c in device.claims] == [
        (U1, True, None),
        (U2, False, None),
    ]
    assert U1 not in {span.owner for span in device.spans}


def test_a_released_device_says_until_when(recognizer: Recognizer) -> None:
    """Its claims name nobody, and hold until the moment of the release."""
    recognizer.release("d1", at=T + 50)
    person, device = recognizer.show(DEVICE).persons, recognizer.show(DEVICE).devices[0]

    assert person == ()
    assert device.released_until == T + 50
    assert [(c.identifier, c.person, c.until) for c in device.claims] == [(None, None, T + 50)] * 2
    assert {span.owner for span in device.spans} == {None}


def test_a_forgotten_person_is_not_shown(recognizer: Recognizer) -> None:
    """Neither by its identifiers nor on the device that somebody else claimed, too."""
    recognizer.forget(PHONE, at=T + 50)
    device = recognizer.show(DEVICE)

    assert not any(recognizer.show(asked).found for asked in (U1, MAIL, PHONE))
    assert [person.canonical for person in device.persons] == [U2]
    assert [c.identifier for c in device.devices[0].claims] == [None, U2]
    assert {U1, MAIL, PHONE}.isdisjoint(device.person_of)


@pytest.mark.parametrize(
    "asked", [Identifier("email", "?@x.com"), Identifier("anonymous_id", "d9")], ids=lambda i: i[0]
)
def test_what_was_never_seen_is_not_found(recognizer: Recognizer, asked: Identifier) -> None:
    """Nothing is shown of it."""
    picture = recognizer.show(asked)

    assert (picture.found, picture.persons, picture.devices, picture.people) == (False, (), (), ())


def test_a_device_of_nobody_is_found(recognizer: Recognizer) -> None:
    """It has neither claims nor spans."""
    picture = recognizer.show(Identifier("anonymous_id", "lonely"))

    assert picture.found
    assert [(d.claims, d.spans) for d in picture.devices] == [((), ())]


def test_a_big_person_is_cut_and_says_so(graph: Graph) -> None:
    """Of everything at most so many; what is left out is counted, and the latest is kept."""
    recognizer = Recognizer(graph)
    recognizer.process(
        [
            make_event(f"m{n}", T + n, f"d{n:02}", user_id="u1", email=f"{n:02}@x.com")
            for n in range(12)
        ]
        + [make_event(f"k{n}", T + 20 + n, "d11", user_id=f"u{n % 2 + 1}") for n in range(8)]
    )
    picture = recognizer.show(U1, limit=3)
    (person,) = picture.persons

    assert [m.identifier.value for m in person.identifiers] == ["u1", "00@x.com", "01@x.com"]
    assert [link.message_id for link in person.links] == ["m0", "m1"]
    assert [device.anonymous_id for device in picture.devices] == ["d11", "d10", "d09"]
    # Those of the person asked about: m11, k0, k2, k4, k6 are hers; the latest three stay.
    assert [claim.message_id for claim in picture.devices[0].claims] == ["k2", "k4", "k6"]
    assert {span.owner for span in picture.devices[0].spans} == {U1}
    assert set(picture.left_out) == {
        LeftOut("identifiers", "user_id:u1", 3, 13),
        LeftOut("links", "user_id:u1", 2, 12),
        LeftOut("devices", "user_id:u1", 3, 12),
        LeftOut("claims", "device d11", 3, 9),
        LeftOut("spans", "device d11", 3, 9),
    }


def test_the_last_of_very_many_devices_are_found(graph: Graph) -> None:
    """More than are read by one call: the last claimed are shown, and all are counted."""
    recognizer = Recognizer(graph)
    times = [(n * 389) % 1_100 for n in range(1_100)]
    recognizer.process(
        [make_event(f"m{n}", T + time, f"d{time}", user_id="u1") for n, time in enumerate(times)]
    )
    picture = recognizer.show(U1, limit=3)

    assert [device.anonymous_id for device in picture.devices] == ["d1099", "d1098", "d1097"]
    assert picture.left_out == (LeftOut("devices", "user_id:u1", 3, 1_100),)


def test_what_links_the_identifier_to_its_person_is_kept(graph: Graph) -> None:
    """However many others there are, the chain from the one asked for is shown."""
    recognizer = Recognizer(graph)
    recognizer.process(
        [
            make_event("m0", T, user_id="u1", email="hub@x.com"),
            *(make_event(f"m{n}", T + n, user_id="u1", email=f"{n}@x.com") for n in range(1, 9)),
            make_event("far", T + 90, email="hub@x.com", phone="7"),
        ]
    )
    (person,) = recognizer.show(Identifier("phone", "7"), limit=3).persons

    assert [member.identifier.value for member in person.identifiers] == ["u1", "7", "hub@x.com"]
    assert [link.message_id for link in person.links] == ["m0", "far"]


def test_many_owners_of_a_device_are_cut_to_the_latest(graph: Graph) -> None:
    """Their identifiers count together, and each still has its canonical one."""
    recognizer = Recognizer(graph)
    recognizer.process(
        [
            make_event(f"m{n}", T + n, "d1", user_id=f"u{n}", email=f"{n}@x.com", phone=f"{n}")
            for n in range(9)
        ]
    )
    picture = recognizer.show(DEVICE, limit=4)
    told = {(left.what, left.of): left.total for left in picture.left_out}

    assert [person.canonical.value for person in picture.persons] == ["u8", "u7", "u6", "u5"]
    assert [len(person.identifiers) for person in picture.persons] == [3, 1, 1, 1]
    assert told[("claims", "device d1")] == 9
    assert told[("spans", "device d1")] == 10
    assert told[("identifiers", "user_id:u7")] == 3


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(recognizer: Recognizer, limit: int) -> None:
    """It says what was found and what is needed."""
    with pytest.raises(ConfigurationError, match=f"limit is {limit}; it must be at least 1"):
        recognizer.show(U1, limit=limit)


def test_other_rules_are_refused(graph: Graph, recognizer: Recognizer) -> None:
    """A picture by another policy than the graph's would show spans that no row follows."""
    other = Recognizer(graph, Rules(attribution=AttributionRules(policy=Policy.FIRST_CLAIM)))

    with pytest.raises(ConfigurationError, match="policy device_split"):
        other.show(U1)


def test_a_hashed_value_is_shown_as_it_is_stored(graph: Graph) -> None:
    """Asked for by the plain value or by the hash; the plain one is nowhere in the picture."""
    recognizer = Recognizer(graph, Rules(identity=HASHING))
    recognizer.process([make_event("m1", T, "d1", user_id="u1", email="Secret@x.com")])
    plain = Identifier("email", "secret@x.com")
    hashed = normalise(plain, HASHING)
    picture = recognizer.show(plain)

    assert picture == recognizer.show(hashed)
    assert picture.subject == hashed
    assert picture.persons[0].identifiers[1].seen_as == hashed.value
    assert "secret" not in repr(picture).lower()


def test_showing_changes_nothing(graph: Graph, recognizer: Recognizer) -> None:
    """The numbers of the graph and the next answer stay as they were."""
    asked = [U1, MAIL, DEVICE, Identifier("anonymous_id", "lonely"), Identifier("phone", "?")]
    first = [recognizer.show(one) for one in asked]
    before = replace(graph.stats(), bytes=0)

    assert [recognizer.show(one) for one in asked] == first
    assert replace(graph.stats(), bytes=0) == before


def test_workspaces_do_not_show_each_other(graph: Graph, recognizer: Recognizer) -> None:
    """What one workspace knows is unknown in another."""
    other = Recognizer(graph, Rules(workspace="other"))

    assert not any(other.show(asked).found for asked in (U1, MAIL, DEVICE))


def test_a_rehearsal_shows_what_is_below(recognizer: Recognizer, graph: Graph) -> None:
    """The same picture through a graph that is laid over it, and what it adds stays in it."""
    over = graph.rehearse()
    above = Recognizer(over)
    same = [above.show(asked) == recognizer.show(asked) for asked in (U1, PHONE, DEVICE)]
    above.process([make_event("m9", T + 9, "d9", user_id="u1")])
    added = [device.anonymous_id for device in above.show(U1).devices]
    over.close()

    assert same == [True, True, True]
    assert added[0] == "d9"
    assert [device.anonymous_id for device in recognizer.show(U1).devices] == ["d2", "d1"]
