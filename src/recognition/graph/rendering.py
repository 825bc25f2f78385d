"""
How a picture of the graph looks: as text, JSON, Mermaid, DOT, or a page of its own.

It decides nothing and leaves nothing out but where it says so. Every value may come from a stranger
who wrote it into an event: each goes through the one function that makes it harmless in its format.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

from recognition.attribution import BEGINNING, DAY, END
from recognition.events import Identifier, render_time
from recognition.graph.explaining import LinkReason
from recognition.graph.showing import Device, DeviceClaim, DeviceSpan, Picture

#: Backgrounds of owners and what is written on them: the palette of Okabe and Ito
#: (https://jfly.uni-koeln.de/color/), which people with any colour vision tell apart. After the
#: last one the first comes again; every owner has a number and a name beside its colour.
COLOURS = (
    ("#56B4E9", "#000000"),
    ("#E69F00", "#000000"),
    ("#009E73", "#000000"),
    ("#F0E442", "#000000"),
    ("#CC79A7", "#000000"),
    ("#0072B2", "#FFFFFF"),
    ("#D55E00", "#000000"),
)
NOBODY = ("#E5E5E5", "#000000")

#: A drawing of more shows nothing to anybody: identifiers of those asked about, devices, others.
MOST_NODES = (80, 60, 60)
#: Mermaid refuses more (https://mermaid.js.org/config/schema-docs/config.html, maxEdges).
MOST_EDGES = 500

#: Mermaid refuses a longer text, in characters (the same page, maxTextSize).
MERMAID_MOST = 50_000

_LABEL = 60  # characters of a value in a drawing; tables have all of it
_BOX = 24  # as many are seen in its box on a page; a click shows the label
_SPANS_IN_LABEL = 5

_REFUSED = {
    "unique": "refused: a person has one value of this type, and would have two",
    "limit": "refused: the person would have more identifiers than are allowed",
    "unlinked": "unlinked by hand, for good",
}
_KINDS = {"seen": "seen on one event", "alias": "an alias"}


def render(picture: Picture, format: str) -> str:
    """
    The whole document, with a newline at its end.

    Args:
        picture: From `recognition.graph.showing.show`.
        format: One of `FORMATS`.
    """
    return FORMATS[format](picture)


# ------------------------------------------------------------------------------------------ words


def _when(time: int) -> str:
    return render_time(time).replace(".000000Z", "Z")


def _span_times(span: DeviceSpan) -> str:
    start = "" if span.start == BEGINNING else f"from {_when(span.start)}"
    end = "" if span.end == END else f"until {_when(span.end)}"
    return f"{start} {end}".strip() or "at all times"


def _span_owner(span: DeviceSpan) -> str:
    return "nobody" if span.owner is None else ":".join(span.owner)


def _provenance(link: LinkReason) -> str:
    """Where a link comes from, and why it does not hold where it does not."""
    if link.time == END:
        return f"never seen; {_REFUSED[link.refused]}"
    seen = f"{_KINDS[link.kind]}: message {link.message_id}, {_when(link.time)}"
    return f"{seen}; {_REFUSED[link.refused]}" if link.refused else seen


def _claimant(claim: DeviceClaim) -> str:
    """Whom a claim names, and what became of it."""
    if claim.identifier is None:
        until = "" if claim.until is None else f" until {_when(claim.until)}"
        return f"nobody{until}: forgotten or released"
    told = ":".join(claim.identifier)
    if claim.person not in (None, claim.identifier):
        told += f" ({':'.join(claim.person)})" if claim.person else ""
    return f"{told}, without effect: unlinked by hand" if claim.unlinked else told


def _policy(picture: Picture) -> str:
    rules = picture.attribution
    return f"policy {rules.policy}, look-back {rules.lookback / DAY:g} days"


def _left_out(picture: Picture) -> list[str]:
    told = [
        f"{left.total - left.shown:,} of {left.total:,} {left.what} of {left.of} are left out"
        for left in picture.left_out
    ]
    if told:
        told.append(f"at most {picture.limit:,} of each kind are shown; --limit changes that")
    return told


def _printable(text: str) -> str:
    """Without characters that would do something to a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


# ------------------------------------------------------------------------------------------- text


def _text(picture: Picture) -> str:
    return "".join(f"{_printable(line)}\n" for line in _lines(picture))


def _lines(picture: Picture) -> Iterator[str]:
    subject = ":".join(picture.subject)
    if not picture.found:
        yield f"{subject}: never seen in workspace {picture.workspace}"
        return
    yield f"{subject} in workspace {picture.workspace}, {_policy(picture)}"
    for person in picture.persons:
        yield ""
        yield f"person {':'.join(person.canonical)}"
        for member in person.identifiers:
            seen = "never seen"
            if member.first_seen is not None:
                seen = f"seen first {_when(member.first_seen)}, message {member.message_id}"
            if member.seen_as != member.identifier.value:
                seen += f", as {member.seen_as}"
            yield f"  identifier {':'.join(member.identifier)}, {seen}"
        for link in person.links:
            yield f"  link {':'.join(link.a)} = {':'.join(link.b)}, {_provenance(link)}"
    for device in picture.devices:
        yield ""
        yield f"device {device.anonymous_id}"
        if device.released_until is not None:
            yield f"  released until {_when(device.released_until)}"
        for identifier in device.unlinked:
            yield f"  unlinked by hand from {':'.join(identifier)}, for good"
        for claim in device.claims:
            yield f"  claim {_when(claim.time)} by {_claimant(claim)}, message {claim.message_id}"
        for span in device.spans:
            yield f"  span {_span_times(span)}: {_span_owner(span)}"
        if not device.spans:
            yield "  nobody was ever seen on it"
    if picture.left_out:
        yield ""
        yield from _left_out(picture)


# ------------------------------------------------------------------------------------------- JSON


def _json(picture: Picture) -> str:
    return f"{json.dumps(_document(picture), ensure_ascii=False, indent=2)}\n"


def _document(picture: Picture) -> dict[str, Any]:
    """The shape that ``docs/graph-show.schema.json`` describes."""
    inside = {member.identifier for person in picture.persons for member in person.identifiers}
    return {
        "kind": "graph_picture",
        "version": 1,
        "workspace": picture.workspace,
        "policy": picture.attribution.policy.value,
        "lookback_days": picture.attribution.lookback / DAY,
        "subject": picture.subject._asdict(),
        "found": picture.found,
        "persons": [
            {
                "canonical": person.canonical._asdict(),
                "identifiers": [
                    {
                        **member.identifier._asdict(),
                        "seen_as": member.seen_as,
                        "first_seen": _bound(member.first_seen),
                        "message_id": member.message_id or None,
                    }
                    for member in person.identifiers
                ],
                "links": [
                    {
                        "a": link.a._asdict(),
                        "b": link.b._asdict(),
                        "kind": link.kind,
                        "time": _bound(link.time),
                        "message_id": link.message_id or None,
                        "refused": link.refused or None,
                    }
                    for link in person.links
                ],
            }
            for person in picture.persons
        ],
        "devices": [
            {
                "anonymous_id": device.anonymous_id,
                "released_until": _bound(device.released_until),
                "unlinked": [identifier._asdict() for identifier in device.unlinked],
                "claims": [
                    {
                        "time": render_time(claim.time),
                        "message_id": claim.message_id,
                        "identifier": claim.identifier and claim.identifier._asdict(),
                        "person": claim.person and claim.person._asdict(),
                        "unlinked": claim.unlinked,
                        "until": _bound(claim.until),
                    }
                    for claim in device.claims
                ],
                "spans": [
                    {
                        "start": _bound(span.start),
                        "end": _bound(span.end),
                        "owner": span.owner and span.owner._asdict(),
                    }
                    for span in device.spans
                ],
            }
            for device in picture.devices
        ],
        "others": [
            {"identifier": identifier._asdict(), "person": person._asdict()}
            for identifier, person in picture.person_of.items()
            if identifier not in inside
        ],
        "limit": picture.limit,
        "left_out": [left._asdict() for left in picture.left_out],
    }


def _bound(time: int | None) -> str | None:
    """A time, or nothing where there is no bound."""
    return None if time is None or time in (BEGINNING, END) else render_time(time)


# ---------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True, slots=True)
class _Node:
    """An identifier or a device; ``person`` is the place of its person in `Picture.people`."""

    name: str
    kind: str
    person: int | None
    lines: tuple[str, ...]
    column: int
    """0: persons that were asked about; 1: devices; 2: everybody else."""


@dataclass(frozen=True, slots=True)
class _Edge:
    source: str
    target: str
    kind: str
    """``seen`` or ``alias`` where it holds, ``refused``, ``claims`` or ``unlinked``."""
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Drawing:
    nodes: tuple[_Node, ...]
    edges: tuple[_Edge, ...]
    left_out: tuple[str, ...]


def _draw(picture: Picture) -> _Drawing:
    """Identifiers and devices as nodes, links and claims as edges, one for all claims of two."""
    people = {person: place for place, person in enumerate(picture.people)}
    nodes: dict[Identifier | str, _Node] = {}

    def add(key: Identifier | str, kind: str, person: int | None, *lines: str, column: int) -> str:
        if key not in nodes:
            nodes[key] = _Node(f"n{len(nodes)}", kind, person, lines, column)
        return nodes[key].name

    def add_identifier(identifier: Identifier, column: int) -> str:
        person = people[picture.person_of[identifier]]
        shown = (identifier.type, _shorten(identifier.value))
        return add(identifier, "identifier", person, *shown, column=column)

    edges: list[_Edge] = []
    for found in picture.persons:
        for member in found.identifiers:
            add_identifier(member.identifier, 0)
    for device in picture.devices:
        add(device.anonymous_id, "device", None, *_device_lines(device, picture), column=1)
    for found in picture.persons:
        for link in found.links:
            a, b = (add_identifier(end, 2) for end in (link.a, link.b))
            kind = "refused" if link.refused else link.kind
            edges.append(_Edge(a, b, kind, _edge_lines(link)))
    for device in picture.devices:
        target = nodes[device.anonymous_id].name
        claims: dict[Identifier, list[DeviceClaim]] = {}
        for claim in device.claims:
            if claim.identifier is not None:
                claims.setdefault(claim.identifier, []).append(claim)
        for identifier, own in claims.items():
            kind = "unlinked" if all(claim.unlinked for claim in own) else "claims"
            count = f"{len(own):,} claim{'s' if len(own) > 1 else ''}"
            last = f"{'last ' if len(own) > 1 else ''}{_shorten(own[-1].message_id)}"
            lines = [count, last, _when(own[-1].time)]
            if kind == "unlinked":
                lines.append("unlinked by hand")
            edges.append(_Edge(add_identifier(identifier, 2), target, kind, tuple(lines)))
        for identifier in device.unlinked:
            if identifier not in claims:
                source = add_identifier(identifier, 2)
                edges.append(_Edge(source, target, "unlinked", ("unlinked by hand",)))
    kept = [
        node
        for column, most in enumerate(MOST_NODES)
        for node in [found for found in nodes.values() if found.column == column][:most]
    ]
    names = {node.name for node in kept}
    drawn = [edge for edge in edges if {edge.source, edge.target} <= names][:MOST_EDGES]
    return _Drawing(
        tuple(kept),
        tuple(drawn),
        tuple(
            f"{total - shown:,} of {total:,} {what} are not drawn"
            for what, shown, total in (
                ("nodes", len(kept), len(nodes)),
                ("edges", len(drawn), len(edges)),
            )
            if shown < total
        ),
    )


def _shorten(value: str, most: int = _LABEL) -> str:
    if len(value) <= most:
        return value
    return f"{value[:most]}\N{HORIZONTAL ELLIPSIS} ({len(value):,} characters)"


def _by_person(drawing: _Drawing, picture: Picture) -> Iterator[tuple[int, list[_Node]]]:
    """The nodes of each person that was asked about, with its place; without those of none."""
    for place in range(len(picture.persons)):
        if nodes := [n for n in drawing.nodes if n.column == 0 and n.person == place]:
            yield place, nodes


def _notes(picture: Picture, drawing: _Drawing) -> list[str]:
    """What a drawing must say beside itself, in a few lines: kinds only, and nobody's value."""
    if not picture.found:
        return [f"{_name(picture.subject)} was never seen"]
    kinds: dict[str, tuple[int, int]] = {}
    for left in picture.left_out:
        shown, total = kinds.get(left.what, (0, 0))
        kinds[left.what] = shown + left.shown, total + left.total
    told = [
        f"{total - shown:,} of {total:,} {what} are left out"
        for what, (shown, total) in kinds.items()
    ]
    return [*told, *drawing.left_out]


def _edge_lines(link: LinkReason) -> tuple[str, ...]:
    if link.time == END:
        return "never seen", "unlinked by hand"
    lines = (_KINDS[link.kind], _shorten(link.message_id), _when(link.time))
    short = {"unique": "refused: one value only", "limit": "refused: too many identifiers"}
    return (*lines, short.get(link.refused, "unlinked by hand")) if link.refused else lines


def _device_lines(device: Device, picture: Picture) -> Iterator[str]:
    yield "device"
    yield _shorten(device.anonymous_id)
    spans = device.spans[-_SPANS_IN_LABEL:]
    left = next(
        (
            left.total - len(spans)
            for left in picture.left_out
            if (left.what, left.of) == ("spans", f"device {device.anonymous_id}")
        ),
        len(device.spans) - len(spans),
    )
    if left:
        yield f"{left:,} more spans"
    for span in spans:
        owner = span.owner and f"{span.owner.type}:{_shorten(span.owner.value)}"
        yield f"{owner or 'nobody'} {_span_times(span)}"


# ---------------------------------------------------------------------------------------- Mermaid

_MERMAID_EDGES = {
    "seen": "---",
    "alias": "===",
    "refused": "-.-",
    "claims": "-->",
    "unlinked": "-.->",
}
# Between letters and digits these mean nothing to Markdown either, which labels go through.
_PLAIN = re.compile(r"[A-Za-z0-9 ]|(?<=[A-Za-z0-9])[-_.:,](?=[A-Za-z0-9])")
# In every spelling it takes these for a line break and for mathematics: a sign without width comes
# between the two (U+2060).
_PAIRS = re.compile(r"\\(?=n)|\$(?=\$)")


def _mermaid(picture: Picture) -> str:
    drawing = _draw(picture)
    notes = _notes(picture, drawing)
    styles = {**{f"p{place}": colour for place, colour in enumerate(COLOURS)}, "nobody": NOBODY}
    ends = [
        f"  classDef {style} fill:{back},color:{front},stroke:#333333"
        for style, (back, front) in styles.items()
    ]
    lines = ["flowchart LR"]
    # 200 for what is said last, if not all fits.
    whole = room = MERMAID_MOST - sum(map(len, (*ends, _mermaid_label(notes)))) - 200
    skipped = 0
    names: set[str] = set()

    def fits(size: int, keep: float) -> bool:
        """Take so much of the room, where this part of it stays for what comes after."""
        nonlocal room
        if room - size < keep * whole:
            return False
        room -= size
        return True

    def take_nodes(nodes: Iterable[_Node], indent: str, keep: float) -> None:
        nonlocal skipped
        for node in nodes:
            open, close = ('(["', '"])') if node.kind == "identifier" else ('["', '"]')
            style = "nobody" if node.person is None else f"p{node.person % len(COLOURS)}"
            line = f"{indent}{node.name}{open}{_mermaid_label(node.lines)}{close}:::{style}"
            if fits(len(line) + 1, keep):
                names.add(node.name)
                lines.append(line)
            else:
                skipped += 1

    for person, nodes in _by_person(drawing, picture):
        title = _mermaid_label(["person", _name(picture.persons[person].canonical)])
        begin, end = f'  subgraph s{person}["{title}"]', "  end"
        if fits(len(begin) + len(end) + 2, 0.7):
            lines.append(begin)
            take_nodes(nodes, "    ", 0.6)
            lines.append(end)
        else:
            skipped += len(nodes)
    for column, keep in ((1, 0.4), (2, 0.3)):
        take_nodes((node for node in drawing.nodes if node.column == column), "  ", keep)
    for edge in drawing.edges:
        line = f'  {edge.source} {_MERMAID_EDGES[edge.kind]}|"{_mermaid_label(edge.lines)}"|'
        line += f" {edge.target}"
        if {edge.source, edge.target} <= names and fits(len(line) + 1, 0):
            lines.append(line)
        else:
            skipped += 1
    if skipped:
        notes.append(f"{skipped:,} nodes and edges are not drawn: Mermaid takes no longer text")
    if notes:
        lines.append(f'  note["{_mermaid_label(notes)}"]')
    return "".join(f"{line}\n" for line in (*lines, *ends))


def _name(identifier: Identifier) -> str:
    return f"{identifier.type}:{_shorten(identifier.value)}"


def _mermaid_label(lines: Iterable[str]) -> str:
    """Everything but plain characters as its number: no other way is safe in all of its places."""
    return "<br/>".join(
        "".join(
            c if _PLAIN.match(line, place) else "".join(f"#{ord(sign)};" for sign in _harmless(c))
            for place, c in enumerate(line)
        )
        for line in (_PAIRS.sub("\\g<0>\u2060", line) for line in lines)
    )


# They turn round what follows them, whatever it belongs to, and are not seen themselves
# (https://www.unicode.org/reports/tr9/#Directional_Formatting_Characters).
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _harmless(character: str) -> str:
    """The character; of a control the sign that stands for it, or its number."""
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    if 0x80 <= number < 0xA0 or character in _TURNS:
        return f"\\u{number:04x}"
    return character


# -------------------------------------------------------------------------------------------- DOT

_DOT_EDGES = {
    "seen": "dir=none",
    "alias": "dir=none, penwidth=3",
    "refused": 'dir=none, style=dashed, color="#A00000"',
    "claims": 'color="#333333"',
    "unlinked": 'style=dashed, color="#A00000"',
}


def _dot(picture: Picture) -> str:
    drawing = _draw(picture)
    lines = [
        "digraph recognition {",
        '  rankdir=LR; charset="UTF-8";',
        '  node [shape=box, style="rounded,filled", fontname="sans-serif"];',
        '  edge [fontname="sans-serif", fontsize=10];',
    ]

    def node(found: _Node) -> str:
        back, front = NOBODY if found.person is None else COLOURS[found.person % len(COLOURS)]
        style = ', style="filled"' if found.kind == "device" else ""
        return (
            f'{found.name} [label="{_dot_label(found.lines)}", fillcolor="{back}",'
            f' fontcolor="{front}"{style}];'
        )

    for place, nodes in _by_person(drawing, picture):
        title = _dot_label(["person", _name(picture.persons[place].canonical)])
        lines += [f"  subgraph cluster_{place} {{", f'    label="{title}";']
        lines += [f"    {node(found)}" for found in nodes]
        lines.append("  }")
    lines += [f"  {node(n)}" for n in drawing.nodes if n.column]
    for edge in drawing.edges:
        label = _dot_label(edge.lines)
        lines.append(
            f'  {edge.source} -> {edge.target} [label="{label}", {_DOT_EDGES[edge.kind]}];'
        )
    if notes := _notes(picture, drawing):
        lines.append(f'  note [shape=note, label="{_dot_label(notes)}"];')
    return "".join(f"{line}\n" for line in [*lines, "}"])


def _dot_label(lines: Iterable[str]) -> str:
    """As Graphviz reads an ``escString``: entities are read in it, too."""
    special = {'"': "&quot;", "\\": "\\\\", "&": "&amp;"}
    return "\\n".join(
        "".join(special.get(sign, sign) for c in line for sign in _harmless(c)) for line in lines
    )


# ------------------------------------------------------------------------------------------- page


def _page(picture: Picture) -> str:
    """
    One file that loads nothing: the library, the style and the data are in it.

    Its content security policy names the two scripts by their hashes and allows nothing else, so
    that no value could load or run anything even if it came through.
    """
    folder = files("recognition.graph") / "page"
    page, style, library, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "cytoscape.min.js", "page.js")
    )
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (library, script)
    )
    drawing = _draw(picture)
    parts = {
        "hashes": hashes,
        "style": style,
        "library": library,
        "script": script,
        "subject": _escape(":".join(picture.subject)),
        "summary": _summary(picture, drawing),
        "legend": _legend(picture),
        "devices": "".join(_device_section(device, picture) for device in picture.devices),
        "persons": _person_sections(picture),
        "drawing": _script_json(_elements(drawing)),
    }
    # One pass: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _escape(text: str) -> str:
    """Text or the value of a quoted attribute."""
    return html.escape("".join(map(_harmless, text)), quote=True)


def _script_json(value: object) -> str:
    """JSON that ends no script and begins no comment, and is ASCII."""
    text = json.dumps(value)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _summary(picture: Picture, drawing: _Drawing) -> str:
    workspace = _escape(picture.workspace)
    if not picture.found:
        return f"<p>Never seen in workspace {workspace}.</p>"
    told = [
        f"Workspace {workspace}, {_policy(picture)}.",
        f"People: {len(picture.people):,}. Devices: {len(picture.devices):,}.",
    ]
    left = [*_left_out(picture), *drawing.left_out]
    listed = "".join(f"<li>{_escape(line)}</li>" for line in left)
    return f"<p>{' '.join(told)}</p>" + (f'<ul class="left-out">{listed}</ul>' if left else "")


def _legend(picture: Picture) -> str:
    entries = [
        f"<li>{_swatch(place)} {_escape(':'.join(person))}</li>"
        for place, person in enumerate(picture.people)
    ]
    entries.append(f"<li>{_swatch(None)} nobody</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _swatch(place: int | None) -> str:
    text = "\N{EN DASH}" if place is None else str(place + 1)
    return f'<span class="swatch" style="{_colours(place)}">{text}</span>'


def _colours(place: int | None) -> str:
    back, front = NOBODY if place is None else COLOURS[place % len(COLOURS)]
    return f"background:{back};color:{front}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""


def _person_sections(picture: Picture) -> str:
    places = {person: place for place, person in enumerate(picture.people)}
    found = []
    for person in picture.persons:
        place = places[person.canonical]
        found.append(
            f"<section><h3>{_swatch(place)} Person {_escape(':'.join(person.canonical))}</h3>"
        )
        found.append(
            _table(
                ("identifier", "as seen first", "first seen", "message"),
                (
                    (
                        ":".join(member.identifier),
                        member.seen_as,
                        "never" if member.first_seen is None else _when(member.first_seen),
                        member.message_id,
                    )
                    for member in person.identifiers
                ),
            )
        )
        found.append(
            _table(
                ("link", "with", "holds", "provenance"),
                (
                    (
                        ":".join(link.a),
                        ":".join(link.b),
                        "no" if link.refused else "yes",
                        _provenance(link),
                    )
                    for link in person.links
                ),
            )
        )
        found.append("</section>")
    return "".join(found)


def _device_section(device: Device, picture: Picture) -> str:
    told = []
    if device.released_until is not None:
        told.append(f"Released until {_when(device.released_until)}.")
    told += [f"Unlinked by hand from {':'.join(one)}, for good." for one in device.unlinked]
    if not device.spans:
        told.append("Nobody was ever seen on it.")
    claims = _table(
        ("claim at", "by", "message"),
        ((_when(claim.time), _claimant(claim), claim.message_id) for claim in device.claims),
    )
    spans = _table(
        ("span", "owner"), ((_span_times(span), _span_owner(span)) for span in device.spans)
    )
    tables = f"<details><summary>As tables</summary>{claims}{spans}</details>"
    return (
        f"<section><h3>Device {_escape(device.anonymous_id)}</h3>"
        f"{''.join(f'<p>{_escape(line)}</p>' for line in told)}"
        f"{_timeline(device, picture)}{tables if claims or spans else ''}</section>"
    )


def _timeline(device: Device, picture: Picture) -> str:
    """Spans as coloured blocks, claims as marks above them, long times drawn shorter."""
    if not device.spans:
        return ""
    people = {person: place for place, person in enumerate(picture.people)}
    place_of, intervals = _scale(device)
    blocks = []
    before = BEGINNING

    def leave_out(end: int) -> None:
        if end > before:
            blocks.append(_block(place_of(before), place_of(end), "gap", "", "not shown"))

    for span in device.spans:
        leave_out(span.start)
        before = span.end
        owner = None if span.owner is None else people[span.owner]
        label = "nobody" if owner is None else f"{owner + 1} {_span_owner(span)}"
        title = f"{_span_owner(span)} {_span_times(span)}"
        blocks.append(
            _block(
                place_of(span.start),
                place_of(span.end),
                "span nobody" if owner is None else "span",
                f";{_colours(owner)}",
                label,
                title,
                _span_times(span),
            )
        )
    leave_out(END)
    marks = "".join(
        f'<li class="claim" style="left:{place_of(claim.time):.3f}%"'
        f' title="{_escape(told)}"><span class="text">{_escape(told)}</span></li>'
        for claim in device.claims
        for told in [f"claim {_when(claim.time)} by {_claimant(claim)}, {claim.message_id}"]
    )
    name = _escape(f"timeline of device {device.anonymous_id}")
    return (
        f'<div class="timeline" role="region" aria-label="{name}" tabindex="0">'
        f'<div class="track" style="min-width:{6 * intervals}rem">'
        f'<ol class="claims">{marks}</ol><ol class="spans">{"".join(blocks)}</ol></div></div>'
    )


def _block(
    start: float, end: float, kind: str, style: str, label: str, title: str = "", times: str = ""
) -> str:
    lines = f"<b>{_escape(label)}</b>" + (f"<i>{_escape(times)}</i>" if times else "")
    return (
        f'<li class="{kind}" style="left:{start:.3f}%;width:{end - start:.3f}%{style}"'
        f' title="{_escape(title or label)}">{lines}</li>'
    )


def _scale(device: Device) -> tuple[Callable[[int], float], int]:
    """
    From a time to a percentage of the width, and the number of intervals.

    Order is kept. Of an interval the logarithm counts: a visit of a minute would not be seen beside
    a look-back of a month.
    """
    times = {time for span in device.spans for time in (span.start, span.end)}
    times.update(claim.time for claim in device.claims)
    inner = sorted(times - {BEGINNING, END})
    weights = [1 + math.log10(1 + (b - a) / 1_000_000) for a, b in pairwise(inner)]
    # What comes before the first time, and after the last one, is as wide as some minutes.
    places: dict[int, float] = {BEGINNING: 0.0}
    at = 3.0
    for time, weight in zip(inner, [*weights, 3.0], strict=False):
        places[time] = at
        at += weight
    places[END] = at
    return lambda time: 100 * places[time] / at, len(inner) + 1


def _elements(drawing: _Drawing) -> Mapping[str, object]:
    """As Cytoscape.js takes them, in three columns; compound nodes hold what is one person."""
    rows = [0, 0, 0]
    places: dict[str, tuple[int, int]] = {}
    elements: list[dict[str, object]] = []
    boxes: set[int] = set()
    for node in drawing.nodes:
        back, front = NOBODY if node.person is None else COLOURS[node.person % len(COLOURS)]
        data: dict[str, object] = {
            "id": node.name,
            "kind": node.kind,
            "label": "\n".join(_visible(line[:_BOX]) for line in node.lines[:2]),
            "details": "\n".join(map(_visible, node.lines)),
            "back": back,
            "front": front,
        }
        if node.column == 0 and node.person is not None:
            box = f"p{node.person}"
            if node.person not in boxes:
                boxes.add(node.person)
                elements.append(
                    {"data": {"id": box, "kind": "person", "label": f"person {node.person + 1}"}}
                )
                rows[0] += bool(rows[0])
            data["parent"] = box
        column, row = places[node.name] = node.column, rows[node.column]
        rows[column] += 1
        elements.append({"data": data, "position": {"x": 380 * column, "y": 80 * row}})
    for number, edge in enumerate(drawing.edges):
        told = "\n".join(map(_visible, edge.lines))
        data = {"id": f"e{number}", "kind": edge.kind, "label": told, "details": told}
        data["source"], data["target"] = edge.source, edge.target
        (column, row), (to, end) = places[edge.source], places[edge.target]
        if edge.kind in ("seen", "alias", "refused"):
            # A link has no direction: drawn downwards, all of a column are on the same side of it.
            if column == to and row > end:
                data["source"], data["target"] = edge.target, edge.source
            data["bend"] = min(240 + 20 * abs(end - row), 500) if column == to else 60
        elements.append({"data": data})
    return {"elements": elements}


def _visible(text: str) -> str:
    return "".join(map(_harmless, text))


#: What `render` takes.
FORMATS: Mapping[str, Callable[[Picture], str]] = {
    "text": _text,
    "json": _json,
    "mermaid": _mermaid,
    "dot": _dot,
    "html": _page,
}
