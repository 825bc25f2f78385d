"""
One recognition window on a big ClickHouse table: what the sink costs beside the least that can be
done, and beside what others do.

    python benchmarks/clickhouse.py [--rows 10000000] [--visitors 1,100,10000,100000]
        [--recent 10000] [--lines chosen,...] [--json]

The engine is the embedded one. K visitors of about 20 events get a user, an e-mail address and a
version, in a table of 30 columns in 12 monthly partitions, sorted by day and visitor, of which 30 %
is identified. Each line is a process of its own on an equal copy of the directory (hard links), and
counts the CPU seconds of user and system, the wall seconds, what the process read and wrote, page
cache or not, and how much its memory grew:

``floor: scan and write``
    find the rows, write their addresses and the new values elsewhere; the stage is loaded in it, as
    in all other lines
``floor: columns``
    write the three columns of all rows elsewhere: what any rewrite of the columns has to do
``floor: bare update``
    the engine's own ``UPDATE`` of the same rows, without intervals, versions, lock and survey: what
    the sink adds to it is its own
``chosen``
    the sink, the strategy that it chooses; ``update`` and ``alter`` are the same, forced
``replace-partition``
    the same, forced: the recent visitors' partition is written anew, whole, and swapped in
``override``
    the sink, forced to publish the values beside the table; its queries ask the view, and are asked
    again after all was squashed
``unpruned``
    the sink, of the recent visitors, whose updates say no times
``again``
    the same window a second time
``one by one``
    a mutation for each of some visitors, scaled up to K
``literals``
    one mutation with an ``IN`` list and ``transform``
``squash``
    one mutation with a dictionary over all partitions, as PostHog does it
``whole rows``
    an ``INSERT .. SELECT`` of the whole rows, as Jitsu sends them again; without what FINAL costs

Then the CPU milliseconds of queries: before the window, after it, and after the patches were
applied. They ask for what is there before and after alike, and nothing is kept from one to the
next: the engine remembers which granules a condition met, and skips the others the second time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import clickhouse_connect

from recognition.messages import Between, Empty, Equals, UpdateByCriteria
from recognition.planner import Plan, plan_updates
from recognition.sinks import open_sink

PER_VISITOR = 20
DAYS = 360
START = datetime(2025, 1, 1, tzinfo=UTC)
#: What the engine would have on a server: with its own two threads mutations poll for seconds.
OPTIONS = {"background_pool_size": "16"}

TEXTS = ("url", "referrer", "title", "user_agent", "campaign", "source", "medium", "term")
CODES = ("country", "city", "browser", "os", "device", "locale", "currency", "library")

CREATE = (
    "CREATE TABLE events (message_id String, type LowCardinality(String), anonymous_id String,"
    " user_id Nullable(String), user_email Nullable(String), recognition_version Nullable(Int64),"
    " timestamp DateTime64(6, 'UTC'), received_at DateTime, session UInt32, amount Float64,"
    " quantity UInt16, properties String, context String, ip IPv4, "
    + ", ".join(f"{name} String" for name in TEXTS)
    + ", "
    + ", ".join(f"{name} LowCardinality(String)" for name in CODES)
    + ") ENGINE = MergeTree PARTITION BY toYYYYMM(timestamp)"
    " ORDER BY (toDate(timestamp), anonymous_id, message_id) SETTINGS"
    " enable_block_number_column = 1, enable_block_offset_column = 1, patch_parts_version = 'v1'"
)

# A visitor comes first on some day and again within two months, each time for seven events.
FILL = (
    "INSERT INTO events SELECT hex(sipHash128(n)), ['page', 'track', 'identify'][n % 3 + 1],"
    " hex(sipHash128(v, 'visitor')), if(v % 10 < 3, concat('known-', toString(v)), NULL),"
    " if(v % 10 < 3, concat('known-', toString(v), '@example.com'), NULL), NULL,"
    " toDateTime64('2025-01-01 00:00:00', 6, 'UTC') + toIntervalSecond(least("
    "   cityHash64(v) % {days:UInt32} + cityHash64(v, s) % 60 * (s > 0), {days:UInt32} - 1) * 86400"
    "   + cityHash64(v, s, 1) % 80000 + n % 20 * 13),"
    " now(), s, cityHash64(n) % 10000 / 100, n % 7,"
    ' concat(\'{"path":"/\', hex(cityHash64(n % 5000)), \'","value":"\','
    "   hex(sipHash128(n, 'p')), hex(cityHash64(n)), '\",\"list\":[', toString(n), ',',"
    "   toString(v), ',', toString(n * v), ']}'),"
    ' concat(\'{"page":"\', hex(cityHash64(n % 3000)), \'","screen":"1920x1080","id":"\','
    "   hex(cityHash64(n, 'c')), '\"}'), toIPv4(toUInt32(cityHash64(v))), "
    + ", ".join(f"concat('{name}-', toString(cityHash64(n, '{name}') % 5000))" for name in TEXTS)
    + ", "
    + ", ".join(f"concat('{name}-', toString(cityHash64(v, '{name}') % 50))" for name in CODES)
    + " FROM (SELECT number AS n, intDiv(number, 20) AS v, intDiv(number % 20, 7) AS s"
    "   FROM numbers({first:UInt64}, {count:UInt64}))"
)

QUERIES = {
    "group by user": "SELECT user_id, count() FROM events GROUP BY user_id FORMAT Null",
    "one user": "SELECT count() FROM events WHERE user_id = 'known-1' FORMAT Null",
    "one visitor": "SELECT count(user_id) FROM events WHERE anonymous_id ="
    " (SELECT hex(sipHash128(1, 'visitor'))) FORMAT Null",
    "other columns": "SELECT country, sum(amount) FROM events GROUP BY country FORMAT Null",
}


class Run:
    """One process: a copy of the directory, a window, and what is measured."""

    def __init__(self, path: Path, rows: int, visitors: int, recent: bool) -> None:
        self.path, self.rows, self.count, self.recent = path, rows, visitors, recent
        self.client = clickhouse_connect.get_client(
            interface="chdb", path=str(path), chdb_options=OPTIONS
        )
        # The first insert of a process loads libraries, which takes 0.4 CPU seconds.
        self.client.command("CREATE TABLE first (x UInt8) ENGINE = Memory")
        self.client.insert("first", [[1]])

    # The window

    def visitors(self) -> list[tuple[str, int, datetime, datetime]]:
        """Unknown visitors: their id, how many rows they have, and from when to when."""
        since = START + timedelta(days=DAYS - 28 if self.recent else 0)
        found = self.client.query(
            "SELECT anonymous_id, count(), toUnixTimestamp(min(timestamp)),"
            " toUnixTimestamp(max(timestamp)) FROM events WHERE user_id IS NULL"
            " GROUP BY anonymous_id HAVING min(timestamp) >= {since:DateTime64(6, 'UTC')}"
            " ORDER BY cityHash64(anonymous_id) LIMIT {count:UInt32}",
            parameters={"since": since, "count": self.count},
        )
        return [
            (key, n, datetime.fromtimestamp(a, UTC), datetime.fromtimestamp(b + 1, UTC))
            for key, n, a, b in found.result_rows
        ]

    def plan(self, bounded: bool = True) -> Plan:
        """What recognition would send for them."""
        return plan_updates(
            [
                UpdateByCriteria(
                    id=f"{n:032x}",
                    workspace="w",
                    table="events",
                    set={"user_id": f"u{n}", "user_email": f"u{n}@a.eu", "recognition_version": n},
                    where=(
                        Equals(column="anonymous_id", value=key),
                        Empty(column="user_id"),
                        *([Between(column="timestamp", start=first, end=last)] * bounded),
                    ),
                    sequence=n,
                    expected_rows=rows,
                    created_at=START,
                )
                for n, (key, rows, first, last) in enumerate(self.visitors(), start=1)
            ],
            split=max(self.count, 10_000),
        )

    def stage(self, engine: str) -> None:
        """For the floors and the others: one line for each visitor."""
        self.client.command(
            "CREATE TABLE staged (anonymous_id String, user_id String, email String, version Int64)"
            f" ENGINE = {engine}"
        )
        lines = [[k, f"u{n}", f"u{n}@a.eu", n] for n, (k, *_) in enumerate(self.keys, start=1)]
        self.client.insert("staged", lines)

    # What is measured

    def measure(self, work: Callable[[], object]) -> dict[str, float]:
        """CPU and wall seconds, megabytes read and written, and by how many the peak rose."""
        before, moved, peak, started = self.usage(), self.moved(), self.peak(), time.perf_counter()
        work()
        read, written = (after - now for after, now in zip(self.moved(), moved, strict=True))
        return {
            "cpu": self.usage() - before,
            "wall": time.perf_counter() - started,
            "read": read / 1e6,
            "written": written / 1e6,
            "memory": max(0.0, (self.peak() - peak) / 1e3),
        }

    @staticmethod
    def usage() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    @staticmethod
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @staticmethod
    def moved() -> tuple[int, int]:
        """The bytes that were read and written, by whatever means but mapped memory."""
        said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(said["rchar"]), int(said["wchar"])

    def sink(self, strategy: str, patches: str) -> Any:
        return open_sink(
            f"chdb://{self.path}?strategy={strategy}&patches={patches}&quiet=0",
            chdb_options=OPTIONS,
        )

    # The lines

    def run(self, name: str) -> dict[str, Any]:
        if name in ("chosen", "update", "alter", "replace-partition"):
            return self.run_sink("auto" if name == "chosen" else name)
        if name == "override":
            return self.run_override()
        if name == "unpruned":
            plan, sink = self.plan(bounded=False), self.sink("auto", "auto")
            sink.compile(plan.steps[0])
            found = self.measure(lambda: sink.apply(plan))
            sink.close()
            return found
        self.keys = self.visitors()
        return self.measure(getattr(self, name.replace(" ", "_")))

    def run_sink(self, strategy: str) -> dict[str, Any]:
        plan = self.plan()
        sink = self.sink(strategy, "never" if strategy == "update" else "auto")
        said = sink.compile(plan.steps[0])
        before = {name: self.query(text) for name, text in QUERIES.items()}
        applied = []
        found: dict[str, Any] = self.measure(lambda: applied.append(sink.apply(plan)))
        found["again"] = self.measure(lambda: applied.append(sink.apply(plan)))
        found["rows"] = applied[0].rows_changed
        expected = sum(row.expected_rows or 0 for step in plan.steps for row in step.rows)
        assert (applied[0].rows_changed, applied[1].rows_changed) == (expected, 0)
        found["choice"] = said.splitlines()[-1].removeprefix("-- ")
        after = {name: self.query(text) for name, text in QUERIES.items()}

        def apply_patches() -> None:
            for (partition,) in self.client.query(
                "SELECT DISTINCT substring(partition_id, 40) FROM system.parts WHERE active"
                " AND table = 'events' AND startsWith(name, 'patch-')"
            ).result_rows:
                self.client.command(
                    f"ALTER TABLE events APPLY PATCHES IN PARTITION ID '{partition}'"
                )

        found["patches"] = self.measure(apply_patches)
        applied_queries = {name: self.query(text) for name, text in QUERIES.items()}
        found["queries"] = {
            name: [before[name], after[name], applied_queries[name]] for name in QUERIES
        }
        sink.close()
        return found

    def run_override(self) -> dict[str, Any]:
        plan, sink = self.plan(), self.sink("override", "auto")
        sink.compile(plan.steps[0])
        before = {name: self.query(text) for name, text in QUERIES.items()}
        found: dict[str, Any] = self.measure(lambda: sink.apply(plan))
        found["again"] = self.measure(lambda: sink.apply(plan))
        seen = {n: q.replace("FROM events", "FROM events_recognized") for n, q in QUERIES.items()}
        after = {name: self.query(text) for name, text in seen.items()}
        changed: list[int] = []
        found["squashed"] = self.measure(lambda: changed.append(sink.squash("events")))
        expected = sum(row.expected_rows or 0 for step in plan.steps for row in step.rows)
        assert changed == [expected]
        squashed = {name: self.query(text) for name, text in seen.items()}
        found["queries"] = {name: [before[name], after[name], squashed[name]] for name in QUERIES}
        sink.close()
        return found

    def query(self, text: str) -> float:
        """The least CPU milliseconds of five."""
        times = []
        for _ in range(5):
            before = self.usage()
            self.client.command(text, settings={"use_query_condition_cache": 0})
            times.append((self.usage() - before) * 1000)
        return min(times)

    def scan_and_write(self) -> None:
        self.stage("Join(ANY, LEFT, anonymous_id)")
        self.client.command(
            "CREATE TABLE floor (b UInt64, o UInt64, user_id String, email String, version Int64)"
            " ENGINE = MergeTree ORDER BY tuple()"
        )
        self.client.command(
            "INSERT INTO floor SELECT _block_number, _block_offset,"
            " joinGet('staged', 'user_id', anonymous_id), joinGet('staged', 'email', anonymous_id),"
            " joinGet('staged', 'version', anonymous_id) FROM events WHERE anonymous_id IN"
            f" (SELECT anonymous_id FROM staged) AND user_id IS NULL AND {self.range()}"
        )

    def bare_update(self) -> None:
        self.stage("Join(ANY, LEFT, anonymous_id)")
        values = ", ".join(
            f"{column} = joinGet('default.staged', '{name}', anonymous_id)"
            for column, name in (
                ("user_id", "user_id"),
                ("user_email", "email"),
                ("recognition_version", "version"),
            )
        )
        self.client.command(
            f"UPDATE events SET {values} WHERE anonymous_id IN (SELECT anonymous_id FROM staged)"
            f" AND user_id IS NULL AND {self.range()}"
        )

    def columns(self) -> None:
        self.stage("Join(ANY, LEFT, anonymous_id)")
        self.client.command(
            "CREATE TABLE floor (user_id Nullable(String), email Nullable(String),"
            " version Nullable(Int64)) ENGINE = MergeTree ORDER BY tuple()"
        )
        met = "anonymous_id IN (SELECT anonymous_id FROM staged) AND user_id IS NULL"
        values = ", ".join(
            f"if({met} AND {self.range()}, joinGet('staged', '{name}', anonymous_id), {column})"
            for name, column in (
                ("user_id", "user_id"),
                ("email", "user_email"),
                ("version", "recognition_version"),
            )
        )
        self.client.command(f"INSERT INTO floor SELECT {values} FROM events WHERE {self.months()}")

    def range(self) -> str:
        first, last = min(k[2] for k in self.keys), max(k[3] for k in self.keys)
        return (
            f"timestamp >= '{first:%Y-%m-%d %H:%M:%S}' AND timestamp < '{last:%Y-%m-%d %H:%M:%S}'"
        )

    def months(self) -> str:
        first, last = min(k[2] for k in self.keys), max(k[3] for k in self.keys)
        return f"toYYYYMM(timestamp) >= {first:%Y%m} AND toYYYYMM(timestamp) <= {last:%Y%m}"

    def one_by_one(self) -> None:
        for n, (key, *_) in enumerate(self.keys[:SAMPLE], start=1):
            self.client.command(
                f"ALTER TABLE events UPDATE user_id = 'u{n}', user_email = 'u{n}@a.eu',"
                f" recognition_version = {n} WHERE anonymous_id = '{key}' AND user_id IS NULL"
            )

    def literals(self) -> None:
        keys = ", ".join(f"'{key}'" for key, *_ in self.keys)
        users = ", ".join(f"'u{n}'" for n in range(1, len(self.keys) + 1))
        emails = ", ".join(f"'u{n}@a.eu'" for n in range(1, len(self.keys) + 1))
        versions = ", ".join(str(n) for n in range(1, len(self.keys) + 1))
        self.client.command(
            f"ALTER TABLE events UPDATE user_id = transform(anonymous_id, [{keys}], [{users}], ''),"
            f" user_email = transform(anonymous_id, [{keys}], [{emails}], ''),"
            f" recognition_version = transform(anonymous_id, [{keys}], [{versions}], 0)"
            f" WHERE anonymous_id IN ({keys}) AND user_id IS NULL",
            settings={"max_query_size": 100_000_000, "max_ast_elements": 10_000_000,
                      "max_expanded_ast_elements": 10_000_000},
        )  # fmt: skip

    def squash(self) -> None:
        self.stage("MergeTree ORDER BY anonymous_id")
        self.client.command(
            "CREATE DICTIONARY squashed (anonymous_id String, user_id String, email String,"
            " version Int64) PRIMARY KEY anonymous_id SOURCE(CLICKHOUSE(TABLE 'staged'"
            " DB 'default')) LAYOUT(COMPLEX_KEY_HASHED()) LIFETIME(0)"
        )
        values = ", ".join(
            f"{column} = dictGet('default.squashed', '{name}', tuple(anonymous_id))"
            for column, name in (
                ("user_id", "user_id"),
                ("user_email", "email"),
                ("recognition_version", "version"),
            )
        )
        self.client.command(
            f"ALTER TABLE events UPDATE {values} WHERE"
            " dictHas('default.squashed', tuple(anonymous_id)) AND user_id IS NULL"
        )

    def whole_rows(self) -> None:
        self.stage("Join(ANY, LEFT, anonymous_id)")
        self.client.command("CREATE TABLE again AS events")
        self.client.command(
            "INSERT INTO again SELECT * REPLACE(joinGet('staged', 'user_id', anonymous_id) AS"
            " user_id, joinGet('staged', 'email', anonymous_id) AS user_email,"
            " joinGet('staged', 'version', anonymous_id) AS recognition_version) FROM events"
            " WHERE anonymous_id IN (SELECT anonymous_id FROM staged) AND events.user_id IS NULL"
        )


SAMPLE = 3
LINES = (
    "scan and write", "columns", "bare update", "chosen", "override", "unpruned", "update", "alter",
    "replace-partition", "one by one", "literals", "squash", "whole rows",
)  # fmt: skip


def build(path: Path, rows: int) -> None:
    """The table, its parts merged into one for each month."""
    client = clickhouse_connect.get_client(interface="chdb", path=str(path), chdb_options=OPTIONS)
    client.command(CREATE)
    for first in range(0, rows, 1_000_000):
        count = min(1_000_000, rows - first)
        client.command(FILL, parameters={"first": first, "count": count, "days": DAYS})
    client.command("OPTIMIZE TABLE events FINAL")
    client.close()


def measure(base: Path, name: str, rows: int, visitors: int, recent: bool) -> dict[str, Any]:
    """One line, in a process of its own, on a copy of the directory."""
    copy = base.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy, copy_function=_link, symlinks=True)
    command = [sys.executable, __file__, "--line", name, "--path", str(copy)]
    command += ["--rows", str(rows), "--visitors", str(visitors)]
    done = subprocess.run(
        [*command, *(["--is-recent"] if recent else [])], stdout=subprocess.PIPE, check=True
    )
    shutil.rmtree(copy)
    found: dict[str, Any] = json.loads(done.stdout)
    if name == "one by one":
        for key in found:
            found[key] *= visitors / min(SAMPLE, visitors)
    return found


def _link(source: str, target: str) -> None:
    """Parts are never written to again; what else there is, is copied."""
    if "/store/" in source and source.endswith(
        (".bin", ".mrk2", ".cmrk2", ".mrk3", ".idx", ".cidx")
    ):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def main() -> int:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description="One recognition window on a ClickHouse table.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--visitors", default="1,100,10000,100000")
    parser.add_argument("--recent", type=int, default=10_000, help="visitors of the last 4 weeks")
    parser.add_argument("--lines", default=",".join(LINES))
    parser.add_argument("--json", action="store_true")
    for name in ("--line", "--path"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--is-recent", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line == "build":
        build(Path(options.path), options.rows)
        return 0
    if options.line:
        run = Run(Path(options.path), options.rows, int(options.visitors), options.is_recent)
        print(json.dumps(run.run(options.line)))
        return 0
    cases = [(int(each), False) for each in options.visitors.split(",")]
    cases += [(options.recent, True)] if options.recent else []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        command = [sys.executable, __file__, "--line", "build", "--path", str(base)]
        subprocess.run([*command, "--rows", str(options.rows)], check=True)
        for visitors, recent in cases:
            lines = {
                name: measure(base, name, options.rows, visitors, recent)
                for name in options.lines.split(",")
                if not (name == "literals" and visitors > 10_000)
                and not (name in ("unpruned", "replace-partition") and not recent)
            }
            results.append({"visitors": visitors, "recent": recent, "lines": lines})
            if not options.json:
                _print_case(results[-1], options.rows)
    if options.json:
        print(json.dumps({"rows": options.rows, "results": results}, indent=2))
    return 0


def _print_case(case: dict[str, Any], rows: int) -> None:
    lines = case["lines"]
    kind = "of the last four weeks" if case["recent"] else "of the whole year"
    print(f"{case['visitors']:,} visitors {kind}, {rows:,} rows")
    for name, found in lines.items():
        ratios = "".join(
            f"{found['cpu'] / lines[floor]['cpu']:>9.2f} x"
            for floor in ("scan and write", "columns", "bare update")
            if floor in lines
        )
        print(
            f"  {name:<16}{found['cpu']:>9.2f} s{ratios}{found['read']:>10.1f} MB read"
            f"{found['written']:>10.1f} MB written{found['memory']:>8.0f} MB memory"
        )
        if "queries" in found:
            later, said = "patches", "patches applied"
            if "squashed" in found:
                later, said = "squashed", "values squashed"
            again, then = found["again"]["cpu"], found[later]["cpu"]
            print(f"    {found.get('choice', 'published')}")
            print(f"    again {again:.2f} s, {said} {then:.2f} s")
            for query, (before, after, last) in found["queries"].items():
                print(
                    f"    {query:<16}{before:>7.0f} ms before, {after / before:.2f} x after,"
                    f" {last / before:.2f} x with the {said}"
                )
    print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
