"""
Bulker's world: its destination configuration, its topics, its HTTP interface.

What Bulker (https://github.com/jitsucom/bulker) and Jitsu already know of a destination (where it
is, its layout, key and time column, what identifies a visitor) is read from their own
configuration, so that nothing has to be said twice. Reading it opens no connection. Nothing here
shows a password, a key or a token: neither a ``repr``, nor an error, nor a note.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import quote, urlencode

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from recognition.attribution import DAY
from recognition.errors import (
    ConfigurationError,
    InputError,
    MessageError,
    MissingDependencyError,
    OutcomeUnknownError,
    RecognitionError,
    SinkError,
    SinkUnavailableError,
)
from recognition.events import SEGMENT, Event, Format, parse_paths
from recognition.layouts import Columns, Layout, layout_named, snake_case
from recognition.messages import UpdateByCriteria, parse_update
from recognition.planner import plan_updates
from recognition.rules import Rules
from recognition.sinks import Applied, Sink, open_sink

# ---------------------------------------------------------------------------------------- topics

#: A topic's name has at most so many bytes; Kafka's own limit (``bulkerapp/app/topic_manager.go``).
MAX_TOPIC_BYTES = 249

#: The table of the topics that all tables of a destination share.
ALL_TABLES = "_all_"

_BEGIN = "in.id."
_OF_ALL_TABLES = ("retry", "dead")
_PLAIN_TABLE = re.compile(r"[A-Za-z0-9_.-]*")
_BASE64 = re.compile(r"[A-Za-z0-9_-]*")


class Topic(NamedTuple):
    """What the name of one of Bulker's topics says."""

    destination: str
    #: ``batch``, ``stream``, ``retry``, ``dead``, ``profiles``, or what a later Bulker adds.
    mode: str
    #: As the events' producer named it; `ALL_TABLES` for ``retry`` and ``dead``.
    table: str
    #: From 1; 0: the table has one topic.
    partition: int = 0
    #: What all topics of an installation begin with, its last dot included.
    prefix: str = ""


def make_topic(topic: Topic) -> str:
    """
    The topic's name, byte for byte as Bulker makes it.

    A table that has other characters than ``[A-Za-z0-9_.-]`` is written in URL-safe base64 without
    padding. ``retry`` and ``dead`` have one topic for all tables, whatever the table.

    Raises:
        ConfigurationError: The name is longer than `MAX_TOPIC_BYTES`, the table is empty, or the
            destination holds a dot, so that Bulker could not read the name again.
    """
    if not topic.destination or "." in topic.destination:
        raise ConfigurationError("the id of a destination of Bulker is not empty and has no dot")
    table = ALL_TABLES if topic.mode in _OF_ALL_TABLES else topic.table
    if not table:
        raise ConfigurationError("a topic of Bulker names a table")
    encoding = "t"
    if not _PLAIN_TABLE.fullmatch(table):
        encoding = "b64"
        table = base64.urlsafe_b64encode(table.encode()).decode("ascii").rstrip("=")
    name = f"{topic.prefix}{_BEGIN}{topic.destination}.m.{topic.mode}.{encoding}.{table}"
    if topic.partition:
        name += f".p.{topic.partition}"
    if len(name.encode()) > MAX_TOPIC_BYTES:
        raise ConfigurationError(
            f"the topic of this table has {len(name.encode())} bytes, and Kafka takes"
            f" {MAX_TOPIC_BYTES}; Bulker recommends names of tables of at most 63 characters"
        )
    return name


def parse_topic(name: str) -> Topic:
    """
    Read a topic's name as Bulker does.

    A plain table that holds ``.p.`` is cut there, as by Bulker itself.

    Raises:
        InputError: This is no topic of Bulker.
    """
    prefix, *rest = name.split(_BEGIN)
    groups = rest[0].split(".", 4) if len(rest) == 1 else []
    if len(groups) != 5 or groups[1] != "m" or groups[3] not in ("t", "b64"):
        raise InputError(
            "not a topic of Bulker: those are PREFIXin.id.DESTINATION.m.MODE.t.TABLE, .b64. where"
            " the table is in base64"
        )
    destination, _, mode, encoding, last = groups
    table, *partition = last.split(".p.")
    if encoding == "b64":
        try:
            if not _BASE64.fullmatch(table):
                raise ValueError
            table = base64.urlsafe_b64decode(table + "=" * (-len(table) % 4)).decode()
        except (ValueError, binascii.Error):
            raise InputError("not a topic of Bulker: its table is not in base64") from None
    number = int(partition[0]) if partition and partition[0].isdecimal() else 0
    return Topic(destination, mode, table, number, prefix)


# --------------------------------------------------------------------------------- configuration

_EXTRA = (
    "Bulker's configuration and its HTTP interface need packages that are not installed; run:"
    ' pip install "recognition[bulker]"'
)

#: The id of Jitsu's function "Identity Stitching" among the functions of a connection.
RECOGNITION_FUNCTION = "builtin.transformation.user-recognition"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _split_keys(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _read_json(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("is no JSON object") from None
    return value


class RecognitionFunction(_Model):
    """The settings of Jitsu Next's function for user recognition: its names and its defaults."""

    anonymousIdFields: tuple[str, ...] = ("anonymousId",)
    """Paths of the anonymous id; the first that exists wins."""
    identifierFields: tuple[str, ...] = ("userId", "context.traits")
    """What identifies. An object of traits stands for the email and the phone in it."""
    eventTypes: tuple[str, ...] = ("page", "track", "screen")
    """The types of anonymous events that are remembered."""
    lookbackWindowDays: Annotated[float, Field(ge=0, le=36_500)] = 30
    """How many days a claim reaches back."""
    collectionId: str = ""
    """Names a collection of Jitsu's, which is not used here."""


class _Options(_Model):
    """Those options of a stream that say something about its rows."""

    mode: Literal["stream", "batch"] = "batch"
    frequency: float | None = None
    primaryKey: Annotated[tuple[str, ...], BeforeValidator(_split_keys)] = ()
    deduplicate: bool = False
    timestampColumn: str | None = None
    namespace: str | None = None
    dataLayout: str | None = None
    keepOriginalNames: bool = False
    functions: tuple[dict[str, Any], ...] | None = None
    functionsEnv: Annotated[dict[str, Any], BeforeValidator(_read_json)] = {}


# Known to Bulker or to Jitsu, and without a meaning for recognition (bulkerlib/options.go and
# implementations/sql/options.go; the names of connections in Jitsu's export).
_OTHER_OPTIONS = re.findall(
    r"\w+",
    "addMeta batchSize batchSizeBytes columnTypes debugTill deduplicateWindow disabled"
    " disableTemporaryTables discriminatorField events functionsClasses functionsServer hosts"
    " maxColumnsCount mergeWindow multithreading omitNils partitionId retryBatchSize"
    " retryFrequency schedule schema schemaFreeze spreadTablesSchedule storageKey streams"
    " tableNamePrefix temporaryBatchSize threadsCount timezone toSameCase workspaceUpdatedAt",
)
_DESTINATION_KEYS = re.findall(
    r"\w+",
    "__debug credentials credentialsHash defaultTableName destinationId id logLevel"
    " metricsKeyPrefix options optionsHash special streamId streamName type updatedAt usesBulker"
    " workspaceId",
)


class _Opening(NamedTuple):
    """What a sink is opened with."""

    scheme: str
    user: str | None = None
    password: str | None = None
    host: str | None = None
    port: int | None = None
    database: str | None = None
    query: Mapping[str, str] = {}
    #: Handed to `open_sink`.
    options: Mapping[str, Any] = {}
    #: What goes into files, by the parameter that names the file to the driver.
    files: Mapping[str, str] = {}
    #: Names of settings that were left alone.
    ignored: tuple[str, ...] = ()


class _Credentials(_Model):
    parameters: dict[str, str] = {}

    def open_as(self, namespace: str | None) -> _Opening:
        """Where rows of the namespace are; ``None``: of the destination's own."""
        raise NotImplementedError


class _Server(_Credentials):
    host: str
    port: int | None = None
    database: str
    defaultSchema: str | None = None
    username: str | None = None
    password: SecretStr = SecretStr("")


# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
_LIBPQ = re.findall(
    r"\w+",
    "application_name channel_binding client_encoding connect_timeout fallback_application_name"
    " gssencmode gsslib hostaddr keepalives keepalives_count keepalives_idle keepalives_interval"
    " krbsrvname load_balance_hosts options passfile require_auth requirepeer service sslcert"
    " sslcompression sslcrl sslkey sslmode sslnegotiation sslpassword sslrootcert sslsni"
    " target_session_attrs tcp_user_timeout",
)
# Of pgx, the driver of Bulker (https://pkg.go.dev/github.com/jackc/pgx/v5#ParseConfig).
_PGX = re.compile(
    r"pool_.*|default_query_exec_mode|(statement|description)_cache_(capacity|mode)"
    r"|min_read_buffer_size"
)


class _Postgres(_Server):
    sslMode: str | None = None
    sslServerCA: str | None = None
    sslClientCert: SecretStr | None = None
    sslClientKey: SecretStr | None = None
    authenticationMethod: str | None = None
    instanceConnectionName: str | None = None

    def open_as(self, namespace: str | None) -> _Opening:
        if self.authenticationMethod not in (None, "", "password"):
            raise ValueError(
                f"authenticationMethod {self.authenticationMethod} is not supported; run the"
                " proxy of Cloud SQL and name its host"
            )
        query: dict[str, str] = {}
        runtime: dict[str, str] = {}
        files: dict[str, str] = {}
        ignored = []
        for name, value in self.parameters.items():
            if _PGX.fullmatch(name):
                ignored.append(f"parameters.{name}")
            elif name in _LIBPQ:
                query[name] = value
            else:
                runtime[name] = value
        # As Bulker does it: the schema is the whole search_path.
        schema = namespace or self.defaultSchema
        if schema:
            runtime["search_path"] = '"' + schema.replace('"', '""') + '"'
        if runtime:
            given = [query["options"]] if "options" in query else []
            given += [f"-c {name}={_escape(value)}" for name, value in runtime.items()]
            query["options"] = " ".join(given)
        if self.sslMode:
            query["sslmode"] = self.sslMode
            for name, secret in (
                ("sslrootcert", self.sslServerCA and SecretStr(self.sslServerCA)),
                ("sslcert", self.sslClientCert),
                ("sslkey", self.sslClientKey),
            ):
                content = secret.get_secret_value() if secret else ""
                if content and self.sslMode in ("verify-ca", "verify-full"):
                    (query if Path(content).is_absolute() else files)[name] = content
        return _Opening(
            "postgresql+psycopg",
            self.username,
            self.password.get_secret_value() or None,
            self.host,
            self.port,
            self.database,
            query,
            files=files,
            ignored=tuple(ignored),
        )


def _escape(value: str) -> str:
    """As libpq reads ``options``: blanks and backslashes behind a backslash."""
    return re.sub(r"([\\\s])", r"\\\1", value)


class _Mysql(_Server):
    def open_as(self, namespace: str | None) -> _Opening:
        query: dict[str, str] = {}
        ignored = []
        # https://github.com/go-sql-driver/mysql#parameters, as PyMySQL has them.
        tls = {
            "true": {"ssl_verify_cert": "true", "ssl_verify_identity": "true"},
            "skip-verify": {"ssl_check_hostname": "false"},
            "false": {"ssl_disabled": "true"},
        }
        times = {
            "timeout": "connect_timeout",
            "readTimeout": "read_timeout",
            "writeTimeout": "write_timeout",
        }
        for name, value in self.parameters.items():
            if name == "tls" and value.lower() in tls:
                query |= tls[value.lower()]
            elif name in times and (seconds := re.fullmatch(r"(\d+)s", value)):
                query[times[name]] = seconds[1]
            else:
                ignored.append(f"parameters.{name}")
        return _Opening(
            "mysql+pymysql",
            self.username,
            self.password.get_secret_value() or None,
            self.host,
            self.port,
            namespace or self.database,
            query,
            ignored=tuple(ignored),
        )


class _Redshift(_Server):
    host: str = ""
    # For COPY by way of S3, which recognition does not use.
    bucket: str | None = None
    region: str | None = None
    folder: str | None = None
    accessKeyId: str | None = None
    secretAccessKey: SecretStr | None = None
    authenticationMethod: str | None = None
    roleARN: str | None = None
    roleARNExpiry: str | None = None
    externalID: str | None = None
    serverless: bool = False
    workgroupName: str | None = None
    clusterIdentifier: str | None = None

    def open_as(self, namespace: str | None) -> _Opening:
        query: dict[str, str] = {}
        ignored = []
        for name, value in self.parameters.items():
            if name == "sslmode" and value == "disable":
                query["ssl"] = "false"
            elif name == "sslmode" and value in ("verify-ca", "verify-full"):
                query["sslmode"] = value
            else:  # ``require``, too: the driver's own default checks the certificate
                ignored.append(f"parameters.{name}")
        options: dict[str, Any] = {}
        schema = namespace or self.defaultSchema
        if schema:
            if not re.fullmatch(r"[a-z_][a-z0-9_$]*", schema):
                raise ValueError("defaultSchema of Redshift is a name that needs no quotes")
            options["settings"] = {
                "query_group": "recognition",
                "error_on_nondeterministic_update": "true",
                "search_path": schema,
            }
        opening = _Opening(
            "redshift+redshift_connector",
            self.username,
            self.password.get_secret_value() or None,
            self.host or None,
            self.port or 5439,
            self.database,
            query,
            options,
            ignored=tuple(ignored),
        )
        if self.authenticationMethod != "iam":
            if not self.host:
                raise ValueError("host is missing")
            return opening
        if self.roleARN or self.externalID:
            raise ValueError(
                "roleARN is not supported; name the role in a profile of AWS, and the profile in"
                " AWS_PROFILE"
            )
        query["iam"] = "true"
        given = {
            "region": self.region,
            "db_user": self.username,
            "access_key_id": self.accessKeyId,
            "secret_access_key": self.secretAccessKey and self.secretAccessKey.get_secret_value(),
            "is_serverless": "true" if self.serverless else None,
            "serverless_work_group": self.workgroupName if self.serverless else None,
            "cluster_identifier": None if self.serverless else self.clusterIdentifier,
        }
        query |= {name: value for name, value in given.items() if value}
        return opening._replace(user=None, password=None)


class _Snowflake(_Credentials):
    account: str
    port: int | None = None
    database: str
    defaultSchema: str = "PUBLIC"
    username: str
    password: SecretStr = SecretStr("")
    warehouse: str
    authenticationMethod: Literal["password", "key-pair", ""] = "password"
    privateKey: SecretStr | None = None
    privateKeyPassphrase: SecretStr | None = None

    def open_as(self, namespace: str | None) -> _Opening:
        options: dict[str, Any] = {}
        if self.authenticationMethod == "key-pair":
            if self.privateKey is None:
                raise ValueError("privateKey is missing")
            phrase = self.privateKeyPassphrase
            options["connect_args"] = {
                "authenticator": "SNOWFLAKE_JWT",
                "private_key": _read_private_key(
                    self.privateKey.get_secret_value(),
                    phrase.get_secret_value() if phrase is not None else "",
                ),
            }
        return _Opening(
            "snowflake",
            self.username,
            None if options else self.password.get_secret_value(),
            self.account,
            self.port,
            f"{self.database}/{namespace or self.defaultSchema}",
            {"warehouse": self.warehouse, **self.parameters},
            options,
        )


def _read_private_key(text: str, passphrase: str) -> bytes:
    """The key in DER, as the connector takes it."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as exc:
        raise MissingDependencyError(
            'a key pair of Snowflake needs the package cryptography; run: pip install "recognition'
            '[snowflake]"'
        ) from exc
    try:
        key = serialization.load_pem_private_key(
            text.encode(), password=passphrase.encode() or None
        )
    except (ValueError, TypeError):
        raise ValueError("privateKey cannot be read with this privateKeyPassphrase") from None
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class _Engine(_Model):
    rawStatement: str | None = None
    nullableFields: tuple[str, ...] = ()
    partitionFields: tuple[dict[str, str], ...] = ()
    orderFields: tuple[dict[str, str], ...] = ()
    primaryKeys: tuple[str, ...] = ()


class _Clickhouse(_Credentials):
    protocol: Literal["clickhouse", "clickhouse-secure", "http", "https", ""] = "clickhouse"
    hosts: tuple[str, ...]
    username: str = "default"
    password: SecretStr = SecretStr("")
    database: str = "default"
    cluster: str | None = None
    databaseEngine: str | None = None
    tls: dict[str, str] = {}
    # How Bulker makes tables. A sink looks at the table that is there.
    engine: _Engine | None = None
    loadAsJson: bool = False
    s3AccessKeyId: str | None = None
    s3SecretAccessKey: SecretStr | None = None
    s3Bucket: str | None = None
    s3Region: str | None = None
    s3Folder: str | None = None
    s3UsePresignedURL: bool = False

    def open_as(self, namespace: str | None) -> _Opening:
        if not self.hosts:
            raise ValueError("hosts is empty")
        # An address of IPv6 stands in brackets where a port follows.
        named = re.fullmatch(r"\[(.+)\](?::(.*))?|([^:]*)(?::([^:]*))?", self.hosts[0])
        if named is None:
            raise ValueError("hosts[0] is no HOST:PORT")
        host, port = named[1] or named[3], named[2] or named[4] or ""
        secure = self.protocol in ("https", "clickhouse-secure")
        ignored = [f"hosts[{number}]" for number in range(1, len(self.hosts))]
        query = {"secure": "true"} if secure else {}
        if self.protocol not in ("http", "https") and port:
            # The native protocol's; the sink's client speaks HTTP, which has a port of its own.
            ignored.append("the port of hosts[0]")
            port = ""
        # Bulker does not look at a certificate unless it is told to.
        if secure and self.parameters.get("skip_verify", "true") != "false":
            query["verify"] = "false"
        ignored += [
            f"parameters.{name}"
            for name in self.parameters
            if name not in ("secure", "skip_verify")
        ]
        ignored += [f"tls.{name}" for name in self.tls]
        return _Opening(
            "clickhouse",
            self.username,
            self.password.get_secret_value() or None,
            host,
            int(port) if port.isdecimal() else (8443 if secure else 8123),
            namespace or self.database,
            query,
            ignored=tuple(ignored),
        )


class _Bigquery(_Credentials):
    project: str
    keyFile: Any = None
    bqDataset: str
    bucket: str | None = None
    gcsBucket: str | None = None

    def open_as(self, namespace: str | None) -> _Opening:
        query: dict[str, str] = {}
        files: dict[str, str] = {}
        key = self.keyFile
        if key not in (None, "", "workload_identity"):
            text = key if isinstance(key, str) else json.dumps(key)
            (query if Path(text).is_absolute() else files)["credentials_path"] = text
        return _Opening(
            "bigquery",
            host=self.project,
            database=namespace or self.bqDataset,
            query=query,
            files=files,
        )


_TYPES: Mapping[str, type[_Credentials]] = {
    "bigquery": _Bigquery,
    "clickhouse": _Clickhouse,
    "mysql": _Mysql,
    "postgres": _Postgres,
    "redshift": _Redshift,
    "snowflake": _Snowflake,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """
    How the rows of a connection look, and what of its events is remembered.

    Args:
        layout: Tables and columns, after ``dataLayout``, ``keepOriginalNames``, ``primaryKey``,
            ``timestampColumn`` and ``defaultTableName``.
        format: Where an event's identifiers are.
        primary_key: Of the tables; may be empty.
        deduplicate: A row of the same key replaces the one that is there: so does a row that
            Bulker tries again after hours.
        batch_period: In seconds, how long rows wait until they are in the table.
        event_types: The types of anonymous events that are remembered; ``None``: all.
        lookback_days: How far a claim reaches back; ``None``: nothing was said.
        keeps_names: Columns have the names of the events' keys, not in snake case.
    """

    layout: Layout
    format: Format = SEGMENT
    primary_key: tuple[str, ...] = ()
    deduplicate: bool = False
    batch_period: float = 300.0
    event_types: frozenset[str] | None = None
    lookback_days: float | None = None
    keeps_names: bool = False

    #: When Bulker gives a row up (5, 25, 125, 625, 1,440 minutes, each after the one before), in
    #: seconds: until then the row may still come, and replace the one that is there
    #: (``bulkerapp/app/abstract_batch_consumer.go``).
    RETRIED_FOR: ClassVar[float] = (5 + 25 + 125 + 625 + 1_440) * 60.0

    def rules(self, base: Rules) -> Rules:
        """
        The same rules for the rows of this connection, which Bulker writes as they came.

        Raises:
            ConfigurationError: The rules name a trait whose column has another name here.
        """
        changed = [trait for trait in base.traits if snake_case(trait) != trait]
        if self.keeps_names and changed:
            raise ConfigurationError(
                f"keepOriginalNames: the columns of the traits {', '.join(changed)} are not in"
                " snake case, which updates need. Take them out of traits. Nothing was written."
            )
        known = dict.fromkeys((*base.identity.known, *self.format.known))
        attribution = base.attribution
        if self.lookback_days is not None:
            attribution = replace(attribution, lookback=round(self.lookback_days * DAY))
        return replace(
            base,
            layout=self.layout,
            attribution=attribution,
            identity=replace(base.identity, known=tuple(known)),
            stamps=False,
        )

    def remembers(self, event: Event) -> bool:
        """Whether the event is remembered: it identifies, or is of one of the ``event_types``."""
        return (
            self.event_types is None
            or event.type in self.event_types
            or bool(event.known)
            or event.previous_id is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """One of Bulker's destinations that can be updated. Its ``repr`` holds no secret."""

    id: str
    #: ``postgres``, ``mysql``, ``redshift``, ``snowflake``, ``clickhouse`` or ``bigquery``.
    type: str
    stream: Stream
    #: What was left alone, and what to know about it, a sentence each.
    notes: tuple[str, ...] = ()
    _opening: _Opening = field(repr=False)

    @property
    def url(self) -> str:
        """The sink's URL, with the password in it: for `open_sink`, not to be shown."""
        return self._render(self._opening.query)

    @property
    def options(self) -> dict[str, Any]:
        """What `open_sink` needs beside the URL; may hold a key."""
        return dict(self._opening.options)

    def open(self, **options: Any) -> Sink:
        """
        The destination as a sink; it connects when it is first used.

        Certificates and keys that the configuration holds as text, where a driver takes files
        alone, are written to files that nobody else can read, and that go when the sink does.

        Raises:
            UnknownSchemeError: No sink is installed for this type.
            MissingDependencyError: The sink's driver is not installed; the text names the command.
        """
        files, query = self._opening.files, dict(self._opening.query)
        directory = tempfile.mkdtemp(prefix="recognition-") if files else None
        try:
            for name, content in files.items():
                assert directory is not None
                path = os.path.join(directory, name)
                # libpq refuses a key that others may read; mkdtemp's directory is ours alone.
                with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                    file.write(content)
                query[name] = path
            sink = open_sink(self._render(query), **{**self._opening.options, **options})
        except BaseException:
            if directory is not None:
                shutil.rmtree(directory)
            raise
        if directory is not None:
            weakref.finalize(sink, shutil.rmtree, directory, ignore_errors=True)
        return sink

    def _render(self, query: Mapping[str, str]) -> str:
        from sqlalchemy import URL

        opening = self._opening
        return URL.create(
            opening.scheme,
            opening.user,
            opening.password,
            opening.host,
            opening.port,
            opening.database,
            query,
        ).render_as_string(hide_password=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destinations:
    """What a configuration of Bulker holds."""

    #: Those that can be updated, by id, in the order of the configuration.
    known: Mapping[str, Destination]
    #: Id and type of those that were skipped because nothing can be updated there.
    skipped: tuple[tuple[str, str], ...] = ()

    def stream(self) -> Stream:
        """
        How rows look, where all destinations get the rows of the same events.

        Updates name tables and columns, so one graph serves destinations that agree on them.

        Raises:
            ConfigurationError: There is no destination, or two of them disagree: both are named.
        """
        if not self.known:
            raise ConfigurationError("the configuration has no destination that can be updated")
        first, *others = self.known.values()
        for other in others:
            for what in ("layout", "format", "event_types", "lookback_days", "keeps_names"):
                if getattr(first.stream, what) != getattr(other.stream, what):
                    raise ConfigurationError(
                        f"the destinations {first.id} and {other.id} differ in {what}, so that one"
                        " update cannot mean the rows of both: give each a graph of its own"
                    )
        # The slowest of them decides how long rows are waited for.
        return replace(
            first.stream,
            batch_period=max(each.stream.batch_period for each in self.known.values()),
            deduplicate=any(each.stream.deduplicate for each in self.known.values()),
        )


def read_destinations(
    source: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    *,
    prefix: str = "BULKER_DESTINATION_",
    skip_unsupported: bool = False,
) -> Destinations:
    """
    Read the destinations of a Bulker server, as it is configured.

    Args:
        source: Its YAML file (``BULKER_CONFIG_SOURCE``, with or without ``file://``), whose key
            ``destinations`` maps ids to destinations; ``None``: the environment.
        environ: Usually ``os.environ``. Without a file, each variable of the prefix is a
            destination in relaxed JSON; an ``id`` in it wins over the variable's name.
        prefix: As after ``env://`` in ``BULKER_CONFIG_SOURCE``, with the underscore.
        skip_unsupported: Destinations of which nothing can be updated (files, webhooks) are
            listed in ``skipped`` instead of being refused.

    Raises:
        ConfigurationError: The file cannot be read, a key is unknown (the nearest known one is
            named), a value is missing or wrong, or a type is not supported. The text never says
            what a value was.
        MissingDependencyError: The extra ``bulker`` is not installed.
    """
    if source is not None:
        path = os.fspath(source).removeprefix("file://")
        if "://" in path:
            raise ConfigurationError(
                "destinations are read from a YAML file or from the environment; sources of Bulker"
                " of other schemes (redis, http, postgres) are not: save their answer as a file"
            )
        found = _read_yaml(path)
    else:
        found = _read_variables(environ, prefix)
    known: dict[str, Destination] = {}
    skipped: list[tuple[str, str]] = []
    for where, name, raw in found:
        raw = _tidy(raw)
        if not isinstance(raw, dict):
            raise ConfigurationError(f"{where} is no destination: it has no keys")
        _refuse_unknown(where, raw, _DESTINATION_KEYS)
        # In a file the key of the map is the id, whatever stands below it.
        identity = name if source is not None else str(raw.get("id") or name)
        kind = str(raw.get("type", ""))
        if kind in _TYPES:
            known[identity] = _read_destination(where, identity, raw)
        else:
            skipped.append((identity, kind))
    if skipped and not skip_unsupported:
        listed = []
        for identity, kind in skipped:
            near = get_close_matches(kind, _TYPES, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            listed.append(f"{identity} ({kind or 'no type'}{hint})")
        raise ConfigurationError(
            f"destinations of which nothing can be updated: {', '.join(listed)}. Supported are"
            f" {', '.join(_TYPES)}. Take the others out, or say that they are to be skipped"
            " (skip_unsupported)."
        )
    return Destinations(known=known, skipped=tuple(skipped))


def _read_yaml(path: str) -> list[tuple[str, str, Any]]:
    """Triples of where it was written, the name there, and what it is."""
    try:
        import yaml
    except ImportError as exc:
        raise MissingDependencyError(_EXTRA) from exc

    class Loader(yaml.SafeLoader):
        """Every scalar is the text that was written, but for null: a password 0123 keeps its 0."""

    Loader.yaml_implicit_resolvers = {
        first: kept
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        if (kept := [each for each in resolvers if each[0].endswith((":null", ":merge"))])
    }
    try:
        with open(path, encoding="utf-8") as file:
            read = yaml.load(file, Loader)
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8") from None
    except yaml.YAMLError as exc:
        # Its text quotes the line, which may hold a password.
        mark = getattr(exc, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{path}{line} is not YAML") from None
    destinations = read.get("destinations") if isinstance(read, dict) else None
    if not isinstance(destinations, dict):
        raise ConfigurationError(
            f"{path} has no key destinations that maps ids to destinations, as Bulker's has"
        )
    return [(f"{path}: {name}", str(name), value) for name, value in destinations.items()]


def _read_variables(environ: Mapping[str, str], prefix: str) -> list[tuple[str, str, Any]]:
    try:
        import hjson
    except ImportError as exc:
        raise MissingDependencyError(_EXTRA) from exc
    found = []
    for variable, text in sorted(environ.items()):
        if variable.startswith(prefix) and variable != prefix:
            try:
                read = hjson.loads(text, parse_int=str, object_pairs_hook=dict)
                found.append((variable, variable.removeprefix(prefix), read))
            except (hjson.HjsonDecodeError, RecursionError):
                raise ConfigurationError(f"{variable} is no relaxed JSON (Hjson)") from None
    return found


def _tidy(value: Any) -> Any:
    """All scalars as texts, what is null left out."""
    if isinstance(value, dict):
        return {str(key): _tidy(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_tidy(each) for each in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else value


def _refuse_unknown(where: str, found: Mapping[str, Any], known: Iterable[str]) -> None:
    names = sorted(known)
    for key in found:
        if key not in names:
            folded = {name.lower(): name for name in names}
            near = get_close_matches(key.lower(), folded, n=1, cutoff=0.5)
            hint = (
                f"the nearest known one is {folded[near[0]]}"
                if near
                else "known are " + (", ".join(names))
            )
            raise ConfigurationError(f"{where}: the key {key} is unknown; {hint}")


def _validate(where: str, model: type[_Model], found: Any) -> Any:
    if not isinstance(found, dict):
        raise ConfigurationError(f"{where} is missing, or has no keys")
    _refuse_unknown(where, found, model.model_fields)
    try:
        return model.model_validate(found)
    except ValidationError as exc:
        reasons = [
            f"{'.'.join(str(part) for part in error['loc'])}:"
            f" {error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors(include_input=False, include_url=False, include_context=False)
        ]
        raise ConfigurationError(f"{where}: {'; '.join(reasons)}") from None


def _read_destination(where: str, identity: str, raw: Mapping[str, Any]) -> Destination:
    given = raw.get("options") or {}
    if not isinstance(given, dict):
        raise ConfigurationError(f"{where}: options has no keys")
    _refuse_unknown(f"{where}: options", given, {*_Options.model_fields, *_OTHER_OPTIONS})
    telling = {key: value for key, value in given.items() if key in _Options.model_fields}
    options: _Options = _validate(f"{where}: options", _Options, telling)
    model = _TYPES[str(raw["type"])]
    credentials: _Credentials = _validate(f"{where}: credentials", model, raw.get("credentials"))
    try:
        opening = credentials.open_as(options.namespace)
        stream, notes = _read_stream(where, options, raw.get("defaultTableName"))
    except ValueError as exc:
        raise ConfigurationError(f"{where}: credentials: {exc}") from None
    if opening.ignored:
        notes.append(f"not used: {', '.join(opening.ignored)}")
    return Destination(
        id=identity, type=str(raw["type"]), stream=stream, notes=tuple(notes), _opening=opening
    )


def _read_stream(where: str, options: _Options, table: Any) -> tuple[Stream, list[str]]:
    notes = []
    form, lookback, types = SEGMENT, None, None
    for function in options.functions or ():
        if function.get("functionId") == RECOGNITION_FUNCTION:
            place = f"{where}: options.functions: {RECOGNITION_FUNCTION}"
            settings: RecognitionFunction = _validate(
                place, RecognitionFunction, function.get("functionOptions") or {}
            )
            form = _build_format(settings)
            lookback, types = settings.lookbackWindowDays, frozenset(settings.eventTypes)
            break
    else:
        if options.functions is not None:
            notes.append(
                "its functions do not have user recognition (Identity Stitching); it is recognised"
                " here all the same, with the settings of recognition"
            )
    named = options.functionsEnv.get("IDENTIFYING_TRAITS")
    if named:
        form = form.with_identifying_traits(_split_keys(str(named)))
    if not options.deduplicate:
        notes.append("deduplicate is off: a row that Bulker writes twice is there twice")
    frequency = options.frequency
    return (
        Stream(
            layout=_build_layout(where, options, table),
            format=form,
            primary_key=options.primaryKey,
            deduplicate=options.deduplicate,
            batch_period=0.0 if options.mode == "stream" else (frequency or 5.0) * 60,
            event_types=types,
            lookback_days=lookback,
            keeps_names=options.keepOriginalNames,
        ),
        notes,
    )


def _build_format(settings: RecognitionFunction) -> Format:
    known: dict[str, list[str]] = {}
    for path in settings.identifierFields:
        (keys,) = parse_paths(path)
        if keys in SEGMENT.traits:
            for trait in ("email", "phone"):
                places = ["/" + "/".join(each) for each in SEGMENT.known[trait]]
                known.setdefault(trait, []).extend(places)
        else:
            known.setdefault(snake_case(keys[-1]), []).append(path)
    form = replace(SEGMENT, anonymous_id=parse_paths(settings.anonymousIdFields))
    return form.with_known(known, replacing=True)


def _build_layout(where: str, options: _Options, table: Any) -> Layout:
    layout = layout_named(options.dataLayout or "segment-single-table")

    def change(columns: Columns) -> Columns:
        if options.keepOriginalNames and layout.name.startswith("segment"):
            columns = replace(columns, id="messageId", anonymous_id="anonymousId", user_id="userId")
        if options.timestampColumn:
            columns = replace(columns, time=options.timestampColumn)
        keys = options.primaryKey
        if len(keys) == 1:
            columns = replace(columns, id=keys[0])
        elif keys and columns.id not in keys:
            raise ConfigurationError(
                f"{where}: options.primaryKey has several columns, and {columns.id} is not one of"
                " them: which one holds the message id is not known. Name it in a [layout] of"
                " recognition's own settings."
            )
        return columns

    return replace(
        layout,
        table=str(table) if table and not layout.type_is_table else layout.table,
        columns=change(layout.columns),
        table_columns={name: change(each) for name, each in layout.table_columns.items()},
    )


# ---------------------------------------------------------------------------------------- server

#: What Jitsu sends to ``/post`` at most, in bytes (``bulker-destination.ts``); a line of ``/bulk``
#: may have 1 MiB (``bulkerapp/app/router.go``).
MAX_ROW_BYTES = 1_000_000

#: The longest pause that a ``Retry-After`` makes, in seconds.
MAX_RETRY_AFTER = 60.0

#: A user function of Jitsu names an event's table under either of these keys.
_TABLE_KEYS = ("JITSU_TABLE_NAME", "__JITSU_TABLE_NAME")


class BulkerClient:
    """
    Talks to a Bulker server. Threads may share one.

    What passes (no connection, 429, 500, 502, 503, 504) is tried again with growing, jittered
    pauses; a ``Retry-After`` of the server is heeded, up to `MAX_RETRY_AFTER`.

    Args:
        url: Where it listens, such as ``http://bulker:3042``.
        token: One of its ``BULKER_AUTH_TOKENS``, in the clear; never shown.
        timeout: For one attempt, in seconds. A ``bulk`` is answered when its rows are written.
        attempts: How often something is tried.
        pause: Before the second attempt, in seconds; it doubles each time, up to 30.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float = 60.0,
        attempts: int = 5,
        pause: float = 0.5,
    ) -> None:
        try:
            import urllib3
        except ImportError as exc:
            raise MissingDependencyError(_EXTRA) from exc
        if not re.match(r"https?://[^/@]+(/|$)", url):
            raise ConfigurationError("the URL of a Bulker server begins with http:// or https://")
        self._url = url.rstrip("/")

        class Retry(urllib3.Retry):
            """One that is not sent away for hours: whoever waits holds a lease."""

            def get_retry_after(self, response: Any) -> float | None:
                seconds = super().get_retry_after(response)
                return None if seconds is None else min(seconds, MAX_RETRY_AFTER)

        self._retries = Retry(
            total=attempts - 1,
            backoff_factor=pause,
            backoff_jitter=pause,
            backoff_max=30.0,
            allowed_methods=None,  # POST, too: what may not be done twice is told below
            status_forcelist=(429, 500, 502, 503, 504),
            raise_on_status=False,
        )
        headers = {"User-Agent": "recognition"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(
            maxsize=8, headers=headers, timeout=urllib3.Timeout(total=timeout)
        )

    def post(
        self,
        destination: str,
        table: str,
        row: Mapping[str, Any],
        *,
        partition: int = 0,
        mode: Literal["batch", "stream"] | None = None,
    ) -> None:
        """
        Put one row into the queue of a table; it is written with its batch, later.

        A row whose answer got lost is sent again, so it may be there twice where the destination
        does not deduplicate.

        Args:
            destination: Its id.
            table: The table's name, as it is.
            row: As Bulker gets it: nested objects become columns.
            partition: One of several topics of a table, from 1; 0: there is one.
            mode: Instead of the destination's own.

        Raises:
            InputError: The row has more than `MAX_ROW_BYTES`, or is no JSON; nothing was sent.
            ConfigurationError: The token was refused, or there is no such destination.
            SinkUnavailableError: Bulker cannot be reached, or does not do it now.
            OutcomeUnknownError: The connection went before the answer, or something failed on the
                way to it (500, 502, 504). Sending again is right.
            SinkError: Bulker refused the row.
        """
        query = {"tableName": table}
        if partition:
            query["partition"] = str(partition)
        if mode is not None:
            query["modeOverride"] = mode
        self._send("post", destination, query, [_to_line(row)], "application/json", twice=True)

    def bulk(
        self,
        destination: str,
        table: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        primary_key: Sequence[str] = (),
    ) -> Mapping[str, Any]:
        """
        Write rows in one transaction; they are in the table when this returns.

        With a primary key, a row replaces the one that is there, so a request whose answer got lost
        is sent again. Without one it is not, because the rows would be there twice.

        Returns:
            Bulker's state: ``status``, ``processedRows``, ``successfulRows`` and others; empty
            where there were no rows.

        Raises:
            OutcomeUnknownError: The connection went before the answer, or something failed on the
                way to it (500, 502, 504).
            SinkError: Bulker refused the rows; none of them was written. The other errors are those
                of `post`.
        """
        lines = [_to_line(row) for row in rows]
        if not lines:
            return {}
        query = {"tableName": table, "mode": "batch"}
        state = self._send(
            "bulk",
            destination,
            query,
            lines,
            "application/x-ndjson",
            twice=bool(primary_key),
            keys=primary_key,
        ).get("state")
        if not isinstance(state, dict) or state.get("status") != "COMPLETED":
            raise OutcomeUnknownError(
                "Bulker answered that the rows were taken, but not that they are COMPLETED"
            )
        return state

    def ready(self) -> bool:
        """Whether the server says that it takes requests."""
        import urllib3

        try:
            answer = self._pool.request("GET", f"{self._url}/ready", retries=False)
        except urllib3.exceptions.HTTPError:
            return False
        return answer.status == 200

    def close(self) -> None:
        """Close the connections; the second time nothing happens."""
        self._pool.clear()

    def _send(
        self,
        route: str,
        destination: str,
        query: Mapping[str, str],
        lines: Sequence[bytes],
        content_type: str,
        *,
        twice: bool,
        keys: Sequence[str] = (),
    ) -> Mapping[str, Any]:
        import urllib3

        pairs = [*query.items(), *(("pk", key) for key in keys)]
        url = f"{self._url}/{route}/{quote(destination, safe='')}?{urlencode(pairs)}"
        # What was begun may have been done: an answer that got lost, a 500 in the middle.
        retries = (
            self._retries
            if twice
            else self._retries.new(read=0, other=0, status_forcelist=(429, 503))
        )
        try:
            answer = self._pool.request(
                "POST",
                url,
                body=b"\n".join(lines),
                headers={**self._pool.headers, "Content-Type": content_type},
                retries=retries,
                redirect=False,
            )
        except urllib3.exceptions.MaxRetryError as exc:
            # Their text holds the address and the query only, but nobody needs it.
            if isinstance(exc.reason, urllib3.exceptions.NewConnectionError):
                raise SinkUnavailableError("Bulker cannot be reached") from exc
            raise OutcomeUnknownError(_LOST) from exc
        except urllib3.exceptions.HTTPError as exc:
            raise OutcomeUnknownError(_LOST) from exc
        status = answer.status
        if status == 200:
            try:
                read = answer.json()
            except ValueError:
                read = None
            if not isinstance(read, dict):
                raise OutcomeUnknownError("what answered is no Bulker: 200, and no JSON object")
            return read
        if status in (401, 403):
            raise ConfigurationError("Bulker refused the token")
        if status == 404:
            raise ConfigurationError(f"Bulker knows no destination {destination}")
        if status in (429, 503):
            raise SinkUnavailableError(f"Bulker does not do it now: status {status}")
        if status in (500, 502, 504):
            raise OutcomeUnknownError(
                f"Bulker, or what stands before it, failed: status {status}; the rows may have been"
                " taken or not"
            )
        # Bulker's own text is not shown: it may quote a row.
        raise SinkError(f"Bulker refused what was sent: status {status}; its log says why")


_LOST = "the connection to Bulker went before its answer came; the rows may have been taken or not"


def _to_line(row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(row, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        try:
            line = text.encode()
        except UnicodeEncodeError:
            # Half of a surrogate pair, as a text has that was cut: JSON can say it, UTF-8 cannot.
            line = json.dumps(row, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        # Their text may quote a value.
        raise InputError("a row holds something that is no JSON") from None
    if len(line) > MAX_ROW_BYTES:
        raise InputError(f"a row has {len(line):,} bytes; Bulker takes {MAX_ROW_BYTES:,}")
    return line


# --------------------------------------------------------------------------------- mixed streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A stream that mixes rows and updates, taken apart; each part in the order it came in."""

    #: Rows by table.
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    updates: Sequence[UpdateByCriteria]
    #: The position of what is neither, or a row that Bulker does not take, from 0, and why.
    rejected: Sequence[tuple[int, InputError]]


def split_stream(objects: Iterable[object], table: str | None = None) -> Split:
    """
    Take rows and update messages apart.

    An object whose ``kind`` is ``update_by_criteria`` is an update, every other one is a row.

    Args:
        objects: As `json.loads` gives them.
        table: Of rows that do not name one themselves (``JITSU_TABLE_NAME``, which is taken out).
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    updates: list[UpdateByCriteria] = []
    rejected: list[tuple[int, InputError]] = []
    for position, found in enumerate(objects):
        if not isinstance(found, Mapping):
            rejected.append((position, InputError("a row or an update is a JSON object")))
        elif found.get("kind") == "update_by_criteria":
            try:
                updates.append(parse_update(json.dumps(found)))
            except MessageError as error:
                rejected.append((position, error))
        else:
            own = next((found[key] for key in _TABLE_KEYS if found.get(key)), table)
            if not isinstance(own, str):
                rejected.append((position, InputError("the row names no table")))
            else:
                row = {key: value for key, value in found.items() if key not in _TABLE_KEYS}
                try:
                    _to_line(row)
                except InputError as error:
                    rejected.append((position, error))
                else:
                    rows.setdefault(own, []).append(row)
    return Split(rows=rows, updates=updates, rejected=rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What became of a piece of a mixed stream."""

    rows: int
    applied: Applied
    #: The position of what was neither row nor update, or a row too large, from 0, and why.
    unreadable: Sequence[tuple[int, InputError]]
    #: Updates that were not applied, by id, and why.
    refused: Sequence[tuple[str, RecognitionError]]


class MixedStream:
    """
    A stream of rows and updates for one destination: rows go to Bulker, updates to the sink.

    The updates of a piece are applied when its rows are in their tables, never before, so the
    stream is the one ordered channel that makes re-application unnecessary.

    Args:
        client: The server that writes the rows.
        destination: Where to; its ``primary_key`` makes sending again safe.
        sink: The same destination, opened.
        table: Of rows that do not name one themselves.
    """

    def __init__(
        self,
        client: BulkerClient,
        destination: Destination,
        sink: Sink,
        table: str | None = None,
    ) -> None:
        self._client = client
        self._destination = destination
        self._sink = sink
        self._table = table

    def send(self, objects: Iterable[object]) -> Sent:
        """
        Write the rows, then apply the updates.

        The second time the same piece changes nothing, given a primary key. Where Bulker or the
        sink fails, the error is let out and the whole piece is to be sent again: rows of some
        tables may be written, and no update is applied unless all rows are.

        Raises:
            SinkError: Bulker or the destination failed.
        """
        split = split_stream(objects, self._table)
        count = 0
        for table, rows in split.rows.items():
            self._client.bulk(
                self._destination.id,
                table,
                rows,
                primary_key=self._destination.stream.primary_key,
            )
            count += len(rows)
        plan = plan_updates(split.updates)
        applied = self._sink.apply(plan) if plan.steps else Applied()
        return Sent(
            rows=count,
            applied=applied,
            unreadable=split.rejected,
            refused=(*plan.rejected, *applied.rejected),
        )
