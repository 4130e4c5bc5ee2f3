"""docs/extend.md is run as it stands; the commands of docs/tour.md are ones that the runner takes."""

import re
import shlex
from pathlib import Path

import pytest
import test_contract
import torch

from speedrl_lab import notebooks
from speedrl_lab.__main__ import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
CHECKS = [
    test_contract.test_spec_fits_the_grid_and_the_picture,
    test_contract.test_decoded_pictures_lie_in_the_unit_range,
    test_contract.test_pictures_become_codes,
]
CHECKS_WITH_PROMPTS = [
    test_contract.test_logits_are_float32_over_the_codes_without_the_mask,
    test_contract.test_rows_are_a_slice_of_all_logits,
    test_contract.test_logits_draw_no_random_numbers,
    test_contract.test_rows_of_a_batch_do_not_see_each_other,
    test_contract.test_prompts_and_known_tokens_matter,
    test_contract.test_null_rows_are_alike_and_unlike_any_prompt,
    test_contract.test_a_copy_is_independent,
]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / file).read_text(), re.DOTALL | re.MULTILINE)


def commands(file: str) -> list[list[str]]:
    """What follows `python -m speedrl_lab` in the shell blocks, word by word."""
    lines = [line for block in blocks(file, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m speedrl_lab ")]


def executed(*numbers: int) -> dict:
    """Names after those Python blocks of extend.md."""
    names: dict = {}
    for number in numbers:
        exec(compile(blocks("extend.md", "python")[number], f"extend.md, block {number}", "exec"), names)
    return names


def test_the_reward_trains(capsys):
    executed(0, 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 {'redness': ") and second.startswith("2 {'redness': ")


def test_the_generator_holds_the_contract_and_learns(tmp_path):
    with torch.random.fork_rng(devices=[]):
        names = executed(0, 2, 3)
    quality = [record["quality"] for record in names["records"]]
    assert quality[-1] > 0.8 > 0.3 > quality[0] and names["records"][-1]["steps"] < names["records"][0]["steps"]
    flags, prompts = names["flags"], ["red", "green", "blue"]
    for check in CHECKS:
        check(flags)
    for check in CHECKS_WITH_PROMPTS:
        check(flags, prompts)
    for offset in (None, -1):
        test_contract.test_decode_refuses_what_is_no_code(flags, offset)
    flags.save_policy(tmp_path / "policy.safetensors", "a test")
    assert (tmp_path / "policy.safetensors").stat().st_size > 10_000


@pytest.mark.slow
def test_the_notebook_runs_with_its_knobs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    executed(4)
    shown, run = commands("extend.md")
    main(shown)
    assert "steps: int = 4" in capsys.readouterr().out
    main(run)
    assert "two cats" in (tmp_path / "made" / "four.ipynb").read_text()
    with pytest.raises(SystemExit):
        main([*run[:2], "step=2", "--output", "other"])
    assert "unknown parameter 'step'; nearest: 'steps'" in capsys.readouterr().err


def test_papermill_itself_refuses_an_unknown_parameter(tmp_path, monkeypatch):
    import papermill
    from papermill.engines import papermill_engines

    monkeypatch.chdir(tmp_path)
    executed(4)
    papermill_engines.register("speedrl", notebooks.LabEngine)
    with pytest.raises(TypeError, match="unknown parameter 'stepz'; nearest: 'steps'"):
        papermill.execute_notebook("four.ipynb", "made.ipynb", {"stepz": 3}, engine_name="speedrl", progress_bar=False)


def test_the_commands_of_the_tour_are_taken(tmp_path, monkeypatch):
    """As far as it goes without a kernel: notebooks are there, knobs are theirs and fit, flags are known."""
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    started = []
    monkeypatch.setattr(notebooks, "_execute", lambda path, target, values: started.append(path.stem))
    run = [words for words in commands("tour.md") if words[0] == "run"]
    for words in run:
        main(words)
    assert len(started) == len(run) >= 2
