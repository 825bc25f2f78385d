"""
Events of many households, each small enough for the oracle: who shares devices, and with whom.

Nobody of one household meets anybody of another one, so that the oracle, which looks at all events
for each of them, is asked household by household, however many there are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from oracle import Oracle, make_event
from recognition.attribution import DAY
from recognition.events import Event, render_time

SIZE = 50  # events of a household
_SECOND = 1_000_000
_START = 1_780_000_000 * _SECOND


def make_household(number: int) -> list[Event]:
    """In the order in which they arrive, which is about that of their times."""
    draw = random.Random(f"household {number}")
    devices = [f"d{number}-{k}" for k in range(draw.randint(2, 5))]
    users = [f"u{number}-{k}" for k in range(draw.randint(1, 3))]
    # An address belongs to a user; now and then another one names it, which is a conflict.
    emails = {f"{user}@example.com": user for user in users}
    found = []
    for position in range(SIZE):
        user = email = None
        chance = draw.random()
        if chance < 0.04:
            user = draw.choice(users)
        elif chance < 0.07:
            email = draw.choice(list(emails))
        elif chance < 0.10:
            email = draw.choice(list(emails))
            user = emails[email] if draw.random() < 0.9 else draw.choice(users)
        found.append(
            make_event(
                f"m{number}-{position:03}",
                _START + draw.randrange(20 * DAY // _SECOND) * _SECOND,
                draw.choice(devices),
                user_id=user,
                email=email,
            )
        )
    return sorted(found, key=lambda event: event.time + draw.gauss(0, 2 * DAY))


def owners(events: Sequence[Event]) -> dict[str, str | None]:
    """By message id, what the rows of a household hold in the end, with the default settings."""
    return Oracle("device_split", 30 * DAY, own_column=False, events=[*events]).owners()


def to_segment(event: Event) -> dict[str, Any]:
    """As it is sent."""
    known = {one.type: one.value for one in event.known}
    return {
        "messageId": event.message_id,
        "timestamp": render_time(event.time),
        "type": "track",
        "event": "Seen",
        "anonymousId": event.anonymous_id,
        "userId": known.get("user_id"),
        "context": {"traits": {k: v for k, v in known.items() if k != "user_id"}},
    }


def to_row(event: Event) -> tuple[str, str | None, str | None, str]:
    """As a pipeline writes it: message, device, user, time."""
    user = next((one.value for one in event.known if one.type == "user_id"), None)
    return event.message_id, event.anonymous_id, user, render_time(event.time)
