"""
One recognition window on a big table: what a plan costs beside the bare statement.

    python benchmarks/windows.py [--rows 2000000] [--visitors 1,100,10000,100000] [--rounds 5]
        [--json] [--engines sqlite,duckdb,postgresql,postgresql-unindexed] [--cpu]

Each of K visitors gets a user and an e-mail address in all of its rows of an interval, in a table
of N rows with 15 columns. Each line is measured from an equal copy of the file, on a connection
that is open, commit included:

``floor``
    the bare ``UPDATE .. FROM`` with the same criteria; its stage is loaded beforehand
``plan``
    from messages to steps: no database, the same whatever the table
``apply``
    stage, look at the ledger, which is there already, send the statement, note it; the target, at
    most 1.3 times the floor (PostgreSQL: 1.25), is that of this line at full size
``ours``
    both. On a column store the floor rewrites 200,000 rows in about the time in which Python reads
    10,000 messages twice, so that this line shows the language more than the sink
``by version``
    ``apply`` where each row has its version and no ledger is kept
``again``
    the same plan applied a second time, which changes nothing and counts what it matched
``read``
    the bare ``SELECT`` of the same rows, after the floor: what ``again`` cannot do without
``one by one``
    one ``UPDATE`` for each of some visitors, in one transaction, scaled up to K

The ratio is the median of the rounds' ratios, because a round's measurements share its noise. With
``--cpu`` seconds are those of the process, all threads together: on a machine that others use too
they say more than the clock does. That is for engines in the process alone.

On PostgreSQL, with and without an index on the device, the bytes of write-ahead log are counted
too, each time right after a checkpoint. Its server is the one of the tests, without ``fsync``:
what a flush costs is the same for all lines, and would hide what we add.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import duckdb

from recognition.messages import Between, Empty, Equals, UpdateByCriteria
from recognition.planner import Plan, plan_updates
from recognition.sinks import Applied, open_sink

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from postgres import GivenServer, open_server

START = datetime(2026, 1, 1)
DAYS = 90
PER_VISITOR = 20

# Neither a checkpoint nor a vacuum of its own comes between.
SERVER = {"shared_buffers": "1GB", "max_wal_size": "16GB", "checkpoint_timeout": "1d"}
SERVER |= {"autovacuum": "off", "wal_level": "replica"}

COLUMNS = {
    "message_id": "TEXT PRIMARY KEY",
    "type": "TEXT",
    "anonymous_id": "TEXT",
    "user_id": "TEXT",
    "timestamp": "TIMESTAMP",
    "context_traits_email": "TEXT",
    "recognition_version": "BIGINT",
    "name": "TEXT",
    "url": "TEXT",
    "referrer": "TEXT",
    "user_agent": "TEXT",
    "country": "TEXT",
    "amount": "DOUBLE PRECISION",
    "quantity": "BIGINT",
    "campaign": "TEXT",
}

STAGE = (
    "CREATE TEMP TABLE s AS SELECT anonymous_id, user_id, context_traits_email AS email,"
    " timestamp AS lower, timestamp AS upper FROM events WHERE 1 = 0"
)
FLOOR = (
    "UPDATE events SET user_id = s.user_id, context_traits_email = s.email FROM s"
    " WHERE events.anonymous_id = s.anonymous_id AND events.user_id IS NULL"
    " AND events.timestamp >= s.lower AND events.timestamp < s.upper"
)
READ = (
    "SELECT count(events.user_id), count(events.context_traits_email) FROM events, s"
    " WHERE events.anonymous_id = s.anonymous_id"
    " AND events.timestamp >= s.lower AND events.timestamp < s.upper"
)
ONE = (
    "UPDATE events SET user_id = ?, context_traits_email = ? WHERE anonymous_id = ?"
    " AND user_id IS NULL AND timestamp >= ? AND timestamp < ?"
)


class _File:
    """A database that is one file, copied as such."""

    name: str
    #: The target: how often the floor `apply` may take.
    target = 1.3

    def url(self, path: Path) -> str:
        return f"{self.name}:///{path}"

    def copy(self, base: Path, copy: Path) -> None:
        shutil.copyfile(base, copy)

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def drop(self, path: Path) -> None:
        path.unlink()

    def log_position(self) -> int:
        return 0


class Sqlite(_File):
    """The table in SQLite: times as the library's ``load`` stores them, the device indexed."""

    name = "sqlite"
    one = ONE
    version = sqlite3.sqlite_version
    sample = 1_000

    @contextmanager
    def connect(self, path: Path) -> Iterator[Any]:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA temp_store = MEMORY")
            yield connection

    def build(self, path: Path, rows: int) -> None:
        with self.connect(path) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("BEGIN")
            connection.execute(_create_table().replace(" TIMESTAMP,", " TEXT,"))
            marks = ", ".join("?" * len(COLUMNS))
            connection.executemany(f"INSERT INTO events VALUES ({marks})", _rows(rows))
            connection.execute("CREATE INDEX events_anonymous_id ON events (anonymous_id)")
            connection.execute("COMMIT")

    def stage(self, connection: Any, rows: Sequence[tuple[Any, ...]]) -> None:
        connection.execute(STAGE)
        connection.executemany("INSERT INTO s VALUES (?, ?, ?, ?, ?)", rows)

    def time(self, moment: datetime) -> object:
        return moment.isoformat(sep=" ", timespec="microseconds")


class Duckdb(_File):
    """The table in DuckDB: no index but that of the primary key."""

    name = "duckdb"
    one = ONE
    version = duckdb.__version__
    sample = 10

    @contextmanager
    def connect(self, path: Path) -> Iterator[Any]:
        with duckdb.connect(path) as connection:
            yield connection

    def build(self, path: Path, rows: int) -> None:
        visitors = rows // PER_VISITOR
        step = DAYS * 86_400_000_000 // rows
        with self.connect(path) as connection:
            connection.execute(_create_table())
            connection.execute(
                "INSERT INTO events SELECT printf('%032x', i), 'page',"
                f" 'anon-' || printf('%012x', (i * 7919) % {visitors}), NULL,"
                f" TIMESTAMP '{START}' + to_microseconds(i * {step}), NULL, NULL,"
                " 'Product Viewed', 'https://shop.example.com/shoes/trail/' || (i % 1000),"
                " 'https://search.example.com/?q=' || (i % 100),"
                " 'Mozilla/5.0 (X11; Linux x86_64; rv:146.0) Gecko/20100101 Firefox/146.0',"
                f" 'DE', (i % 9999) / 100.0, i % 7, NULL FROM range({rows}) t(i)"
            )

    def stage(self, connection: Any, rows: Sequence[tuple[Any, ...]]) -> None:
        connection.execute(STAGE)
        types = ("VARCHAR", "VARCHAR", "VARCHAR", "TIMESTAMP", "TIMESTAMP")
        lists = ", ".join(f"unnest(CAST(? AS {each}[]))" for each in types)
        columns = [list(column) for column in zip(*rows, strict=True)]
        connection.execute(f"INSERT INTO s SELECT {lists}", columns)

    def time(self, moment: datetime) -> object:
        return moment


class Postgresql:
    """The table in PostgreSQL; a path is a database, by its name."""

    one = ONE.replace("?", "%s")
    target = 1.25

    def __init__(self, server: GivenServer, indexed: bool) -> None:
        self.name = "postgresql" if indexed else "postgresql-unindexed"
        self.version = server.version
        self.sample = 1_000 if indexed else 3
        self._server = server
        self._indexed = indexed

    def _name(self, path: Path) -> str:
        return f"bench_{path.name.partition('.')[0]}"

    @contextmanager
    def connect(self, path: Path) -> Iterator[Any]:
        with self._server.connect(self._name(path)) as connection:
            yield connection

    def build(self, path: Path, rows: int) -> None:
        visitors = rows // PER_VISITOR
        step = DAYS * 86_400_000_000 // rows
        self._server.run(f"CREATE DATABASE {self._name(path)}")
        with self.connect(path) as connection:
            connection.execute(_create_table())
            connection.execute(
                "INSERT INTO events SELECT lpad(to_hex(i), 32, '0'), 'page',"
                f" 'anon-' || lpad(to_hex((i * 7919) % {visitors}), 12, '0'), NULL,"
                f" TIMESTAMP '{START}' + i * {step} * INTERVAL '1 microsecond', NULL, NULL,"
                " 'Product Viewed', 'https://shop.example.com/shoes/trail/' || (i % 1000),"
                " 'https://search.example.com/?q=' || (i % 100),"
                " 'Mozilla/5.0 (X11; Linux x86_64; rv:146.0) Gecko/20100101 Firefox/146.0',"
                " 'DE', (i % 9999) / 100.0, i % 7, NULL"
                f" FROM generate_series(0::bigint, {rows} - 1) t(i)"
            )
            if self._indexed:
                connection.execute("CREATE INDEX ON events (anonymous_id)")
            connection.execute("VACUUM (ANALYZE) events")

    def stage(self, connection: Any, rows: Sequence[tuple[Any, ...]]) -> None:
        connection.execute(STAGE)
        with connection.cursor().copy("COPY s FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        connection.execute("ANALYZE s")

    def time(self, moment: datetime) -> object:
        return moment

    def url(self, path: Path) -> str:
        return self._server.url(self._name(path))

    def copy(self, base: Path, copy: Path) -> None:
        self.drop(copy)
        # By its files where there is the choice, since 15: not through the log.
        by = " STRATEGY file_copy" if int(self.version.partition(".")[0]) >= 15 else ""
        self._server.run(f"CREATE DATABASE {self._name(copy)} TEMPLATE {self._name(base)}{by}")
        self._server.run("CHECKPOINT")

    def size(self, path: Path) -> int:
        ((size,),) = self._server.run("SELECT pg_database_size(%s)", (self._name(path),))
        return int(size)

    def drop(self, path: Path) -> None:
        self._server.run(f"DROP DATABASE IF EXISTS {self._name(path)} WITH (FORCE)")

    def log_position(self) -> int:
        ((position,),) = self._server.run("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
        return int(position)


Engine = Sqlite | Duckdb | Postgresql

_clock: Callable[[], float] = perf_counter


def _create_table() -> str:
    return f"CREATE TABLE events ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())})"


def _rows(rows: int) -> Iterator[tuple[object, ...]]:
    visitors = rows // PER_VISITOR
    step = timedelta(microseconds=DAYS * 86_400_000_000 // rows)
    agent = "Mozilla/5.0 (X11; Linux x86_64; rv:146.0) Gecko/20100101 Firefox/146.0"
    moment = START
    for i in range(rows):
        yield (
            f"{i:032x}",
            "page",
            _device(i * 7919 % visitors),
            None,
            moment.isoformat(sep=" ", timespec="microseconds"),
            None,
            None,
            "Product Viewed",
            f"https://shop.example.com/shoes/trail/{i % 1000}",
            f"https://search.example.com/?q={i % 100}",
            agent,
            "DE",
            i % 9999 / 100,
            i % 7,
            None,
        )
        moment += step


def _device(visitor: int) -> str:
    return f"anon-{visitor:012x}"


def _chosen(rows: int, visitors: int) -> list[tuple[str, str, str, datetime, datetime]]:
    """Device, user, e-mail, and an interval of its own that holds all of its rows."""
    everyone = rows // PER_VISITOR
    return sorted(
        (
            _device(visitor),
            f"user-{visitor:08d}",
            f"user-{visitor:08d}@example.com",
            START - timedelta(seconds=visitor % 1000),
            START + timedelta(days=DAYS, seconds=visitor % 1000),
        )
        for visitor in range(0, everyone, everyone // visitors)
    )[:visitors]


def _updates(
    chosen: Iterable[tuple[str, str, str, datetime, datetime]], versioned: bool
) -> list[UpdateByCriteria]:
    found = []
    for sequence, (device, user, email, lower, upper) in enumerate(chosen, start=1):
        values: dict[str, Any] = {"user_id": user, "context_traits_email": email}
        if versioned:
            values["recognition_version"] = sequence
        where = (
            Equals(column="anonymous_id", value=device),
            Empty(column="user_id"),
            Between(
                column="timestamp",
                start=lower.replace(tzinfo=UTC),
                end=upper.replace(tzinfo=UTC),
            ),
        )
        found.append(
            UpdateByCriteria(
                id=f"{sequence:032x}",
                workspace="w1",
                table="events",
                set=values,
                where=where,
                sequence=sequence,
                expected_rows=PER_VISITOR,
                created_at=START.replace(tzinfo=UTC),
            )
        )
    return found


def _timed(work: Callable[[], Any]) -> float:
    gc.collect()
    started = _clock()
    work()
    return _clock() - started


def _run_floor(engine: Engine, path: Path, chosen: Sequence[Any]) -> tuple[dict[str, float], int]:
    staged = [
        (device, user, email, engine.time(lower), engine.time(upper))
        for device, user, email, lower, upper in chosen
    ]
    with engine.connect(path) as connection:
        engine.stage(connection, staged)

        def work() -> None:
            connection.execute("BEGIN")
            connection.execute(FLOOR)
            connection.execute("COMMIT")

        logged = engine.log_position()
        floor = _timed(work)
        logged = engine.log_position() - logged
        found: list[Any] = []
        read = _timed(lambda: found.extend(connection.execute(READ).fetchall()))
        assert [*found[0]] == [len(chosen) * PER_VISITOR] * 2, found
        return {"floor": floor, "read": read}, logged


def _run_ours(
    engine: Engine, path: Path, updates: Sequence[UpdateByCriteria]
) -> tuple[dict[str, float], dict[str, int]]:
    with closing(open_sink(engine.url(path))) as sink:
        plans: list[Plan] = []
        plan = _timed(lambda: plans.append(plan_updates(updates)))
        nobody = _updates([("nobody", "u", "e", START, START + timedelta(days=1))], False)
        sink.apply(plan_updates(nobody))  # the first of all makes the ledger
        reports: list[Applied] = []
        logged = [engine.log_position()]
        apply = _timed(lambda: reports.append(sink.apply(plans[0])))
        logged.append(engine.log_position())
        again = _timed(lambda: reports.append(sink.apply(plans[0])))
        logged.append(engine.log_position())
        found = [report.rows_changed for report in reports]
        assert found == [len(updates) * PER_VISITOR, 0], found
        assert reports[1].rows_matched == found[0]
    return (
        {"plan": plan, "apply": apply, "ours": plan + apply, "again": again},
        {"apply": logged[1] - logged[0], "again": logged[2] - logged[1]},
    )


def _run_one_by_one(engine: Engine, path: Path, chosen: Sequence[Any]) -> float:
    sample = chosen[:: max(1, len(chosen) // engine.sample)][: engine.sample]
    with engine.connect(path) as connection:

        def work() -> None:
            connection.execute("BEGIN")
            for device, user, email, lower, upper in sample:
                span = (engine.time(lower), engine.time(upper))
                connection.execute(engine.one, (user, email, device, *span))
            connection.execute("COMMIT")

        return _timed(work) * len(chosen) / len(sample)


def measure(
    engine: Engine, base: Path, copy: Path, rows: int, visitors: int, rounds: int
) -> dict[str, Any]:
    """The median of each measurement, in seconds, and of its ratio to the floor."""
    chosen = _chosen(rows, visitors)
    by_ledger, by_version = _updates(chosen, False), _updates(chosen, True)

    def fresh() -> Path:
        engine.copy(base, copy)
        return copy

    found: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    logs: dict[str, list[int]] = {}
    for _ in range(rounds):
        once, logged = _run_floor(engine, fresh(), chosen)
        log = {"floor": logged}
        seconds, of_ours = _run_ours(engine, fresh(), by_ledger)
        once.update(seconds)
        log.update(of_ours)
        seconds, of_ours = _run_ours(engine, fresh(), by_version)
        once["by version"], log["by version"] = seconds["apply"], of_ours["apply"]
        once["one by one"] = _run_one_by_one(engine, fresh(), chosen)
        for name, each in once.items():
            found.setdefault(name, []).append(each)
            ratios.setdefault(name, []).append(each / once["floor"])
        for name, size in log.items():
            logs.setdefault(name, []).append(size)
    engine.drop(copy)
    result = {
        "engine": engine.name,
        "version": engine.version,
        "rows": rows,
        "visitors": visitors,
        "rows_changed": visitors * PER_VISITOR,
        "file_bytes": engine.size(base),
        "rounds": rounds,
        "one_by_one_sample": min(engine.sample, visitors),
        "seconds": {name: median(each) for name, each in found.items()},
        "ratio": {name: median(each) for name, each in ratios.items()},
        "target": engine.target,
        "met": median(ratios["apply"]) <= engine.target,
    }
    if any(map(any, logs.values())):
        result["log_bytes"] = {name: median(each) for name, each in logs.items()}
    return result


def main() -> int:
    """Measure, and print a table or JSON; 0 also when the target is missed, it is said."""
    parser = argparse.ArgumentParser(description="One recognition window on a big table.")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--visitors", default="1,100,10000,100000", help="one or several numbers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default="sqlite,duckdb,postgresql,postgresql-unindexed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, not those of the clock")
    options = parser.parse_args()
    if options.cpu:
        if "postgresql" in options.engines:
            parser.error("--cpu is for engines in the process: --engines sqlite,duckdb")
        global _clock
        _clock = process_time
    numbers = [int(each) for each in options.visitors.split(",")]
    if not all(0 < each <= options.rows // PER_VISITOR for each in numbers):
        parser.error(f"--visitors are at most --rows / {PER_VISITOR}")
    results = []
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        server: GivenServer | None = None
        for name in options.engines.split(","):
            engine: Engine
            if name.startswith("postgresql"):
                server = server or opened.enter_context(open_server(**SERVER))
                engine = Postgresql(server, indexed=name == "postgresql")
            else:
                engine = Sqlite() if name == "sqlite" else Duckdb()
            base, copy = folder / f"base.{name}", folder / f"copy.{name}"
            engine.build(base, options.rows)
            for visitors in numbers:
                results.append(measure(engine, base, copy, options.rows, visitors, options.rounds))
                if not options.json:
                    _print_table(results[-1])
            engine.drop(base)
    if options.json:
        print(json.dumps({"python": platform.python_version(), "results": results}, indent=2))
    return 0


def _print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['engine']} {result['version']}: {result['visitors']:,} visitors,"
        f" {result['rows_changed']:,} of {result['rows']:,} rows,"
        f" {result['file_bytes'] / 1e6:,.0f} MB, median of {result['rounds']}"
    )
    for name, seconds in result["seconds"].items():
        note = ""
        if name == "apply" and result["rows"] >= 2_000_000:
            note = f"  target {result['target']}: {'met' if result['met'] else 'MISSED'}"
        if name == "one by one":
            note = f"  scaled up from {result['one_by_one_sample']:,} visitors"
        log = result.get("log_bytes", {}).get(name)
        if log is not None:
            floor = result["log_bytes"]["floor"]
            note = f"{log / 1e6:>12,.1f} MB of log{log / floor:>7.2f} x{note}"
        print(f"  {name:<12}{seconds:>10.4f} s{result['ratio'][name]:>9.2f} x{note}")
    print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
