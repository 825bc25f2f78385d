"""
Retroactive user recognition at scale: when a visitor is identified, the earlier rows follow.

The public names, nothing else. Importing this loads no driver.
"""

from recognition.attribution import AttributionRules, Policy
from recognition.delivery import Delivered, Deliverer, Destination, Served, deliver
from recognition.errors import (
    ConfigurationError,
    EventError,
    GraphError,
    GraphReadOnlyError,
    GraphSchemaError,
    GraphUnavailableError,
    InputError,
    MessageError,
    MissingDependencyError,
    OutcomeUnknownError,
    RecognitionError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    SourceError,
    TableError,
    UnknownSchemeError,
    UnsupportedPolicyError,
    ValueRefusedError,
)
from recognition.events import Event, Format, Identifier, Reject, parse_event, read_events
from recognition.graph import Explanation, Graph, GraphStats, Owner, Receipt, open_graph
from recognition.identity import IdentityRules
from recognition.layouts import Columns, Layout, layout_named
from recognition.messages import (
    Between,
    Cause,
    Empty,
    Equals,
    Messages,
    OneOf,
    UpdateByCriteria,
    json_schema,
    parse_update,
    read_updates,
)
from recognition.planner import Plan, Step, plan_updates
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import MergeTraits, References, Rules, Supersede, TableRules
from recognition.sinks import Applied, Capabilities, Sink, installed_schemes, open_sink

__version__ = "0.1.0"

__all__ = [
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
