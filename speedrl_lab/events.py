"""Event files that TensorBoard reads, written without it: scalars beside metrics.jsonl.

A scalar takes a few bytes of protobuf in a frame with two checksums. TensorBoard as a dependency would bring a
web server, gRPC and a writer thread for them; whoever wants to look installs it where the looking is done.
A file is only ever appended to, because a running TensorBoard remembers how far it has read: each time a run is
gone on with, a new file begins, and its session-start event tells TensorBoard to forget what an earlier file
holds from that iteration on (what `purge_step` does in its own writer).
"""

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PREFIX = "events.out.tfevents."
POLYNOMIAL = 0x82F63B78  # of CRC-32C, bits reversed
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # wire types of protobuf


class EventFile:
    """The event file of one session of a run, created with its first record."""

    def __init__(self, folder: Path, first_step: int):
        last = max((int(path.suffix[1:]) for path in folder.glob(f"{PREFIX}[0-9]*[0-9]")), default=0)
        self.path = folder / f"{PREFIX}{last + 1:04d}"  # TensorBoard reads files in the order of their names
        start = _event(0, _field(3, BYTES, b"brain.Event:2"))
        if last:
            start += _event(first_step, _field(7, BYTES, _field(1, VARINT, 1)))  # SessionLog, status START
        with self.path.open("xb") as file:
            file.write(start)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the numbers of a record at its `iteration`; nested ones as `rewards/<name>`."""
        values = b"".join(
            _field(1, BYTES, _field(1, BYTES, tag.encode()) + _field(2, FLOAT, value)) for tag, value in scalars(record)
        )
        with self.path.open("ab") as file:
            file.write(_event(record["iteration"], _field(5, BYTES, values)))


def scalars(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record with their tags; texts, lists, flags and the iteration are left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{above}{name}/")
        elif above + name != "iteration" and not isinstance(value, bool | str | list | tuple | None):
            yield above + name, float(value)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), as RFC 3720 uses it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_row(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
    return value


TABLE = [_crc_row(value) for value in range(256)]


def _event(step: int, content: bytes) -> bytes:
    """A framed Event message: wall time, step, and one encoded field."""
    data = _field(1, DOUBLE, time.time()) + _field(2, VARINT, step) + content
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    """The checksum of a frame: rotated and shifted, so that checksums of checksums stay useful."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _field(number: int, kind: int, value: Any) -> bytes:
    """One protobuf field; numbers below 16, non-negative integers."""
    key = bytes([number << 3 | kind])
    match kind:
        case 0:
            return key + _varint(value)
        case 1:
            return key + struct.pack("<d", value)
        case 5:
            return key + _float32(value)
    return key + _varint(len(value)) + value


def _float32(value: float) -> bytes:
    """A number beyond the range of float32 becomes infinite."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
