"""Settings: where they come from, which one wins, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from traceback import format_exception

import pytest
from pydantic import ValidationError

from recognition.attribution import DAY, Policy
from recognition.config import (
    Settings,
    build_bots,
    build_format,
    build_rules,
    hide_password,
    load_settings,
    render_reference,
)
from recognition.errors import ConfigurationError, UnsupportedPolicyError
from recognition.events import BOTS, is_bot, parse_event
from recognition.rules import References, Supersede, TableRules

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_any_source_the_defaults_stand() -> None:
    """No file and no variable: the defaults, and they make valid rules."""
    settings = load_settings({}, {})

    assert settings == Settings()
    assert build_rules(settings, stamps=True).attribution.lookback == 30 * DAY


def test_arguments_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    """Each source wins over those before it, key by key."""
    file = tmp_path / "some.toml"
    file.write_text('workspace = "file"\npolicy = "last_login"\nlookback_days = 1\n')
    environ = {"RECOGNITION_POLICY": "first_claim", "RECOGNITION_LOOKBACK_DAYS": "2"}

    settings = load_settings({"lookback_days": 3, "sink": None}, environ, file)

    assert settings.workspace == "file"
    assert settings.policy is Policy.FIRST_CLAIM
    assert settings.lookback_days == 3
    assert settings.batch_size == 1000


def test_the_file_of_the_directory_is_read_unless_another_is_named(tmp_path: Path) -> None:
    """`recognition.toml` is read where it is there; `RECOGNITION_CONFIG` names another."""
    (tmp_path / "recognition.toml").write_text('workspace = "here"')
    (tmp_path / "other.toml").write_text('workspace = "there"')

    here = load_settings({}, {})
    there = load_settings({}, {"RECOGNITION_CONFIG": "other.toml"})

    assert (here.workspace, there.workspace) == ("here", "there")


def test_tables_and_lists_come_from_the_environment() -> None:
    """Two underscores lead into a table; a list is JSON, or words with commas."""
    settings = load_settings(
        {},
        {
            "RECOGNITION_LAYOUT__TABLE": "visits",
            "RECOGNITION_LAYOUT__ID": "event_id",
            "RECOGNITION_TRAITS": "email, plan",
            "RECOGNITION_BLOCKED_PATTERNS": "[0-9]{2},test-.*",
            "RECOGNITION_IDENTIFIERS": '[{"type": "account", "paths": ["traits.account"]}]',
            "RECOGNITION_TEST_POSTGRESQL": "not a setting",
        },
    )
    rules = build_rules(settings, stamps=True)

    assert rules.layout.table == "visits"
    assert rules.layout.columns.id == "event_id"
    assert rules.layout.columns.anonymous_id == "anonymous_id"
    assert rules.traits == ("email", "plan")
    assert rules.identity.blocked_patterns == ("[0-9]{2}", "test-.*")
    assert rules.identity.known == ("user_id", "email", "phone", "account")


def test_an_environment_variable_changes_one_key_of_a_table_of_the_file(tmp_path: Path) -> None:
    """A variable for a table's key leaves the table's other keys as the file has them."""
    (tmp_path / "recognition.toml").write_text('[layout]\ntable = "visits"\nid = "event_id"\n')

    settings = load_settings({}, {"RECOGNITION_LAYOUT__ID": "message"})
    columns = build_rules(settings, stamps=True).layout.columns

    assert columns.id == "message"
    assert build_rules(settings, stamps=True).layout.table == "visits"


def test_all_settings_reach_the_rules(tmp_path: Path) -> None:
    """What the file says is what the rules hold."""
    (tmp_path / "recognition.toml").write_text(
        """
        workspace = "w1"
        policy = "since_last_identify"
        lookback_days = 7
        layout = "jitsu-legacy"
        target_column = "stitched_user_id"
        traits = ["email"]
        references = "none"
        max_identifiers = 5
        blocked = ["Demo"]

        [[identifiers]]
        type = "email"
        unique = true

        [[identifiers]]
        type = "account"
        lower = true

        [tables.orders]
        references = "ids"
        supersede = "references"
        """
    )

    rules = build_rules(load_settings({}, {}), stamps=False)

    assert rules.workspace == "w1"
    assert rules.attribution.policy is Policy.SINCE_LAST_IDENTIFY
    assert rules.attribution.lookback == 7 * DAY
    assert rules.layout.name == "jitsu-legacy"
    assert rules.target_column == "stitched_user_id"
    assert rules.traits == ("email",)
    assert rules.stamps is False
    assert rules.default.references is References.NONE
    assert rules.tables == {
        "orders": TableRules(references=References.IDS, supersede=Supersede.REFERENCES)
    }
    assert rules.identity.known == ("user_id", "email", "phone", "account")
    assert rules.identity.unique == {"user_id", "email"}
    assert rules.identity.lowered == {"email", "account"}
    assert rules.identity.max_identifiers == 5
    assert rules.identity.blocked == {"demo"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lookbackdays = 3", "recognition.toml: lookbackdays is unknown; the nearest known one is"
         " recognition.toml: lookback_days"),
        ("[layout]\ntabel = 'x'", "recognition.toml: layout.tabel is unknown"),
        ("[[identifiers]]\ntyp = 'x'", "recognition.toml: identifiers.type"),
        ("[tables.orders]\nreference = 'ids'", "recognition.toml: tables.orders.references"),
        ("zzz = 1", "known are workspace, graph, sink"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_told_the_nearest_known_one(tmp_path: Path, text: str, told: str) -> None:
    """An unknown key, at any depth, is an error that says where it is and what was meant."""
    (tmp_path / "recognition.toml").write_text(text)

    with pytest.raises(ConfigurationError) as caught:
        load_settings({}, {})

    assert told in str(caught.value)


def test_an_unknown_variable_is_told_the_nearest_known_one() -> None:
    """The same for the environment, in its own spelling."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings({}, {"RECOGNITION_LOOKBACK": "3"})

    assert str(caught.value) == (
        "RECOGNITION_LOOKBACK is unknown; the nearest known one is RECOGNITION_LOOKBACK_DAYS"
    )


@pytest.mark.parametrize(
    ("arguments", "environ", "told"),
    [
        ({"policy": "hunter2"}, {}, "--policy: policy: Input should be 'device_split'"),
        ({}, {"RECOGNITION_LOOKBACK_DAYS": "hunter2"}, "RECOGNITION_LOOKBACK_DAYS: lookback_days"),
        ({"lookback_days": -1}, {}, "--lookback-days: lookback_days: Input should be greater"),
    ],
)
def test_a_wrong_value_is_told_where_it_was_written_and_never_repeated(
    arguments: dict[str, object], environ: dict[str, str], told: str
) -> None:
    """An error names the place and the rule; the value may be a secret and stays away."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(arguments, environ)

    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["not toml =", "\udcff".encode("utf-8", "surrogateescape")])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, text: str | bytes) -> None:
    """Broken TOML and broken UTF-8 are configuration errors that name the file."""
    (tmp_path / "x.toml").write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ConfigurationError, match=r"x\.toml"):
        load_settings({}, {}, tmp_path / "x.toml")


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """A file that was asked for must be there."""
    with pytest.raises(ConfigurationError, match=r"missing\.toml cannot be read"):
        load_settings({}, {}, tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"layout": "segments"}, "segment-single-table"),
        ({"blocked_patterns": ("(",)}, "blocked pattern"),
        ({"references": "none", "supersede": "references"}, "needs references = ids"),
    ],
)
def test_settings_that_cannot_be_are_configuration_errors(
    settings: dict[str, object], told: str
) -> None:
    """What only the rules can refuse comes out as a configuration error too."""
    with pytest.raises(ConfigurationError, match=told):
        build_rules(Settings.model_validate(settings), stamps=True)


def test_every_built_in_format_finds_the_configured_identifiers() -> None:
    """Without a format each event shows its own, and more identifiers are found in all of them."""
    settings = Settings.model_validate(
        {"identifiers": [{"type": "account"}, {"type": "email", "paths": ["properties.mail"]}]}
    )
    read = build_format(settings)

    segment = parse_event(
        {
            "messageId": "m1",
            "timestamp": "2026-01-01",
            "type": "track",
            "traits": {"account": "acme"},
            "properties": {"mail": "a@example.com"},
        },
        read,
    )
    flat = parse_event(
        {"message_id": "m2", "timestamp": 1, "type": "track", "context_traits_account": "acme"},
        read,
    )

    assert segment.known == (("email", "a@example.com"), ("account", "acme"))
    assert flat.known == (("account", "acme"),)


def test_a_format_of_ones_own_has_its_own_paths() -> None:
    """Alternatives in order; what is not named comes from the base, where there is one."""
    alone = Settings.model_validate(
        {"format": {"message_id": "id", "time": ["at", "seen.at"], "user_id": "who"}}
    )
    based = Settings.model_validate({"format": {"base": "segment", "anonymous_id": "cookie"}})

    own = parse_event({"id": 7, "seen": {"at": 1}, "who": "u1"}, build_format(alone))
    changed = parse_event(
        {"messageId": "m", "timestamp": 1, "type": "Page", "cookie": "c", "userId": "u2"},
        build_format(based),
    )

    assert (own.message_id, own.time, own.known) == ("7", 1_000_000, (("user_id", "u1"),))
    assert (changed.anonymous_id, changed.known) == ("c", (("user_id", "u2"),))


@pytest.mark.parametrize(
    ("format", "told"),
    [
        ("segmnt", "there are: segment"),
        ({"base": "segmnt"}, "there are: segment"),
        ({"message_id": "id"}, "one for the time"),
        ({"message_id": "a..b", "time": "t"}, "is not a path"),
    ],
)
def test_a_format_that_cannot_be_is_a_configuration_error(format: object, told: str) -> None:
    """An unknown format, a missing path and a broken one are told."""
    with pytest.raises(ConfigurationError, match=told):
        build_format(Settings.model_validate({"format": format}))


def test_bots_are_the_built_in_ones_or_ones_own_or_none() -> None:
    """Unset, a pattern and the empty text are three different things."""
    own = build_bots(Settings(bots="^probe/"))

    assert build_bots(Settings()) is BOTS
    assert own is not None
    assert is_bot("Probe/1.0", own)
    assert build_bots(Settings(bots="")) is None
    with pytest.raises(ConfigurationError, match="bots"):
        build_bots(Settings(bots="("))


def test_a_policy_that_the_table_cannot_support_says_what_to_add() -> None:
    """Moving rows between people needs a way to know which rows recognition wrote."""
    settings = Settings(policy=Policy.LAST_LOGIN, references=References.NONE)

    with pytest.raises(UnsupportedPolicyError, match="target_column"):
        build_rules(settings, stamps=True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///graph.db", "sqlite:///graph.db"),
        ("redshift://ann:pa:ss@w/rd@host:5439/db", "redshift://ann:***@host:5439/db"),
        ("x://host/db?password=a&warehouse=w&Token=b", "x://host/db?password=***&warehouse=w&Token=***"),
    ],
)  # fmt: skip
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    """Passwords and secret parameters are hidden, and nothing else."""
    assert hide_password(url) == shown


def test_settings_print_without_urls() -> None:
    """A URL may hold a password, so settings do not print theirs."""
    settings = Settings(graph="x://ann:hunter2@h/g", sink="x://ann:hunter2@h/s")

    assert "hunter2" not in repr(settings)


KEY = "an example key of 28 letters"


def test_the_hash_key_comes_from_the_environment() -> None:
    """What is hashed reaches the rules, with the key as bytes; nothing that prints shows it."""
    settings = load_settings(
        {}, {"RECOGNITION_HASHED": "email, phone", "RECOGNITION_HASH_KEY": KEY}
    )
    identity = build_rules(settings, stamps=True).identity

    assert identity.hashed == {"email", "phone"}
    assert identity.hash_key == KEY.encode()
    for shown in (repr(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert KEY not in shown


def test_a_hash_key_of_any_bytes_is_taken() -> None:
    """A variable may hold bytes that are no text; they are the key as they are."""
    raw = bytes(range(0xE0, 0x100))
    environ = {"RECOGNITION_HASH_KEY": raw.decode("utf-8", "surrogateescape")}

    assert build_rules(load_settings({}, environ), stamps=True).identity.hash_key == raw


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"HASH_KEY": KEY[:15]}, "RECOGNITION_HASH_KEY: hash_key: a key has at least 16"),
        ({"HASH_KEY": ""}, "RECOGNITION_HASH_KEY: hash_key: a key has at least 16"),
        ({"HASH_KEY": f'["{KEY}"]'}, "RECOGNITION_HASH_KEY: hash_key: Input should be a valid"),
        ({"HASH_KEY": KEY, "LOOKBACK_DAYS": "-1"}, "RECOGNITION_LOOKBACK_DAYS"),
        ({"HASH_KEY": KEY, "RETENTION_DAYS": "1"}, "at least lookback_days"),
        ({"HASHED": "email"}, "there is no hash_key"),
        ({"HASHED": "user_id", "HASH_KEY": KEY}, "user_id cannot be hashed"),
        ({"HASHED": "anonymous_id", "HASH_KEY": KEY}, "anonymous_id cannot be hashed"),
        ({"HASHED": "e-mail", "HASH_KEY": KEY}, "not known: ['e-mail']"),
        ({"HASHED": "email", "HASH_KEY": KEY, "TRAITS": "email"}, "traits names email"),
    ],
)
def test_a_wrong_hash_setting_is_told_without_the_key(environ: dict[str, str], told: str) -> None:
    """Each says what is needed, and no error shows a part of the key."""
    with pytest.raises(ConfigurationError) as caught:
        build_rules(
            load_settings({}, {f"RECOGNITION_{key}": value for key, value in environ.items()}),
            stamps=True,
        )

    assert told in str(caught.value)
    assert KEY[:15] not in "".join(format_exception(caught.value))


def test_a_file_that_is_not_toml_keeps_its_key(tmp_path: Path) -> None:
    """A key without quotes is a mistake that is told without it; so is one of another type."""
    for text in (f"hash_key = {KEY}", f'hash_key = "{KEY}', f'hash_key = {{ a = "{KEY}" }}'):
        (tmp_path / "recognition.toml").write_text(text)

        with pytest.raises(ConfigurationError) as caught:
            load_settings({}, {})
        assert KEY[:15] not in "".join(format_exception(caught.value))


def test_a_settings_object_refuses_without_its_input() -> None:
    """Whoever makes settings in Python is not shown the key either."""
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"hash_key": KEY, "retention_days": 1, "lookback_days": 7})

    assert KEY[:15] not in str(caught.value)


@pytest.mark.parametrize(
    ("identifier", "format", "trait"),
    [
        ({"type": "email", "paths": ["traits.mail"]}, "segment", "mail"),
        ({"type": "email", "paths": ["traits.mail"]}, None, "mail"),
        ({"type": "email", "paths": ["context_traits_mail"]}, "flat", "mail"),
        ({"type": "email", "paths": ["/user/mail"]}, "jitsu-classic", "mail"),
        ({"type": "email", "paths": ["who.mail"]}, {"base": "segment", "traits": "who"}, "mail"),
    ],
)
def test_a_trait_in_which_a_hashed_type_is_found_is_refused(
    identifier: dict[str, object], format: object, trait: str
) -> None:
    """A trait of any name leaves in plain, so none may be where a hashed type is looked for."""
    given = {"format": format, "identifiers": [identifier], "hashed": "email", "hash_key": KEY}

    with pytest.raises(ConfigurationError, match=f"traits names {trait}, in which email is found"):
        build_rules(Settings.model_validate({**given, "traits": ["plan", trait]}), stamps=True)
    assert build_rules(Settings.model_validate({**given, "traits": ["plan"]}), stamps=True)


def test_references_are_kept_for_as_long_as_a_claim_reaches_back() -> None:
    """Shorter would leave rows behind that nobody could name any more."""
    with pytest.raises(ConfigurationError, match="at least lookback_days"):
        load_settings({}, {"RECOGNITION_RETENTION_DAYS": "7"})

    assert load_settings({"lookback_days": 7}, {"RECOGNITION_RETENTION_DAYS": "7"})


def test_every_setting_is_described() -> None:
    """No setting without a sentence on what it means."""
    missing = [key for key, field in Settings.model_fields.items() if not field.description]

    assert missing == []


def test_the_reference_page_is_what_the_code_says() -> None:
    """docs/configuration.md holds the generated tables; `recognition config --reference`."""
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")

    assert render_reference() in page
