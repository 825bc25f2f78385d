"""
Settings from `recognition.toml`, the environment and the command line, made into rules.

Later ones win: defaults, file, environment, arguments. What is written here is checked here, with
the place where it was written; nothing behind this file reads a file or a variable. It never
prints a URL with its password.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from recognition.attribution import DAY, AttributionRules, Policy
from recognition.errors import ConfigurationError
from recognition.events import BOTS, FORMATS, Format, parse_paths
from recognition.identity import IdentityRules
from recognition.layouts import Columns, Layout, layout_named, single_table
from recognition.rules import MergeTraits, References, Rules, Supersede, TableRules

#: Read where no other is named, if it is there.
DEFAULT_FILE = Path("recognition.toml")

PREFIX = "RECOGNITION_"

# Not settings: the file's name, and what this project's own tests are told.
_RESERVED = re.compile(r"RECOGNITION_(CONFIG|TEST_.*)")


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _long_enough(key: SecretStr | None) -> SecretStr | None:
    if key is not None and len(key) < 16:
        raise ValueError("a key has at least 16 characters")
    return key


def _elsewhere(place: str) -> str:
    if not re.fullmatch(r"(env|file):.+", place):
        raise ValueError("a secret is not written here: say env:NAME or file:PATH")
    return place


Words = Annotated[tuple[str, ...], BeforeValidator(_split)]

#: Where a secret is: a variable of the environment, or a file.
Place = Annotated[str, AfterValidator(_elsewhere)]

#: Options of librdkafka that hold a secret themselves.
_SECRET_OPTION = re.compile(r"password|secret|\.pem$|oauthbearer\.config")


def _refuse_secrets(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if _SECRET_OPTION.search(name):
            raise ValueError(
                f'{name} is a secret and is not written here: secrets = {{"{name}" = "env:NAME"}}'
            )
    return options


class _Table(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


class IdentifierTable(_Table):
    """One `[[identifiers]]`: a type of known identifier. A type that exists already is changed."""

    type: Annotated[str, Field(pattern=r"[a-z][a-z0-9_]{0,62}")]
    """What it is called. New types come after `user_id`, `email` and `phone`, in this order."""
    paths: Words = ()
    """Where it is found, for example `traits.account`; the first path that exists wins, after those
    of the format. None, for a new type: the trait of its name."""
    unique: bool | None = None
    """Whether a person has at most one. Only `user_id` is unique where nothing is said."""
    lower: bool | None = None
    """Whether its case means nothing. Only that of `email` does not where nothing is said."""


class LayoutTable(_Table):
    """`[layout]`: one table that holds the rows of all events, with columns of your own."""

    table: str
    """The table, with its schema where it has one: `analytics.events`."""
    id: str = Columns().id
    """The column of the message id."""
    anonymous_id: str = Columns().anonymous_id
    """The column of the anonymous id."""
    user_id: str = Columns().user_id
    """The column of the user that the event itself named."""
    time: str = Columns().time
    """The column of the event's own time."""
    trait: str | None = Columns().trait
    """The columns of traits; `{}` stands for the trait's name in snake case."""
    event_type: str | None = Columns().event_type
    """The column of the event's type; written by `--load` alone."""
    name: str | None = Columns().name
    """The column of the name of a track, page or screen; written by `--load` alone."""


class PerTable(_Table):
    """`[tables.<name>]`: what is kept and compared for one table, where it differs."""

    references: References | None = None
    """As the setting of the same name."""
    supersede: Supersede | None = None
    """As the setting of the same name."""


class FormatTable(_Table):
    """`[format]`: where the parts of an event are found; alternatives, the first that exists."""

    base: str | None = None
    """A built-in format whose paths stand where none are given here."""
    message_id: Words = ()
    """Needed, here or in the base."""
    time: Words = ()
    """Needed, here or in the base. A time without a zone is UTC."""
    type: Words = ()
    """The event's type; without a path every event is of type `event`."""
    anonymous_id: Words = ()
    """The device or browser."""
    user_id: Words = ()
    """The user; more known identifiers are `[[identifiers]]`."""
    traits: Words = ()
    """Objects whose scalar members are traits of the user."""
    previous_id: Words = ()
    """The id that was used before, in an `alias`."""
    name: Words = ()
    """The name of a track, page or screen."""
    table: Words = ()
    """A table that the event itself chooses."""
    user_agent: Words = ()
    """What the bot filter looks at."""


class DestinationTable(_Table):
    """One `[[destinations]]`: a database that `recognition worker` brings updates to."""

    name: Annotated[str, Field(pattern=r"[a-z0-9_][a-z0-9_-]{0,62}")]
    """By it the graph remembers what was done. Another name is another destination."""
    url: Annotated[str, Field(repr=False)]
    """The URL of its sink; `kafka://host:9092/topic` hands the updates on to a topic as they are
    (several hosts with commas)."""
    options: Annotated[dict[str, Any], Field(repr=False)] = {}
    """What else the sink is told, as `sink_options`; of a topic: librdkafka's options."""
    secrets: dict[str, Place] = {}
    """Options that are secret, by name: where each of them is, `env:NAME` or `file:PATH`."""
    settle_seconds: Annotated[float, Field(ge=0, le=30 * 86_400)] | None = None
    """Instead of that of `[delivery]`."""


class BulkerTable(_Table):
    """`[bulker]`: destinations that Bulker knows already, as its own configuration has them."""

    source: str
    """Where Bulker's configuration is, written as in its `BULKER_CONFIG_SOURCE`: a YAML file (with
    `file://` or without), or `env://BULKER_DESTINATION` for the variables that begin so."""
    destinations: Words = ()
    """The ids of those that are brought up to date; none: all that it has."""
    skip_unsupported: bool = False
    """Whether destinations of which nothing can be updated (files, webhooks) are left out; else
    they are an error that lists them."""


class DeliveryTable(_Table):
    """`[delivery]`: how `recognition worker` brings updates to the destinations."""

    window: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """How many updates are applied in one window, at most."""
    every_seconds: Annotated[float, Field(ge=0.01, le=3600)] = 1.0
    """How long a window collects, from the beginning of the one before."""
    settle_seconds: Annotated[float, Field(ge=0, le=30 * 86_400)] = 600.0
    """After how long an update is applied again, because its rows may have been on their way:
    twice the batch period of the pipeline. 0: never, where rows and updates come in one order."""
    reapply: Literal["unmatched", "all"] = "unmatched"
    """Which updates are applied again after that: those that name a range of time, or messages
    whose rows were not all found; or all of them."""
    again_hours: Annotated[float, Field(ge=0, le=30 * 24)] | None = None
    """Until so long after its decision an update is kept, and then applied once more, for a
    pipeline that may write an old row again after hours. 0: never. Unset: 38, an hour longer than
    Bulker tries, where `[bulker]` has `deduplicate`; else 0."""
    patience_hours: Annotated[float, Field(ge=0)] = 24.0
    """How long an update waits for a table or column that is missing before it is given up."""


class _TopicsTable(_Table):
    servers: Annotated[str, Field(min_length=1)]
    """The brokers that are asked first: `host:port`, several with commas."""
    topics: Annotated[Words, Field(min_length=1)]
    """Their names; one that begins with `^` is a regular expression."""
    options: Annotated[
        dict[str, str | int | float | bool], Field(repr=False), AfterValidator(_refuse_secrets)
    ] = {}
    """Options of librdkafka, such as `security.protocol`, `sasl.mechanism` and `sasl.username`."""
    secrets: dict[str, Place] = {}
    """Its options that are secret, such as `sasl.password`: where each of them is, `env:NAME` or
    `file:PATH`."""


class KafkaTable(_TopicsTable):
    """`[worker.kafka]`: topics that events are taken from."""

    group: Annotated[str, Field(min_length=1)] = "recognition"
    """The consumer group. All workers of one graph share it."""
    inside: str | None = None
    """The key under which a message holds its event: `httpPayload` in Jitsu's topic
    `destination-messages`. Unset: the message is the event."""
    dead_letters: str | None = None
    """The topic for messages that cannot be read; it must exist. Unset: they go to `rejects`."""
    batch_size: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """How many messages are handed over at once, at most."""
    linger_seconds: Annotated[float, Field(ge=0.01, le=60)] = 0.5
    """How long a batch gathers."""


class UpdatesTable(_TopicsTable):
    """`[worker.updates]`: topics of updates, which others decided and this worker applies."""

    group: Annotated[str, Field(min_length=1)] = "recognition"
    """Each destination reads in a consumer group of its own: this, a hyphen, and its name."""
    dead_letters: str | None = None
    """The topic for messages that cannot be read or applied; it must exist. Unset: they go to
    `rejects`."""
    batch_size: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """How many updates are applied in one window, at most."""
    linger_seconds: Annotated[float, Field(ge=0.01, le=60)] = 1.0
    """How long a window gathers."""


class HttpTable(_Table):
    """`[worker.http]`: a port that the SDKs of Segment, RudderStack and Jitsu post events to."""

    keys: Place
    """Where the write keys that are let in are, `env:NAME` or `file:PATH`: words with blanks,
    commas or line ends between them."""
    host: str = "127.0.0.1"
    """The address to listen on. It speaks no TLS: anything but loopback belongs behind a proxy."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8080
    """The port."""
    origins: Words = ()
    """Web pages (`https://shop.example`) whose scripts may post; `*`: all. None: browsers may post
    from the receiver's own origin only."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 5 * 1024 * 1024
    """The largest body, packed and unpacked; larger ones are refused with 413."""
    max_waiting_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024 * 1024
    """How much may wait to be durable, unpacked; beyond it requests are refused with 429."""
    patience_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    """How long a request waits for its events to be durable; then it is answered with 503."""


class WorkerTable(_Table):
    """`[worker]`: where `recognition worker` finds events, and what it shows."""

    directories: Words = ()
    """Directories of event files; a file that was taken goes to `done` inside."""
    kafka: KafkaTable | None = None
    """Topics that events are taken from, a table `[worker.kafka]`; unset: none."""
    updates: UpdatesTable | None = None
    """Topics of updates that this worker applies to its destinations, a table `[worker.updates]`.
    Such a worker takes no events and opens no graph."""
    http: HttpTable | None = None
    """A port that events are posted to, a table `[worker.http]`; unset: none is opened."""
    rejects: str = "rejects.ndjson"
    """The file to which is added what could not be read as an event. It holds personal data."""
    future_hours: Annotated[float, Field(ge=0)] = 24.0
    """An event whose time lies further ahead is rejected, because its device's clock is wrong and
    its claim would stand above all that come. 0: none is."""
    past_days: Annotated[float, Field(ge=0)] = 3650.0
    """An event whose time lies further back is rejected. 0: none is."""
    metrics: Annotated[str | None, Field(pattern=r".+:\d+")] = None
    """Where metrics are served to Prometheus, for example `127.0.0.1:9464`; unset: nowhere."""

    @model_validator(mode="after")
    def _decides_or_applies(self) -> Self:
        if self.updates is not None and (self.directories or self.kafka or self.http):
            raise ValueError(
                "a worker takes events in, or applies the updates of topics: take out `updates`, or"
                " directories, kafka and http"
            )
        return self


class Settings(_Table):
    """Everything that can be set."""

    workspace: Annotated[str, Field(min_length=1, max_length=255)] = "default"
    """The isolation key: nothing is ever linked across two workspaces."""
    graph: Annotated[str, Field(repr=False)] = "sqlite:///recognition.db"
    """The URL of the graph: `sqlite:///path`, `mongodb://host/database` or `memory:`."""
    sink: Annotated[str | None, Field(repr=False)] = None
    """The URL of the sink. Without one, updates stay in the graph's outbox."""
    destinations: tuple[DestinationTable, ...] = ()
    """The destinations of `recognition worker`; where none is given, and no `[bulker]`, it is the
    sink alone, by the name `default`."""
    bulker: BulkerTable | None = None
    """Destinations that are read from Bulker's configuration, a table `[bulker]`, with their
    layout, key, time column and look-back. What is set here beside it stands above it."""
    delivery: DeliveryTable = DeliveryTable()
    """How they are served."""
    worker: WorkerTable = WorkerTable()
    """What a worker takes in, and shows."""
    sink_options: Annotated[dict[str, Any], Field(repr=False)] = {}
    """What else the sink is told, a table `[sink_options]`; the page of each database lists it."""
    policy: Policy = Policy.DEVICE_SPLIT
    """Who owns the events of a shared device."""
    lookback_days: Annotated[int, Field(ge=0, le=36500)] = 30
    """How many days a claim reaches back before its own time."""
    layout: str | LayoutTable = "segment-single-table"
    """Where the rows of an event live: a name, or a table `[layout]`."""
    target_column: str | None = None
    """The column that receives the owner; where nothing is said, the layout's user column."""
    traits: Words = ()
    """The traits that an update sets beside the user, for example `email`."""
    merge_traits: MergeTraits = MergeTraits.OVERWRITE
    """Whether a trait that the person never named empties what the event itself had."""
    references: References = References.IDS
    """Whether message ids and times are kept, so that an update can name its rows one by one."""
    supersede: Supersede = Supersede.AUTO
    """How it is known that a row holds what recognition wrote, so that it may change again."""
    tables: dict[str, PerTable] = {}
    """The last two for tables that differ."""
    identifiers: tuple[IdentifierTable, ...] = ()
    """More types of known identifiers, and changes to the built-in ones."""
    max_identifiers: Annotated[int, Field(ge=1)] = IdentityRules().max_identifiers
    """The most identifiers that one person may have; a link beyond them is refused and counted."""
    blocked: Words = ()
    """Values that never identify anybody, beside the built-in ones; any case."""
    blocked_patterns: Words = ()
    """Regular expressions of such values; they match the whole value."""
    hashed: Words = ()
    """The types of known identifiers whose values leave the process as keyed hashes only, for
    example `email`; neither `user_id` nor `anonymous_id`."""
    hash_key: Annotated[SecretStr | None, AfterValidator(_long_enough)] = None
    """The secret of these hashes, at least 16 characters, the same for all workers of a graph.
    Usually from the environment, as `RECOGNITION_HASH_KEY`."""
    bots: str | None = None
    """A regular expression of user agents to skip; empty: none. Unset: the built-in one."""
    format: str | FormatTable | None = None
    """How events are written: `segment`, `jitsu-classic`, `snowplow`, `flat`, or a table
    `[format]`; unset: known from each event by its keys."""
    batch_size: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """How many events are handled in one step, which is one transaction of the graph."""
    retention_days: Annotated[int, Field(ge=1)] | None = None
    """How many days message references are kept, at least `lookback_days`; unset: for good. Older
    ones are dropped at the end of each run, and once a day by a worker."""

    @model_validator(mode="after")
    def _keeps_what_a_claim_reaches(self) -> Self:
        if self.retention_days is not None and self.retention_days < self.lookback_days:
            raise ValueError(
                "retention_days is at least lookback_days: a claim could not reach the rows whose"
                " references are dropped"
            )
        return self

    @model_validator(mode="after")
    def _names_each_destination_once(self) -> Self:
        names = [destination.name for destination in self.destinations]
        if len(set(names)) < len(names):
            raise ValueError("two destinations have the same name")
        return self


def load_settings(
    arguments: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None
) -> Settings:
    """
    Put all sources together. Reads one file at most, and writes nothing.

    Args:
        arguments: By the names of the settings; ``None`` means not given.
        environ: Usually ``os.environ``.
        file: The file to read; ``None``: what ``RECOGNITION_CONFIG`` names, else `DEFAULT_FILE`
            where there is one.

    Raises:
        ConfigurationError: A key is unknown (the nearest known one is named), or a value is wrong.
            The text says where it was written, never what the value was.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = file or (Path(environ[f"{PREFIX}CONFIG"]) if f"{PREFIX}CONFIG" in environ else None)
    if path is not None or DEFAULT_FILE.exists():
        path = path or DEFAULT_FILE
        merged = _read_file(path)
        _refuse_unknown(merged, Settings, lambda keys: f"{path}: {'.'.join(keys)}")
        sources = dict.fromkeys(merged, str(path))
    for variable, keys, value in _read_environment(environ):
        _refuse_unknown(_nest(keys, value), Settings, _variable)
        _merge(merged, keys, value)
        sources[keys[0]] = variable
    for key, given in arguments.items():
        if given is not None:
            merged[key] = given
            sources[key] = f"--{key.replace('_', '-')}"
    try:
        return Settings.model_validate(merged)
    except ValidationError as exc:
        reasons = []
        for error in exc.errors(include_input=False, include_url=False):
            place = [str(part) for part in error["loc"]]
            where = [sources[place[0]], ".".join(place)] if place else []
            reasons.append(": ".join([*where, error["msg"].removeprefix("Value error, ")]))
        raise ConfigurationError("; ".join(reasons)) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{path} is not TOML: {exc}") from exc


def _read_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, list[str], Any]]:
    """Triples of the variable's name, the keys that it stands for, and its value."""
    for variable, text in sorted(environ.items()):
        if variable.startswith(PREFIX) and not _RESERVED.fullmatch(variable):
            value: Any = text
            if text.lstrip().startswith(("[", "{")):
                try:
                    value = json.loads(text)
                except ValueError:
                    value = text  # a regular expression may begin like this
            yield variable, variable.removeprefix(PREFIX).lower().split("__"), value


def _variable(keys: list[str]) -> str:
    return PREFIX + "__".join(keys).upper()


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys[1:]):
        value = {key: value}
    return {keys[0]: value}


def _merge(into: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(into.get(key), dict):
            into[key] = {}
        into = into[key]
    into[keys[-1]] = value


def _refuse_unknown(
    found: Mapping[str, Any], model: type[BaseModel], name: Callable[[list[str]], str]
) -> None:
    """Refuse the first key that the model does not have; ``name`` says how keys are written."""
    for keys, key, known in _unknown_keys(found, model, []):
        near = get_close_matches(key.lower(), known, n=1, cutoff=0.5)
        help = (
            f"the nearest known one is {name([*keys, near[0]])}"
            if near
            else f"known are {', '.join(known)}"
        )
        raise ConfigurationError(f"{name([*keys, key])} is unknown; {help}")


def _unknown_keys(
    found: Mapping[str, Any], model: type[BaseModel], above: list[str]
) -> Iterator[tuple[list[str], str, list[str]]]:
    for key, value in found.items():
        field = model.model_fields.get(key)
        if field is None:
            yield above, key, list(model.model_fields)
            continue
        table = _table_in(field.annotation)
        if table is None:
            continue
        if isinstance(value, list):
            tables = [([*above, key], item) for item in value]
        elif get_origin(field.annotation) is dict and isinstance(value, Mapping):
            tables = [([*above, key, name], item) for name, item in value.items()]
        else:
            tables = [([*above, key], value)]
        for place, item in tables:
            if isinstance(item, Mapping):
                yield from _unknown_keys(item, table, place)


def _table_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_table_in, get_args(annotation))), None)


def build_rules(settings: Settings, *, stamps: bool) -> Rules:
    """
    The rules that the settings say.

    Args:
        settings: What was read.
        stamps: Whether the rows are written from what the recognizer returns.

    Raises:
        ConfigurationError: Two settings contradict each other, or a name is unknown.
    """
    default = TableRules(references=settings.references, supersede=settings.supersede)
    _refuse_plain_traits(settings)
    try:
        return Rules(
            workspace=settings.workspace,
            attribution=AttributionRules(
                policy=settings.policy, lookback=settings.lookback_days * DAY
            ),
            identity=_build_identity(settings),
            layout=_build_layout(settings.layout),
            target_column=settings.target_column,
            traits=settings.traits,
            merge_traits=settings.merge_traits,
            stamps=stamps,
            default=default,
            tables={
                name: TableRules(
                    references=table.references or settings.references,
                    supersede=table.supersede or settings.supersede,
                )
                for name, table in settings.tables.items()
            },
        )
    except ValueError as exc:
        raise ConfigurationError(f"the settings contradict each other: {exc}") from exc


def _build_identity(settings: Settings) -> IdentityRules:
    default, key = IdentityRules(), settings.hash_key
    known, unique, lowered = list(default.known), set(default.unique), set(default.lowered)
    for identifier in settings.identifiers:
        if identifier.type not in known:
            known.append(identifier.type)
        for flag, types in ((identifier.unique, unique), (identifier.lower, lowered)):
            if flag is not None:
                (types.add if flag else types.discard)(identifier.type)
    return IdentityRules(
        known=tuple(known),
        unique=frozenset(unique),
        lowered=frozenset(lowered),
        max_identifiers=settings.max_identifiers,
        blocked=frozenset(settings.blocked),
        blocked_patterns=settings.blocked_patterns,
        hashed=frozenset(settings.hashed),
        # Bytes of the environment that are no text come as surrogates; as bytes they are a key.
        hash_key=None if key is None else key.get_secret_value().encode("utf-8", "surrogateescape"),
    )


def _refuse_plain_traits(settings: Settings) -> None:
    """A hashed type may be found in a trait of another name; the rules know its own name only."""
    if not settings.hashed or not settings.traits:
        return
    read = build_format(settings)
    for form in [read] if isinstance(read, Format) else read.values():
        between = form.separator or "."
        places = [between.join(place) + between for place in form.traits]
        for type in settings.hashed:
            for path in map(between.join, form.known.get(type, ())):
                for place in places:
                    trait = path.removeprefix(place)
                    if path.startswith(place) and trait in settings.traits:
                        raise ConfigurationError(
                            f"traits names {trait}, in which {type} is found, which is hashed:"
                            " graph and updates would hold the plain value. Take it out of traits,"
                            " or out of hashed. Nothing was written."
                        )


def _build_layout(layout: str | LayoutTable) -> Layout:
    if isinstance(layout, str):
        return layout_named(layout)
    columns = layout.model_dump()
    return single_table("configured", columns.pop("table"), Columns(**columns))


def build_format(settings: Settings) -> Format | Mapping[str, Format]:
    """
    How to read events: one format, or all built-in ones where each event shows its own.

    Raises:
        ConfigurationError: A format is unknown, or a path is none.
    """
    if settings.format is None:
        return {label: with_identifiers(form, settings) for label, form in FORMATS.items()}
    if isinstance(settings.format, str):
        return with_identifiers(_format_named(settings.format), settings)
    table = settings.format
    paths = {key: parse_paths(given) for key, given in table.model_dump(exclude={"base"}).items()}
    user_id = paths.pop("user_id")
    base = _format_named(table.base) if table.base is not None else None
    known = dict(base.known) if base else {}
    if user_id:
        known = {"user_id": user_id, **{k: p for k, p in known.items() if k != "user_id"}}
    changed: dict[str, Any] = {key: given for key, given in paths.items() if given}
    if base is not None:
        form = replace(base, known=known, **changed)
    else:
        form = Format(label="configured", known=known, **{"message_id": (), "time": (), **changed})
    return with_identifiers(form, settings)


def with_identifiers(form: Format, settings: Settings) -> Format:
    """The format, in which the `[[identifiers]]` of the settings are found too."""
    for identifier in settings.identifiers:
        if identifier.paths:
            form = form.with_known({identifier.type: identifier.paths})
        elif identifier.type not in form.known:
            form = form.with_identifying_traits([identifier.type])
    return form


def _format_named(label: str) -> Format:
    try:
        return FORMATS[label]
    except KeyError:
        known = ", ".join(FORMATS)
        raise ConfigurationError(f"format {label!r} is unknown; there are: {known}") from None


def build_bots(settings: Settings) -> re.Pattern[str] | None:
    """
    The user agents to skip; ``None``: none.

    Raises:
        ConfigurationError: It is no regular expression.
    """
    if settings.bots is None:
        return BOTS
    try:
        return re.compile(settings.bots, re.IGNORECASE) if settings.bots else None
    except re.error as exc:
        raise ConfigurationError(f"bots is not a regular expression: {exc}") from exc


def read_secret(place: str, environ: Mapping[str, str]) -> str:
    """
    What stands at the place, without white space around it.

    Args:
        place: ``env:NAME`` or ``file:PATH``.
        environ: Usually ``os.environ``.

    Raises:
        ConfigurationError: There is nothing; the text names the place.
    """
    kind, _, name = place.partition(":")
    try:
        found = environ[name] if kind == "env" else Path(name).read_text(encoding="utf-8")
    except KeyError:
        raise ConfigurationError(f"{place}: there is no such variable") from None
    except (OSError, UnicodeDecodeError) as exc:
        told = getattr(exc, "strerror", None) or "it is not UTF-8"
        raise ConfigurationError(f"{place} cannot be read: {told}") from None
    if not found.strip():
        raise ConfigurationError(f"{place} is empty")
    return found.strip()


def hide_password(url: str) -> str:
    """The URL as it may be shown: without its password, and without secrets in its query."""
    url = re.sub(r"(//[^/@:]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:password|secret|token|key)[^=&]*=)[^&]*", r"\1***", url)


def hide_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a sink as they may be shown: without what looks like a secret by its name."""
    return {
        name: hide_secrets(value)
        if isinstance(value, Mapping)
        else "***"
        if re.search(r"(?i)password|secret|token|key|passphrase", name)
        else value
        for name, value in options.items()
    }


def render_reference() -> str:
    """All settings as Markdown, made from this file: the page `docs/configuration.md` holds it."""
    parts = [_render_table("Settings", Settings)]
    for title, table in (
        ("`[[destinations]]`", DestinationTable),
        ("`[bulker]`", BulkerTable),
        ("`[delivery]`", DeliveryTable),
        ("`[worker]`", WorkerTable),
        ("`[worker.kafka]`", KafkaTable),
        ("`[worker.updates]`", UpdatesTable),
        ("`[worker.http]`", HttpTable),
        ("`[[identifiers]]`", IdentifierTable),
        ("`[format]`", FormatTable),
        ("`[layout]`", LayoutTable),
        ("`[tables.<name>]`", PerTable),
    ):
        parts.append(_render_table(title, table))
    return "\n".join(parts)


def _render_table(title: str, model: type[BaseModel]) -> str:
    lines = [f"## {title}", "", "| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split())
        choices = _choices(field.annotation)
        if choices:
            meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        meaning += _range(field)
        lines.append(f"| `{key}` | {render_default(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def _range(field: FieldInfo) -> str:
    found = {
        name: f"{getattr(rule, name):,}"
        for rule in field.metadata
        for name in ("gt", "ge", "le")
        if getattr(rule, name, None) is not None
    }
    match found:
        case {"ge": low, "le": high}:
            return f" From {low} to {high}."
        case {"gt": low, "le": high}:
            return f" More than {low}, at most {high}."
        case {"le": high}:
            return f" At most {high}."
        case {"gt": low}:
            return f" More than {low}."
        case {"ge": low} if low != "0":
            return f" At least {low}."
    return ""


def render_default(field: FieldInfo) -> str:
    """The default of a setting as the reference shows it."""
    if field.is_required():
        return "needed"
    if isinstance(field.default, _Table):
        return "see below"
    return "unset" if field.default is None else f"`{json.dumps(field.default)}`"


def _choices(annotation: Any) -> list[str]:
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return [choice.value for choice in annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]
