"""The way in: what is passed through, what is remembered, and what the rows hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from oracle import make_event
from recognition.attribution import AttributionRules, Policy
from recognition.errors import InputError
from recognition.events import Event, Identifier
from recognition.graph import Graph, Owner
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.layouts import layout_named
from recognition.messages import VERSION_COLUMN
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import MergeTraits, References, Rules, Supersede, TableRules
from warehouse import Warehouse

GRAPHS: dict[str, Callable[[], Graph]] = {
    "memory": MemoryGraph,
    "sqlite": lambda: SqliteGraph(":memory:"),
}
BOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"
OWN = "stitched_user_id"
U1, U2, MAIL = Identifier("user_id", "u1"), Identifier("user_id", "u2"), "a@x.com"


@pytest.fixture(params=GRAPHS)
def graph(request: pytest.FixtureRequest) -> Iterator[Graph]:
    """Each embedded graph, empty."""
    opened = GRAPHS[request.param]()
    yield opened
    opened.close()


class Line:
    """A recognizer with a warehouse behind it; every batch is written, flushed and delivered."""

    def __init__(self, graph: Graph, **options: Any) -> None:
        self.graph = graph
        self.recognizer = Recognizer(graph, Rules(**options))
        self.warehouse = Warehouse()

    def take(self, *events: Event) -> Recognition:
        done = self.recognizer.process(events)
        for table, rows in self.recognizer.rows(done).items():
            self.warehouse.load(table, rows)
        self.recognizer.flushed(done.receipt)
        self.deliver()
        return done

    def deliver(self) -> int:
        leased = self.graph.lease_updates(10_000, 60)
        self.warehouse.apply([item.update for item in leased])
        self.graph.acknowledge([item.position for item in leased])
        return len(leased)

    def column(self, name: str = "user_id", table: str = "events") -> dict[str, object]:
        return {m: row.get(name) for m, row in self.warehouse.tables[table].items()}


# ---------------------------------------------------------------- owners


def test_earlier_rows_follow_the_login(graph: Graph) -> None:
    """An anonymous row gets the user of the first login after it."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"))
    line.take(make_event("m2", 2, "d1", user_id="u1"))

    assert line.column() == {"m1": "u1", "m2": "u1"}


def test_a_known_device_is_stamped_without_an_update(graph: Graph) -> None:
    """An anonymous event of a known device comes back with its owner and causes no update."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event("m1", 1, "d1", user_id="u1")])
    done = recognizer.process([make_event("m2", 2, "d1")])

    assert done.owners == (Owner("u1"),)
    assert (done.stamped, done.updates) == (1, 0)


def test_the_second_time_the_same_batch_changes_nothing(graph: Graph) -> None:
    """A repeated batch has the same owners, and neither claims, links nor updates."""
    recognizer = Recognizer(graph)
    batch = [make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1", email=MAIL)]
    first, second = recognizer.process(batch), recognizer.process(batch)

    assert second.owners == first.owners
    assert (second.claims, second.links, second.updates) == (0, 0, 0)


def test_a_returning_visitor_causes_no_update(graph: Graph) -> None:
    """A further login of the same user, with nothing anonymous in between, emits nothing."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1")])
    done = recognizer.process([make_event("m3", 3, "d1", user_id="u1")])

    assert (done.claims, done.updates) == (1, 0)


def test_an_empty_batch_is_nothing(graph: Graph) -> None:
    """No events, no owners, no rows, no updates."""
    recognizer = Recognizer(graph)
    done = recognizer.process([])

    assert (done.events, done.owners, done.updates) == ((), (), 0)
    assert recognizer.rows(done) == {}
    assert recognizer.flushed(done.receipt) == 0


def test_an_event_without_any_id_is_passed_through(graph: Graph) -> None:
    """An event of nobody has a row without an owner and leaves no reference."""
    line = Line(graph)
    done = line.take(make_event("m1", 1))

    assert done.owners == (None,)
    assert line.column() == {"m1": None}
    assert graph.stats().references == 0


def test_events_of_one_batch_see_each_other(graph: Graph) -> None:
    """An anonymous event is stamped by a login that stands after it in the same batch."""
    done = Recognizer(graph).process(
        [make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1")]
    )

    assert done.owners == (Owner("u1"), Owner("u1"))


def test_the_same_message_first_anonymous_then_identified(graph: Graph) -> None:
    """A message that comes again with its user makes the claim that was missing."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event("m1", 1, "d1")])
    done = recognizer.process([make_event("m1", 1, "d1", user_id="u1")])

    assert (done.claims, done.owners) == (1, (Owner("u1"),))


# ---------------------------------------------------------------- what identifies nobody


def test_a_blocked_user_id_is_passed_through_and_identifies_nobody(graph: Graph) -> None:
    """The row keeps what the event gave; the device stays anonymous."""
    line = Line(graph)
    done = line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="undefined"))

    assert line.column() == {"m1": None, "m2": "undefined"}
    assert (done.blocked, done.claims, done.identified) == (1, 0, 0)


def test_a_blocked_device_links_nobody(graph: Graph) -> None:
    """Everybody whose device is called "null" shares nothing."""
    line = Line(graph)
    done = line.take(make_event("m1", 1, "null"), make_event("m2", 2, "null", user_id="u1"))

    assert line.column() == {"m1": None, "m2": "u1"}
    assert (done.blocked, done.claims) == (2, 0)


def test_a_blocked_user_id_leaves_the_email(graph: Graph) -> None:
    """The event is identified by what remains."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="0", email=MAIL))

    assert line.column() == {"m1": MAIL, "m2": "0"}


def test_two_people_with_a_blocked_email_are_not_one(graph: Graph) -> None:
    """A placeholder joins nobody."""
    done = Recognizer(graph).process(
        [
            make_event("m1", 1, "d1", user_id="u1", phone="unknown"),
            make_event("m2", 2, "d2", email=MAIL, phone="unknown"),
        ]
    )

    assert done.links == 0
    assert done.owners == (Owner("u1"), Owner(MAIL))


def test_a_group_id_links_nobody(graph: Graph) -> None:
    """A type that is not configured as known is no identifier."""
    group = Identifier("group_id", "g1")
    events = [
        replace(make_event("m1", 1, "d1"), known=(group,)),
        replace(make_event("m2", 2, "d2", user_id="u1"), known=(U1, group)),
    ]
    done = Recognizer(graph).process(events)

    assert (done.identified, done.links) == (1, 0)
    assert done.owners == (None, Owner("u1"))


def test_a_bot_is_passed_through_and_teaches_nothing(graph: Graph) -> None:
    """A bot's events have rows as they came, and neither claim nor reference."""
    line = Line(graph)
    events = [make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1")]
    done = line.take(*(replace(event, user_agent=BOT) for event in events))

    assert line.column() == {"m1": None, "m2": "u1"}
    assert (done.bots, done.anonymous, done.identified) == (2, 0, 0)
    assert graph.stats().anonymous_ids == 0


def test_the_bot_filter_can_be_switched_off(graph: Graph) -> None:
    """Without a filter a bot is a visitor like any other."""
    event = replace(make_event("m1", 1, "d1", user_id="u1"), user_agent=BOT)

    assert Recognizer(graph, bots=None).process([event]).bots == 0


def test_a_previous_id_that_is_the_own_device_names_no_second_person(graph: Graph) -> None:
    """An alias from the device's own id is an ordinary login."""
    done = Recognizer(graph).process(
        [make_event("m1", 1, "d1", user_id="u1", previous_id="d1", type="alias")]
    )

    assert (done.links, done.claims) == (0, 1)


def test_a_previous_id_may_be_a_device(graph: Graph) -> None:
    """An alias gives the rows of another anonymous id to the user."""
    line = Line(graph)
    line.take(make_event("m1", 1, "old"))
    line.take(make_event("m2", 2, "d1", user_id="u1", previous_id="old", type="alias"))

    assert line.column()["m1"] == "u1"


def test_a_previous_id_may_be_a_user(graph: Graph) -> None:
    """An alias joins two user ids; the one that was seen first names the person."""
    line = Line(graph, target_column=OWN)
    line.take(make_event("m1", 1, "d1", user_id="u1"))
    line.take(make_event("m2", 2, "d2", user_id="u2", previous_id="u1", type="alias"))

    assert set(line.column(OWN).values()) == {"u1"}


def test_aliases_in_a_circle_are_one_person(graph: Graph) -> None:
    """A chain of aliases that ends where it began joins all, and an alias to itself nothing."""
    line = Line(graph, target_column=OWN)
    line.take(
        make_event("m1", 1, user_id="u1", previous_id="u2"),
        make_event("m2", 2, user_id="u2", previous_id="u3"),
        make_event("m3", 3, user_id="u3", previous_id="u1"),
        make_event("m4", 4, user_id="u1", previous_id="u1"),
    )

    assert set(line.column(OWN).values()) == {"u1"}


# ---------------------------------------------------------------- counts


def test_a_batch_is_counted(graph: Graph) -> None:
    """Anonymous, identified, stamped, claims, links and conflicts are numbers of things."""
    done = Recognizer(graph).process(
        [
            make_event("m1", 1, "d1"),
            make_event("m2", 2, "d1", user_id="u1", email=MAIL),
            make_event("m3", 3, "d2", user_id="u2", email=MAIL),
            make_event("m4", 4, "d3"),
            make_event("m5", 5),
        ]
    )

    assert (done.anonymous, done.identified, done.stamped) == (3, 2, 1)
    assert (done.claims, done.links, done.conflicts) == (2, 2, 1)


# ---------------------------------------------------------------- rows


def test_an_own_column_is_filled_for_everybody(graph: Graph) -> None:
    """With a target column the user column stays as the event gave it."""
    line = Line(graph, target_column=OWN)
    line.take(
        make_event("m1", 1, "d1"),
        make_event("m2", 2, "d1", user_id="u1"),
        make_event("m3", 3, "d2"),
    )

    assert line.column() == {"m1": None, "m2": "u1", "m3": None}
    assert line.column(OWN) == {"m1": "u1", "m2": "u1", "m3": None}


def test_a_row_of_an_email_is_stamped_with_its_person(graph: Graph) -> None:
    """An event that names no user id holds the canonical id of its person."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1", user_id="u1", email=MAIL), make_event("m2", 2, email=MAIL))

    assert line.column()["m2"] == "u1"


def test_a_row_of_an_email_follows_when_the_user_id_comes(graph: Graph) -> None:
    """The canonical id of a person changes, and with it the rows that were written before."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=" A@X.com "))
    line.take(make_event("m3", 3, "d2", user_id="u1", email=MAIL))

    assert line.column() == {"m1": "u1", "m2": "u1", "m3": "u1"}


def test_without_stamps_rows_are_as_they_came(graph: Graph) -> None:
    """Where somebody else writes the rows, each owned row has an update."""
    recognizer = Recognizer(graph, Rules(stamps=False))
    done = recognizer.process([make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1")])
    rows = {row["message_id"]: row["user_id"] for row in recognizer.rows(done)["events"]}

    assert rows == {"m1": None, "m2": "u1"}
    assert done.updates == 1


def test_a_stamped_row_has_its_version(graph: Graph) -> None:
    """A row that is stamped holds the sequence of its batch, any other row holds no version."""
    rules = Rules(default=TableRules(supersede=Supersede.VERSION))
    recognizer = Recognizer(graph, rules)
    done = recognizer.process(
        [
            make_event("m1", 1, "d1"),
            make_event("m2", 2, "d1", user_id="u1"),
            make_event("m3", 3, "d2"),
        ]
    )
    rows = {row["message_id"]: row[VERSION_COLUMN] for row in recognizer.rows(done)["events"]}

    assert rows == {"m1": done.versions[0], "m2": None, "m3": None}


def test_one_track_has_two_rows_and_both_are_updated(graph: Graph) -> None:
    """Under layout ``segment`` the table of the name follows like ``tracks``."""
    line = Line(graph, layout=layout_named("segment"))
    line.take(make_event("m1", 1, "d1", name="Buy Now"))
    line.take(make_event("m2", 2, "d1", user_id="u1", type="identify"))

    assert line.column(table="tracks") == {"m1": "u1"}
    assert line.column(table="Buy Now") == {"m1": "u1"}


# ---------------------------------------------------------------- traits

PLAN = "context_traits_plan"


def test_earlier_rows_get_the_traits(graph: Graph) -> None:
    """The configured traits are written beside the owner; others are not."""
    line = Line(graph, traits=("plan",))
    line.take(make_event("m1", 1, "d1"))
    line.take(make_event("m2", 2, "d1", user_id="u1", traits={"plan": "pro", "city": "Rome"}))

    assert line.column(PLAN)["m1"] == "pro"
    assert line.column("context_traits_city")["m1"] is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_latest_trait_wins_by_time_and_message_id(graph: Graph, order: Sequence[int]) -> None:
    """Of two traits the later one is the truth, whichever arrives first; ids break ties."""
    line = Line(graph, traits=("plan",))
    line.take(make_event("m0", 1, "d1"))
    named = [
        make_event("m1", 5, "d1", user_id="u1", traits={"plan": "old"}),
        make_event("m2", 9, "d1", user_id="u1", traits={"plan": "tie"}),
        make_event("m3", 9, "d1", user_id="u1", traits={"plan": "new"}),
    ]
    for position in order:
        line.take(named[position])

    assert line.column(PLAN)["m0"] == "new"


def test_a_trait_of_one_identifier_is_the_whole_persons(graph: Graph) -> None:
    """A trait that came with the email reaches rows that were recognised by the user id."""
    line = Line(graph, traits=("plan",))
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1", email=MAIL))
    line.take(make_event("m3", 3, email=MAIL, traits={"plan": "pro"}))

    assert line.column(PLAN)["m1"] == "pro"


@pytest.mark.parametrize(
    ("merge", "stays", "kept"), [("overwrite", None, None), ("coalesce", "trial", "free")]
)
@pytest.mark.parametrize("references", [References.IDS, References.NONE])
def test_a_trait_that_nobody_named_empties_on_request(
    graph: Graph, merge: str, stays: str | None, kept: str | None, references: References
) -> None:
    """To coalesce leaves what an event had of its own, in a row that belonged to nobody before."""
    rules = TableRules(references=references, supersede=Supersede.VERSION)
    line = Line(graph, traits=("plan",), merge_traits=merge, default=rules)
    line.take(make_event("m1", 1, "d1", traits={"plan": "free"}))
    line.take(make_event("m2", 2, "d1", user_id="u1"))
    first = line.column(PLAN)["m1"]
    line.take(make_event("m3", 3, "d1", traits={"plan": "trial"}))  # stamped
    stamped = line.column(PLAN)["m3"]
    line.take(make_event("m4", 4, "d2", user_id="u1", traits={"plan": "pro"}))

    assert (first, stamped) == (kept, stays)
    assert (line.column(PLAN)["m1"], line.column(PLAN)["m3"]) == ("pro", "pro")


@pytest.mark.parametrize("merge", MergeTraits)
def test_a_trait_of_another_person_never_stays(graph: Graph, merge: MergeTraits) -> None:
    """A row that goes to somebody else, or to nobody, loses the traits of the first."""
    rules = TableRules(supersede=Supersede.VERSION)
    line = Line(graph, traits=("plan",), merge_traits=merge, default=rules)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 1, "d2"))
    both = [make_event(f"m{n}", 9, f"d{n - 2}", user_id="u1") for n in (3, 4)]
    line.take(*both, make_event("m5", 9, user_id="u1", traits={"plan": "pro"}))
    named = line.column(PLAN)
    line.take(make_event("m6", 5, "d1", user_id="u2"))  # an earlier claim, which comes late
    line.recognizer.release("d2")
    line.deliver()

    assert (named["m1"], named["m2"]) == ("pro", "pro")
    assert (line.column()["m1"], line.column(PLAN)["m1"]) == ("u2", None)
    assert (line.column()["m2"], line.column(PLAN)["m2"]) == (None, None)


# ---------------------------------------------------------------- what happens in between


def test_rows_on_their_way_are_made_good_by_flushed(graph: Graph) -> None:
    """A claim between `process` and the visible rows reaches them when they are flushed."""
    line = Line(graph)
    done = line.recognizer.process([make_event("m1", 1, "d1")])
    line.take(make_event("m2", 2, "d1", user_id="u1"))
    for table, rows in line.recognizer.rows(done).items():
        line.warehouse.load(table, rows)
    emitted = line.recognizer.flushed(done.receipt)
    line.deliver()

    assert emitted == 1
    assert line.column()["m1"] == "u1"


def test_flushed_emits_nothing_where_nothing_happened(graph: Graph) -> None:
    """No claim in between, no update."""
    recognizer = Recognizer(graph)
    done = recognizer.process([make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1")])

    assert recognizer.flushed(done.receipt) == 0


def test_workspaces_share_nothing(graph: Graph) -> None:
    """The same device in another workspace is another device."""
    Recognizer(graph, Rules(workspace="w1")).process([make_event("m1", 1, "d1", user_id="u1")])
    done = Recognizer(graph, Rules(workspace="w2")).process([make_event("m2", 2, "d1")])

    assert done.owners == (None,)


# ---------------------------------------------------------------- undo


def test_an_unlinked_email_falls_back_to_itself(graph: Graph) -> None:
    """Rows that followed the email are the email's again, and stay so."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=MAIL))
    line.take(make_event("m3", 3, user_id="u1", email=MAIL))
    line.recognizer.unlink(U1, Identifier("email", " A@x.com"))
    line.take(make_event("m4", 4, user_id="u1", email=MAIL))

    assert line.column() == {"m1": MAIL, "m2": MAIL, "m3": "u1", "m4": "u1"}


def test_a_device_is_taken_from_a_user(graph: Graph) -> None:
    """After `unlink` of a device and a user the rows are nobody's; the user's own row stays."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1"))
    line.recognizer.unlink(Identifier("anonymous_id", "d1"), U1)
    line.take(make_event("m3", 3, "d1", user_id="u1"))

    assert line.column() == {"m1": None, "m2": "u1", "m3": "u1"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (U1, U1),
        (Identifier("anonymous_id", "d1"), Identifier("anonymous_id", "d2")),
    ],
)
def test_unlink_needs_two_that_can_be_linked(
    graph: Graph, one: Identifier, other: Identifier
) -> None:
    """Two devices, or an identifier and itself, are refused; nothing was written."""
    with pytest.raises(InputError, match="Nothing was written"):
        Recognizer(graph).unlink(one, other)


def test_a_released_device_is_nobodys(graph: Graph) -> None:
    """Rows until the release are nobody's, also for who logs in later."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1"))
    line.recognizer.release("d1", at=5)
    line.take(make_event("m3", 6, "d1", user_id="u2"))

    assert line.column() == {"m1": None, "m2": "u1", "m3": "u2"}


@pytest.mark.parametrize("policy", [p for p in Policy if p is not Policy.LAST_LOGIN])
def test_a_forgotten_person_is_not_handed_on(graph: Graph, policy: Policy) -> None:
    """After `forget` the rows of the person are unknown, and stay so when somebody logs in."""
    line = Line(graph, attribution=AttributionRules(policy=policy))
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=MAIL))
    line.recognizer.forget(Identifier("email", MAIL), at=5)
    line.take(make_event("m3", 6, "d1", user_id="u2"))

    assert line.column() == {"m1": None, "m2": None, "m3": "u2"}


def test_a_late_event_of_a_forgotten_person_stays_forgotten(graph: Graph) -> None:
    """What happened before and arrives later neither claims nor is remembered by name."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1"))
    line.recognizer.forget(U1, at=5)
    done = line.take(make_event("m3", 3, "d1", user_id="u1"), make_event("m4", 4, "d1"))

    assert line.column()["m4"] is None
    assert done.owners == (None, None)
    assert not line.recognizer.explain(U1).found


def test_forget_needs_a_known_identifier(graph: Graph) -> None:
    """A device is no person; the error lists what is, and no value."""
    with pytest.raises(InputError, match="user_id, email, phone") as caught:
        Recognizer(graph).forget(Identifier("anonymous_id", "secret-device"))

    assert "secret-device" not in str(caught.value)


# ---------------------------------------------------------------- what once went wrong


NO_REFERENCES = TableRules(references=References.NONE, supersede=Supersede.VERSION)


def test_a_forgotten_person_may_come_back(graph: Graph) -> None:
    """Events after the moment of forgetting make a new person, in any number of batches."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1", user_id="u1"))
    line.recognizer.forget(U1, at=5)
    line.take(make_event("m2", 6, "d1", user_id="u1"))
    line.take(make_event("m3", 7, "d1", user_id="u1"), make_event("m4", 8, "d1"))

    assert line.column()["m4"] == "u1"


def test_a_person_may_grow_after_its_device_was_taken() -> None:
    """A batch that moves a person, one of whose devices was unlinked, is processed."""
    line = Line(MemoryGraph())
    line.take(make_event("m1", 9, "d1", email=MAIL))
    line.recognizer.unlink(Identifier("anonymous_id", "d1"), Identifier("email", MAIL))
    line.take(make_event("m2", 8, "d1", user_id="u1", email=MAIL))

    assert line.column() == {"m1": "u1", "m2": "u1"}


def test_a_device_is_taken_from_an_email_and_the_emails_own_row_stays(graph: Graph) -> None:
    """What the email itself did is never emptied with the anonymous rows of the device."""
    line = Line(graph, default=NO_REFERENCES)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=MAIL))
    line.recognizer.unlink(Identifier("anonymous_id", "d1"), Identifier("email", MAIL))
    line.deliver()

    assert line.column() == {"m1": None, "m2": MAIL}


def test_a_released_device_leaves_the_emails_own_row(graph: Graph) -> None:
    """Releasing a device empties its anonymous rows only."""
    line = Line(graph, default=NO_REFERENCES)
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=MAIL))
    line.recognizer.release("d1", at=5)
    line.deliver()

    assert line.column() == {"m1": None, "m2": MAIL}


def test_a_late_claim_does_not_take_a_released_device(graph: Graph) -> None:
    """A login before the release that arrives after it claims nothing."""
    line = Line(graph)
    line.take(make_event("m1", 1, "d1"))
    line.recognizer.release("d1", at=5)
    line.take(make_event("m2", 2, "d1", user_id="u1"))

    assert line.column() == {"m1": None, "m2": "u1"}


def test_a_row_that_moves_leaves_the_traits_of_its_old_owner(graph: Graph) -> None:
    """No row of one person ever shows a trait of another."""
    line = Line(graph, traits=("plan",))
    line.take(make_event("m1", 5, "d1"))
    line.take(make_event("m2", 9, "d1", user_id="u1", traits={"plan": "pro"}))
    line.take(make_event("m3", 4, "d1", user_id="u2"))

    assert line.column()["m1"] == "u2"
    assert line.column(PLAN)["m1"] is None


def test_a_trait_reaches_rows_of_a_person_that_is_joined_in_the_same_batch(graph: Graph) -> None:
    """A trait that comes with a new identifier is written to the rows that were there."""
    line = Line(graph, traits=("plan",))
    line.take(make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1"))
    line.take(
        make_event("m3", 3, email=MAIL, traits={"plan": "pro"}),
        make_event("m4", 4, user_id="u1", email=MAIL),
    )

    assert line.column(PLAN)["m1"] == "pro"


def test_without_stamps_rows_on_their_way_are_made_good_by_flushed(graph: Graph) -> None:
    """An update that ran before its row was visible is sent again when the row is flushed."""
    line = Line(graph, stamps=False)
    done = line.recognizer.process(
        [make_event("m1", 1, "d1"), make_event("m2", 2, "d1", user_id="u1")]
    )
    line.deliver()
    for table, rows in line.recognizer.rows(done).items():
        line.warehouse.load(table, rows)
    line.recognizer.flushed(done.receipt)
    line.deliver()

    assert line.column()["m1"] == "u1"


def test_forgetting_up_to_a_moment_before_the_person_was_seen(graph: Graph) -> None:
    """A moment in the past is no error."""
    line = Line(graph, target_column=OWN)
    line.take(make_event("m1", 9, user_id="u1"))
    line.recognizer.forget(U1, at=5)

    assert not line.recognizer.explain(U1).found


def test_an_older_update_does_not_take_a_row_of_nobody(graph: Graph) -> None:
    """A row that belongs to nobody since a release stays so, though an update is still to come."""
    line = Line(graph)
    line.recognizer.process([make_event("m1", 1, "d1"), make_event("m3", 3, "d1")])
    line.recognizer.process([make_event("m4", 4, "d1", user_id="u1")])
    line.recognizer.release("d1", at=9)
    line.take(make_event("m2", 2, "d1"))

    assert line.column() == {"m2": None}


def test_without_stamps_an_older_update_does_not_stand(graph: Graph) -> None:
    """The owner at the time of processing stands against an update that was still to come."""
    line = Line(graph, stamps=False)
    line.recognizer.process([make_event("m1", 2, "d1"), make_event("m4", 8, "d1")])
    line.recognizer.process([make_event("m0", 1, "d1", user_id="u1")])
    line.recognizer.process([make_event("m2", 4, "d1", user_id="u2")])
    line.take(make_event("m3", 5, "d1"))

    assert line.column() == {"m3": "u2"}
