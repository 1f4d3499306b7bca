"""What must stay true of scoring outputs: the published rules with their faults, and ours."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
import data
import run as running
import score

ROOT = Path(__file__).parents[1]
OUTPUTS = Path(__file__).parent / "data" / "llada_outputs"


def run_score(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "name, file, published, ours",
    [("countdown", "countdown_256.jsonl", {"correct": 6}, {"correct": 5}),
     ("math", "math500_256.jsonl", {"correct": 3}, {"correct": 7}),
     ("gsm8k", "gsm8k_256.jsonl", {"correct": 3}, {"correct": 6}),
     ("sudoku", "sudoku_256.jsonl", {"correct": 0, "cells": 13, "cells_accuracy": 13 / 80},
      {"correct": 0, "cells": 14, "cells_accuracy": 14 / 80})],
)  # fmt: skip
def test_published_rules_and_ours_count_the_excerpts_as_one_does_by_hand(
    name, file, published, ours
):
    run = run_score("--task", name, "--score", str(OUTPUTS / file))
    result = json.loads(run.stdout)
    counted = result.pop("published_rules")
    for tally, expected in ((counted, published), (result, ours)):
        share = expected["correct"] / 10
        assert tally == {"task": name, "n": 10, "accuracy": share} | expected


def test_no_reward_needs_the_published_rules():
    check = "import sys, data; sys.exit('score' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=60)


def test_scoring_prints_one_line_and_cuts_completions_at_the_end_token(tmp_path):
    rows = [
        {"question": "?", "completion": "<answer>\\boxed{1,000}<|eot_id|> 7", "answer": 1000.0},
        {"question": "?", "completion": "it is 7<|eot_id|>8", "answer": "#### 7"},
        {"question": "?", "completion": "it is 7", "answer": None},
    ]
    file = tmp_path / "outputs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_score("--task", "gsm8k", "--score", str(file))
    printed = json.loads(run.stdout)
    published = printed.pop("published_rules")
    assert printed == {"task": "gsm8k", "n": 3, "correct": 2, "accuracy": 2 / 3}
    assert len(run.stdout.splitlines()) == 1
    compat = json.loads(run_score("--task", "gsm8k", "--score", str(file), "--compat").stdout)
    assert compat == published
    assert compat["correct"] == 0  # 1,000 is read as 1, and a text without a box or tag as nothing


def test_scoring_programs_takes_the_data_set_s_row_as_the_answer(tmp_path):
    code = "def double(x):\n    return 2 * x"
    answer = {"text": "Double a number.", "code": code, "test_list": ["assert double(2) == 4"]}
    wrong = code.replace("2", "3")
    file = tmp_path / "outputs.jsonl"
    with file.open("w") as rows:
        for written in (code, wrong):
            completion = f"```python\n{written}\n```<|eot_id|>"
            row = {"question": "?", "completion": completion, "answer": answer}
            rows.write(json.dumps(row) + "\n")
    assert score.score("mbpp", file)["correct"] == 1


def test_a_malformed_output_is_named_with_its_line(tmp_path):
    file = tmp_path / "outputs.jsonl"
    for name, row, reason in (
        ("gsm8k", {"question": "?", "completion": 3, "answer": 1}, "expected question, completion"),
        ("sudoku", {"question": "no grid", "completion": "", "answer": ""}, "the puzzle is None"),
        ("countdown", {"completion": "", "answer": 7}, "no field 'numbers'"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"outputs.jsonl, line 1: {reason}"):
            score.score(name, file)


@pytest.mark.parametrize(
    "args",
    ["--task chess --score x", "--task math", "--task math --score nowhere", "--score x",
     "--task mbpp --score nowhere --compat", "--task math --score x --fast", ""],
)  # fmt: skip
def test_a_wrong_command_line_ends_with_2_and_one_line(args):
    run = run_score(*args.split())
    assert run.returncode == 2 and not run.stdout and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text, grid",
    [("<answer>``` 12\n34 ```", "1234"), ("<answer>12<|eot_id|>", "12"), ("</answer> 34", "34"),
     ("<answer></answer>56<|endoftext|>", "56"), ("1234123412341234 </answer>", "1234" * 4),
     ("it is 4321432143214321", "4321" * 4), ("no", ""), ("<answer>12", "")],
)  # fmt: skip
def test_the_published_sudoku_rule_looks_in_five_places_in_order(text, grid):
    answer = {"puzzle": "0" * 16, "solution": grid + "x" * (16 - len(grid))}
    assert score.published_sudoku(text, answer) == len(grid) / 16


@pytest.mark.parametrize(
    "a, b, same",
    [("\\dfrac12", "\\frac{1}{2}", True), ("x = 5", "5", True), ("xyz = 5", "5", False),
     (".5", "0.5", True), ("3/4", "\\frac{3}{4}", True), ("a/b", "a / b", False),
     ("5\\text{ cm}", "5", True), ("\\sqrt3", "\\sqrt{3}", True), ("\\sqrt", "\\sqrt ", False),
     ("\\frac1{72}", "\\frac{1}{72}", True), ("\\left(1,2\\right)", "(1, 2)", True),
     ("90^\\circ", "90", True), ("1\\text{ a}\\text{ b}", "1", False)],
)  # fmt: skip
def test_the_published_rule_for_latex_compares_normal_forms(a, b, same):
    assert score.published_equal(a, b) == same


@pytest.mark.parametrize(
    "text, correct",
    [("\\boxed{2 ** 3 - 1}", True), ("\\boxed{-1 + 2 * 3 - -2}", False), ("so 2 * 3 + 1 = 7", True),
     ("<answer>3 * 2 + 1</answer>", False), ("\\boxed{3 \\times 2 + 1 = 7}", True),
     ("2**3**1", False), ("\\boxed{2 * 3 + 1}", True), ("\\boxed{3.0 * 2 + 1}", False),
     ("<answer>3 * 2 + 1</answer>\\boxed{", True), ("\\boxed{1**2**3 + 6}", False)],
)  # fmt: skip
def test_the_published_countdown_rule_follows_python(text, correct):
    answer = {"numbers": [1, 2, 3], "target": 7}
    assert score.published_countdown(text, answer).correct == correct


@pytest.mark.parametrize("name", ["sudoku", "countdown", "toycode", "gsm8k", "math"])
def test_answers_that_an_evaluation_wrote_score_as_it_scored_them(name, tmp_path):
    task = data.TASKS[name]
    stored = str(OUTPUTS.parent) if name in ("gsm8k", "math") else None  # else generated
    problems = task.load("test", stored)[:4]
    answers = ["nothing", *map(solved, problems[1:])]
    rewards = task.rewards(answers, problems)
    assert [reward.correct for reward in rewards] == [False, True, True, True]
    held = SimpleNamespace(
        test_set=problems, ranks=running.Ranks(), cfg=SimpleNamespace(template=config.Template())
    )
    rows = running.answer_rows(held, list(zip(problems, answers, rewards))[::-1])
    assert [row["id"] for row in rows] == [problem.id for problem in problems]
    lines = "\n".join(json.dumps(row, default=str) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    assert score.score(name, tmp_path / "a.jsonl")["correct"] == 3


def solved(problem: data.Problem) -> str:
    """A right answer."""
    told = problem.answer
    if isinstance(told, dict) and "job" in told:
        return f"```python\n{told['code']}\n```"
    return f"<answer>{told['solution'] if isinstance(told, dict) else told}</answer>"
