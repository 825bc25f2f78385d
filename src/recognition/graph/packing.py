"""
How ids and message references are packed, and names made short, the same in every graph on a disk.

A UUID in its usual form takes 16 bytes. A reference is a time of its day and a message id: 20 bytes
where the id is a UUID and the time has whole milliseconds, which is what the SDKs send.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator

from recognition.attribution import DAY
from recognition.identity import ANONYMOUS

UUID_MS, UUID_US, TEXT = range(3)
UUID_MS_FORMAT = struct.Struct(">I16s")


def pack_id(value: str) -> bytes | str:
    """16 bytes for a UUID in its usual form, the text itself for all others."""
    if len(value) == 36 and value[8:24:5] == "----":
        digits = value.replace("-", "")
        try:
            packed = bytes.fromhex(digits)
        except ValueError:
            return value
        if packed.hex() == digits and len(packed) == 16:
            return packed
    return value


def unpack_id(key: bytes | str) -> str:
    if isinstance(key, str):
        return key
    digits = key.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def pack(message_id: str, at: int) -> tuple[int, int, bytes]:
    """The day, how it is packed, and the reference itself."""
    day, rest = divmod(at, DAY)
    key = pack_id(message_id)
    if key.__class__ is bytes:
        if rest % 1000 == 0:
            return day, UUID_MS, UUID_MS_FORMAT.pack(rest // 1000, key)
        return day, UUID_US, rest.to_bytes(5, "big") + key
    text = message_id.encode()
    return day, TEXT, rest.to_bytes(5, "big") + struct.pack(">H", len(text)) + text


def unpack(kind: int, packed: bytes, start: int) -> Iterator[tuple[str, int]]:
    if kind == UUID_MS:
        for at, key in UUID_MS_FORMAT.iter_unpack(packed):
            yield unpack_id(key), start + at * 1000
        return
    position = 0
    while position < len(packed):
        at = start + int.from_bytes(packed[position : position + 5], "big")
        position += 5
        if kind == UUID_US:
            yield unpack_id(packed[position : position + 16]), at
            position += 16
        else:
            (length,) = struct.unpack_from(">H", packed, position)
            position += 2
            yield packed[position : position + length].decode(), at
            position += length


#: Bytes of a digest. Of ten thousand million names, two share one with a probability of 1e-9.
DIGEST = 12
EARLIER_DIGEST = 16


def digester(salt: bytes, workspace: str) -> Callable[[str, str], bytes]:
    """
    Makes the short names of anonymous ids and known identifiers of one workspace.

    Keyed by the salt of the graph, so that a name tells nothing, and none can be made to collide,
    without it. The last bit tells the two kinds apart: 0 is an anonymous id, 1 is a known one.
    """
    keyed = hashlib.blake2b(key=salt, digest_size=DIGEST)
    keyed.update(len(workspace.encode()).to_bytes(4, "big") + workspace.encode())
    begun: dict[str, hashlib.blake2b] = {}

    def digest(type: str, value: str) -> bytes:
        if type not in begun:
            beginning = keyed.copy()
            beginning.update(f"{type}\0".encode())
            begun[type] = beginning  # whole by now: threads share it
        named = begun[type].copy()
        named.update(value.encode())
        made = named.digest()
        known = type != ANONYMOUS
        return made if made[-1] & 1 == known else made[:-1] + _OTHER_KIND[made[-1]]

    return digest


_OTHER_KIND = [bytes((last ^ 1,)) for last in range(256)]


def earlier_digester(salt: bytes, workspace: str) -> Callable[[str, str], bytes]:
    """
    Makes the 16-byte names by which version 1 of the SQLite graph remembered who was forgotten.

    Nothing leads from these to the names of now, so that they are kept, and asked for as well.
    """

    def digest(type: str, value: str) -> bytes:
        text = "\0".join((workspace, type, value)).encode()
        return hashlib.blake2b(text, key=salt, digest_size=EARLIER_DIGEST).digest()

    return digest
