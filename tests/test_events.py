"""Event files: the bytes TensorBoard expects, and one line a tag however often a run was stopped."""

import math
import struct

import pytest
import torch

from speedrl_lab.events import EventFile, crc32c, scalars
from speedrl_lab.runs import Run


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
)
def test_checksums_are_those_of_rfc_3720(data, expected):
    assert crc32c(data) == expected


def frames(data):
    """The payloads of a file's frames, their checksums compared."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        payload = data[12 : 12 + length]
        for text, stored in ((data[:8], data[8:12]), (payload, data[12 + length : 16 + length])):
            crc = crc32c(text)
            rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
            assert struct.pack("<I", (rotated + 0xA282EAD8) % 2**32) == stored
        yield payload
        data = data[16 + length :]


def test_an_event_has_the_bytes_of_its_message(tmp_path):
    file = EventFile(tmp_path, 300)
    file.write({"iteration": 300, "kl": 0.5})
    version, event = frames(file.path.read_bytes())
    assert version[9:] == b"\x10\x00" + b"\x1a\x0dbrain.Event:2"  # step 0, file_version
    assert event[:1] == b"\x09" and event[9:12] == b"\x10\xac\x02"  # wall time; step 300 as a varint
    value = b"\x0a\x02kl" + b"\x15" + struct.pack("<f", 0.5)
    assert event[12:] == b"\x2a\x0b\x0a\x09" + value


def test_only_numbers_are_logged_nested_ones_by_path():
    record = {
        "iteration": 3, "rewards": {"clip": torch.tensor(0.5), "speed": -1}, "steps": 4, "warnings": ["x"],
        "done": True, "method": "dimo", "kl": float("nan"), "none": None,
    }  # fmt: skip
    found = dict(scalars(record))
    assert list(found) == ["rewards/clip", "rewards/speed", "steps", "kl"]
    assert found["rewards/clip"] == 0.5 and found["steps"] == 4.0 and math.isnan(found["kl"])


def test_huge_numbers_become_infinite(tmp_path):
    file = EventFile(tmp_path, 1)
    file.write({"iteration": 1, "high": 1e300, "low": -1e300})
    assert struct.pack("<f", math.inf) in file.path.read_bytes()
    assert struct.pack("<f", -math.inf) in file.path.read_bytes()


def interrupted(folder):
    """A run with a checkpoint at iteration 2, killed after 4 and in the middle of a write, that goes on to 5."""
    run = Run.open(folder, {})
    for iteration in range(1, 5):
        run.log({"iteration": iteration, "rewards": {"clip": iteration / 10}, "session": 1})
        if iteration == 2:
            run.save_checkpoint({"iteration": 2})
    with next(folder.glob("events*")).open("ab") as file:
        file.write(b"\x20\x00\x00")
    run = Run.open(folder, {}, resume=True)
    run.load_checkpoint()
    for iteration in range(3, 6):
        run.log({"iteration": iteration, "rewards": {"clip": iteration / 10}, "session": 2})
    return run


def test_a_resumed_run_begins_a_file_and_leaves_the_first_alone(tmp_path):
    run = interrupted(tmp_path / "run")
    first, second = sorted(run.path.glob("events.out.tfevents.*"))
    assert (first.name[-4:], second.name[-4:]) == ("0001", "0002")
    version, start, *events = frames(second.read_bytes())
    assert start[9:] == b"\x10\x03" + b"\x3a\x02\x08\x01"  # step 3, session log: start
    assert len(events) == 3
    assert run.records().session.tolist() == [1, 1, 2, 2, 2]
    run.load_checkpoint()
    run.log({"iteration": 3, "session": 3})
    assert len(list(run.path.glob("events*"))) == 3


def test_tensorboard_reads_each_iteration_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = interrupted(tmp_path / "run")
    events = accumulator.EventAccumulator(str(run.path))
    events.Reload()
    assert events.Tags()["scalars"] == ["rewards/clip", "session"]
    clip = events.Scalars("rewards/clip")
    assert [event.step for event in clip] == [1, 2, 3, 4, 5]
    assert [event.value for event in clip] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [event.value for event in events.Scalars("session")] == [1, 1, 2, 2, 2]
