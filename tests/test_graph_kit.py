"""Each test of `GraphTests` fails on a graph that was broken for it."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest

from recognition.attribution import DAY, END, Claim
from recognition.errors import InputError
from recognition.events import Identifier
from recognition.graph import Delivery, Explanation, Graph, GraphStats, Observation, Outcome
from recognition.graph.decisions import Receipt
from recognition.graph.memory import MemoryGraph
from recognition.graph.store import Day, Rows, Store, StoredLink, Timeline, Trait
from recognition.messages import Messages, UpdateByCriteria
from recognition.rules import References, Rules, TableRules
from recognition.testing import GraphTests, graphs

Reopen = Callable[[], Graph]


class BrokenStore:
    """A store some of whose operations do something else; they get the whole one first."""

    def __init__(self, store: Store, instead: Mapping[str, Callable[..., Any]]) -> None:
        self._store = store
        for name, operation in instead.items():
            setattr(self, name, partial(operation, store))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class BrokenBelow(MemoryGraph):
    """A graph over a broken store."""

    def __init__(self, **instead: Callable[..., Any]) -> None:
        super().__init__()
        self._instead = instead

    @contextmanager
    def _transaction(self, workspace: str, *, write: bool = True) -> Iterator[Store]:
        with super()._transaction(workspace, write=write) as store:
            yield BrokenStore(store, self._instead)  # type: ignore[misc]


# Operations of a store ------------------------------------------------------------------------


def nothing(store: Store, *given: object, **named: object) -> None:
    """Does not do it."""


def finds_nothing(store: Store, *given: object, **named: object) -> dict[Any, Any]:
    """Does not find what is there."""
    return {}


def finds_nobody(store: Store, *given: object) -> set[Any]:
    """Does not find what is there."""
    return set()


def drops_named_updates(store: Store, updates: Sequence[UpdateByCriteria]) -> None:
    """Rows that were recognised once are never changed again."""
    store.emit([u for u in updates if not any(isinstance(c, Messages) for c in u.where)])


def only_the_last_claim(
    store: Store, windows: Mapping[int, tuple[int, int]], *, first: bool = False
) -> dict[int, list[Claim]]:
    return {t: claims[-1:] for t, claims in store.claims(windows, first=first).items()}


def only_claims_inside(
    store: Store, windows: Mapping[int, tuple[int, int]], *, first: bool = False
) -> dict[int, list[Claim]]:
    """The neighbours of the window are missing."""
    return {
        t: [c for c in claims if windows[t][0] <= c.time <= windows[t][1]]
        for t, claims in store.claims(windows, first=first).items()
    }


def links_by_arrival(store: Store, components: Collection[int]) -> dict[int, list[StoredLink]]:
    """What was stored first counts as the earliest."""
    return {
        c: [link._replace(time=0) for link in links] for c, links in store.links(components).items()
    }


def links_without_undo(store: Store, components: Collection[int]) -> dict[int, list[StoredLink]]:
    """That a link was unlinked is not kept."""
    return {
        c: [link._replace(unlinked=False) for link in links]
        for c, links in store.links(components).items()
    }


def traits_as_text(store: Store, traits: Mapping[int, Mapping[str, Trait]]) -> None:
    store.put_traits(
        {
            i: {name: trait._replace(value=str(trait.value)) for name, trait in found.items()}
            for i, found in traits.items()
        }
    )


def claims_without_nobody(
    store: Store, timeline: int, gone: Collection[Claim], new: Collection[Claim]
) -> None:
    """Claims of forgotten people leave no trace, so that the next person gets their rows."""
    store.replace_claims(timeline, gone, [])


def forgotten_for_ever(store: Store, identifiers: Collection[Identifier]) -> dict[Identifier, int]:
    return dict.fromkeys(store.forgotten(identifiers), END)


def forgets_only_the_known(store: Store, identifiers: Mapping[Identifier, int], until: int) -> None:
    store.forget({i: handle for i, handle in identifiers.items() if handle}, until)


def references_before_midnight_lost(
    store: Store, windows: Mapping[int, tuple[int, int]]
) -> dict[int, Rows]:
    return {
        subject: rows._replace(
            references={
                tables: {m: time for m, time in refs.items() if (time + 1) % DAY}
                for tables, refs in rows.references.items()
            }
        )
        for subject, rows in store.rows(windows).items()
    }


def today_only(store: Store, days: Iterable[Day]) -> None:
    """Each day takes the place of the one before it."""
    latest = {(subject, tables): day for subject, tables, day in days}
    store.add_days([Day(*key, day) for key, day in latest.items() if day >= graphs.START // DAY])


def ten_thousand_references(
    store: Store, windows: Mapping[int, tuple[int, int]]
) -> dict[int, Rows]:
    return {
        subject: rows._replace(
            references={
                tables: dict([*refs.items()][:10_000]) for tables, refs in rows.references.items()
            }
        )
        for subject, rows in store.rows(windows).items()
    }


def ten_thousand_timelines(store: Store, anonymous_ids: Collection[str]) -> dict[str, Timeline]:
    return dict([*store.timelines(anonymous_ids).items()][:10_000])


def first_page_only(store: Store, after: int, limit: int, *, known: bool) -> list[int]:
    return [] if after else store.page(after, 1, known=known)


# Whole graphs ---------------------------------------------------------------------------------


class StampsNothing(MemoryGraph):
    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        outcome = super().observe(rules, observations)
        outcome.owners = [None] * len(outcome.owners)
        return outcome


class RandomIds(MemoryGraph):
    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        return [
            delivery._replace(update=delivery.update.model_copy(update={"id": uuid.uuid4().hex}))
            for delivery in super().lease_updates(limit, seconds, destination)
        ]


class OneWorkspace(MemoryGraph):
    @contextmanager
    def _transaction(self, workspace: str, *, write: bool = True) -> Iterator[Store]:
        with super()._transaction("all", write=write) as store:
            yield store


class OtherRules(MemoryGraph):
    """Decides by other rules than it was given."""

    def __init__(self, change: Callable[[Rules], Rules]) -> None:
        super().__init__()
        self._change = change

    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        return super().observe(self._change(rules), observations)


class SeesOtherwise(MemoryGraph):
    """Remembers something else than what it was given."""

    def __init__(self, change: Callable[[int, Observation], Observation]) -> None:
        super().__init__()
        self._change = change

    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        return super().observe(rules, list(map(self._change, count(), observations)))


def without_previous_id(number: int, o: Observation) -> Observation:
    return o._replace(previous_id=None)


def first_row_of_a_batch(number: int, o: Observation) -> Observation:
    return o if number == 0 else o._replace(message_id="lost")


def first_table(number: int, o: Observation) -> Observation:
    return o._replace(tables=o.tables[:1])


def in_lower_case(number: int, o: Observation) -> Observation:
    return o._replace(message_id=o.message_id.lower())


def in_milliseconds(number: int, o: Observation) -> Observation:
    return o._replace(time=o.time // 1000 * 1000)


class UndoesNothing(MemoryGraph):
    def unlink(self, rules: Rules, one: Identifier, other: Identifier) -> int:
        return 0

    def release(self, rules: Rules, anonymous_id: str, at: int) -> int:
        return 0

    def forget(self, rules: Rules, identifier: Identifier, at: int) -> int:
        return 0


class ExplainsFromMemory(MemoryGraph):
    def __init__(self) -> None:
        super().__init__()
        self._told: dict[Identifier | str, Explanation] = {}

    def explain(self, rules: Rules, subject: Identifier | str) -> Explanation:
        if subject not in self._told:
            self._told[subject] = super().explain(rules, subject)
        return self._told[subject]


class ExplainsNothing(MemoryGraph):
    def explain(self, rules: Rules, subject: Identifier | str) -> Explanation:
        return replace(super().explain(rules, subject), because=())


class ExpiresTooMuch(MemoryGraph):
    def expire(self, before: int) -> int:
        return super().expire(before + 10 * DAY)


class ExpiresReferencesOnly(MemoryGraph):
    def expire(self, before: int) -> int:
        kept = [
            (by_day, {tables: set(days) for tables, days in by_day.items()})
            for store in self._stores.values()
            for _, by_day in store.rows_by_subject.values()
        ]
        dropped = super().expire(before)
        for by_day, days in kept:
            by_day.update(days)
        return dropped


class LeasesHideNothing(MemoryGraph):
    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        return super().lease_updates(limit, 0, destination)


class LeasesForEver(MemoryGraph):
    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        return super().lease_updates(limit, 1e9, destination)


class LeasesNewestFirst(MemoryGraph):
    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        leased = super().lease_updates(1_000_000, seconds, destination)
        rest = leased[: max(len(leased) - limit, 0)]
        self.return_updates([delivery.position for delivery in rest], "", dead=False)
        return leased[len(rest) :][::-1]


class HoldsNothing(MemoryGraph):
    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        pass


class HoldsWithoutSaying(MemoryGraph):
    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        super().hold_updates(positions, seconds, applied=False, destination=destination)


class HoldsTheDead(MemoryGraph):
    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        self.return_updates(positions, "", dead=False, destination=destination)


class FirstDestinationIsEnough(MemoryGraph):
    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        for name in (destination, *self.destinations()):
            super().acknowledge(positions, name)


class DiesForAll(MemoryGraph):
    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        for name in self.destinations():
            super().return_updates(positions, reason, dead=dead, destination=name)


class NewDestinationsGetNewUpdatesOnly(MemoryGraph):
    def add_destination(self, name: str, *, filled: bool = False) -> None:
        super().add_destination(name, filled=filled)
        self._progress[name].clear()


class ServesAnybody(MemoryGraph):
    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        return super().lease_updates(limit, seconds, next(iter(self.destinations()), ""))


class ForgetsThatItWasFilled(MemoryGraph):
    def add_destination(self, name: str, *, filled: bool = False) -> None:
        super().add_destination(name, filled=filled)
        self._filled[name] = filled


class DroppedDestinationsStay(MemoryGraph):
    def drop_destination(self, name: str) -> None:
        self._filled.pop(name, None)


class AcknowledgesNothing(MemoryGraph):
    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        """Leave all as it is."""


class AcknowledgesUpTo(MemoryGraph):
    """Takes a position for an offset, as of a log."""

    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        for last in positions:
            super().acknowledge([position for position in self._outbox if position <= last])


class ReturnsNothing(MemoryGraph):
    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        """Leave all as it is."""


class BuriesTheDead(MemoryGraph):
    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        if dead:
            self.acknowledge(positions)
        else:
            super().return_updates(positions, reason, dead=False)


class NeverRechecks(MemoryGraph):
    def recheck(self, rules: Rules, receipt: Receipt) -> int:
        return 0


class RechecksTheUnknownOnly(MemoryGraph):
    def recheck(self, rules: Rules, receipt: Receipt) -> int:
        pairs = zip(receipt.observations, receipt.stamped, strict=True)
        unknown = tuple(observation for observation, owner in pairs if owner is None)
        nobody = (None,) * len(unknown)
        return super().recheck(rules, Receipt(receipt.decision, unknown, nobody))


class RechecksAlways(MemoryGraph):
    def recheck(self, rules: Rules, receipt: Receipt) -> int:
        nobody = (None,) * len(receipt.stamped)
        return super().recheck(rules, receipt._replace(decision=-1, stamped=nobody))


class GoesOnAfterFailure(MemoryGraph):
    """Keeps half of a decision that failed."""

    @contextmanager
    def _transaction(self, workspace: str, *, write: bool = True) -> Iterator[Store]:
        self._failed = None
        with super()._transaction(workspace, write=write) as store:
            yield store


class RefusesNothing(MemoryGraph):
    def unlink(self, rules: Rules, one: Identifier, other: Identifier) -> int:
        try:
            return super().unlink(rules, one, other)
        except InputError:
            return 0


class CountsWrong(MemoryGraph):
    def stats(self) -> GraphStats:
        stats = super().stats()
        return replace(stats, persons=stats.identifiers)


class RehearsesForReal(MemoryGraph):
    def rehearse(self) -> Graph:
        return self

    def close(self) -> None:
        """Stay open."""


class ClosesItsNeighbours(MemoryGraph):
    def __init__(self, neighbour: Graph) -> None:
        super().__init__()
        self._neighbour = neighbour

    def close(self) -> None:
        super().close()
        self._neighbour.close()


def alone(graph: Graph) -> tuple[Graph, Reopen]:
    return graph, lambda: graph


def apart(graph: Graph) -> tuple[Graph, Reopen]:
    """Opened again it is another, empty one."""
    return graph, MemoryGraph


def closing_both() -> tuple[Graph, Reopen]:
    other = MemoryGraph()
    return ClosesItsNeighbours(other), lambda: other


def without_limits(rules: Rules) -> Rules:
    return replace(rules, identity=replace(rules.identity, max_identifiers=1_000))


def without_unique(rules: Rules) -> Rules:
    return replace(rules, identity=replace(rules.identity, unique=frozenset()))


def with_references(rules: Rules) -> Rules:
    return replace(rules, default=TableRules())


def without_references(rules: Rules) -> Rules:
    return replace(rules, default=TableRules(references=References.NONE))


def below(**instead: Callable[..., Any]) -> Callable[[], tuple[Graph, Reopen]]:
    return lambda: alone(BrokenBelow(**instead))


def whole(graph: Callable[[], Graph]) -> Callable[[], tuple[Graph, Reopen]]:
    return lambda: alone(graph())


DEFECTS: dict[str, Callable[[], tuple[Graph, Reopen]]] = {
    "test_stamps_events_of_a_known_device": whole(StampsNothing),
    "test_claim_updates_the_rows_before_it": below(rows=finds_nothing),
    "test_updates_come_in_the_order_of_their_sequence": below(next_sequence=lambda store: 7),
    "test_ids_of_updates_follow_from_what_they_say": whole(RandomIds),
    "test_same_batch_again_changes_nothing": below(claims=finds_nothing),
    "test_claim_that_comes_late_supersedes": below(emit=drops_named_updates),
    "test_claim_takes_only_what_changes_hands": below(claims=finds_nothing),
    "test_cut_and_order_of_batches_do_not_matter": below(claims=only_the_last_claim),
    "test_policies_over_a_long_timeline": below(claims=only_claims_inside),
    "test_two_recognizers_share_a_graph": lambda: apart(MemoryGraph()),
    "test_workers_at_the_same_time": lambda: apart(MemoryGraph()),
    "test_workspaces_are_apart": whole(OneWorkspace),
    "test_alias_joins_two_users": below(set_persons=nothing),
    "test_alias_may_name_a_device": whole(lambda: SeesOtherwise(without_previous_id)),
    "test_links_reach_through_others": below(links=finds_nothing),
    "test_second_user_is_a_conflict": whole(lambda: OtherRules(without_unique)),
    "test_earlier_link_wins_when_it_comes_late": below(links=links_by_arrival),
    "test_persons_have_a_limit": whole(lambda: OtherRules(without_limits)),
    "test_new_canonical_id_updates_the_rows": below(claimed_by=finds_nobody),
    "test_traits_of_the_owner_are_kept_by_type": below(put_traits=traits_as_text),
    "test_unlink_parts_identifiers_for_good": below(links=links_without_undo),
    "test_unlink_takes_a_device_for_good": below(bar=nothing),
    "test_unlink_may_come_before_what_it_parts": whole(UndoesNothing),
    "test_release_takes_a_device_from_everybody": whole(UndoesNothing),
    "test_released_device_stays_released": below(release=nothing),
    "test_forget_empties_the_rows": whole(UndoesNothing),
    "test_forgotten_rows_go_to_nobody_else": below(replace_claims=claims_without_nobody),
    "test_late_events_stay_forgotten": below(forgotten=finds_nothing),
    "test_forgotten_person_may_come_back": below(forgotten=forgotten_for_ever),
    "test_alias_brings_no_forgotten_id_back": below(forgotten=finds_nothing),
    "test_forget_before_anything_was_seen": below(forget=forgets_only_the_known),
    "test_nothing_of_a_forgotten_person_is_left": whole(ExplainsFromMemory),
    "test_references_say_which_rows": whole(lambda: SeesOtherwise(first_row_of_a_batch)),
    "test_without_references_nothing_is_kept_of_an_event": whole(
        lambda: OtherRules(with_references)
    ),
    "test_with_days_nothing_else_is_kept_of_an_event": below(add_days=today_only),
    "test_with_days_only_rows_cause_updates": whole(lambda: OtherRules(without_references)),
    "test_expire_drops_days": whole(ExpiresReferencesOnly),
    "test_every_table_of_an_event_is_updated": whole(lambda: SeesOtherwise(first_table)),
    "test_ids_of_all_shapes": whole(lambda: SeesOtherwise(in_lower_case)),
    "test_times_are_kept_to_the_microsecond": whole(lambda: SeesOtherwise(in_milliseconds)),
    "test_references_of_many_days": below(rows=references_before_midnight_lost),
    "test_expire_drops_old_days_only": whole(ExpiresTooMuch),
    "test_device_with_very_many_events": below(rows=ten_thousand_references),
    "test_batch_with_very_many_devices": below(timelines=ten_thousand_timelines),
    "test_lease_hides_updates": whole(LeasesHideNothing),
    "test_lease_that_ended_brings_updates_back": whole(LeasesForEver),
    "test_acknowledge_removes_updates": whole(AcknowledgesNothing),
    "test_unknown_positions_are_harmless": whole(AcknowledgesUpTo),
    "test_returned_updates_come_again": whole(ReturnsNothing),
    "test_dead_updates_are_kept_with_their_reason": whole(BuriesTheDead),
    "test_updates_are_leased_oldest_first": whole(LeasesNewestFirst),
    "test_held_updates_come_again_after_their_time": whole(HoldsWithoutSaying),
    "test_held_lease_is_longer": whole(HoldsNothing),
    "test_dead_updates_are_not_held": whole(HoldsTheDead),
    "test_destinations_go_at_their_own_pace": whole(FirstDestinationIsEnough),
    "test_destinations_have_their_own_leases": whole(DiesForAll),
    "test_destination_added_later_gets_what_is_there": whole(NewDestinationsGetNewUpdatesOnly),
    "test_only_destinations_that_are_registered_are_served": whole(ServesAnybody),
    "test_destination_says_whether_it_was_filled": whole(ForgetsThatItWasFilled),
    "test_restate_says_everything_once_more": below(page=first_page_only),
    "test_dropped_destination_holds_nothing": whole(DroppedDestinationsStay),
    "test_flushed_makes_good_what_happened_in_between": whole(NeverRechecks),
    "test_flushed_replaces_a_stamp_that_is_out_of_date": whole(RechecksTheUnknownOnly),
    "test_flushed_says_nothing_when_nothing_changed": whole(RechecksAlways),
    "test_decision_that_fails_leaves_nothing_behind": whole(GoesOnAfterFailure),
    "test_refused_call_changes_nothing": whole(RefusesNothing),
    "test_stats_count_what_is_there": whole(CountsWrong),
    "test_explain_says_why": whole(ExplainsNothing),
    "test_rehearsal_decides_the_same_and_writes_nothing": whole(RehearsesForReal),
    "test_close_twice": closing_both,
}

KIT = {name for name in dir(GraphTests) if name.startswith("test_")}


@pytest.mark.parametrize("name", sorted(DEFECTS))
def test_kit_catches_the_defect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit test fails, by an assertion of its own, on the graph that was broken for it."""
    monkeypatch.setattr(graphs, "PATIENCE", 2 * graphs.SHORT_LEASE)
    graph, reopen = DEFECTS[name]()
    test = getattr(GraphTests(), name)
    fixtures = {"graph": graph, "reopen": reopen}
    wanted = {fixture: fixtures[fixture] for fixture in inspect.signature(test).parameters}

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(**wanted)


def test_every_kit_test_has_its_broken_graph() -> None:
    """No test of the kit is without a graph that it fails on."""

    assert set(DEFECTS) == KIT


def test_author_is_told_what_is_missing() -> None:
    """A subclass without the fixture `graph` is told so."""
    given = GraphTests.graph.__wrapped__  # type: ignore[attr-defined]

    with pytest.raises(NotImplementedError, match="gives the graph under test"):
        given(GraphTests())
