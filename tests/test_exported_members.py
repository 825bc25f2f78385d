"""The public names, pinned: a change here is a change for everybody."""

from __future__ import annotations

import recognition

PUBLIC = [
    "Applied",
    "AttributionRules",
    "Between",
    "Capabilities",
    "Cause",
    "Columns",
    "ConfigurationError",
    "Delivered",
    "Deliverer",
    "Destination",
    "Empty",
    "Equals",
    "Event",
    "EventError",
    "Explanation",
    "Format",
    "Graph",
    "GraphError",
    "GraphReadOnlyError",
    "GraphSchemaError",
    "GraphStats",
    "GraphUnavailableError",
    "Identifier",
    "IdentityRules",
    "InputError",
    "Layout",
    "MergeTraits",
    "MessageError",
    "Messages",
    "MissingDependencyError",
    "OneOf",
    "OutcomeUnknownError",
    "Owner",
    "Plan",
    "Policy",
    "Receipt",
    "Recognition",
    "RecognitionError",
    "Recognizer",
    "References",
    "Reject",
    "Rules",
    "Served",
    "Sink",
    "SinkError",
    "SinkReadOnlyError",
    "SinkUnavailableError",
    "SourceError",
    "Step",
    "Supersede",
    "TableError",
    "TableRules",
    "UnknownSchemeError",
    "UnsupportedPolicyError",
    "UpdateByCriteria",
    "ValueRefusedError",
    "__version__",
    "deliver",
    "installed_schemes",
    "json_schema",
    "layout_named",
    "open_graph",
    "open_sink",
    "parse_event",
    "parse_update",
    "plan_updates",
    "read_events",
    "read_updates",
]


def test_the_public_names_are_these() -> None:
    """Nothing is added to or taken from the public names without changing this list."""
    assert sorted(recognition.__all__) == sorted(PUBLIC)


def test_every_public_name_exists() -> None:
    """What is listed can be imported."""
    assert [name for name in recognition.__all__ if not hasattr(recognition, name)] == []


def test_nothing_else_is_public() -> None:
    """What is not listed is a module of the package, or private."""
    extra = {
        name
        for name, value in vars(recognition).items()
        if not name.startswith("_") and name not in PUBLIC and type(value).__name__ != "module"
    }

    assert extra == set()


def test_public_errors_are_in_one_tree() -> None:
    """Catching the root catches every error of the library."""
    errors = [getattr(recognition, name) for name in PUBLIC if name.endswith("Error")]

    assert all(issubclass(error, recognition.RecognitionError) for error in errors)


def test_every_public_name_is_explained() -> None:
    """Each public class and function has a docstring of its own."""
    silent = [
        name for name in PUBLIC if name != "__version__" and not getattr(recognition, name).__doc__
    ]

    assert silent == []
