"""How a picture looks: Mermaid, Graphviz and Chromium read it, and no value fools them."""

from __future__ import annotations

import html
import json
import os
import re
import tomllib
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from browser import Browser, MissingBrowserError, find_viewer
from oracle import make_event
from recognition.attribution import DAY
from recognition.cli import _SHOWN_AS
from recognition.events import Identifier
from recognition.graph.memory import MemoryGraph
from recognition.graph.rendering import (
    COLOURS,
    FORMATS,
    MERMAID_MOST,
    MOST_EDGES,
    MOST_NODES,
    NOBODY,
    render,
)
from recognition.graph.showing import Picture
from recognition.recognizer import Recognizer

ROOT = Path(__file__).parents[1]
PAGE = files("recognition.graph") / "page"
T = 100 * DAY
U1, U2, SHARED = (
    Identifier("user_id", "u1"),
    Identifier("user_id", "u2"),
    Identifier("anonymous_id", "tablet"),
)

# What strangers may write into an event, to break out of the place where it is shown.
HOSTILE = [
    "</script><script>globalThis.hacked = 1</script>",
    "\"><img src=x onerror='globalThis.hacked=1'>",
    "<svg/onload=globalThis.hacked=1>",
    "' \" ` \\ \\n \\N \\G %",
    "emoji \N{GRINNING FACE} \N{LATIN SMALL LETTER E WITH ACUTE} \u202e rtl \u2028 ls",
    "\u202euoy \u2067si ohw\u200f \x85",
    "new\nline\r\ttab \x1b[31m red \x00 nul \x7f",
    "{{data}} {{script}} \\1 \\g<0> $x",
    "&lt;b&gt; &amp; &#34; #34; #quot; &NoBreak;",
    "<!-- comment --> ]]> <b>",
    "end",
    'subgraph x["y"]',
    'n0 --> n1["stolen"]',
    "-->|x| %% comment ;;",
    "**bold** __init__ `code` ~~s~~ $$x$$",
    "1. list",
    "- list",
    "%%{init: {}}%%",
    "http://example.invalid/x.png",
    "javascript:globalThis.hacked=1",
    "label=<<table><tr><td>x</td></tr></table>>",
    "xy" * 150,
]

LONG = "\N{GRINNING FACE}" * 50


def show(*events: Any, asked: Identifier = U1, limit: int = 50, **undo: Any) -> Picture:
    recognizer = Recognizer(MemoryGraph())
    recognizer.process(list(events))
    for name, arguments in undo.items():
        getattr(recognizer, name)(*arguments)
    return recognizer.show(asked, limit)


@cache
def family(asked: Identifier = U1) -> Picture:
    """Ann and Bo share a tablet and a mail; another link was unlinked, and there is an alias."""
    return show(
        make_event("m1", T, "tablet", user_id="u1", email="Ann@x.com"),
        make_event("m2", T + DAY, "tablet", user_id="u2", email="bo@x.com"),
        make_event("m3", T + 2 * DAY, "phone", email="ann@x.com", phone="1"),
        make_event("m4", T + 3 * DAY, "phone", user_id="u2", email="ann@x.com"),
        make_event("m5", T + 4 * DAY, user_id="u1", previous_id="old", type="alias"),
        make_event("m6", T + 5 * DAY, "lost", user_id="u1", phone="2"),
        asked=asked,
        unlink=(U1, Identifier("phone", "2")),
        release=("lost", T + 6 * DAY),
    )


@cache
def hostile(asked: Identifier = U1) -> Picture:
    """Every hostile text as an identifier, as a device, and as a message id."""
    return show(
        make_event("first", T, "tablet", user_id="u1"),
        *(
            make_event(text, T + n, text, user_id="u1", phone=text)
            for n, text in enumerate(HOSTILE)
        ),
        asked=asked,
    )


@cache
def crowd(limit: int = 1000) -> Picture:
    """Many devices that many people share, with names that take much room."""
    return show(
        *(
            make_event(f"m{n}-{k}", T + 1000 * n + k, f"{LONG}{n}", user_id=f"{LONG}{k}")
            for n in range(120)
            for k in {0, n, (n * 7) % 120, (n * 31) % 120, (n * 53) % 120}
        ),
        asked=Identifier("user_id", f"{LONG}0"),
        limit=limit,
    )


@cache
def kiosks() -> Picture:
    """Thirty devices with more claims than are shown, of thirty people."""
    return show(
        *(
            make_event(f"m{n}-{k}", T + 1000 * n + k, f"{LONG}{n}", user_id=f"{LONG}{k % 30}")
            for n in range(30)
            for k in range(35)
        ),
        asked=Identifier("user_id", f"{LONG}0"),
        limit=30,
    )


@cache
def owners() -> Picture:
    """Three hundred people on one device."""
    return show(
        *(make_event(f"m{n}", T + n, "tablet", user_id=f"{LONG}{n}") for n in range(300)),
        asked=SHARED,
        limit=1000,
    )


def nobody() -> Picture:
    return show(make_event("m1", T), asked=Identifier("email", "ghost@x.com"))


PICTURES: dict[str, Callable[[], Picture]] = {
    "person": family,
    "device": lambda: family(SHARED),
    "hostile": hostile,
    "hostile device": lambda: hostile(Identifier("anonymous_id", HOSTILE[0])),
    "cut": lambda: show(
        *(make_event(f"m{n}", T + n, "tablet", user_id=f"u{n}") for n in range(30)),
        asked=SHARED,
        limit=4,
    ),
    "crowd": crowd,
    "kiosks": kiosks,
    "owners": owners,
    "nobody": nobody,
}


@pytest.fixture(params=PICTURES)
def picture(request: pytest.FixtureRequest) -> Picture:
    """One of all kinds."""
    return PICTURES[request.param]()


def visible(text: str) -> str:
    """
    A hostile text as drawings show it: controls have signs of their own, or their numbers, spaces
    are joined.
    """
    signs = {chr(n): chr(0x2400 + n) for n in range(0x20)} | {"\x7f": "\u2421"}
    signs |= {c: f"\\u{ord(c):04x}" for c in "\u202e\u2067\u200f\x85"}
    return " ".join("".join(signs.get(c, c) for c in text).split())


def drawn(text: str) -> str:
    """The same, cut where labels are."""
    return visible(text) if len(text) <= 60 else f"{text[:60]}… ({len(text)} characters)"


# ------------------------------------------------------------------------------------------- text


def test_text_says_everything(picture: Picture) -> None:
    """Every identifier, link, device, claim and span, and what is left out, has its line."""
    text = render(picture, "text")
    count = {word: len(re.findall(rf"^  {word} ", text, re.MULTILINE)) for word in
             ("identifier", "link", "claim", "span")}  # fmt: skip

    assert count == {
        "identifier": sum(len(person.identifiers) for person in picture.persons),
        "link": sum(len(person.links) for person in picture.persons),
        "claim": sum(len(device.claims) for device in picture.devices),
        "span": sum(len(device.spans) for device in picture.devices),
    }
    for left in picture.left_out:
        assert f"of {left.total:,} {left.what} of {left.of} are left out" in text
    assert ("--limit" in text) == bool(picture.left_out)


def test_text_of_a_person() -> None:
    """What a reader sees, word by word."""
    assert render(family(), "text") == (ROOT / "tests/golden/graph_show.txt").read_text("utf-8")


def test_text_does_nothing_to_a_terminal(picture: Picture) -> None:
    """Every character is printable; a value has one line, however many it was written in."""
    text = render(picture, "text")

    assert [c for c in text if not c.isprintable() and c != "\n"] == []


def test_text_of_what_is_not_there() -> None:
    """One line."""
    assert render(nobody(), "text") == "email:ghost@x.com: never seen in workspace default\n"


# ------------------------------------------------------------------------------------------- JSON


def test_json_is_as_its_schema_says(picture: Picture) -> None:
    """docs/graph-show.schema.json describes every document, and allows nothing else."""
    schema = json.loads((ROOT / "docs/graph-show.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(render(picture, "json"))

    jsonschema.Draft202012Validator(schema).validate(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**document, "more": 1})


def test_json_holds_the_values_as_they_are() -> None:
    """Nothing is shortened or replaced in it."""
    document = json.loads(render(hostile(), "json"))
    (person,) = document["persons"]

    assert {i["value"] for i in person["identifiers"]} >= {
        text.strip() for text in HOSTILE if text.strip()
    }
    assert {device["anonymous_id"] for device in document["devices"]} == {"tablet", *HOSTILE}


def test_json_of_a_person() -> None:
    """Word by word: programs read this."""
    golden = (ROOT / "tests/golden/graph_show.json").read_text("utf-8")

    assert json.loads(render(family(), "json")) == json.loads(golden)


# ---------------------------------------------------------------------------------------- Mermaid


def load(browser: Browser, name: str) -> None:
    """A page with a library that was taken from npm."""
    try:
        path = find_viewer(name)
    except MissingBrowserError as error:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))
    browser.open(
        f'<!DOCTYPE html><meta charset="utf-8"><body><script src="{path.as_uri()}"></script>'
    )


# Labels as they are seen: the lines of each, without what is not shown.
_MERMAID = """
    mermaid.initialize({startOnLoad: false});
    const {svg} = await mermaid.render("drawing", arguments[0]);
    const place = document.createElement("div");
    place.innerHTML = svg;
    document.body.append(place);
    const read = (selector) => [...place.querySelectorAll(selector)].map((found) => {
        const lines = [""];
        const walk = (node) => {
            if (node.nodeName.toLowerCase() === "br") lines.push("");
            else if (node.nodeType === 3) lines[lines.length - 1] += node.nodeValue;
            else node.childNodes.forEach(walk);
        };
        walk(found);
        return lines.map((line) => line.trim().split(/\\s+/).join(" "));
    });
    return {
        nodes: read("g.node .nodeLabel"), edges: read("g.edgeLabels .edgeLabel .edgeLabel"),
        groups: read("g.cluster .nodeLabel"),
        paths: place.querySelectorAll("path.flowchart-link").length,
        images: place.querySelectorAll("img, script, a, strong, em, li").length,
        hacked: globalThis.hacked ?? null,
    };
"""


def test_mermaid_draws_what_is_there(browser: Browser) -> None:
    """Mermaid itself reads it: nodes with their labels, links with their provenance."""
    load(browser, "mermaid")
    seen = browser.run(_MERMAID, render(family(), "mermaid"))

    assert sorted(label[:2] for label in seen["nodes"]) == [
        ["device", "lost"], ["device", "old"], ["device", "phone"], ["device", "tablet"],
        ["email", "ann@x.com"], ["phone", "1"], ["phone", "2"], ["user_id", "old"],
        ["user_id", "u1"], ["user_id", "u2"],
    ]  # fmt: skip
    assert ["seen on one event", "m4", "1970-04-14T00:00:00Z", "refused: one value only"] in seen[
        "edges"
    ]
    assert seen["groups"] == [["person", "user_id:u1"]]
    assert seen["paths"] == len(seen["edges"])


def test_mermaid_takes_no_value_for_its_own(browser: Browser) -> None:
    """Every hostile text is seen as it is, as an identifier and as a device; none does anything."""
    load(browser, "mermaid")
    seen = browser.run(_MERMAID, render(hostile(), "mermaid"))
    # The one sign that it needs between two others has no width.
    labels = {tuple(line.replace("\u2060", "") for line in label[:2]) for label in seen["nodes"]}

    assert {("device", drawn(text)) for text in HOSTILE} - labels == set()
    assert {("phone", drawn(text.strip())) for text in HOSTILE} - labels == set()
    assert (seen["hacked"], seen["images"]) == (None, 0)


def test_mermaid_is_never_more_than_it_takes(browser: Browser, picture: Picture) -> None:
    """It is read without an error, and what did not fit is said in it."""
    text = render(picture, "mermaid")
    load(browser, "mermaid")

    assert len(text) <= MERMAID_MOST
    assert text.isascii()
    assert browser.run("return (await mermaid.parse(arguments[0])).diagramType", text)
    if picture.left_out or not picture.found:
        assert 'note["' in text
    if picture.found:
        assert "-->|" in text
    with pytest.raises(Exception, match=r"Parse error|Syntax error|Lexical error"):
        browser.run("return (await mermaid.parse(arguments[0])).diagramType", text + "\n  n0 -->|")


# -------------------------------------------------------------------------------------------- DOT


_DOT = """
    const viz = await Viz.instance();
    const svg = viz.renderSVGElement(arguments[0]);
    const read = (selector) => [...svg.querySelectorAll(selector)].map(
        (found) => [...found.querySelectorAll("text")].map(
            (line) => line.textContent.trim().split(/\\s+/).join(" ")));
    return {nodes: read("g.node"), edges: read("g.edge"), groups: read("g.cluster")};
"""


def test_dot_is_drawn_by_graphviz(browser: Browser) -> None:
    """Graphviz itself reads it: nodes, links and persons."""
    load(browser, "viz")
    seen = browser.run(_DOT, render(family(), "dot"))

    assert {tuple(label[:2]) for label in seen["nodes"]} >= {
        ("user_id", "u1"), ("email", "ann@x.com"), ("device", "tablet"), ("user_id", "u2"),
    }  # fmt: skip
    assert ["seen on one event", "m4", "1970-04-14T00:00:00Z", "refused: one value only"] in seen[
        "edges"
    ]
    assert seen["groups"] == [["person", "user_id:u1"]]


def test_dot_takes_no_value_for_its_own(browser: Browser) -> None:
    """Every hostile text is seen as it is, as an identifier and as a device."""
    load(browser, "viz")
    seen = browser.run(_DOT, render(hostile(), "dot"))
    labels = {tuple(label[:2]) for label in seen["nodes"]}

    assert {("device", drawn(text)) for text in HOSTILE} - labels == set()
    assert {("phone", drawn(text.strip())) for text in HOSTILE} - labels == set()
    assert len(seen["nodes"]) == 2 * len(HOSTILE) + 2


def test_dot_of_everything_is_read(browser: Browser, picture: Picture) -> None:
    """No picture makes a text that Graphviz refuses."""
    load(browser, "viz")
    text = render(picture, "dot")
    read = "return (await Viz.instance()).render(arguments[0], {format: 'canon'}).status"

    assert browser.run(read, text) == "success"
    assert browser.run(read, text[:-3]) == "failure"


# ------------------------------------------------------------------------------------------- page


class _Outline(HTMLParser):
    """What elements there are, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_library_is_the_published_one() -> None:
    """Byte by byte what npm has under the pinned version, with its licence beside it."""
    ours = (PAGE / "cytoscape.min.js").read_bytes()
    pinned = (ROOT / "tests/viewers.txt").read_text("utf-8").splitlines()[0]
    try:
        published = find_viewer("cytoscape").read_bytes()
    except MissingBrowserError as error:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))

    assert ours == published
    assert f'"{pinned.partition("@")[2]}"'.encode() in ours
    assert f"(https://js.cytoscape.org) {pinned.partition('@')[2]}, unchanged" in (
        ROOT / "docs/command-line.md"
    ).read_text("utf-8")


def test_the_library_keeps_its_licence() -> None:
    """The licence is in the wheel, and what is said of the wheel names it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    assert "The Cytoscape Consortium" in (PAGE / "cytoscape.LICENSE").read_text("utf-8")
    assert project["license"] == "Apache-2.0 AND MIT"
    assert "src/recognition/graph/page/cytoscape.LICENSE" in project["license-files"]


def test_the_command_knows_all_formats() -> None:
    """It does not load what renders them before one is asked for."""
    assert set(_SHOWN_AS) == set(FORMATS)


def test_nothing_in_a_page_ends_a_script() -> None:
    """What is put into script elements holds neither their end nor the begin of a comment."""
    page = render(hostile(), "html")
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)

    assert page.count("<script") == page.count("</script>") == 3
    assert len(data) == 1
    assert not re.search(r"[<>&]|[^\x00-\x7f]", data[0])
    assert json.loads(data[0])["elements"]
    for name in ("cytoscape.min.js", "page.js", "page.css"):
        assert not re.search(r"</(script|style)|<!--", (PAGE / name).read_text("utf-8"), re.I)


def test_no_value_becomes_an_element(picture: Picture) -> None:
    """The page holds the elements that it was made of, and no attribute that could run or load."""
    outline = _Outline()
    outline.feed(render(picture, "html"))
    tags = {tag for tag, _ in outline.elements}
    names = {name for _, attributes in outline.elements for name in attributes}

    assert tags <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2",
        "h3", "p", "ul", "ol", "li", "span", "div", "pre", "noscript", "script", "table", "thead",
        "tbody", "tr", "th", "td", "details", "summary", "b", "i",
    }  # fmt: skip
    assert names <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "style", "id", "role",
        "aria-label", "aria-live", "tabindex", "title", "scope", "type",
    }  # fmt: skip


def test_a_page_shows_itself_without_asking_for_anything(
    browser: Browser, picture: Picture
) -> None:
    """From a file, in Chromium: no request, no error, and a drawing where there is one."""
    browser.open(render(picture, "html"))
    shown = browser.run(
        "return {nodes: globalThis.picture.nodes('[back]').length, edges: picture.edges().length,"
        " hacked: globalThis.hacked ?? null, canvases: document.querySelectorAll('canvas').length}"
    )

    assert browser.asked_for() == []
    assert browser.said() == []
    assert shown["hacked"] is None
    assert (shown["nodes"] > 0) == picture.found
    assert shown["nodes"] <= sum(MOST_NODES)
    assert shown["edges"] <= MOST_EDGES
    assert shown["canvases"] > 0


def test_requests_would_be_seen(browser: Browser) -> None:
    """The two logs that the test before relies on do tell of a page that loads and fails."""
    browser.open("<!DOCTYPE html><img src='http://127.0.0.1:9/x.png'><script>throw 1</script>")

    assert browser.asked_for() == ["http://127.0.0.1:9/x.png"]
    assert any("Uncaught" in line for line in browser.said())


def test_a_page_lets_nothing_be_loaded_or_run(browser: Browser) -> None:
    """Even what came into it would do nothing: its policy allows its own two scripts alone."""
    browser.open(render(family(), "html"))
    blocked = browser.run("""
        const found = [];
        document.addEventListener(
            "securitypolicyviolation", (event) => found.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "globalThis.hacked = 1";
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/x.png";
        const button = document.createElement("p");
        button.setAttribute("onclick", "globalThis.hacked = 1");
        document.body.append(script, image, button);
        button.click();
        await new Promise((done) => setTimeout(done, 100));
        return [found.sort(), globalThis.hacked ?? null];
    """)

    assert blocked == [["img-src", "script-src-attr", "script-src-elem"], None]
    assert browser.asked_for() == []


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "json"])
def test_nothing_turns_round_what_stands_beside_it(format: str) -> None:
    """What turns the direction of writing is a number: it would make one value seem another."""
    text = render(hostile(), format)
    if format == "mermaid":
        text = re.sub(r"#(\d+);", lambda found: chr(int(found[1])), text)

    assert {"\u202e", "\u2067", "\u200f", "\x85"}.isdisjoint(text)


def test_every_value_is_seen_as_it_is(browser: Browser) -> None:
    """In the tables, the timelines and the drawing; hostile ones do nothing."""
    browser.open(render(hostile(), "html"))
    seen = browser.run("""
        const texts = (selector) =>
            [...document.querySelectorAll(selector)].map((x) => x.textContent);
        return {cells: texts("td"), titles: texts("h3"), hacked: globalThis.hacked ?? null,
                details: picture.nodes("[back]").map((x) => x.data("details"))};
    """)
    cells = {visible(cell) for cell in seen["cells"]}
    titles = {visible(title) for title in seen["titles"]}
    details = {tuple(map(visible, told.split("\n")[:2])) for told in seen["details"]}

    assert seen["hacked"] is None
    assert {visible(text) for text in HOSTILE} - cells == set()
    assert {visible(f"Device {text}") for text in HOSTILE} - titles == set()
    assert {("device", drawn(text)) for text in HOSTILE} - details == set()


def test_a_click_tells_the_provenance(browser: Browser) -> None:
    """Of a link: how it came, its message and time, and why it does not hold."""
    browser.open(render(family(), "html"))
    told = browser.run("""
        return picture.edges("[kind = 'refused']").map((edge) => {
            edge.emit("tap");
            return document.getElementById("details").textContent;
        });
    """)

    assert "seen on one event\nm4\n1970-04-14T00:00:00Z\nrefused: one value only" in told
    assert len(set(told)) == len(told)


def test_owners_are_told_by_colour_number_and_name(browser: Browser) -> None:
    """Each span has its owner's colour and says who it is; spans of a device lie side by side."""
    browser.open(render(family(SHARED), "html"))
    blocks = browser.run("""
        return [...document.querySelectorAll(".spans li")].map((x) => ({
            text: x.querySelector("b").textContent, back: getComputedStyle(x).backgroundColor,
            left: x.getBoundingClientRect().left, right: x.getBoundingClientRect().right,
            title: x.title}));
    """)
    legend = browser.run("""
        return Object.fromEntries([...document.querySelectorAll(".legend li")].map((x) => [
            x.textContent.trim(), getComputedStyle(x.querySelector(".swatch")).backgroundColor]));
    """)

    assert [block["text"] for block in blocks] == ["nobody", "2 user_id:u1", "1 user_id:u2"]
    assert legend.keys() == {"1 user_id:u2", "2 user_id:u1", "3 phone:2", "– nobody"}
    assert [block["back"] for block in blocks] == [
        legend["– nobody"], legend["2 user_id:u1"], legend["1 user_id:u2"],
    ]  # fmt: skip
    assert len(set(legend.values())) == 4
    for one, other in pairwise(blocks):
        assert one["right"] == pytest.approx(other["left"], abs=1)
        assert one["right"] - one["left"] > 40
    assert blocks[1]["title"] == ("user_id:u1 from 1970-03-12T00:00:00Z until 1970-04-12T00:00:00Z")


def test_claims_lie_where_their_spans_begin(browser: Browser) -> None:
    """On a shared device each claim is marked at its time, and says what it is."""
    browser.open(render(family(SHARED), "html"))
    middles = browser.run("""
        return [...document.querySelectorAll(".claim")].map((x) => {
            const box = x.getBoundingClientRect();
            return [(box.left + box.right) / 2, x.textContent];
        });
    """)
    starts = browser.run("""
        return [...document.querySelectorAll(".spans li")].map(
            (x) => x.getBoundingClientRect().left);
    """)

    assert [text for _, text in middles] == [
        "claim 1970-04-11T00:00:00Z by user_id:u1, m1",
        "claim 1970-04-12T00:00:00Z by user_id:u2, m2",
    ]
    assert starts[1] < middles[0][0] < starts[2]
    assert middles[1][0] == pytest.approx(starts[2], abs=2)


def test_what_is_left_out_is_said_on_the_page(browser: Browser) -> None:
    """In a list at its top, and as gaps in the timeline."""
    browser.open(render(PICTURES["cut"](), "html"))
    seen = browser.run("""
        return [[...document.querySelectorAll(".left-out li")].map((x) => x.textContent),
                document.querySelectorAll(".gap").length];
    """)

    assert "26 of 30 claims of device tablet are left out" in seen[0]
    assert seen[1] == 1


def test_a_page_can_be_used_without_seeing_it(browser: Browser) -> None:
    """Every region has a name, timelines can be reached by keyboard, tables have heads."""
    browser.open(render(family(), "html"))
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    roles = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree["nodes"]
        if not node["ignored"]
    ]
    reached = browser.run(
        "return [...document.querySelectorAll('[tabindex]')].map(x => x.getAttribute('aria-label'))"
    )

    assert ("heading", "user_id:u1") in roles
    assert ("region", "timeline of device tablet") in roles
    assert "timeline of device tablet" in reached
    assert ("columnheader", "provenance") in roles
    assert all(name for role, name in roles if role in ("region", "image", "heading"))


def test_colours_can_be_read() -> None:
    """Text on every colour has the contrast that WCAG 2.2 asks for (1.4.3: 4.5 to 1)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for back, front in (*COLOURS, NOBODY):
        low, high = sorted((luminance(back), luminance(front)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, back
    assert len({back for back, _ in (*COLOURS, NOBODY)}) == len(COLOURS) + 1


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_picture_is_the_same_document(format: str) -> None:
    """Nothing of the moment or of the machine is in it."""
    assert render(family(), format) == render(family(), format)


def test_a_drawing_is_no_larger_than_can_be_looked_at() -> None:
    """What is not drawn is said, and is still in the tables."""
    picture = crowd()
    page = render(picture, "html")

    assert picture.left_out == ()
    assert re.search(r"[0-9,]+ of [0-9,]+ nodes are not drawn", page)
    assert "nodes are not drawn" in render(picture, "dot")
    assert all(html.escape(device.anonymous_id) in page for device in picture.devices)
