"""How one workspace is decided: what may be combined, and what the refusals say."""

from __future__ import annotations

from typing import Any

import pytest

from recognition.attribution import AttributionRules, Policy
from recognition.errors import ConfigurationError, UnsupportedPolicyError
from recognition.identity import IdentityRules
from recognition.layouts import layout_named
from recognition.rules import MergeTraits, References, Rules, Supersede, TableRules

NOTHING_KEPT = TableRules(references=References.NONE)


def with_policy(policy: Policy, **options: Any) -> Rules:
    return Rules(attribution=AttributionRules(policy=policy), **options)


def test_the_defaults_hold_together() -> None:
    """Without any setting: device split, references, the layout's user column."""
    rules = Rules()

    assert rules.attribution.policy is Policy.DEVICE_SPLIT
    assert rules.target_of("events") == "user_id"
    assert rules.supersede_of("events") is Supersede.REFERENCES


@pytest.mark.parametrize("policy", Policy)
def test_a_table_that_cannot_keep_a_policy_is_refused(policy: Policy) -> None:
    """Without references, version and own column nothing tells recognised rows apart."""
    with pytest.raises(UnsupportedPolicyError):
        with_policy(policy, default=NOTHING_KEPT)


@pytest.mark.parametrize(
    "advice", ["references = ids", "target_column", "recognition_version BIGINT", "Nothing was"]
)
def test_the_refusal_says_what_to_add(advice: str) -> None:
    """The text has each of the ways out, and that nothing was written."""
    with pytest.raises(UnsupportedPolicyError, match=advice):
        with_policy(Policy.LAST_LOGIN, default=NOTHING_KEPT)


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_column": "stitched_user_id", "default": NOTHING_KEPT},
        {"default": TableRules(references=References.NONE, supersede=Supersede.VERSION)},
        {"default": TableRules(supersede=Supersede.VERSION)},
    ],
)
def test_each_way_out_is_taken(policy: Policy, options: dict[str, Any]) -> None:
    """What the refusal advises is accepted, under every policy."""
    assert with_policy(policy, **options).attribution.policy is policy


def test_the_refusal_names_the_table() -> None:
    """One table among many is refused by its name."""
    with pytest.raises(UnsupportedPolicyError, match="table pages"):
        Rules(tables={"pages": NOTHING_KEPT})


def test_superseding_by_references_needs_references() -> None:
    """Two settings of a table that contradict each other are refused."""
    contradiction = TableRules(references=References.NONE, supersede=Supersede.REFERENCES)

    with pytest.raises(ConfigurationError, match="needs references = ids"):
        Rules(default=contradiction)


def test_superseding_by_column_needs_a_column() -> None:
    """Whole spans are never written into the column that the pipeline writes."""
    with pytest.raises(ConfigurationError, match="target_column of its own"):
        Rules(default=TableRules(references=References.NONE, supersede=Supersede.COLUMN))


@pytest.mark.parametrize("trait", ["email", "Email", "EMAIL", "accountId", "account_id"])
def test_a_hashed_type_is_no_trait(trait: str) -> None:
    """A trait that is a hashed type would be written in plain, however it is spelled."""
    identity = IdentityRules(
        known=("user_id", "email", "account_id"),
        hashed=frozenset({"email", "account_id"}),
        hash_key=bytes(16),
    )

    with pytest.raises(ConfigurationError, match=f"traits names {trait}, which is hashed"):
        Rules(identity=identity, traits=("plan", trait))
    assert Rules(identity=identity, traits=("plan", "phone")).traits == ("plan", "phone")


@pytest.mark.parametrize("workspace", ["", "  "])
def test_a_workspace_has_a_name(workspace: str) -> None:
    """Every identifier lies inside a workspace."""
    with pytest.raises(ConfigurationError, match="workspace"):
        Rules(workspace=workspace)


@pytest.mark.parametrize(
    "options", [{"references": "some"}, {"supersede": "maybe"}], ids=["references", "supersede"]
)
def test_an_unknown_choice_is_refused(options: dict[str, Any]) -> None:
    """A choice is one of the list."""
    with pytest.raises(ValueError, match="is not a valid"):
        TableRules(**options)


@pytest.mark.parametrize(("target", "own"), [(None, False), ("user_id", False), ("owner", True)])
def test_only_another_column_is_an_own_column(target: str | None, own: bool) -> None:
    """Naming the layout's user column is like naming none."""
    assert Rules(target_column=target).has_own_column is own


def test_the_user_column_is_that_of_the_table() -> None:
    """Without a target column the owner goes where the layout has its user."""
    rules = Rules(layout=layout_named("passthrough"))

    assert rules.target_of("events") == "userId"


def test_one_table_may_differ() -> None:
    """What is kept can be chosen table by table."""
    rules = Rules(
        tables={"pages": TableRules(references=References.NONE, supersede=Supersede.VERSION)}
    )

    assert rules.keeps_references("events")
    assert not rules.keeps_references("pages")
    assert rules.supersede_of("pages") is Supersede.VERSION


@pytest.mark.parametrize(
    ("policy", "target", "follow"),
    [
        (Policy.LAST_LOGIN, "owner", True),
        (Policy.LAST_LOGIN, None, False),
        (Policy.DEVICE_SPLIT, "owner", False),
        (Policy.FIRST_CLAIM, "owner", False),
        (Policy.SINCE_LAST_IDENTIFY, "owner", False),
    ],
)
def test_identified_rows_follow_the_device_in_one_case_only(
    policy: Policy, target: str | None, follow: bool
) -> None:
    """Only the last login, into a column of its own, takes rows of identified people."""
    assert with_policy(policy, target_column=target).identified_follow_device is follow


def test_the_values_of_an_owner_are_the_target_and_the_traits() -> None:
    """An update sets the owner and the traits that the person named."""
    rules = Rules(traits=("firstName", "plan"))

    assert rules.values_of("events", "u1", ("Ann", "pro")) == {
        "user_id": "u1",
        "context_traits_first_name": "Ann",
        "context_traits_plan": "pro",
    }


def test_the_values_of_nobody_are_empty() -> None:
    """A row that is taken back loses the traits with the owner."""
    rules = Rules(traits=("plan",))

    assert rules.values_of("events", None, ()) == {"user_id": None, "context_traits_plan": None}


def test_coalescing_leaves_away_what_the_first_owner_never_named() -> None:
    """Only where the row had no owner before, and never of nobody's row."""
    rules = Rules(traits=("plan",), merge_traits=MergeTraits.COALESCE)
    emptied = {"user_id": "u1", "context_traits_plan": None}

    assert rules.values_of("events", "u1", (None,), first=True) == {"user_id": "u1"}
    assert rules.values_of("events", "u1", (), first=True) == {"user_id": "u1"}
    assert rules.values_of("events", "u1", (None,)) == emptied
    assert rules.values_of("events", None, (), first=True) == {**emptied, "user_id": None}
    assert Rules(traits=("plan",)).values_of("events", "u1", (None,), first=True) == emptied


def test_a_table_without_trait_columns_gets_none() -> None:
    """The rows of ``groups`` receive the owner alone."""
    rules = Rules(layout=layout_named("segment"), traits=("plan",))

    assert rules.values_of("groups", "u1", ("pro",)) == {"user_id": "u1"}
