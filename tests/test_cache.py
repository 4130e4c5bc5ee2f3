"""The cache: fingerprints of content, and files that are whole, exact or computed again."""

import importlib
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_emoji

from speedrl_lab import cache
from speedrl_lab.config import SamplerConfig

TABLE = pd.DataFrame(
    {"prompt": ["a dog", "two cats"], "sample": [0, 1], "psnr": [1 / 3, float(np.float32(0.1))], "size": [np.nan, 1.0]}
)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    return tmp_path


def loaded(columns=tuple(TABLE), rows=2):
    return cache.load("x", "k", columns, rows)


def test_what_is_stored_comes_back_exactly(outputs):
    assert loaded() is None
    cache.store("x", "k", TABLE)
    pd.testing.assert_frame_equal(loaded(), TABLE, check_exact=True)
    assert [path.name for path in (outputs / "cache" / "x").iterdir()] == ["k.json.gz"]


@pytest.mark.parametrize("content", [b"", b"not gzip", None])
def test_a_broken_file_is_a_warning_and_nothing_else(outputs, content):
    cache.store("x", "k", TABLE)
    path = outputs / "cache" / "x" / "k.json.gz"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.warns(UserWarning, match="k.json.gz is broken .* computed again"):
        assert loaded() is None


def test_a_file_of_another_shape_is_not_used():
    cache.store("x", "k", TABLE)
    with pytest.warns(UserWarning, match="2 rows of prompt, sample, psnr, size"):
        assert loaded(rows=3) is None
    with pytest.warns(UserWarning, match="is broken"):
        assert loaded(columns=("prompt", "sample", "psnr")) is None


def test_a_folder_that_cannot_be_written_is_a_warning(outputs):
    (outputs / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="cannot keep a result"):
        cache.store("x", "k", TABLE)


def test_writers_of_one_key_do_not_disturb_each_other(outputs):
    """Readers beside eight writers see a whole table or none, and nothing is left behind."""
    big = pd.concat([TABLE] * 500, ignore_index=True)
    seen, done = [], threading.Event()

    def write():
        for _ in range(5):
            cache.store("x", "k", big)

    def read():
        while not done.is_set():
            seen.append(cache.load("x", "k", tuple(TABLE), 1000))

    writers, reader = [threading.Thread(target=write) for _ in range(8)], threading.Thread(target=read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
    assert all(table is None or table.equals(big) for table in seen)
    assert cache.load("x", "k", tuple(TABLE), 1000).equals(big)
    assert [path.name for path in (outputs / "cache" / "x").iterdir()] == ["k.json.gz"]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, 1.0), (1, True), ("ab", "a"), (["ab"], ["a", "b"]), ([["a"], "b"], [["a", "b"]]), ({"a": 1}, {"a": 2}),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)), (torch.zeros(2), torch.zeros(1, 2)),
        (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])), (SamplerConfig(), SamplerConfig(temperature=0.9)),
        (np.zeros(2), np.ones(2)), (torch.device("cpu"), "cpu"), (None, 0), (b"a", "a"),
    ],
)  # fmt: skip
def test_different_values_have_different_fingerprints(left, right):
    assert cache.fingerprint(left) != cache.fingerprint(right)


def test_equal_content_has_equal_fingerprints():
    assert cache.fingerprint({"a": 1, "b": [2]}) == cache.fingerprint({"b": (2,), "a": 1})
    assert cache.fingerprint(SamplerConfig()) == cache.fingerprint(replace(SamplerConfig(steps=3), steps=8))
    assert cache.fingerprint(torch.ones(3, 4).T) == cache.fingerprint(torch.ones(4, 3))
    assert len(cache.fingerprint(1)) == 64


def test_the_fingerprint_of_a_generator_sees_every_weight(tokenizer):
    known = cache.fingerprint(tiny_emoji(tokenizer))
    assert known == cache.fingerprint(tiny_emoji(tokenizer).copy())
    for part in ("policy", "pace"):
        changed = tiny_emoji(tokenizer)
        with torch.no_grad():
            list(getattr(changed, part).parameters())[-1].view(-1)[0] += 1e-3
        assert cache.fingerprint(changed) != known, part
    changed = tiny_emoji(tokenizer)
    changed.tokenizer = tiny_emoji(tokenizer).tokenizer.__class__(width=16, blocks=1)
    assert cache.fingerprint(changed) != known
    changed = tiny_emoji(tokenizer)
    changed.pace = None
    assert cache.fingerprint(changed) != known


def test_what_has_no_content_has_no_fingerprint():
    with pytest.raises(TypeError, match="a function has no fingerprint"):
        cache.fingerprint([lambda: 1])
    loop: list = []
    loop.append(loop)
    with pytest.raises(TypeError, match="contains itself"):
        cache.fingerprint(loop)


def test_code_is_part_of_a_key_and_what_is_said_about_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)

    def read(text):
        (tmp_path / "part.py").write_text(text)
        return cache.sources("part")

    code = '"""What it is for."""\nLIMIT = 3\n"""Most."""\ndef half(x):\n    """x / 2."""\n    return x / 2\n'
    other_words = "LIMIT = 3  # at most\n\n\ndef half(x):\n    # of it\n    return x / 2\n"
    assert read(code) == read(other_words)
    for old, new in (("3", "4"), ("x / 2\n", "x / 3\n"), ("half", "third")):
        assert read(other_words) != read(other_words.replace(old, new))


def test_the_code_of_a_class_is_part_of_a_fingerprint_and_its_words_are_not(tmp_path, monkeypatch):
    def seen(folder, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / folder)
        monkeypatch.delitem(sys.modules, "part", raising=False)
        return cache.fingerprint(importlib.import_module("part").Part())

    code = 'class Part:\n    size = 3\n    """In steps."""\n\n    def half(self):\n        return 2\n'
    assert seen("one", code) == seen("two", code.replace("In steps.", "Steps of it, at most."))
    assert seen("one more", code) != seen("three", code.replace("return 2", "return 1"))
