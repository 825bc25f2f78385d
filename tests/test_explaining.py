"""Why: the chain of messages and rules behind an owner, and that asking changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from graphs import GRAPHS
from oracle import make_event
from recognition.attribution import BEGINNING, DAY, END, AttributionRules, Policy
from recognition.events import Identifier
from recognition.graph import Graph
from recognition.recognizer import Recognizer
from recognition.rules import Rules

U1, U2 = Identifier("user_id", "u1"), Identifier("user_id", "u2")
MAIL, PHONE = Identifier("email", "a@x.com"), Identifier("phone", "1")
DEVICE = Identifier("anonymous_id", "d1")
T = 100 * DAY


@pytest.fixture(params=GRAPHS)
def graph(request: pytest.FixtureRequest) -> Iterator[Graph]:
    """Each graph, empty."""
    opened = GRAPHS[request.param]()
    yield opened
    opened.close()


@pytest.fixture
def recognizer(graph: Graph) -> Recognizer:
    """Ann on her device, her mail and phone, and a second user who shares the mail."""
    made = Recognizer(graph)
    made.process(
        [
            make_event("m1", T + 1, "d1"),
            make_event("m2", T + 2, "d1", user_id="u1", email="A@x.com"),
            make_event("m3", T + 3, "d2", email="a@x.com", phone="1"),
            make_event("m4", T + 4, "d3", user_id="u2", email="a@x.com"),
            make_event("m5", T + 5, "lonely"),
        ]
    )
    return made


def test_an_unknown_identifier_is_not_found(recognizer: Recognizer) -> None:
    """The answer says that it was never seen, and does not repeat the value."""
    found = recognizer.explain(Identifier("email", "secret@x.com"))

    assert (found.found, found.owner) == (False, None)
    assert "never seen" in found.because[0]
    assert "secret" not in found.because[0]


def test_an_unknown_message_is_not_found(recognizer: Recognizer) -> None:
    """The answer lists the reasons why nothing may be kept of a message."""
    found = recognizer.explain("m99")

    assert not found.found
    assert "never seen" in found.because[0]


def test_an_unknown_device_is_not_found(recognizer: Recognizer) -> None:
    """A device that the graph never met has no owner and no spans."""
    found = recognizer.explain(Identifier("anonymous_id", "nowhere"))

    assert (found.found, found.owner, found.spans) == (False, None, ())


def test_a_known_identifier_is_explained_by_its_links(recognizer: Recognizer) -> None:
    """The chain of messages from an identifier to the one that names the person is shown."""
    found = recognizer.explain(PHONE)
    chain = [line for line in found.because if "linked by" in line]

    assert found.owner == "u1"
    assert [line.rpartition(" ")[2] for line in chain] == ["m3", "m2"]


def test_the_identifiers_are_shown_as_first_seen(recognizer: Recognizer) -> None:
    """The person's identifiers come normalised, with the value of the first sighting."""
    assert recognizer.explain(U1).identifiers == ((MAIL, "A@x.com"), (PHONE, "1"), (U1, "u1"))


def test_an_identifier_is_found_in_any_spelling(recognizer: Recognizer) -> None:
    """The subject is normalised like an event's."""
    assert recognizer.explain(Identifier("email", "  A@X.COM ")).owner == "u1"


def test_a_refused_link_is_shown_with_its_reason(recognizer: Recognizer) -> None:
    """The conflict of two user ids over one mail is listed where it was refused."""
    refused = [link for link in recognizer.explain(U1).links if link.refused]

    assert [(link.a, link.b, link.refused, link.message_id) for link in refused] == [
        (MAIL, U2, "unique", "m4")
    ]


def test_a_refused_link_does_not_join(recognizer: Recognizer) -> None:
    """The second user stands alone."""
    found = recognizer.explain(U2)

    assert found.owner == "u2"
    assert [identifier for identifier, _ in found.identifiers] == [U2]


def test_an_alias_is_called_an_alias(graph: Graph) -> None:
    """Links that somebody declared are told from those that were seen."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event("m1", T, user_id="u2", previous_id="u1", type="alias")])
    found = recognizer.explain(U1)

    assert found.owner == "u2"
    assert [link.kind for link in found.links] == ["alias"]
    assert any("an alias: message m1" in line for line in found.because)


def test_an_unlinked_pair_is_shown_as_unlinked(recognizer: Recognizer) -> None:
    """A link that was removed by hand stays visible."""
    recognizer.unlink(U1, MAIL)
    found = recognizer.explain(U1)

    assert {link.refused for link in found.links if {link.a, link.b} == {U1, MAIL}} == {"unlinked"}
    assert [identifier for identifier, _ in found.identifiers] == [U1]


def test_the_claims_of_a_person_are_shown(recognizer: Recognizer) -> None:
    """Each device that the person used is listed with the message that says so."""
    claims = {(c.anonymous_id, c.message_id, c.identifier) for c in recognizer.explain(U1).claims}

    assert claims == {("d1", "m2", U1), ("d2", "m3", MAIL)}


def test_a_device_is_explained_by_its_spans(recognizer: Recognizer) -> None:
    """Who owns the device when, without gaps, nobody before the look-back."""
    found = recognizer.explain(DEVICE)

    assert found.owner == "u1"
    assert [(span.start, span.end, span.owner) for span in found.spans] == [
        (BEGINNING, T + 2 - 30 * DAY, None),
        (T + 2 - 30 * DAY, END, "u1"),
    ]
    assert [claim.message_id for claim in found.claims] == ["m2"]


def test_a_shared_device_has_no_one_owner(recognizer: Recognizer) -> None:
    """Where two people own a device over time, no single owner is named."""
    recognizer.process([make_event("m9", T + 9, "d1", user_id="u2")])
    found = recognizer.explain(DEVICE)

    assert found.owner is None
    assert [span.owner for span in found.spans] == [None, "u1", "u2"]


def test_persons_of_one_name_are_two(graph: Graph) -> None:
    """A user who is called like the mail of somebody else is another owner."""
    recognizer = Recognizer(graph)
    recognizer.process(
        [
            make_event("m1", T + 1, "d1", user_id="x@x.com"),
            make_event("m2", T + 2, "d1", email="x@x.com"),
        ]
    )
    explanation = recognizer.explain(Identifier("anonymous_id", "d1"))

    assert [span.owner for span in explanation.spans] == [None, "x@x.com", "x@x.com"]
    assert explanation.owner is None


def test_a_device_without_claims_is_nobodys(recognizer: Recognizer) -> None:
    """A device that only ever was anonymous is known and has no owner."""
    found = recognizer.explain(Identifier("anonymous_id", "lonely"))

    assert (found.found, found.owner) == (True, None)


def test_an_anonymous_message_is_explained_by_the_policy(recognizer: Recognizer) -> None:
    """The policy and the claim that decided are named."""
    found = recognizer.explain("m1")

    assert found.owner == "u1"
    assert "device_split" in found.because[0]
    assert "m2" in found.because[1]


def test_a_message_of_nobody_says_so(recognizer: Recognizer) -> None:
    """An anonymous message that no claim reaches has no owner."""
    found = recognizer.explain("m5")

    assert (found.found, found.owner) == (True, None)
    assert "no claim" in found.because[0]


@pytest.mark.parametrize("message", ["m2", "m3"])
def test_an_identified_message_owns_itself(recognizer: Recognizer, message: str) -> None:
    """An event that carried an identifier is explained by it."""
    found = recognizer.explain(message)

    assert found.owner == "u1"
    assert found.because[0] == "the event itself carried a known identifier"


def test_a_message_without_a_device_is_explained(graph: Graph) -> None:
    """The row of an email alone is found by its message id."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event("m1", T, email="a@x.com")])

    assert recognizer.explain("m1").owner == "a@x.com"


def test_a_message_takes_the_claim_that_decided(graph: Graph) -> None:
    """On a shared device the message is explained by the claim before it, not by the first."""
    recognizer = Recognizer(graph)
    recognizer.process(
        [
            make_event("m1", T + 1, "d1", user_id="u1"),
            make_event("m2", T + 2, "d1", user_id="u2"),
            make_event("m3", T + 3, "d1", user_id="u1"),
            make_event("m4", T + 4, "d1"),
        ]
    )
    found = recognizer.explain("m4")

    assert found.owner == "u1"
    assert "m3" in found.because[1]


@pytest.mark.parametrize(
    ("policy", "owner"), [(Policy.FIRST_CLAIM, "u1"), (Policy.LAST_LOGIN, "u2")]
)
def test_the_policy_of_the_rules_decides(graph: Graph, policy: Policy, owner: str) -> None:
    """The explanation repeats the decision with the rules that are given."""
    recognizer = Recognizer(graph, Rules(attribution=AttributionRules(policy=policy)))
    recognizer.process(
        [
            make_event("m1", T + 1, "d1", user_id="u1"),
            make_event("m2", T + 2, "d1"),
            make_event("m3", T + 3, "d1", user_id="u2"),
        ]
    )

    assert recognizer.explain("m2").owner == owner


def test_a_forgotten_person_is_not_found(recognizer: Recognizer) -> None:
    """Nothing is left to explain, by none of the identifiers."""
    recognizer.forget(PHONE, at=T + 50)

    assert not any(recognizer.explain(identifier).found for identifier in (U1, MAIL, PHONE))


def test_a_forgotten_message_is_nobodys(recognizer: Recognizer) -> None:
    """The message is still known; it has no owner, and no identifier is shown."""
    recognizer.forget(U1, at=T + 50)
    found = recognizer.explain("m1")

    assert (found.found, found.owner, found.identifiers) == (True, None, ())
    assert [claim.identifier for claim in found.claims] == [None]


def test_a_forgotten_device_shows_claims_of_nobody(recognizer: Recognizer) -> None:
    """The claim stays in the timeline, without a name."""
    recognizer.forget(U1, at=T + 50)
    found = recognizer.explain(DEVICE)

    assert found.owner is None
    assert [claim.identifier for claim in found.claims] == [None]


def test_a_claim_that_was_unlinked_is_forgotten_with_its_person(recognizer: Recognizer) -> None:
    """What was unlinked first and forgotten then names nobody, and keeps rows from the next one."""
    recognizer.process([make_event("m9", T + 9, "d1", user_id="u2")])
    recognizer.unlink(DEVICE, U1)
    unlinked = {claim.message_id for claim in recognizer.explain(U1).claims}
    recognizer.forget(U1, at=T + 50)
    recognizer.process([make_event("m8", T + 8, "d1")])

    assert unlinked == {"m2", "m3"}
    assert [c.identifier for c in recognizer.explain(DEVICE).claims] == [None, U2]
    assert recognizer.explain("m8").owner is None


@pytest.mark.parametrize("subject", ["m1", "m5", "m99", U1, MAIL, DEVICE, Identifier("phone", "?")])
def test_asking_changes_nothing(
    graph: Graph, recognizer: Recognizer, subject: Identifier | str
) -> None:
    """An explanation leaves the numbers of the graph and the next answers as they were."""
    before, first = graph.stats(), recognizer.explain(subject)

    assert recognizer.explain(subject) == first
    # A server writes what came before to disk when it likes.
    assert replace(graph.stats(), bytes=before.bytes) == before


def test_workspaces_do_not_explain_each_other(graph: Graph, recognizer: Recognizer) -> None:
    """What one workspace knows is unknown in another."""
    other = Recognizer(graph, Rules(workspace="other"))

    assert not any(other.explain(subject).found for subject in ("m1", U1, DEVICE))
