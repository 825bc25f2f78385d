"""
Made-up events of a shop's visitors, as real trackers send them. Nothing else is in this file.

It imports nothing from the library, so that what it makes cannot agree with it by accident. Real
habits and real faults are in it: shared devices, several devices of one person, an e-mail address
long before an account or of a whole family, logins and logouts with and without a new anonymous
id, changed user ids, companies, servers that know no device, late and repeated messages, bots, and
programs that send ``null`` or zeros for an id.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import heappop, heappush
from uuid import UUID

#: The first day of every made-up file: 2026-01-01, in microseconds since 1970-01-01 UTC.
START = 1_767_225_600_000_000

_SECOND = 1_000_000
_MINUTE = 60 * _SECOND
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR

_AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/143.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 19_1 like Mac OS X) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko) Version/19.1 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (X11; Linux x86_64; rv:146.0) Gecko/20100101 Firefox/146.0",
    "Mozilla/5.0 (Linux; Android 16) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/143.0.0.0 Mobile Safari/537.36",
)
_BOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"
_NOBODY = "00000000-0000-0000-0000-000000000000"

_FIRST = ("ann", "bo", "chloe", "dev", "eva", "femi", "gus", "hana", "ivo", "june", "kai", "lea")
_LAST = ("adler", "brook", "costa", "diaz", "ekman", "fox", "gray", "holm", "ito", "jones", "khan")
_PAGES = ("/", "/search", "/shoes", "/shoes/trail", "/jackets", "/sale", "/about", "/cart", "/help")
_TRACKS = ("Product Viewed", "Product Added", "Coupon Entered", "Order Completed")

_Body = dict[str, object]


@dataclass(slots=True)
class _Device:
    anonymous_id: str
    agent: str
    user: _Visitor | None = None
    """Who is signed in; a device of several people has at most one at a time."""


@dataclass(slots=True)
class _Visitor:
    user_id: str
    email: str
    phone: str | None
    devices: list[_Device]
    signs_in_at: int
    """The number of the session, from 0, in which the account is first used; -1 is never."""
    email_at: int
    """The number of the session in which the newsletter is ordered; -1 is never."""
    old_user_id: str | None
    """The id under which the account is first used, where it is renamed later."""
    company: str | None
    sessions: int = 0


def generate_events(visitors: int = 3000, days: int = 30, seed: int = 0) -> Iterator[_Body]:
    """
    Make the events of a shop, in the order in which its collector received them.

    About 15 events for each visitor, 3 in 4 of them without any user id. The order is nearly that
    of the events' own times: 2 in 100 come hours or days late, 1 in 100 comes twice. Memory grows
    with the visitors and their sessions, not with the events.

    Args:
        visitors: How many people come.
        days: Over how many days, from `START`.
        seed: The same three numbers give the same events, byte for byte.
    """
    shop = _Shop(visitors, days, random.Random(seed))
    waiting: list[tuple[int, int, _Body]] = []
    made = 0
    for time, visitor in shop.sessions:
        while waiting and waiting[0][0] <= time:
            yield heappop(waiting)[2]
        for received, event in shop.visit(visitor, time):
            made += 1
            heappush(waiting, (received, made, {**event, "receivedAt": _iso(received)}))
    while waiting:
        yield heappop(waiting)[2]


class _Shop:
    """The people of the shop, their devices, and what happens in each of their sessions."""

    def __init__(self, visitors: int, days: int, rng: random.Random) -> None:
        self._rng = rng
        people: list[_Visitor] = []
        for number in range(visitors):
            people.append(self._person(number, people))
        self.sessions: list[tuple[int, _Visitor | None]] = []
        for person in people:
            # Nobody's sessions lie closer than some minutes; most visitors come once or twice.
            for _ in range(1 + min(int(rng.expovariate(0.5)), 12)):
                self.sessions.append((START + int(rng.random() * days * _DAY), person))
        for _ in range(visitors // 60):
            self.sessions.append((START + int(rng.random() * days * _DAY), None))
        self.sessions.sort(key=lambda session: session[0])

    def _person(self, number: int, people: list[_Visitor]) -> _Visitor:
        rng = self._rng
        first, last = rng.choice(_FIRST), rng.choice(_LAST)
        devices = [self._device() for _ in range(rng.choices((1, 2, 3), (70, 25, 5))[0])]
        if people and rng.random() < 0.08:
            devices[0] = people[-1].devices[0]  # the family's tablet
        shares_email = bool(people) and rng.random() < 0.01
        signs_in_at = rng.choices((-1, 0, 1, 2, 3), (40, 14, 22, 15, 9))[0]
        return _Visitor(
            user_id=f"user-{number:06}",
            email=people[-1].email if shares_email else f"{first}.{last}.{number}@example.com",
            phone=f"+1 555 {number:07}" if rng.random() < 0.1 else None,
            devices=devices,
            signs_in_at=signs_in_at,
            email_at=0 if rng.random() < 0.15 else -1,
            old_user_id=f"legacy-{number}" if rng.random() < 0.04 else None,
            company=f"company-{number % 40}" if rng.random() < 0.05 else None,
        )

    def _device(self) -> _Device:
        return _Device(self._uuid(), self._rng.choice(_AGENTS))

    def visit(self, visitor: _Visitor | None, time: int) -> Iterator[tuple[int, _Body]]:
        """One session: pairs of the time when the collector received an event, and the event."""
        for event_time, event in self._browse(visitor, time) if visitor else self._disturb(time):
            chance = self._rng.random()
            received = event_time + 1 + int(chance * _SECOND)
            if chance < 0.02:
                received += int(_HOUR + self._rng.random() * 2 * _DAY)
            yield received, event
            if chance > 0.99:  # sent again, because the answer got lost
                yield received + int(self._rng.random() * 10 * _MINUTE), event

    def _browse(self, visitor: _Visitor, time: int) -> Iterator[tuple[int, _Body]]:
        rng = self._rng
        session, visitor.sessions = visitor.sessions, visitor.sessions + 1
        device = rng.choice(visitor.devices)
        if device.user is not None and device.user is not visitor:
            yield self._sign_out(device, time)
        steps = 2 + min(int(rng.expovariate(0.25)), 30)
        knows_account = 0 <= visitor.signs_in_at <= session
        signs_in = (
            rng.randrange(1, steps)
            if knows_account
            and device.user is None
            and (session == visitor.signs_in_at or rng.random() < 0.8)
            else -1
        )
        leaves_email = 1 if session == visitor.email_at and device.user is None else -1
        for step in range(steps):
            time += int((5 + rng.expovariate(1 / 40)) * _SECOND)
            if step == leaves_email:
                yield time, self._event(device, time, "identify", traits={"email": visitor.email})
            elif step == signs_in:
                yield from self._sign_in(device, visitor, session, time)
            else:
                yield time, self._look(device, time)
        if device.user is not None and rng.random() < 0.05:
            yield time + _HOUR, self._order_by_server(device.user, time + _HOUR)
        if device.user is not None and rng.random() < 0.2:
            yield self._sign_out(device, time + 20 * _SECOND)

    def _sign_in(
        self, device: _Device, visitor: _Visitor, session: int, time: int
    ) -> Iterator[tuple[int, _Body]]:
        rng = self._rng
        device.user = visitor
        # As people type it; the same address all the same.
        email = visitor.email.title() if rng.random() < 0.1 else visitor.email
        traits: _Body = {"email": email, "plan": rng.choice(("free", "plus"))}
        if visitor.phone is not None:
            traits["phone"] = visitor.phone
        yield time, self._event(device, time, "identify", traits=traits)
        if visitor.company is not None:
            time += _SECOND
            company: _Body = {"name": visitor.company.title(), "email": "office@example.com"}
            yield (
                time,
                self._event(device, time, "group", groupId=visitor.company, traits=company),
            )
        if visitor.old_user_id is not None and session > visitor.signs_in_at:
            old, visitor.old_user_id = visitor.old_user_id, None
            time += _SECOND
            yield time, self._event(device, time, "alias", previousId=old)

    def _sign_out(self, device: _Device, time: int) -> tuple[int, _Body]:
        event = self._event(device, time, "track", event="Signed Out", properties={})
        device.user = None
        if self._rng.random() < 0.5:  # half of the trackers start over with a new anonymous id
            device.anonymous_id = self._uuid()
        return time, event

    def _look(self, device: _Device, time: int) -> _Body:
        rng = self._rng
        if rng.random() < 0.7:
            path = rng.choice(_PAGES)
            properties: _Body = {"path": path, "url": f"https://shop.example{path}"}
            return self._event(device, time, "page", name=path, properties=properties)
        properties = {"sku": f"sku-{rng.randrange(200)}", "price": rng.randrange(10, 200)}
        return self._event(device, time, "track", event=rng.choice(_TRACKS), properties=properties)

    def _order_by_server(self, visitor: _Visitor, time: int) -> _Body:
        return {
            "type": "track",
            "messageId": self._uuid(),
            "timestamp": _iso(time),
            "userId": visitor.old_user_id or visitor.user_id,
            "event": "Order Shipped",
            "properties": {"parcels": self._rng.randrange(1, 3)},
            "context": {"library": {"name": "shop-server", "version": "2.0.1"}},
        }

    def _disturb(self, time: int) -> Iterator[tuple[int, _Body]]:
        """A session that must not teach anybody anything."""
        rng = self._rng
        fault = rng.choice(("bot", "zeros", "null"))
        device = self._device()
        if fault == "bot":
            device.agent = _BOT
        elif fault == "zeros":
            device.anonymous_id = _NOBODY
        for _ in range(rng.randrange(2, 8)):
            time += int((1 + rng.random()) * _SECOND)
            event = self._look(device, time)
            if fault == "zeros":  # one device for the whole world, with another user each time
                event["userId"] = f"kiosk-{rng.randrange(500)}"
            elif fault == "null":
                event["userId"] = rng.choice(("null", "undefined", "0"))
            yield time, event

    def _event(self, device: _Device, time: int, type: str, **fields: object) -> _Body:
        event: _Body = {
            "type": type,
            "messageId": self._uuid(),
            "timestamp": _iso(time),
            "anonymousId": device.anonymous_id,
            **fields,
            "context": {
                "userAgent": device.agent,
                "library": {"name": "analytics.js", "version": "5.2.0"},
            },
        }
        if device.user is not None:
            event["userId"] = device.user.old_user_id or device.user.user_id
        return event

    def _uuid(self) -> str:
        return str(UUID(int=self._rng.getrandbits(128), version=4))


def _iso(time: int) -> str:
    seconds, micros = divmod(time, _SECOND)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{micros // 1000:03}Z"
