"""The kit for sinks can fail: for each of its tests there is a sink that it catches."""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import recognition
from recognition.errors import RecognitionError, SinkError, TableError, UnsupportedPolicyError
from recognition.messages import VERSION_COLUMN
from recognition.planner import Plan, StagedRow, Step
from recognition.sinks import Applied, Capabilities, Sink
from recognition.sinks.sqlite import SqliteSink
from recognition.testing import SinkTests

pytest_plugins = ["pytester"]

Rows = Sequence[Mapping[str, object]]

TYPES = {"text": "TEXT", "time": "TEXT", "integer": "INTEGER", "float": "REAL", "boolean": "BOOL"}


class Right:
    """A sink that does everything right: what the broken ones are made of."""

    #: How the kit's test ends on it, when it is broken.
    ends: type[Exception] = AssertionError

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sink = self.make(f"sqlite:///{path}")

    def make(self, url: str) -> Sink:
        return SqliteSink(url)

    @property
    def capabilities(self) -> Capabilities:
        return self.sink.capabilities

    def compile(self, step: Step) -> str:
        return self.sink.compile(step)

    def apply(self, plan: Plan) -> Applied:
        steps = [changed for step in plan.steps for changed in self.change(step)]
        return self.sink.apply(replace(plan, steps=tuple(steps)))

    def change(self, step: Step) -> Iterable[Step]:
        yield step

    def close(self) -> None:
        self.sink.close()


def _each(step: Step, change: Callable[[StagedRow], StagedRow]) -> Step:
    return replace(step, rows=tuple(change(row) for row in step.rows))


class IgnoresIntervals(Right):
    """It sets all rows of a device."""

    def change(self, step: Step) -> Iterable[Step]:
        shape = replace(step.shape, times=(), open=False)
        yield replace(
            _each(step, lambda row: row._replace(intervals=())),
            shape=shape,
        )


class IgnoresEmpty(Right):
    """It gives away rows of known users, whatever the update asks for."""

    def change(self, step: Step) -> Iterable[Step]:
        columns = tuple(c for c in step.shape.columns if c != VERSION_COLUMN)
        places = [step.shape.columns.index(c) for c in columns]
        yield replace(
            _each(step, lambda row: row._replace(values=tuple(row.values[n] for n in places))),
            shape=replace(step.shape, empty=(), columns=columns),
        )


class IgnoresTheDevice(Right):
    """It finds rows by something else than the key."""

    def change(self, step: Step) -> Iterable[Step]:
        yield _each(step, lambda row: row._replace(equals=("a2", *row.equals[1:])))


class TakesOneValue(Right):
    """Of several values of a key it takes the first."""

    def change(self, step: Step) -> Iterable[Step]:
        first = {row.update_id: row for row in reversed(step.rows)}
        yield replace(step, rows=tuple(first.values()))


class TakesAllMessagesOfADevice(Right):
    """Beside a device it does not look at the messages."""

    def change(self, step: Step) -> Iterable[Step]:
        if step.shape.equals != ("anonymous_id", "message_id"):
            yield step
            return
        shape = replace(step.shape, equals=("anonymous_id",), messages=None)
        yield replace(
            _each(step, lambda row: row._replace(equals=row.equals[:1], message_time=None)),
            shape=shape,
        )


class IncludesEnds(Right):
    """Its intervals include their ends."""

    def change(self, step: Step) -> Iterable[Step]:
        yield _each(
            step,
            lambda row: row._replace(
                intervals=tuple((start, end and end + 1) for start, end in row.intervals)
            ),
        )


class KnowsFullSeconds(Right):
    """It cuts the times of intervals to seconds."""

    def change(self, step: Step) -> Iterable[Step]:
        def cut(time: int | None) -> int | None:
            return None if time is None else time // 1_000_000 * 1_000_000

        yield _each(
            step,
            lambda row: row._replace(
                intervals=tuple((cut(start), cut(end)) for start, end in row.intervals)
            ),
        )


class ComparesWithoutCase(Right):
    """Its database compares texts without case."""

    def make(self, url: str) -> Sink:
        class Loose(SqliteSink):
            def _equal(self, table: Any, stage: Any, shape: Any, target: Any, place: int) -> Any:
                column = target.column(shape.equals[place]).name
                return sa.collate(table.c[column], "NOCASE") == stage.c[f"equal_{place}"]

        return Loose(url)


class TrimsKeys(Right):
    """It trims the blanks of keys."""

    def change(self, step: Step) -> Iterable[Step]:
        yield _each(
            step,
            lambda row: row._replace(
                equals=tuple(v.strip() if isinstance(v, str) else v for v in row.equals)
            ),
        )


class Inserts(Right):
    """It makes a row where there is none."""

    def apply(self, plan: Plan) -> Applied:
        applied = self.sink.apply(plan)
        with closing(sqlite3.connect(self.path)) as connection, connection:
            for step in plan.steps:
                connection.execute("INSERT INTO events (message_id) VALUES (?)", (str(step),))
        return applied


class MissesWhatWasTaken(Right):
    """What the ledger says of a row is not counted."""

    def apply(self, plan: Plan) -> Applied:
        applied = super().apply(plan)
        counts = {update_id: n - 1 for update_id, n in applied.matched_by_update.items()}
        return replace(applied, matched_by_update=counts)


class CountsMatchedAsChanged(Right):
    """It says that it changed what it only matched."""

    def apply(self, plan: Plan) -> Applied:
        applied = self.sink.apply(plan)
        steps = tuple(replace(step, rows_changed=step.rows_matched) for step in applied.steps)
        return replace(applied, rows_changed=applied.rows_matched, steps=steps)


class CountsNothingAsMatched(Right):
    """It takes what it changed for what it matched."""

    def apply(self, plan: Plan) -> Applied:
        applied = self.sink.apply(plan)
        steps = tuple(replace(step, rows_matched=step.rows_changed) for step in applied.steps)
        return replace(applied, rows_matched=applied.rows_changed, steps=steps)


class CountsForNoUpdate(Right):
    """It can count rows for each update, as it says, and does not."""

    def apply(self, plan: Plan) -> Applied:
        return replace(self.sink.apply(plan), matched_by_update={})


class SkipsWhatItKnows(Right):
    """It applies each update once and for all."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.known: set[str] = set()

    def change(self, step: Step) -> Iterable[Step]:
        rows = tuple(row for row in step.rows if row.update_id not in self.known)
        self.known.update(row.update_id for row in rows)
        if rows:
            yield replace(step, rows=rows)


class TakesTheLastToCome(Right):
    """It counts updates as they come, and does not look at their sequence."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sequence = count(1)

    def change(self, step: Step) -> Iterable[Step]:
        place = step.shape.columns.index(VERSION_COLUMN)

        def renumber(row: StagedRow) -> StagedRow:
            sequence = next(self.sequence)
            values = (*row.values[:place], sequence, *row.values[place + 1 :])
            return row._replace(sequence=sequence, values=values)

        yield _each(step, renumber)


class ForgetsItsLedger(Right):
    """It keeps a ledger no longer than a plan."""

    def apply(self, plan: Plan) -> Applied:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("DROP TABLE IF EXISTS recognition_ledger")
        return self.sink.apply(plan)


class RunsStepsBackwards(Right):
    """It does not keep the order of the steps."""

    def apply(self, plan: Plan) -> Applied:
        return self.sink.apply(replace(plan, steps=plan.steps[::-1]))


class DoublesQuotes(Right):
    """It escapes values that need no escaping."""

    def change(self, step: Step) -> Iterable[Step]:
        yield _each(
            step,
            lambda row: row._replace(
                values=tuple(v.replace("'", "''") if isinstance(v, str) else v for v in row.values)
            ),
        )


class CutsTexts(Right):
    """It cuts texts that are long."""

    def change(self, step: Step) -> Iterable[Step]:
        yield _each(
            step,
            lambda row: row._replace(
                values=tuple(v[:32_767] if isinstance(v, str) else v for v in row.values)
            ),
        )


class TidiesNames(Right):
    """It makes names of tables look better."""

    def change(self, step: Step) -> Iterable[Step]:
        table = step.shape.table.replace(" ", "_")
        yield replace(step, shape=replace(step.shape, table=table))


class SkipsNulls(Right):
    """It never writes a null."""

    def change(self, step: Step) -> Iterable[Step]:
        rows = tuple(row for row in step.rows if None not in row.values)
        if rows:
            yield replace(step, rows=rows)


class WritesTexts(Right):
    """It makes a text of every value."""

    def make(self, url: str) -> Sink:
        class Careless(SqliteSink):
            def _refuse(self, column: Any, value: Any) -> None:
                return None

        return Careless(url)

    def change(self, step: Step) -> Iterable[Step]:
        yield _each(
            step, lambda row: row._replace(values=tuple(map(str, row.values)), equals=("42", "a1"))
        )


class HidesRefusals(Right):
    """It says that all is well."""

    def apply(self, plan: Plan) -> Applied:
        return replace(self.sink.apply(plan), rejected=())


class RaisesRefusals(Right):
    """It fails as a whole where some updates are refused."""

    ends = TableError

    def apply(self, plan: Plan) -> Applied:
        applied = self.sink.apply(plan)
        for _, error in applied.rejected:
            raise error
        return applied


class NamesNothing(Right):
    """Its errors do not say what they are about."""

    def apply(self, plan: Plan) -> Applied:
        applied = self.sink.apply(plan)
        rejected = [(name, type(error)("not possible")) for name, error in applied.rejected]
        return replace(applied, rejected=tuple(rejected))


class AddsColumns(Right):
    """It adds what is missing to the table, unasked."""

    def apply(self, plan: Plan) -> Applied:
        applied = self.sink.apply(plan)
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("ALTER TABLE events ADD COLUMN context_traits_shoe TEXT")
        return applied


class StopsAtARefusal(Right):
    """It gives up a plan of which it refuses something."""

    def apply(self, plan: Plan) -> Applied:
        total: list[tuple[str, RecognitionError]] = []
        for step in sorted(plan.steps, key=lambda each: -len(each.shape.columns[0])):
            applied = self.sink.apply(replace(plan, steps=(step,)))
            total += applied.rejected
            if len(total) == 3:
                break
        return replace(applied, rejected=tuple(total))


class DeniesItsLedger(Right):
    """It says that it keeps no ledger, and takes updates that need one."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.sink.capabilities, ledger=False)


class SendsOneForEachVisitor(Right):
    """It sends a statement for each visitor."""

    def change(self, step: Step) -> Iterable[Step]:
        for row in step.rows:
            yield replace(step, rows=(row,))


class CompilesByDoing(Right):
    """Its `compile` carries the step out."""

    def compile(self, step: Step) -> str:
        self.sink.apply(Plan(steps=(step,), updates=()))
        return self.sink.compile(step)


class ShowsValues(Right):
    """Its `compile` shows who is meant."""

    def compile(self, step: Step) -> str:
        return f"{self.sink.compile(step)} {step.rows[0].equals}"


class CompilesNothing(Right):
    """Its `compile` does not say what it will do."""

    def compile(self, step: Step) -> str:
        return f"UPDATE {step.table}"


class ChangesItsMind(Right):
    """What it can do depends on whether it is connected."""

    closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities() if self.closed else self.sink.capabilities

    def close(self) -> None:
        self.closed = True
        self.sink.close()


class ClosesOnce(Right):
    """It cannot be closed again."""

    ends = SinkError
    closed = False

    def close(self) -> None:
        if self.closed:
            raise SinkError("closed already")
        self.closed = True
        self.sink.close()


class SendsForNothing(Right):
    """It sends a statement for a plan without updates."""

    def apply(self, plan: Plan) -> Applied:
        return replace(self.sink.apply(plan), statements=1)


CAUGHT: dict[str, tuple[type[Right], ...]] = {
    "test_sets_the_rows_that_meet_all_criteria": (
        IgnoresIntervals,
        IgnoresEmpty,
        IgnoresTheDevice,
    ),
    "test_one_of_reaches_each_of_its_values": (TakesOneValue,),
    "test_messages_reach_the_rows_that_they_name": (TakesOneValue, TakesAllMessagesOfADevice),
    "test_an_interval_is_half_open_to_the_microsecond": (
        IncludesEnds,
        KnowsFullSeconds,
        IgnoresIntervals,
    ),
    "test_keys_are_compared_exactly": (ComparesWithoutCase, TrimsKeys),
    "test_an_update_never_inserts": (Inserts,),
    "test_rows_of_known_users_stay": (IgnoresEmpty,),
    "test_applying_twice_is_applying_once": (CountsMatchedAsChanged, CountsNothingAsMatched),
    "test_a_late_row_is_met_when_the_update_comes_again": (SkipsWhatItKnows,),
    "test_any_order_converges_by_version": (TakesTheLastToCome, IgnoresEmpty),
    "test_any_order_converges_by_ledger": (ForgetsItsLedger, DeniesItsLedger),
    "test_what_a_later_update_took_is_not_missing": (MissesWhatWasTaken, ForgetsItsLedger),
    "test_a_later_update_takes_no_more_than_its_columns": (ForgetsItsLedger,),
    "test_one_plan_does_what_one_by_one_does": (RunsStepsBackwards,),
    "test_hostile_values_arrive_unchanged": (DoublesQuotes, CutsTexts, TrimsKeys),
    "test_hostile_names_are_names": (TidiesNames,),
    "test_null_empties_what_recognition_wrote": (SkipsNulls,),
    "test_numbers_and_booleans_keep_their_type": (WritesTexts,),
    "test_a_missing_table_is_refused": (HidesRefusals, RaisesRefusals, NamesNothing),
    "test_a_missing_column_is_refused": (HidesRefusals, NamesNothing, AddsColumns),
    "test_a_refused_update_does_not_stop_the_others": (StopsAtARefusal, RaisesRefusals),
    "test_updates_without_a_version_need_a_ledger": (DeniesItsLedger,),
    "test_many_visitors_need_no_more_statements_than_few": (SendsOneForEachVisitor,),
    "test_compile_shows_the_statement_and_sends_nothing": (
        CompilesByDoing,
        ShowsValues,
        CompilesNothing,
    ),
    "test_counts_are_those_of_the_rows": (CountsMatchedAsChanged, CountsNothingAsMatched),
    "test_counts_of_each_update": (CountsForNoUpdate,),
    "test_capabilities_are_constant": (ChangesItsMind,),
    "test_closing_twice_is_closing_once": (ClosesOnce,),
    "test_an_empty_plan_does_nothing": (SendsForNothing,),
}


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Rows], None]:
    """Rows by the driver; times as text."""
    names = ", ".join(f"{name} {TYPES[kind]}" for name, kind in SinkTests.columns.items())
    marks = ", ".join("?" * len(SinkTests.columns))

    def write(table: str, rows: Rows) -> None:
        with closing(sqlite3.connect(tmp_path / "kit.db")) as connection, connection:
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{table}" ({names})')
            connection.executemany(
                f'INSERT INTO "{table}" VALUES ({marks})',
                [
                    [
                        str(row[name]) if name == "timestamp" else row.get(name)
                        for name in SinkTests.columns
                    ]
                    for row in rows
                ],
            )

    return write


@pytest.fixture
def read_rows(tmp_path: Path) -> Callable[[str], list[dict[str, object]]]:
    """Rows by the driver."""

    def read(table: str) -> list[dict[str, object]]:
        with closing(sqlite3.connect(tmp_path / "kit.db")) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(f'SELECT * FROM "{table}"')]

    return read


def _names_of_kit_tests() -> list[str]:
    return [name for name in vars(SinkTests) if name.startswith("test_")]


def _run(name: str, sink: Sink, **fixtures: Any) -> None:
    """One test of the kit, as pytest would call it; of its parameters the first."""
    test = getattr(SinkTests(), name)
    offered = {"sink": sink, "last": "A", **fixtures}
    test(**{each: offered[each] for each in inspect.signature(test).parameters})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[type[Right]], Right]]:
    """Sinks on one file; the broken ones may not know how to close."""
    made: list[Right] = []

    def make_it(kind: type[Right]) -> Right:
        made.append(kind(tmp_path / "kit.db"))
        return made[-1]

    yield make_it
    for each in made:
        each.sink.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, kinds in CAUGHT.items() for kind in kinds],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_kit_catches(
    name: str,
    kind: type[Right],
    make: Callable[[type[Right]], Right],
    write_rows: Callable[[str, Rows], None],
    read_rows: Callable[[str], list[dict[str, object]]],
) -> None:
    """The kit's test fails on a sink that breaks its rule."""
    broken = make(kind)

    with pytest.raises(kind.ends):
        _run(name, broken, write_rows=write_rows, read_rows=read_rows)


@pytest.mark.parametrize("name", _names_of_kit_tests())
def test_the_kit_passes_what_is_right(
    name: str,
    make: Callable[[type[Right]], Right],
    write_rows: Callable[[str, Rows], None],
    read_rows: Callable[[str], list[dict[str, object]]],
) -> None:
    """The same test passes on the sink that the broken ones are made of, and one is made for it."""
    _run(name, make(Right), write_rows=write_rows, read_rows=read_rows)

    assert CAUGHT[name]


def test_the_kit_takes_a_sink_without_a_ledger(
    make: Callable[[type[Right]], Right],
    write_rows: Callable[[str, Rows], None],
    read_rows: Callable[[str], list[dict[str, object]]],
    tmp_path: Path,
) -> None:
    """A sink that keeps no ledger and counts by step passes when it refuses what it must."""
    for name in _names_of_kit_tests():
        (tmp_path / "kit.db").unlink(missing_ok=True)
        sink = make(KeepsNoLedger)

        _run(name, sink, write_rows=write_rows, read_rows=read_rows)

        sink.close()
    with closing(sqlite3.connect(tmp_path / "kit.db")) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
    assert ("recognition_ledger",) not in tables


class KeepsNoLedger(Right):
    """It refuses updates whose order it could not keep, and counts no more than it must."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    def apply(self, plan: Plan) -> Applied:
        refused: dict[str, RecognitionError] = {}
        steps = []
        for step in plan.steps:
            if step.shape.versioned:
                steps.append(step)
                continue
            error = UnsupportedPolicyError(f"{step.table} has no version, and no ledger is kept")
            refused.update((row.update_id, error) for row in step.rows)
        applied = self.sink.apply(replace(plan, steps=tuple(steps)))
        rejected = (*applied.rejected, *refused.items())
        return replace(applied, rejected=rejected, matched_by_update={})


AUTHORS_FILE = """
import sqlite3
from contextlib import closing
import pytest
from recognition.sinks import open_sink
from recognition.testing import SinkTests

TYPES = {"time": "TEXT", "float": "REAL"}

class TestMine(SinkTests):
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "mine.db"

    @pytest.fixture
    def sink(self, path):
        with closing(open_sink(f"sqlite:///{path}")) as sink:
            yield sink

    @pytest.fixture
    def write_rows(self, path):
        def write(table, rows):
            types = [f"{n} {TYPES.get(k, k)}" for n, k in self.columns.items()]
            marks = ", ".join("?" * len(types))
            with closing(sqlite3.connect(path)) as db, db:
                db.execute(f'CREATE TABLE IF NOT EXISTS "{table}" ({", ".join(types)})')
                for row in rows:
                    row = {**row, "timestamp": str(row["timestamp"])}
                    line = [row.get(name) for name in self.columns]
                    db.execute(f'INSERT INTO "{table}" VALUES ({marks})', line)
        return write

    @pytest.fixture
    def read_rows(self, path):
        def read(table):
            with closing(sqlite3.connect(path)) as db:
                db.row_factory = sqlite3.Row
                return [dict(row) for row in db.execute(f'SELECT * FROM "{table}"')]
        return read
"""


@pytest.fixture
def authors(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder elsewhere, from which the library is found."""
    monkeypatch.setenv("PYTHONPATH", str(Path(recognition.__file__).parents[1]))
    return pytester


def _run_authors_file(authors: pytest.Pytester, source: str) -> pytest.RunResult:
    authors.makepyfile(test_mine=source)
    found = entry_points(group="pytest11", name="recognition")
    plugin = () if found else ("-p", "recognition.testing.plugin")
    return authors.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", "-W", "error")


def test_an_authors_file_is_three_fixtures(authors: pytest.Pytester) -> None:
    """A subclass with three fixtures runs the whole kit."""
    result = _run_authors_file(authors, AUTHORS_FILE)

    result.assert_outcomes(passed=len(_names_of_kit_tests()) + 2)


def test_a_failing_kit_says_what_it_compared(authors: pytest.Pytester) -> None:
    """A kit test that fails shows both sides, though it is not in the author's own file."""
    broken = AUTHORS_FILE.replace("return [dict(row)", "return [{**row, 'user_id': 'nobody'}")

    result = _run_authors_file(authors, broken)

    assert result.ret == 1
    result.stdout.fnmatch_lines(["E *assert {*'nobody'*} == {*'u1'*"])


def test_an_authors_file_without_fixtures_says_so(authors: pytest.Pytester) -> None:
    """A subclass that forgets a fixture is told which one."""
    result = _run_authors_file(
        authors,
        "from recognition.testing import SinkTests\nclass TestMine(SinkTests): pass\n",
    )

    assert result.ret == 1
    result.stdout.fnmatch_lines(["*NotImplementedError: the subclass gives the sink under test"])
