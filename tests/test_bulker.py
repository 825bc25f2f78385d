"""
Bulker's world: its topics by its own published cases, its configuration as it stands in real files,
its HTTP interface over real HTTP, and mixed streams into a real PostgreSQL and MariaDB.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql

import mariadb as mariadb_server
from postgres import GivenServer
from recognition.attribution import DAY
from recognition.bulker import (
    MAX_ROW_BYTES,
    MAX_TOPIC_BYTES,
    BulkerClient,
    Destination,
    Destinations,
    MixedStream,
    RecognitionFunction,
    Stream,
    Topic,
    make_topic,
    parse_topic,
    read_destinations,
    split_stream,
)
from recognition.errors import (
    ConfigurationError,
    InputError,
    MessageError,
    MissingDependencyError,
    OutcomeUnknownError,
    SinkError,
    SinkUnavailableError,
)
from recognition.events import Identifier, parse_event
from recognition.graph.memory import MemoryGraph
from recognition.messages import Empty, Equals, UpdateByCriteria
from recognition.planner import plan_updates
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.sinks.mysql import MysqlSink
from recognition.sinks.postgresql import PostgresqlSink
from recognition.sinks.redshift import RedshiftSink
from recognition.sinks.snowflake import SnowflakeSink
from recognition.testing.sinks import at

# Topics -----------------------------------------------------------------------------------------

# The cases of bulkerapp/app/topic_manager_test.go, and of the rules in topic_manager.go.
LONG_ID = "clyzlw9m10006az0lhwqg34u9-pq7h-vjyr-gKxdFT"
TOPICS = {
    "in.id.clyzlw-.m.batch.t.events": Topic("clyzlw-", "batch", "events"),
    "some.prefix.in.id.clyzlw-.m.batch.t.events": Topic(
        "clyzlw-", "batch", "events", prefix="some.prefix."
    ),
    f"in.id.{LONG_ID}.m.batch.t.events": Topic(LONG_ID, "batch", "events"),
    f"in.id.{LONG_ID}.m.batch.t.events.p.1": Topic(LONG_ID, "batch", "events", 1),
    f"in.id.{LONG_ID}.m.batch.t.events.com": Topic(LONG_ID, "batch", "events.com"),
    f"in.id.{LONG_ID}.m.batch.b64.QWNjb3VudCBEZWFjdGl2YXRlZCBVc2Vy": Topic(
        LONG_ID, "batch", "Account Deactivated User"
    ),
    f"in.id.{LONG_ID}.m.stream.b64.w7w_.p.12": Topic(LONG_ID, "stream", "ü?", 12),
    f"in.id.{LONG_ID}.m.retry.t._all_": Topic(LONG_ID, "retry", "_all_"),
}


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic_is_made_and_read_as_bulker_does(name: str) -> None:
    """The names of Bulker's own tests are made byte for byte, and read again."""
    assert make_topic(TOPICS[name]) == name
    assert parse_topic(name) == TOPICS[name]


@pytest.mark.parametrize("mode", ["retry", "dead"])
def test_some_modes_have_one_topic_for_all_tables(mode: str) -> None:
    """``retry`` and ``dead`` leave the table out, whatever it is."""
    assert make_topic(Topic("d", mode, "über")) == f"in.id.d.m.{mode}.t._all_"


@pytest.mark.parametrize(
    "name",
    [
        "clyzlw9m10006.m.batch.t.events",  # of Bulker's tests: no in.id.
        f"in.id.extra-substring.{LONG_ID}.m.batch.t.events",  # of Bulker's tests
        "in.id.d.m.batch.t",
        "in.id.d.n.batch.t.events",
        "in.id.d.m.batch.x.events",
        "in.id.d.m.batch.t.in.id.d",
        "in.id.d.m.batch.b64.QWNjb3VudA==",
        "in.id.d.m.batch.b64.Q",
        "in.id.d.m.batch.b64._w",
        "",
        "destination-messages-dead-letter",
    ],
)
def test_a_foreign_topic_is_refused(name: str) -> None:
    """What Bulker does not read as one of its topics is not read here either."""
    with pytest.raises(InputError, match="not a topic of Bulker"):
        parse_topic(name)


def test_a_plain_table_is_cut_where_bulker_cuts_it() -> None:
    """A table named like a partition is read as Bulker reads it: it cannot know better."""
    name = make_topic(Topic("d", "batch", "a.p.b"))

    assert name == "in.id.d.m.batch.t.a.p.b"
    assert parse_topic(name) == Topic("d", "batch", "a")


def test_a_topic_is_at_most_as_long_as_kafka_takes() -> None:
    """249 bytes pass, 250 are refused, and so is what Bulker could not read again."""
    fixed = len("in.id.d.m.batch.t.")

    assert len(make_topic(Topic("d", "batch", "x" * (MAX_TOPIC_BYTES - fixed)))) == 249
    with pytest.raises(ConfigurationError, match="has 250 bytes"):
        make_topic(Topic("d", "batch", "x" * (MAX_TOPIC_BYTES - fixed + 1)))
    with pytest.raises(ConfigurationError, match="no dot"):
        make_topic(Topic("a.b", "batch", "events"))
    with pytest.raises(ConfigurationError, match="names a table"):
        make_topic(Topic("d", "batch", ""))


@given(
    st.text("abcXYZ019_-", min_size=1, max_size=20),
    st.sampled_from(["batch", "stream"]),
    st.text(min_size=1, max_size=30).filter(
        lambda text: ".p." not in text and "in.id." not in text and _is_utf8(text)
    ),
    st.integers(0, 99),
    st.sampled_from(["", "prod.", "a.b.", "x"]),
)
def test_every_table_comes_back(
    destination: str, mode: str, table: str, partition: int, prefix: str
) -> None:
    """Whatever a table is called, its topic is plain ASCII and says what it was called."""
    topic = Topic(destination, mode, table, partition, prefix)
    name = make_topic(topic)

    assert parse_topic(name) == topic
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


# Configuration ----------------------------------------------------------------------------------

SECRET = "p@ss:w/rd?%&#\\ '\"0123"

# As Bulker's example has it (bulkerapp/app/test_data/config.yaml), with one of each type.
YAML = r"""
destinations:
  batch_postgres:
    type: "postgres"
    options:
      mode: "batch"
      batchSize: 10
      primaryKey: "message_id"
      deduplicate: true
    credentials:
      host: localhost
      port: 5433
      database: test
      username: test
      password: 0123
      defaultSchema: bulker
      parameters:
        sslmode: disable
  maria:
    type: mysql
    options: &options {mode: stream, primaryKey: [message_id, timestamp], deduplicate: true}
    credentials:
      host: db
      port: 3306
      database: analytics
      username: loader
      password: yes
      parameters: {tls: skip-verify, timeout: 60s, charset: utf8mb4}
  red:
    type: redshift
    options: *options
    credentials:
      host: cluster.region.redshift.amazonaws.com
      database: dev
      defaultSchema: analytics
      username: loader
      password: "a@b"
      bucket: b
      region: r
      accessKeyId: AK
      secretAccessKey: SK
      parameters: {sslmode: require}
  snow:
    type: snowflake
    options: {}
    credentials:
      account: org-account
      port:
      database: ANALYTICS
      defaultSchema: PUBLIC
      username: LOADER
      password: 1e3
      warehouse: LOADING
      parameters: {role: RECOGNITION, application: null}
  click:
    type: clickhouse
    options: {frequency: 10}
    credentials:
      protocol: clickhouse-secure
      hosts: ["ch1:9440", ch2]
      username: loader
      password: "a/b"
      database: analytics
      cluster: main
      engine: {orderFields: [{field: id, function: ""}], nullableFields: [user_id]}
  query:
    type: bigquery
    credentials: {project: p, bqDataset: d, keyFile: '{"type": "service_account"}', bucket: b}
"""
URLS = {
    "batch_postgres": "postgresql+psycopg://test:0123@localhost:5433/test?"
    "options=-c+search_path%3D%22bulker%22&sslmode=disable",
    "maria": "mysql+pymysql://loader:yes@db:3306/analytics?"
    "connect_timeout=60&ssl_check_hostname=false",
    "red": "redshift+redshift_connector://loader:a%40b@cluster.region.redshift.amazonaws.com:5439"
    "/dev",
    "snow": "snowflake://LOADER:1e3@org-account/ANALYTICS/PUBLIC?"
    "role=RECOGNITION&warehouse=LOADING",
    "click": "clickhouse://loader:a%2Fb@ch1:8443/analytics?secure=true&verify=false",
    "query": "bigquery://p/d",
}


@pytest.fixture
def read_yaml(tmp_path: Path) -> Callable[..., Destinations]:
    """Read a configuration that is given as text."""

    def read(text: str, **options: Any) -> Destinations:
        path = tmp_path / "bulker.yaml"
        path.write_text(text, encoding="utf-8")
        return read_destinations(f"file://{path}", {}, **options)

    return read


def read_env(**variables: object) -> Destinations:
    """Read destinations from variables of an environment; what is no text becomes JSON."""
    return read_destinations(
        None,
        {
            f"BULKER_DESTINATION_{name}": value if isinstance(value, str) else json.dumps(value)
            for name, value in variables.items()
        },
    )


def postgres_with(options: Mapping[str, object], **others: object) -> Destination:
    """The destination that a connection with these options makes."""
    credentials = {"host": "h", "database": "d"}
    raw = {"type": "postgres", "credentials": credentials, "options": dict(options), **others}
    return read_env(PG=raw).known["PG"]


def test_a_file_of_bulker_is_read_as_it_is(read_yaml: Callable[..., Destinations]) -> None:
    """Each of the six types becomes the URL of its sink, with every value as it was written."""
    found = read_yaml(YAML)

    assert {name: each.url for name, each in found.known.items()} == URLS
    assert found.skipped == ()
    assert found.known["red"].options["settings"]["search_path"] == "analytics"


def test_the_sinks_take_these_urls(read_yaml: Callable[..., Destinations]) -> None:
    """The sinks that are installed open without a connection."""
    known = read_yaml(YAML).known
    kinds = {
        "batch_postgres": PostgresqlSink,
        "maria": MysqlSink,
        "red": RedshiftSink,
        "snow": SnowflakeSink,
    }
    for name, kind in kinds.items():
        with closing(known[name].open()) as sink:
            assert isinstance(sink, kind)


def test_relaxed_json_is_read_from_the_environment() -> None:
    """As Bulker's documentation has it: no quotes, comments; the id inside wins over the name."""
    found = read_env(
        ONE="""{
            id: 'pg-1', type:"postgres", // the main one
            credentials: {host: "localhost", port: 5432, database: 'd', username: "u",
                          password: 0123 4
                          parameters: {}}
            # a string without quotes goes to the end of its line
            options: {mode: "stream", primaryKey: "message_id, at", frequency: 0.5,}
        }""",
        TWO={
            "type": "bigquery",
            "credentials": {"project": "p", "bqDataset": "d", "keyFile": {"type": "x"}},
        },
    )
    one, two = found.known.values()

    assert list(found.known) == ["pg-1", "TWO"]
    assert one.url == "postgresql+psycopg://u:0123 4@localhost:5432/d"
    assert one.stream.primary_key == ("message_id", "at")
    assert one.stream.batch_period == 0.0
    assert two.url == "bigquery://p/d"


def test_no_secret_is_shown(
    read_yaml: Callable[..., Destinations], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what prints a destination, nor an error, nor a note, nor a log holds a secret."""
    caplog.set_level(logging.DEBUG)
    text = YAML.replace("password: 0123", f"password: {json.dumps(SECRET)}")
    found = read_yaml(text)
    shown = [repr(found), str(found), repr(found.known["batch_postgres"]), caplog.text]
    shown += [note for each in found.known.values() for note in each.notes]
    for wrong in (
        text.replace("port: 5433", "port: x"),
        text.replace("host: localhost", "hst: localhost"),
        text.replace("defaultSchema: bulker", "defaultSchema: [bulker]"),
        text.replace("host: localhost", f"host: {json.dumps(SECRET)}\n    : : -"),
        text.replace("host: localhost\n", ""),
    ):
        with pytest.raises(ConfigurationError) as caught:
            read_yaml(wrong)
        error: BaseException | None = caught.value
        shown.append(str(error))
        while error is not None and not error.__suppress_context__:
            error = error.__cause__ or error.__context__
            shown.append(str(error))
    with pytest.raises(ConfigurationError) as in_env:
        read_env(A="{type: postgres, credentials: {password: '" + SECRET)
    shown.append(str(in_env.value))

    assert sa.make_url(found.known["batch_postgres"].url).password == SECRET
    for each in (SECRET, SECRET[:6], "a@b", "a%40b", "SK", "1e3", "service_account"):
        assert [text for text in shown if each in text] == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("    type: mysql", "    typ: mysql", "maria: the key typ is unknown; .* is type"),
        ("port: 5433", "prt: 5433", "credentials: the key prt is unknown; .* known one is port"),
        ('mode: "batch"', "mde: batch", "options: the key mde is unknown; .* one is mode"),
        ("deduplicate: true\n", "dedupe: on\n", "options: the key dedupe .* one is deduplicate"),
        ("orderFields", "orderField", "orderField"),
        ("port: 5433", "port: many", "credentials: port: Input should be a valid integer"),
        ("warehouse: LOADING", "", "snow: credentials: warehouse: Field required"),
        ('mode: "batch"', "mode: replace", "options: mode: Input should be 'stream' or 'batch'"),
        ("account: org-account", "authenticationMethod: key-pair\n      account: x", "privateKey"),
        ('hosts: ["ch1:9440", ch2]', "hosts: []", "click: credentials: hosts is empty"),
        ("    type: mysql", "    type: sqlserver", "maria .sqlserver"),
        ("    type: mysql", "    type: postgress", "did you mean postgres"),
        ("destinations:", "destination:", "no key destinations"),
        ("      bucket: b\n", "      authenticationMethod: iam\n      roleARN: x\n", "AWS_PROFILE"),
        ("defaultSchema: analytics", "defaultSchema: 'A B'", "a name that needs no quotes"),
        ("defaultSchema: bulker", "authenticationMethod: google-psc", "proxy of Cloud SQL"),
    ],
)
def test_what_is_wrong_is_said(
    read_yaml: Callable[..., Destinations], old: str, new: str, told: str
) -> None:
    """An unknown key names the nearest known one, a wrong value its place; nothing is guessed."""
    assert YAML.count(old) >= 1

    with pytest.raises(ConfigurationError, match=told):
        read_yaml(YAML.replace(old, new, 1))


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    """Neither a missing file, nor other bytes, nor another scheme is taken for no destination."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for source, told in {
        str(tmp_path / "none.yaml"): "cannot be read",
        str(tmp_path / "bytes"): "not UTF-8",
        "redis://host": "from a YAML file or from the environment",
    }.items():
        with pytest.raises(ConfigurationError, match=told):
            read_destinations(source, {})


def test_a_missing_package_names_the_command(
    read_yaml: Callable[..., Destinations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra, each of its three parts says how to install it."""
    for package in ("yaml", "hjson", "urllib3"):
        monkeypatch.setitem(sys.modules, package, None)
    parts: list[Callable[[], object]] = [
        lambda: read_yaml(YAML),
        lambda: read_env(A="{}"),
        lambda: BulkerClient("http://127.0.0.1:9"),
    ]
    for part in parts:
        with pytest.raises(MissingDependencyError, match=r"recognition\[bulker\]"):
            part()


def test_what_cannot_be_updated_is_skipped_only_on_request(
    read_yaml: Callable[..., Destinations],
) -> None:
    """Files and webhooks are listed in an error, or skipped and listed where that is asked for."""
    text = YAML + "  files: {type: s3, credentials: {bucket: b}}\n  hook: {type: webhook}\n"
    with pytest.raises(ConfigurationError) as caught:
        read_yaml(text)
    found = read_yaml(text, skip_unsupported=True)

    assert "files (s3), hook (webhook)" in str(caught.value)
    assert found.skipped == (("files", "s3"), ("hook", "webhook"))
    assert list(found.known) == list(URLS)


def test_what_was_left_alone_is_said(read_yaml: Callable[..., Destinations]) -> None:
    """Parameters without a meaning here are named, and so is what makes double rows."""
    notes = {name: each.notes for name, each in read_yaml(YAML).known.items()}

    assert notes["batch_postgres"] == ()
    assert notes["maria"] == ("not used: parameters.charset",)
    assert "not used: hosts[1], the port of hosts[0]" in notes["click"]
    assert any("deduplicate is off" in note for note in notes["click"])
    lacking = postgres_with({"functions": [{"functionId": "udf.x"}], "deduplicate": True}).notes
    assert len(lacking) == 1
    assert "Identity Stitching" in lacking[0]


@pytest.mark.parametrize(
    ("host", "shown"),
    [("[::1]:8124", "[::1]:8124"), ("[fe80::2]", "[fe80::2]:8123"), ("ch1", "ch1:8123")],
)
def test_a_host_of_clickhouse_may_be_an_address(host: str, shown: str) -> None:
    """An address of IPv6 stands in brackets, with a port or without."""
    credentials = {"protocol": "http", "hosts": [host], "username": "u"}
    raw = {"type": "clickhouse", "credentials": credentials}

    assert read_env(CH=raw).known["CH"].url == f"clickhouse://u@{shown}/default"


def test_a_key_pair_of_snowflake_is_handed_on() -> None:
    """The private key goes to the connector in DER; a wrong passphrase is said, not shown."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"open sesame"),
    ).decode()

    def raw(phrase: str) -> dict[str, object]:
        return {
            "type": "snowflake",
            "credentials": {
                "account": "a", "database": "D", "username": "U", "warehouse": "W",
                "authenticationMethod": "key-pair", "privateKey": pem,
                "privateKeyPassphrase": phrase,
            },
        }  # fmt: skip

    destination = read_env(S=raw("open sesame")).known["S"]
    with pytest.raises(ConfigurationError, match="privateKey cannot be read") as caught:
        read_env(S=raw("open barley"))

    given = destination.options["connect_args"]
    assert given["authenticator"] == "SNOWFLAKE_JWT"
    loaded = serialization.load_der_private_key(given["private_key"], password=None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert loaded.private_numbers() == key.private_numbers()
    assert destination.url == "snowflake://U@a/D/PUBLIC?warehouse=W"
    assert "barley" not in str(caught.value)
    assert "PRIVATE" not in repr(destination)


def test_redshift_with_iam() -> None:
    """The keys and the cluster of IAM go to the driver's own parameters."""
    base = {"database": "dev", "authenticationMethod": "iam", "region": "r", "username": "u"}
    cluster = read_env(
        R={"type": "redshift", "credentials": {**base, "clusterIdentifier": "c",
                                               "accessKeyId": "AK", "secretAccessKey": "S/K"}}
    ).known["R"]  # fmt: skip
    serverless = read_env(
        R={"type": "redshift", "credentials": {**base, "serverless": True, "workgroupName": "w"}}
    ).known["R"]

    assert dict(sa.make_url(cluster.url).query) == {
        "iam": "true", "region": "r", "db_user": "u", "cluster_identifier": "c",
        "access_key_id": "AK", "secret_access_key": "S/K",
    }  # fmt: skip
    assert dict(sa.make_url(serverless.url).query) == {
        "iam": "true", "region": "r", "db_user": "u", "is_serverless": "true",
        "serverless_work_group": "w",
    }  # fmt: skip


# Streams ----------------------------------------------------------------------------------------


def test_a_stream_has_jitsus_defaults() -> None:
    """Nothing said: one table of Jitsu's own columns, five minutes until rows are there."""
    stream = postgres_with({}).stream

    assert stream.layout.name == "segment-single-table"
    assert stream.layout.tables_of(event("m1", "track")) == ("events",)
    assert stream.batch_period == 300.0
    assert (stream.primary_key, stream.deduplicate, stream.event_types) == ((), False, None)
    assert Stream.RETRIED_FOR == 133_200.0


def event(message_id: str, type: str, **members: object) -> Any:
    """An event as Jitsu's SDKs send it."""
    return parse_event(
        {
            "messageId": message_id,
            "type": type,
            "timestamp": "2026-01-01T00:00:00Z",
            "anonymousId": "a1",
            **members,
        }
    )


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (
            {"primaryKey": "event_id", "timestampColumn": "at"},
            ("events", "event_id", "anonymous_id", "user_id", "at"),
        ),
        (
            {"dataLayout": "jitsu-legacy", "primaryKey": "eventn_ctx_event_id"},
            ("events", "eventn_ctx_event_id", "user_anonymous_id", "user_id", "_timestamp"),
        ),
        (
            {"dataLayout": "segment-single-table", "keepOriginalNames": "true"},
            ("events", "messageId", "anonymousId", "userId", "timestamp"),
        ),
        (
            {"dataLayout": "segment", "primaryKey": ["timestamp", "message_id"]},
            ("identifies", "message_id", "anonymous_id", "user_id", "timestamp"),
        ),
        (
            {"dataLayout": "passthrough", "primaryKey": "messageId"},
            ("events", "messageId", "anonymousId", "userId", "timestamp"),
        ),
    ],
)
def test_tables_and_columns_follow_from_a_connection(
    options: dict[str, object], columns: tuple[str, ...]
) -> None:
    """Layout, key and time column of a connection are those of the updates."""
    stream = postgres_with(options).stream
    (table,) = stream.layout.tables_of(event("m1", "identify"))
    found = stream.layout.columns_of(table)

    assert (table, found.id, found.anonymous_id, found.user_id, found.time) == columns


def test_a_table_of_its_own_is_meant() -> None:
    """``defaultTableName`` is the table of a layout that has one; others have theirs by type."""
    single = postgres_with({}, defaultTableName="visits").stream.layout
    segment = postgres_with({"dataLayout": "segment"}, defaultTableName="visits").stream.layout

    assert single.tables_of(event("m1", "page")) == ("visits",)
    assert segment.tables_of(event("m1", "page")) == ("pages",)


def test_a_key_that_does_not_say_where_the_message_id_is() -> None:
    """Several columns without the layout's id: the error asks which one it is."""
    with pytest.raises(ConfigurationError, match="which one holds the message id"):
        postgres_with({"primaryKey": "day,number"})
    with pytest.raises(ConfigurationError, match="layout 'wide' is unknown"):
        postgres_with({"dataLayout": "wide"})


def test_the_function_of_jitsu_has_its_names_and_defaults() -> None:
    """As libs/core-functions/src/functions/user-recognition.ts declares them."""
    assert RecognitionFunction().model_dump() == {
        "anonymousIdFields": ("anonymousId",),
        "identifierFields": ("userId", "context.traits"),
        "eventTypes": ("page", "track", "screen"),
        "lookbackWindowDays": 30,
        "collectionId": "",
    }


def with_function(env: object = None, **settings: object) -> Stream:
    """The stream of a connection whose function has these settings."""
    function = {"functionId": "builtin.transformation.user-recognition", **settings}
    options: dict[str, object] = {"functions": [{"functionId": "udf.a"}, function]}
    return postgres_with({**options, **({"functionsEnv": env} if env else {})}).stream


def test_the_functions_settings_become_rules() -> None:
    """Paths, types of events, look-back and identifying traits are taken over."""
    stream = with_function(
        {"IDENTIFYING_TRAITS": "account, plan_id"},
        functionOptions={
            "anonymousIdFields": ["anonymousId", "context.deviceId"],
            "identifierFields": ["userId", "properties.customerNo"],
            "eventTypes": ["page"],
            "lookbackWindowDays": 7,
        },
    )
    rules = stream.rules(Rules(workspace="w"))
    body = {
        "messageId": "m1", "type": "page", "timestamp": "2026-01-01T00:00:00Z",
        "context": {"deviceId": "d1", "traits": {"email": "e@example.com", "account": "acme"}},
        "properties": {"customerNo": 42},
    }  # fmt: skip
    read = parse_event(body, stream.format)

    assert read.anonymous_id == "d1"
    assert read.known == (Identifier("customer_no", "42"), Identifier("account", "acme"))
    assert rules.attribution.lookback == 7 * DAY
    assert rules.identity.known[-3:] == ("customer_no", "account", "plan_id")
    assert rules.stamps is False
    assert rules.workspace == "w"


def test_only_events_of_the_named_types_are_remembered() -> None:
    """An anonymous event of another type stays anonymous; whoever identifies is never left out."""
    stream = with_function()

    assert [t for t in ("page", "track", "screen", "group") if stream.remembers(event("m", t))] == [
        "page",
        "track",
        "screen",
    ]
    assert stream.remembers(event("m", "group", userId="u1"))
    assert stream.remembers(event("m", "alias", previousId="u0"))
    assert postgres_with({}).stream.remembers(event("m", "group"))


def test_wrong_settings_of_the_function_are_said() -> None:
    """The nearest known name is told, for these settings too."""
    with pytest.raises(ConfigurationError, match="nearest known one is lookbackWindowDays"):
        with_function(functionOptions={"lookbackWindow": 7})
    with pytest.raises(ConfigurationError, match="functionsEnv: is no JSON object"):
        with_function("{")


def test_traits_under_their_original_names_are_refused() -> None:
    """Updates write columns in snake case, so that a trait of another name would miss its own."""
    stream = postgres_with({"keepOriginalNames": True}).stream

    assert stream.rules(Rules(traits=("email",))).traits == ("email",)
    with pytest.raises(ConfigurationError, match="firstName"):
        stream.rules(Rules(traits=("firstName",)))


def test_destinations_of_one_graph_agree() -> None:
    """Two that name rows differently cannot share updates; the slowest decides how long to wait."""
    raw = {"type": "postgres", "credentials": {"host": "h", "database": "d"}}
    fast = {**raw, "options": {"mode": "stream"}}
    slow = {**raw, "options": {"frequency": 60, "deduplicate": True}}
    legacy = {**raw, "options": {"dataLayout": "jitsu-legacy"}}

    together = read_env(A=fast, B=slow).stream()
    assert (together.batch_period, together.deduplicate) == (3_600.0, True)
    with pytest.raises(ConfigurationError, match="A and B differ in layout"):
        read_env(A=fast, B=legacy).stream()
    with pytest.raises(ConfigurationError, match="no destination"):
        read_env().stream()


# The server -------------------------------------------------------------------------------------

TOKEN = "21a2ae36-32994870a9fbf2f61ea6f6c8"


class Bulker(ThreadingHTTPServer):
    """
    A peer that follows the rules of ``bulkerapp/app/router.go``.

    ``faults`` are used up, one for each request: a status to answer with, or ``cut``: the request
    is carried out and the connection closed without an answer.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _BulkerRequest)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[int | str] = []
        self.retry_after = "0"
        self.requests: list[tuple[str, dict[str, list[str]]]] = []
        self.queued: list[tuple[str, dict[str, Any]]] = []
        self.write: Callable[[str, list[dict[str, Any]], list[str]], None] = lambda *_: None


class _BulkerRequest(BaseHTTPRequestHandler):
    server: Bulker
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/ready" and not self.server.faults else 503, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        _, route, destination = parts.path.split("/")
        self.server.requests.append((route, query))
        fault = self.server.faults.pop(0) if self.server.faults else 0
        if isinstance(fault, int) and fault:
            return self._answer(fault, {"error": "no"}, {"Retry-After": self.server.retry_after})
        status, answer = self._handle(route, destination, query, body)
        if fault == "cut":
            self.close_connection = True
            self.connection.close()
            return None
        return self._answer(status, answer)

    def _handle(
        self, route: str, destination: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, dict[str, Any]]:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "auth"}
        if destination != "pg":
            return 404, {"error": "destination not found"}
        if not query.get("tableName"):
            return 400, {"error": "missing required parameter"}
        (table,) = query["tableName"]
        if route == "post":
            self.server.queued.append((table, json.loads(body)))
            return 200, {"message": "ok"}
        if query.get("mode") != ["batch"]:
            return 400, {"error": "invalid bulker mode"}
        rows = [json.loads(line) for line in body.splitlines()]
        if any("refused" in row for row in rows):
            return 400, {"error": f"stream consume error: {rows}"}
        self.server.write(table, rows, query.get("pk", []))
        return 200, {"message": "ok", "state": {"status": "COMPLETED", "successfulRows": len(rows)}}

    def _answer(
        self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def bulker() -> Iterator[Bulker]:
    """A Bulker server on loopback."""
    server = Bulker()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(bulker: Bulker) -> Iterator[BulkerClient]:
    """A client that has the token and does not wait long."""
    with closing(BulkerClient(bulker.url, TOKEN, timeout=5.0, pause=0.01)) as client:
        yield client


def test_a_row_is_posted(bulker: Bulker, client: BulkerClient) -> None:
    """The table is a parameter, partition and mode are sent where they are given."""
    client.post("pg", "Buy now & here", {"id": 1, "größe": {"a": None}})
    client.post("pg", "events", {"id": 2}, partition=3, mode="stream")

    assert bulker.queued == [
        ("Buy now & here", {"id": 1, "größe": {"a": None}}),
        ("events", {"id": 2}),
    ]
    assert bulker.requests[1] == (
        "post",
        {"tableName": ["events"], "partition": ["3"], "modeOverride": ["stream"]},
    )
    assert client.ready()


def test_what_passes_is_tried_again(bulker: Bulker, client: BulkerClient) -> None:
    """Server errors, too many requests, a cut connection: the row arrives, at least once."""
    bulker.faults = [503, 429, "cut", 500]

    client.post("pg", "events", {"id": 1})

    assert len(bulker.requests) == 5
    assert bulker.queued == [("events", {"id": 1})] * 2


def test_what_does_not_pass_is_not(bulker: Bulker) -> None:
    """A wrong token, an unknown destination, a refused row: one request, an error of its own."""
    with (
        closing(BulkerClient(bulker.url, "wrong", pause=0.01)) as stranger,
        pytest.raises(ConfigurationError, match="refused the token"),
    ):
        stranger.post("pg", "events", {})
    with closing(BulkerClient(bulker.url, TOKEN, pause=0.01)) as client:
        with pytest.raises(ConfigurationError, match="no destination other"):
            client.post("other", "events", {})
        with pytest.raises(SinkError, match="status 400") as refused:
            client.bulk("pg", "events", [{"refused": "secret value"}], primary_key=["id"])
        with pytest.raises(InputError, match="bytes"):
            client.post("pg", "events", {"x": "y" * MAX_ROW_BYTES})

    assert len(bulker.requests) == 3
    assert "secret value" not in str(refused.value)
    assert not refused.value.retryable


def test_a_bulker_that_is_down_is_told(bulker: Bulker, client: BulkerClient) -> None:
    """An error that may pass says so, after as many attempts as were asked for."""
    bulker.faults = [503] * 5
    with pytest.raises(SinkUnavailableError, match="503") as busy:
        client.post("pg", "events", {})
    bulker.faults = ["cut"] * 5
    with pytest.raises(OutcomeUnknownError):
        client.post("pg", "events", {})
    bulker.faults = [503]
    assert not client.ready()
    with closing(BulkerClient("http://127.0.0.1:9", TOKEN, attempts=2, pause=0.01)) as nobody:
        with pytest.raises(SinkUnavailableError, match="cannot be reached") as gone:
            nobody.post("pg", "events", {})
        assert not nobody.ready()

    assert len(bulker.requests) == 10
    assert busy.value.retryable
    assert gone.value.retryable


@pytest.mark.parametrize("status", [500, 502, 504])
def test_what_may_have_happened_says_so(bulker: Bulker, client: BulkerClient, status: int) -> None:
    """An answer from the middle of the way does not say that nothing was written."""
    bulker.faults = [status] * 5
    with pytest.raises(OutcomeUnknownError, match=str(status)) as keyless:
        client.bulk("pg", "events", [{"id": 1}])
    requests = len(bulker.requests)
    bulker.faults = [status] * 5
    with pytest.raises(OutcomeUnknownError, match=str(status)):
        client.post("pg", "events", {"id": 1})

    assert keyless.value.written is None
    assert (requests, len(bulker.requests)) == (1, 6)


def test_nobody_is_sent_away_for_hours(
    bulker: Bulker, client: BulkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``Retry-After`` is heeded as far as a lease bears it."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    bulker.faults = [503]
    bulker.retry_after = "7200"
    client.post("pg", "events", {"id": 1})

    assert pauses == [60.0]


def test_a_text_that_was_cut_in_a_character_is_sent(bulker: Bulker, client: BulkerClient) -> None:
    """JSON may say half of a surrogate pair; what no JSON says is refused without its value."""
    client.post("pg", "events", {"id": "\ud83d"})
    with pytest.raises(InputError, match="no JSON") as refused:
        client.post("pg", "events", {"secret": float("nan")})

    assert bulker.queued == [("events", {"id": "\ud83d"})]
    assert refused.value.__cause__ is None


def test_rows_without_a_key_are_not_sent_twice(bulker: Bulker, client: BulkerClient) -> None:
    """Where nothing would tell doubles apart, a lost answer is an unknown outcome, and no retry."""
    written: list[object] = []
    bulker.write = lambda table, rows, keys: written.append((len(rows), keys))
    bulker.faults = ["cut"]
    with pytest.raises(OutcomeUnknownError):
        client.bulk("pg", "events", [{"id": 1}])
    bulker.faults = [503, "cut"]
    state = client.bulk("pg", "events", [{"id": 1}, {"id": 2}], primary_key=["id", "at"])

    assert written == [(1, []), (2, ["id", "at"]), (2, ["id", "at"])]
    assert state["successfulRows"] == 2
    assert client.bulk("pg", "events", []) == {}


@pytest.mark.parametrize("url", ["bulker:3042", "ftp://x", "http://user@host"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    """What is no HTTP address of a server, or would carry a password, is refused at once."""
    with pytest.raises(ConfigurationError, match="http://"):
        BulkerClient(url)


# Mixed streams ----------------------------------------------------------------------------------


def recognised(anonymous_id: str, user: str, table: str = "events") -> UpdateByCriteria:
    """The update that a claim makes."""
    return UpdateByCriteria(
        id=f"{anonymous_id}-{user}",
        workspace="w",
        table=table,
        set={"user_id": user, "recognition_version": 1},
        where=(Equals(column="anonymous_id", value=anonymous_id), Empty(column="user_id")),
        sequence=1,
        created_at=at(0),
    )


def row_of(message_id: str, anonymous_id: str, **others: object) -> dict[str, object]:
    return {"message_id": message_id, "anonymous_id": anonymous_id, "user_id": None, **others}


def test_a_mixed_stream_is_taken_apart() -> None:
    """Updates by their kind; rows by the table that they name; what is neither is told by place."""
    update = recognised("a1", "u1")
    split = split_stream(
        [
            row_of("m1", "a1"),
            json.loads(update.to_json()),
            row_of("m2", "a1", JITSU_TABLE_NAME="Signed Up"),
            {"kind": "update_by_criteria", "version": 9},
            {"kind": "page", "message_id": "m3"},
            ["no object"],
            row_of("m4", "a1", large="y" * MAX_ROW_BYTES),
        ],
        "events",
    )
    nameless = split_stream([{"message_id": "m4"}])

    assert split.rows == {
        "events": [row_of("m1", "a1"), {"kind": "page", "message_id": "m3"}],
        "Signed Up": [row_of("m2", "a1")],
    }
    assert split.updates == [update]
    assert [position for position, _ in split.rejected] == [3, 5, 6]
    assert isinstance(split.rejected[0][1], MessageError)
    assert "names no table" in str(nameless.rejected[0][1])


class Table:
    """The rows of a destination of Bulker in PostgreSQL, as its batches write them."""

    def __init__(self, server: GivenServer, database: str, schema: str) -> None:
        self.server, self.database, self.schema = server, database, schema
        server.run(
            sql.SQL("CREATE TABLE {}.events (message_id text PRIMARY KEY, anonymous_id text,"
                    " user_id text, timestamp timestamptz, recognition_version bigint)"
                    ).format(sql.Identifier(schema)),
            database=database,
        )  # fmt: skip

    def write(self, table: str, rows: list[dict[str, Any]], keys: list[str]) -> None:
        """INSERT .. ON CONFLICT DO UPDATE of the row's own columns, as Bulker does."""
        names = list(rows[0])
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT ({}) DO UPDATE SET {}")
        with self.server.connect(self.database) as connection, connection.cursor() as cursor:
            cursor.executemany(
                statement.format(
                    sql.Identifier(self.schema, table),
                    sql.SQL(", ").join(map(sql.Identifier, names)),
                    sql.SQL(", ").join([sql.Placeholder()] * len(names)),
                    sql.SQL(", ").join(map(sql.Identifier, keys)),
                    sql.SQL(", ").join(
                        sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in names
                    ),
                ),
                [[row[name] for name in names] for row in rows],
            )

    def replace(self, row: dict[str, Any]) -> None:
        """The whole row anew, as Bulker does in ClickHouse and, by batch, in Redshift."""
        statement = sql.SQL("DELETE FROM {} WHERE message_id = %s").format(
            sql.Identifier(self.schema, "events")
        )
        self.server.run(statement, [row["message_id"]], database=self.database)
        self.write("events", [row], ["message_id"])

    def users(self) -> dict[str, str | None]:
        statement = sql.SQL("SELECT message_id, user_id FROM {}").format(
            sql.Identifier(self.schema, "events")
        )
        return dict(self.server.run(statement, database=self.database))


SCHEMA = 'Jitsu\'s "raw" \\data'


@pytest.fixture
def table(postgres: GivenServer) -> Iterator[Table]:
    """A table in a schema whose name needs every kind of quoting."""
    with postgres.database() as name:
        postgres.run(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMA)), database=name)
        yield Table(postgres, name, SCHEMA)


def destination_of(table: Table, **credentials: object) -> Destination:
    """The destination as Bulker is configured for it."""
    server = table.server
    return read_env(
        pg={
            "type": "postgres",
            "credentials": {
                "host": server.host, "port": server.port, "database": table.database,
                "username": server.user, "password": server.password,
                "defaultSchema": table.schema, "parameters": {"statement_timeout": "60 s"},
                **credentials,
            },
            "options": {"primaryKey": "message_id", "deduplicate": True},
        }
    ).known["pg"]  # fmt: skip


def test_updates_are_applied_after_the_rows_before_them(
    bulker: Bulker, client: BulkerClient, table: Table
) -> None:
    """
    The whole way on real parts: HTTP, then PostgreSQL, in a schema of the configuration.

    Bulker being down leaves the piece undone; sent again, all rows have their user; once more,
    nothing changes.
    """
    bulker.write = table.write
    piece = [
        row_of("m1", "a1"),
        json.loads(recognised("a1", "u1").to_json()),
        row_of("m2", "a1"),
        row_of("m3", "a2"),
    ]
    destination = destination_of(table)
    with closing(destination.open()) as sink:
        stream = MixedStream(client, destination, sink, "events")
        bulker.faults = [503] * 5
        with pytest.raises(SinkUnavailableError):
            stream.send(piece)
        before = table.users()
        first = stream.send(piece)
        after = table.users()
        again = stream.send([piece[1]])

    assert before == {}
    assert after == {"m1": "u1", "m2": "u1", "m3": None}
    assert (first.rows, first.applied.rows_changed, first.refused) == (3, 2, ())
    assert (again.rows, again.applied.rows_changed) == (0, 0)


def test_an_original_that_comes_back_is_recognised_again(
    bulker: Bulker, client: BulkerClient, table: Table
) -> None:
    """Bulker's retry puts the anonymous row over the recognised one; the update mends it again."""
    bulker.write = table.write
    update = json.loads(recognised("a1", "u1").to_json())
    destination = destination_of(table)
    with closing(destination.open()) as sink:
        stream = MixedStream(client, destination, sink, "events")
        stream.send([row_of("m1", "a1"), update])
        table.replace(row_of("m1", "a1"))
        undone = table.users()
        stream.send([update])

    assert undone == {"m1": None}
    assert table.users() == {"m1": "u1"}


def test_the_settings_of_a_connection_reach_the_rows(table: Table) -> None:
    """From events to rows with nothing configured but Bulker: the rules are the connection's."""
    destination = destination_of(table)
    rules = destination.stream.rules(Rules())
    graph = MemoryGraph()
    recognizer = Recognizer(graph, rules)
    sent = {"timestamp": "2026-01-01T00:00:00Z"}
    table.write("events", [row_of("m1", "a1", **sent), row_of("m2", "a1", **sent)], ["message_id"])
    recognizer.process([event("m1", "page"), event("m2", "identify", userId="u1")])
    updates = [leased.update for leased in graph.lease_updates(10, 60)]

    with closing(destination.open()) as sink:
        applied = sink.apply(plan_updates(updates))

    assert applied.rejected == ()
    assert table.users()["m1"] == "u1"


def test_certificates_as_text_become_files_that_go_with_the_sink(table: Table) -> None:
    """libpq takes files alone: they are ours, readable by us alone, and gone with the sink."""
    destination = destination_of(
        table, sslMode="verify-full", sslServerCA="-----BEGIN CERTIFICATE-----\nca",
        sslClientCert="cert", sslClientKey="/etc/hostname",
    )  # fmt: skip
    sink = destination.open()
    assert isinstance(sink, PostgresqlSink)
    query = sink._engine.url.query
    paths = [Path(str(query[name])) for name in ("sslrootcert", "sslcert")]

    assert query["sslmode"] == "verify-full"
    assert query["sslkey"] == "/etc/hostname"
    assert paths[0].read_text().endswith("\nca")
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in paths} == {0o600}
    sink.close()
    del sink
    deadline = time.monotonic() + 10
    while paths[0].exists() and time.monotonic() < deadline:
        gc.collect()
    assert not paths[0].parent.exists()


def test_a_key_of_bigquery_becomes_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key as text or as an object is no part of a URL; a path is."""

    class Opened:
        def __init__(self, url: str) -> None:
            self.url = url

    monkeypatch.setattr("recognition.bulker.open_sink", Opened)
    found = {}
    for name, key in {"object": {"type": "x"}, "text": '{"type": "y"}', "path": "/k.json"}.items():
        credentials = {"project": "p", "bqDataset": "d", "keyFile": key}
        sink = read_env(Q={"type": "bigquery", "credentials": credentials}).known["Q"].open()
        path = Path(str(sa.make_url(sink.url).query["credentials_path"]))  # type: ignore[attr-defined]
        found[name] = path.read_text() if name != "path" else str(path)
        del sink
        gc.collect()
        assert not path.exists()

    assert found == {"object": '{"type": "x"}', "text": '{"type": "y"}', "path": "/k.json"}


def test_mysql_is_opened_from_bulkers_configuration(
    mariadb: mariadb_server.GivenServer,
) -> None:
    """The same on a real MariaDB; a password with every odd character gets in."""
    with mariadb.database() as name:
        mariadb.run(
            "CREATE TABLE events (message_id varchar(64) PRIMARY KEY, anonymous_id varchar(64),"
            " user_id varchar(64), recognition_version bigint)",
            database=name,
        )
        mariadb.run("INSERT INTO events VALUES ('m1', 'a1', NULL, NULL)", database=name)
        user = f"odd_{os.getpid()}"
        mariadb.run(f"CREATE USER {user}@'%%' IDENTIFIED BY %s", SECRET)
        try:
            mariadb.run(f"GRANT ALL ON `{name}`.* TO {user}@'%%'")
            destination = read_env(
                M={
                    "type": "mysql",
                    "credentials": {
                        "host": mariadb.host, "port": mariadb.port, "database": "mysql",
                        "username": user, "password": SECRET,
                        "parameters": {"tls": "false", "timeout": "10s"},
                    },
                    "options": {"namespace": name},
                }
            ).known["M"]  # fmt: skip

            with closing(destination.open()) as sink:
                applied = sink.apply(plan_updates([recognised("a1", "u1")]))
        finally:
            mariadb.run(f"DROP USER {user}@'%%'")

        assert applied.rejected == ()
        assert mariadb.run("SELECT user_id FROM events", database=name) == [("u1",)]


def test_rules_are_not_shared_between_connections() -> None:
    """What one connection says leaves the rules that were given as they are."""
    base = Rules()
    with_function(functionOptions={"lookbackWindowDays": 1}).rules(base)

    assert base == replace(Rules())


def test_the_examples_of_the_page_run(
    bulker: Bulker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/bulker.md: the configuration is read and opened, the client posts and writes."""
    page = (Path(__file__).parents[1] / "docs" / "bulker.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BULKER_TOKEN", TOKEN)
    (tmp_path / "bulker.yaml").write_text(
        "destinations: {pg: {type: postgres, credentials: {host: h, database: d}}}"
    )
    names: dict[str, Any] = {}
    exec(compile(first, "bulker.md", "exec"), names)
    exec(compile(second.replace("http://bulker:3042", bulker.url), "bulker.md", "exec"), names)
    names["client"].close()
    for sink in names["sinks"].values():
        sink.close()

    assert names["rules"].stamps is False
    assert bulker.queued == [("events", {"message_id": "m1"})]
    assert [route for route, _ in bulker.requests] == ["post", "bulk"]
