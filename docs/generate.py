"""
Makes what can be made of these pages from the code: references, schema, pictures.

    python docs/generate.py            # writes what differs, and says so
    python docs/generate.py --check    # writes nothing; exit code 1 where something differs

In a page, what is made stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; everything
else is written by hand. ``tests/test_docs.py`` fails where a page is not what the code says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from recognition import cli
from recognition.attribution import DAY, AttributionRules, Claim, Policy, spans
from recognition.config import Settings, render_default, render_reference
from recognition.messages import json_schema

DOCS = Path(__file__).parent
BLOCK = re.compile(r"^<!-- generated: ([^>]+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def generate() -> dict[Path, str]:
    """Every file that is made, or has a part that is; and what it should hold."""
    made = {
        DOCS / "message.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False)
        + "\n",
        DOCS / "img" / "way.svg": draw_way(),
        DOCS / "img" / "policies.svg": draw_policies(),
        DOCS / "img" / "second-look.svg": draw_second_look(),
        DOCS / "img" / "settle.svg": draw_settle(),
    }
    for name in ("configuration", "command-line", "messages"):
        page = DOCS / f"{name}.md"
        made[page] = BLOCK.sub(_fill, page.read_text(encoding="utf-8"))
    return made


def _fill(found: re.Match[str]) -> str:
    name = found[1]
    if name.startswith("recognition "):
        text = render_command(name)
    else:
        text = {
            "settings": render_reference,
            "arguments": render_shared,
            "keys": render_keys,
            "criteria": render_criteria,
        }[name]()
    return f"<!-- generated: {name} -->\n{text.strip()}\n<!-- end -->"


def _table(head: str, rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the messages


def render_keys() -> str:
    """The keys of the update message and of its cause, from the JSON schema."""
    schema = json_schema()
    cause = schema["$defs"]["Cause"]
    keys = {**schema["properties"]}
    keys |= {f"cause.{key}": value for key, value in cause["properties"].items()}
    needed = set(schema["required"]) | {"kind", "version"}
    return _table(
        "key | value | needed | meaning",
        (
            (f"`{key}`", _type(value), "yes" if key in needed else "no", value["description"])
            for key, value in keys.items()
        ),
    )


def render_criteria() -> str:
    """Each criterion, from the JSON schema."""
    schema = json_schema()
    kinds: Mapping[str, str] = schema["properties"]["where"]["items"]["discriminator"]["mapping"]

    def rows() -> Iterator[Sequence[str]]:
        for kind in ("equals", "one_of", "empty", "between", "messages"):
            criterion = schema["$defs"][kinds[kind].rpartition("/")[2]]
            keys = [
                f"`{key}`: {_type(value)}"
                for key, value in criterion["properties"].items()
                if key != "kind"
            ]
            meaning = " ".join(criterion["description"].split()).replace("``", "`")
            yield f"`{kind}`", meaning, "; ".join(keys)
        assert len(kinds) == 5

    return _table("`kind` | the row meets it when | its other keys", rows())


_NAMES = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text"}


def _type(schema: Mapping[str, Any]) -> str:
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "$ref" in schema:
        return "object"
    if "anyOf" in schema:
        kinds = [_type(one) for one in schema["anyOf"]]
        return f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    match schema["type"]:
        case "object":
            return f"object of column and value: {_type(schema['additionalProperties'])}"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(map(_type, schema['prefixItems']))}]"
        case "array":
            items = schema["items"]
            return f"list of {'criteria' if 'oneOf' in items else _type(items)}, not empty"
        case "null":
            return "null"
        case kind if schema.get("format") == "date-time":
            return "time"
        case kind:
            text = _NAMES[kind]
            if "minimum" in schema:
                text += f", at least {schema['minimum']}"
            if "maxLength" in schema:
                text += f" of {schema['minLength']} to {schema['maxLength']} characters"
            return text


# -------------------------------------------------------------------------------- the command line


def _commands(
    parser: argparse.ArgumentParser, name: str = "recognition"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from _commands(below, f"{name} {command}")
            return
    yield name, parser


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]


# What several commands take. The first of them are those that every command takes.
_EVERY = [action.dest for action in _arguments(cli._common())]
_SHARED = {
    action.dest: action
    for group in (cli._common, *cli._GROUPS.values())
    for action in _arguments(group())
    if action.option_strings
}
# Those of a graph that say how it decides: `[RULES]` in a usage.
_RULES = [a.dest for a in _arguments(cli._graph_arguments()) if a.dest != "graph"]


def _written(action: argparse.Action) -> str:
    """How an argument is given: `--limit N`."""
    name = action.option_strings[-1] if action.option_strings else ""
    if action.nargs == 0:
        return name
    value = action.metavar or "|".join(map(str, action.choices or [])) or action.dest.upper()
    assert isinstance(value, str)
    if action.nargs == "+":
        value += "..."
    return f"{name} {value}".strip()


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    positional = [a for a in _arguments(parser) if not a.option_strings]
    options = [a for a in _arguments(parser) if a.option_strings and a.dest not in _EVERY]
    parts = [_written(a) for a in positional]
    parts += [
        f"[{_written(a)}]" + "..." * isinstance(a, argparse._AppendAction)
        for a in options
        if a.dest not in _RULES
    ]
    parts += ["[RULES]"] * any(a.dest in _RULES for a in options)
    # A part is not broken: its blanks are not those between parts.
    text = " ".join([name, *(part.replace(" ", "\0") for part in parts)])
    lines = textwrap.wrap(text, 100, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def _default(action: argparse.Action) -> str:
    if action.default is not None and action.default is not False:
        return f"`{action.default}`"
    if action.dest in Settings.model_fields and action.option_strings:
        return render_default(Settings.model_fields[action.dest])
    return ""


def _meaning(action: argparse.Action) -> str:
    assert action.help, f"{action.dest} has no help"
    meaning = f"{action.help[0].upper()}{action.help[1:].rstrip('.')}."
    if action.choices and action.metavar is None:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    return meaning


def _argument_rows(actions: Sequence[argparse.Action]) -> Iterator[Sequence[str]]:
    for action in actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        yield names or f"`{_written(action)}`", _default(action), _meaning(action)


def render_shared() -> str:
    """The arguments that several commands take, and which of them."""
    commands = dict(_commands(cli._build_parser()))

    def rows() -> Iterator[Sequence[str]]:
        shared = _SHARED.values()
        for action, row in zip(shared, _argument_rows(list(shared)), strict=True):
            takers = [
                name.removeprefix("recognition ")
                for name, parser in commands.items()
                if any(a.dest == action.dest and a.help == action.help for a in _arguments(parser))
            ]
            if action.dest in _RULES:
                yield *row, "`[RULES]`"
            else:
                yield *row, "every one" if len(takers) == len(commands) else _short(takers)

    return _table("argument | default | meaning | of", rows())


def _short(commands: list[str]) -> str:
    """All of a group's commands are the group."""
    graph = [name for name in commands if name.startswith("graph ")]
    if len(graph) > 2:
        commands = [name for name in commands if name not in graph] + ["`graph` and what follows"]
    return ", ".join(name if "`" in name else f"`{name}`" for name in commands)


def render_command(name: str) -> str:
    """Usage, and the arguments that are the command's own; of `graph` those of all below it."""
    commands = dict(_commands(cli._build_parser()))
    below = {full: p for full, p in commands.items() if f"{full} ".startswith(f"{name} ")}
    text = ["```text", *(_usage(full, parser) for full, parser in below.items()), "```"]
    own = {
        full: [a for a in _arguments(parser) if _SHARED.get(a.dest, a).help != a.help or
               a.dest not in _SHARED]
        for full, parser in below.items()
    }  # fmt: skip
    if len(below) > 1:
        rows = [
            (f"`{full.rpartition(' ')[2]}`", *row)
            for full, actions in own.items()
            for row in _argument_rows(actions)
        ]
        return "\n".join([*text, "", _table("command | argument | default | meaning", iter(rows))])
    (actions,) = own.values()
    if actions:
        head = "argument | default | meaning"
        text += ["", _table(head, _argument_rows(actions))]
    return "\n".join(text)


# ------------------------------------------------------------------------------------ the pictures

_INK, _PALE, _LINE = "#24292f", "#57606a", "#8c959f"
_COLOURS = {"Ann": "#b6d7f5", "Bo": "#f8d9a8", None: "#eeeeee"}
_BLUE, _GREEN, _GREY = "#ddebf7", "#dcefd8", "#f3f3f3"


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img" font-family="sans-serif"'
            f' font-size="13" fill="{_INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
            f' markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="{_INK}"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", **style: str) -> str:
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> str:
    middle = y + height / 2 + 4.5 - 8.5 * (len(lines) - 1)
    return "\n".join(
        [
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
            f' fill="{fill}" stroke="{_LINE}"/>',
            *(
                _text(
                    x + width / 2, middle + 17 * n, line,
                    **({"font_weight": "bold"} if n == 0 else {"font_size": "12", "fill": _PALE}),
                )
                for n, line in enumerate(lines)
            ),
        ]
    )  # fmt: skip


def _arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    path = " ".join(f"{x:g} {y:g}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{path}" fill="none" stroke="{_INK}" marker-end="url(#to)"{dash}/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = _LINE) -> str:
    return f'<path d="M{x1:g} {y1:g} {x2:g} {y2:g}" stroke="{colour}"/>'


def draw_way() -> str:
    """The way of the data: what is the pipeline's, what is ours, what is the warehouse's."""
    small = {"font_size": "12", "fill": _PALE}
    return _svg(
        760,
        250,
        "Rows go from your pipeline to the warehouse; events go to the recognizer, decisions and"
        " updates are saved in the graph in one transaction, and updates are applied to the rows.",
        [
            _box(20, 20, 120, 52, _GREY, "events", "of your visitors"),
            _box(230, 20, 150, 52, _GREY, "your pipeline", "loads rows as ever"),
            _box(600, 20, 140, 210, _GREEN, "warehouse", "only user columns", "are changed"),
            _arrow((140, 46), (230, 46)),
            _arrow((380, 46), (600, 46)),
            _text(490, 39, "rows", **small),
            _box(20, 160, 120, 52, _BLUE, "recognizer", "whose is it?"),
            _box(230, 148, 150, 76, _BLUE, "graph", "claims, spans, persons;", "outbox of updates"),
            _box(430, 160, 110, 52, _BLUE, "delivery", "windows, sinks"),
            _arrow((80, 72), (80, 160)),
            _text(90, 120, "the same events", "start", **small),
            _arrow((140, 186), (230, 186)),
            _text(185, 178, "one", **small),
            _text(185, 205, "transaction", **small),
            _arrow((380, 186), (430, 186)),
            _arrow((540, 186), (600, 186)),
            _text(570, 178, "UPDATE", **small),
            _arrow((305, 72), (305, 148), dashed=True),
            _text(314, 104, "rows are visible", "start", **small),
            _text(314, 120, "(flushed)", "start", **small),
        ],
    )  # fmt: skip


def draw_policies() -> str:
    """Who owns the events of one tablet under each policy; the spans are those of the code."""
    first, last, left, width = 0, 90, 180, 560
    claims = [Claim(40 * DAY, "m1", "Ann"), Claim(55 * DAY, "m2", "Bo")]

    def at(day: float) -> float:
        return left + (day - first) * width / (last - first)

    parts = [
        _text(at(40), 22, "Ann signs in"), _text(at(55), 38, "Bo signs in"),
        _arrow((at(40), 27), (at(40), 58)), _arrow((at(55), 43), (at(55), 58)),
    ]  # fmt: skip
    for row, policy in enumerate(Policy):
        y = 62 + 44 * row
        parts.append(_text(left - 12, y + 21, policy, "end", font_family="monospace"))
        for start, end, owner in spans(claims, AttributionRules(policy=policy)):
            # The microsecond of a claim itself is not to be seen at this scale.
            day, until = max(first, start / DAY), min(last, end / DAY)
            if until - day < 0.01:
                continue
            name = "nobody" if owner is None else str(owner)
            parts.append(
                f'<rect x="{at(day):.1f}" y="{y}" width="{at(until) - at(day):.1f}" height="32"'
                f' fill="{_COLOURS[None if owner is None else name]}" stroke="#ffffff"/>'
            )
            parts.append(_text(round((at(day) + at(until)) / 2, 1), y + 21, name))
    bottom = 62 + 44 * len(Policy)
    parts += [_line(at(day), 58, at(day), bottom + 2) for day in (40, 55)]
    parts.append(_line(at(first), bottom + 2, at(last), bottom + 2))
    for day in range(first, last + 1, 10):
        parts.append(_line(at(day), bottom + 2, at(day), bottom + 7))
        parts.append(_text(at(day), bottom + 21, str(day), font_size="12", fill=_PALE))
    parts.append(_text(left - 12, bottom + 21, "day", "end", font_size="12", fill=_PALE))
    return _svg(
        760,
        bottom + 32,
        "The owners of the anonymous events of one tablet, under each of the four policies, with a"
        " look-back of 30 days.",
        parts,
    )


def _lifelines(names: Sequence[str], places: Sequence[float], height: float) -> list[str]:
    parts = []
    for name, x in zip(names, places, strict=True):
        parts.append(_line(x, 44, x, height - 12))
        parts.append(_box(x - 62, 14, 124, 30, _GREY, name))
    return parts


def draw_second_look() -> str:
    """A row that is on its way when its update runs: the second look finds it."""
    a, graph, b, warehouse = places = (90, 280, 470, 670)
    halo = {"paint_order": "stroke", "stroke": "#ffffff", "stroke_width": "5"}

    def step(y: float, x1: float, x2: float, text: str) -> list[str]:
        middle = (x1 + x2) / 2
        return [_arrow((x1, y), (x2, y)), _text(middle, y - 6, text, font_size="12", **halo)]

    parts = _lifelines(("worker A", "graph", "worker B", "warehouse"), places, 366)
    parts += step(78, a, graph, "process: m1, anonymous")
    parts += step(112, b, graph, "process: Ann signs in")
    parts += step(150, graph, warehouse, "the update is applied: no row is there yet")
    parts += step(196, a, warehouse, "the row of m1 is written, anonymous")
    parts += step(242, a, graph, "flushed(receipt)")
    parts += [
        _box(graph - 76, 256, 152, 48, _BLUE, "second look", "m1 has an owner now"),
    ]
    parts += step(334, graph, warehouse, "a further update: the row of m1 is Ann's")
    return _svg(
        760,
        366,
        "Worker A has an anonymous row on its way while worker B takes in a login; when A reports"
        " its rows as visible, the graph looks again and emits a further update.",
        parts,
    )


def draw_settle() -> str:
    """An update that is held and applied again, where nobody calls `flushed`."""
    settle = int(Settings().delivery.settle_seconds)
    left, right, y = 110, 650, 120
    small = {"font_size": "12", "fill": _PALE}
    return _svg(
        760,
        210,
        f"An update finds 10 of 12 rows, is held, and is applied again after {settle} seconds,"
        " when the rows that were on their way have come.",
        [
            f'<rect x="{left}" y="{y - 16}" width="{right - left}" height="32" fill="{_BLUE}"/>',
            _text((left + right) / 2, y + 5, f"held for settle_seconds = {settle}"),
            _line(20, y + 16, 740, y + 16),
            _arrow((left, 66), (left, y - 16)),
            _text(left, 30, "applied"), _text(left, 48, "10 of 12 rows found", **small),
            _arrow((right, 66), (right, y - 16)),
            _text(right, 30, "applied once more"), _text(right, 48, "12 of 12: done", **small),
            _arrow((270, y + 52), (270, y + 18)), _arrow((330, y + 52), (330, y + 18)),
            _text(300, y + 70, "the pipeline writes the two rows that were on their way", **small),
        ],
    )  # fmt: skip


def main() -> int:
    """Write, or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    differ = [
        (path, text)
        for path, text in generate().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in differ:
        sys.stdout.write(f"{path.relative_to(DOCS.parent)} {'differs' if check else 'written'}\n")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if check and differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
