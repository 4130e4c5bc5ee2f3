"""Prompt files of every kind, what is wrong with them line by line, and the GenEval-like judge of EmojiScenes."""

import json
from pathlib import Path

import pytest
import torch

import speedrl_lab as lab
from speedrl_lab import scenes
from speedrl_lab.compositor import COLORS, OBJECTS, paint
from speedrl_lab.prompts import Prompt, load_prompts, read_prompts
from speedrl_lab.rewards import build_rewards
from speedrl_lab.rewards.geneval import judge, metadata_of, read_metadata


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# Files


def test_one_prompt_a_line(tmp_path):
    path = write(tmp_path, "own.txt", "\ufeffa dog\r\n\n  two cats \na dog\nein Bär, naß\n")
    assert read_prompts(path) == [Prompt("a dog", line=1), Prompt("two cats", line=3), Prompt("ein Bär, naß", line=5)]


def test_json_lines_keep_their_metadata(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    ]
    lines = [json.dumps(row) for row in rows]
    path = write(tmp_path, "geneval.jsonl", "\n".join([lines[0], "", lines[1], lines[0]]))
    first, second = read_prompts(path)
    assert (first.text, first.line, second.text, second.line) == ("two dogs", 1, "a cat", 3)
    assert first.metadata == {"tag": "counting", "include": [{"class": "dog", "count": 2}]}


@pytest.mark.parametrize(("ending", "comma", "column"), [("tsv", "\t", "Prompt"), ("csv", ",", "Prompts")])
def test_tables_of_the_benchmarks(tmp_path, ending, comma, column):
    """PartiPrompts is a .tsv with a column Prompt, DrawBench a .csv with Prompts."""
    rows = [f"{column}{comma}Category", f'"A red ball, on a ""green"" box"{comma}Colors', "", f"A dog{comma}Counting",
            f"A dog{comma}Misc"]  # fmt: skip
    prompts = read_prompts(write(tmp_path, f"table.{ending}", "\r\n".join(rows)))
    assert [prompt.text for prompt in prompts] == ['A red ball, on a "green" box', "A dog"]
    assert prompts[0].metadata == {"Category": "Colors"} and [prompt.line for prompt in prompts] == [2, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a dog"}\n{"prompt": "a', "line 2: no JSON"),
        ("a.jsonl", '{"prompt": "a dog"}\n\n["a cat"]', "line 3: a list; expected an object with a 'prompt'"),
        ("a.jsonl", '{"tag": "x"}', "line 1: no 'prompt' among 'tag'"),
        ("a.jsonl", '{"prompt": 3}', "line 1: prompt=3; expected words"),
        (
            "a.jsonl",
            '{"prompt": "a dog", "n": 1}\n{"prompt": "a dog", "n": 2}',
            "line 2: .* line 1 with other",
        ),
        ("a.csv", "Prompt,Kind\na dog,x\na dog, a cat,x", "line 3: 3 cells under 2 columns"),
        ("a.csv", "Prompt,Kind\na dog,x\n ,x", "line 3: Prompt=' '; expected words"),
        ("a.tsv", "Text_\tKind\na dog\tx", "line 1: no 'prompt' among 'Text_', 'Kind'"),
        ("a.txt", b"a dog\na c\xe4t", "line 2: not UTF-8"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.json", "[]", "ends in '.json'; nearest: '.jsonl'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_load_prompts_takes_splits_and_files(tmp_path):
    assert lab.load_prompts is load_prompts
    assert load_prompts("test", 5) == scenes.load_prompts("test", 5)
    path = write(tmp_path, "own.txt", "a dog\na cat\na key\n")
    assert load_prompts(str(path)) == ["a dog", "a cat", "a key"] and load_prompts(path, 2) == ["a dog", "a cat"]
    with pytest.raises(ValueError, match="asked for 4 prompts; own.txt holds 3"):
        load_prompts(str(path), 4)
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        load_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="unknown split 'tset'; nearest: 'test'"):
        load_prompts("tset")


# The judge


def test_captions_become_geneval_metadata():
    assert metadata_of(scenes.parse_caption("a dog left of a cat on a red background")) == {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "exclude": [{"class": "dog", "count": 2}, {"class": "cat", "count": 2}],
        "prompt": "a dog left of a cat on a red background",
    }
    assert metadata_of(scenes.parse_caption("two fish"))["include"] == [{"class": "fish", "count": 2}]


def truth(caption: str, seed: int = 0):
    """What a perfect detector says of one scene of a caption."""
    layout = scenes.draw_layouts([scenes.parse_caption(caption)], torch.Generator().manual_seed(seed))
    counts, centers = scenes.answers(layout)
    return counts[0], layout.backgrounds[0], centers[0]


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    ("include", "exclude", "met"),
    [
        ([DOG], [], True),
        ([DOG, CAT], [], True),
        ([{"class": "dog"}], [], True),  # one unless said otherwise
        ([{**DOG, "count": 2}], [], False),
        ([DOG, {"class": "key", "count": 1}], [], False),
        ([{**DOG, "color": "blue"}], [], True),
        ([{**DOG, "color": "red"}], [], False),
        ([CAT, {**DOG, "position": ["left of", 0]}], [], True),
        ([DOG, {**CAT, "position": ["right of", 0]}], [], True),
        ([CAT, {**DOG, "position": ["right of", 0]}], [], False),
        ([DOG, {**CAT, "position": ["left of", 0]}], [], False),
        ([DOG], [CAT], False),
        ([DOG], [{"class": "cat", "count": 2}], True),
    ],
)
def test_clauses_are_judged(include, exclude, met):
    answers = truth("a dog left of a cat on a blue background")
    assert judge(read_metadata({"include": include, "exclude": exclude}), *answers) is met


@pytest.mark.parametrize("relation", ["above", "below"])
def test_y_grows_downwards(relation):
    demand = read_metadata({"include": [CAT, {**DOG, "position": [relation, 0]}]})
    assert judge(demand, *truth("a dog above a cat")) is (relation == "above")
    assert judge(demand, *truth("a cat above a dog")) is (relation == "below")
    assert not judge(demand, *truth("two dogs"))


def test_real_scenes_pass_and_wrong_ones_fail():
    drawn, _, images = scenes.draw_batch(192, "test", seed=3)
    rng = torch.Generator().manual_seed(0)
    reward = build_rewards(["geneval"])["geneval"]
    right = reward(images, [scene.caption for scene in drawn], None)
    wrong = reward(images.bfloat16(), [scenes.alter(scene, rng).caption for scene in drawn], None)
    assert right.shape == (192,) and right.dtype == wrong.dtype == torch.float32
    assert set(right.tolist()) <= {0.0, 1.0}
    assert float(right.mean()) > 0.95 and float(wrong.mean()) < 0.05


def test_a_file_overrules_the_caption(tmp_path):
    rows = [{"prompt": "my two pets", "include": [DOG, CAT]}, {"prompt": "a dog", "include": [CAT]}]
    path = write(tmp_path, "own.jsonl", "\n".join(map(json.dumps, rows)))
    name = f"geneval:{path}"
    reward = build_rewards([name])[name]
    rng = torch.Generator().manual_seed(1)
    both = [scenes.parse_caption("a dog and a cat"), scenes.parse_caption("a key")]
    images = paint(scenes.draw_layouts(both, rng))
    assert reward(images, ["my two pets", "my two pets"], None).tolist() == [1.0, 0.0]
    assert reward(images, ["a dog", "a key"], None).tolist() == [1.0, 1.0]  # "a dog" asks for a cat here
    with pytest.raises(ValueError, match="unknown word 'dgo'"):
        reward(images[:1], ["a dgo"], None)
    assert "own.jsonl (sha256 " in reward.record


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, 'line 1: no list "include" in the metadata'),
        ({"include": ["dog"]}, "line 1: 'dog' is no entry"),
        ({"include": [{"class": "dgo"}]}, "line 1: unknown class 'dgo'; nearest: 'dog'"),
        ({"include": [{**DOG, "count": 3}]}, "line 1: count=3 of 'dog': expected 1 to 2"),
        ({"include": [{**DOG, "count": True}]}, "line 1: count=True"),
        ({"include": [{**DOG, "color": "rde"}]}, "line 1: unknown color 'rde'; nearest: 'red'"),
        ({"include": [{**DOG, "position": ["left of", 0]}]}, "line 1: position=.*earlier entry"),
        ({"include": [DOG, {**CAT, "position": ["beside", 0]}]}, "line 1: position=.*left of, right of, above, below"),
    ],
)
def test_metadata_that_cannot_be_judged(tmp_path, metadata, message):
    path = write(tmp_path, "bad.jsonl", json.dumps({"prompt": "a dog", **metadata}))
    with pytest.raises(ValueError, match=message):
        build_rewards([f"geneval:{path}"])


def test_every_caption_can_be_judged():
    for scene in list(scenes.all_scenes())[::97]:
        demand = read_metadata(metadata_of(scene))
        assert {OBJECTS[clause.object] for clause in demand.include} == set(scene.objects)
        assert {clause.color for clause in demand.include} <= {None, *range(len(COLORS))}
