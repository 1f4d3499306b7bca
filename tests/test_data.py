"""What must stay true of problems and rewards."""

import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data

ROOT = Path(__file__).parents[1]
EXCERPTS = str(Path(__file__).with_name("data"))  # ten rows of each public data set
GENERATED = ("sudoku", "countdown", "toycode")
SPLITS = ("train", "val", "test")
MANY = "4000003000000000"  # a Sudoku with many solutions

MBPP_ROW = {
    "task_id": 700,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert double(-3) == -6"],
    "test_setup_code": "",
}
HUMANEVAL_ROW = {
    "task_id": "HumanEval/900",
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r: float) -> float:\n"
    '    """ The area of half a circle. """\n',
    "entry_point": "area",
    "canonical_solution": "    return half(math.pi * r * r)\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(0) == 0\n"
    "    assert abs(candidate(2) - half(4 * math.pi)) < 1e-9\n    assert True, 'not a test'\n",
}
KODCODE_ROW = {
    "question_id": "Filter_1_I",
    "question": "Write a function root that returns the whole square root of a square number.",
    "solution": "def root(n):\n    if n < 0:\n        raise ValueError('negative')\n"
    "    return int(n**0.5)",
    "test": "import pytest\nfrom solution import root\n\nNINE = 9\n\n\ndef test_nine():\n"
    "    assert root(NINE) == 3\n\n\ndef test_negative():\n    with pytest.raises(ValueError):\n"
    "        root(-1)\n\n\ndef test_near():\n    assert root(16) == pytest.approx(4)\n\n\n"
    "@pytest.mark.parametrize('n', [1])\ndef test_left_out(n):\n    assert False\n",
    "test_info": [{"function_declaration": "def root(n):"}],
}


@cache
def example(name: str) -> data.Problem:
    """One problem of each task, without any file."""
    rows = {
        "gsm8k": {"question": "How much is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        "math": {"problem": "What is half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        "humaneval": HUMANEVAL_ROW,
        "mbpp": MBPP_ROW,
    }
    task = data.TASKS[name]
    return task.problem(rows[name]) if name in rows else task.load("val")[0]


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


# ---- every reward --------------------------------------------------------------------------------

PIECES = st.sampled_from(
    "<answer> </answer> \\boxed{ } { ( ) [ ] ^ ^{ ! / // ** = - + * , . $ % & \\\\ \\frac \\sqrt "
    "\\text{ \\pi x e 0 1 2 30**100**93 9^{9^{9^9}} 999! (9^{999})^{999} \\binom{9999}{5000} "
    "\\sum_{k=1}^{9^9} 4312214312343421 ```python ``` <|eot_id|> \x00 \ud800 ٣ ½ −".split(" ")
    + ["\n", " ", "```python\n", "def f(a, b):\n    return ", "9" * 5000, "((" * 200, "-" * 3000]
)
COMPLETIONS = st.one_of(
    st.text(max_size=200),
    st.lists(PIECES, max_size=30).map("".join),
    st.lists(PIECES, max_size=10).map(lambda p: f"<answer>\\boxed{{{''.join(p)}}}</answer>"),
)


@pytest.mark.parametrize("name", data.TASKS)
def test_any_text_gets_a_finite_reward_whose_parts_add_up(name):
    problem = example(name)

    @settings(max_examples=150, deadline=None)
    @given(COMPLETIONS)
    def check(completion):
        reward = data.TASKS[name].reward(completion, problem)
        assert math.isfinite(reward) and 0 <= reward <= 1.1
        assert math.isclose(sum(reward.parts.values()), reward, abs_tol=1e-12)
        assert isinstance(reward.correct, bool) and (reward >= 1 or not reward.correct)

    check()


@pytest.mark.parametrize("name", data.TASKS)
@pytest.mark.parametrize(
    "unit",
    "<answer> \\boxed{ ``` { 1 1, 1= = ( - a\n \\frac 9^{".split(" ") + [" "],
)
def test_a_very_long_text_gets_a_reward_too(name, unit):
    """A moment for what reads it once; what looks back from every place would take minutes."""
    problem, text = example(name), unit * (100_000 // len(unit))
    for completion in (text, f"<answer>{text}</answer>"):
        assert 0 <= data.TASKS[name].reward(completion, problem) <= 1.1


def test_a_reward_refuses_parts_that_do_not_add_up_to_it():
    with pytest.raises(ValueError, match="1.0 has parts that add up to 25.0"):
        data.Reward(1.0, True, length=25.0)


def test_a_reward_survives_pickling_and_refuses_nan():
    reward = pickle.loads(pickle.dumps(data.Reward(1.1, True, tests=1.0, format=0.1)))
    assert (reward, reward.correct, reward.parts) == (1.1, True, {"tests": 1.0, "format": 0.1})
    assert data.Reward(0.5).parts == {"reward": 0.5}
    with pytest.raises(ValueError, match="finite"):
        data.Reward(float("nan"))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_problems_are_the_same_every_time_and_no_split_holds_another_s(name):
    task = data.TASKS[name]
    first = {split: task.load(split) for split in SPLITS}
    assert first == {split: task.load(split) for split in SPLITS}
    prompts = [problem.prompt for split in SPLITS for problem in first[split]]
    assert len(set(prompts)) == len(prompts)
    assert len(first["val"]) == len(first["test"]) == 256 and len(first["train"]) > 2000
    ids = [problem.id for split in SPLITS for problem in first[split]]
    assert len(set(ids)) == len(ids)


# ---- sudoku --------------------------------------------------------------------------------------


def is_solved(grid: str, puzzle: str) -> bool:
    """The rules, written out: an oracle for the bit sets."""
    if len(grid) != 16 or any(clue not in ("0", digit) for clue, digit in zip(puzzle, grid)):
        return False
    units = []
    for i in range(4):
        units.append([4 * i + j for j in range(4)])
        units.append([4 * j + i for j in range(4)])
        top = 8 * (i // 2) + 2 * (i % 2)
        units.append([top, top + 1, top + 4, top + 5])
    return all(sorted(grid[cell] for cell in unit) == list("1234") for unit in units)


def test_there_are_288_grids_and_each_follows_the_rules():
    grids = data.sudoku_grids()
    assert len(set(grids)) == 288 and all(is_solved(grid, "0" * 16) for grid in grids)


def test_sudoku_splits_share_no_solution_and_every_puzzle_has_one():
    solutions, empty = {}, set()
    for split in SPLITS:
        answers = [problem.answer for problem in data.TASKS["sudoku"].load(split)]
        solutions[split] = {answer["solution"] for answer in answers}
        empty |= {answer["puzzle"].count("0") for answer in answers}
        for answer in answers:
            assert data.sudoku_solutions(answer["puzzle"]) == (answer["solution"],)
    assert [len(solutions[split]) for split in SPLITS] == [200, 44, 44]
    assert len(set.union(*solutions.values())) == 288
    assert empty == set(range(4, 12))


def test_sudoku_is_scored_by_the_rules_and_not_against_one_grid():
    problem = data.TASKS["sudoku"].problem({"puzzle": MANY})
    rng = random.Random(0)
    solutions = [grid for grid in data.sudoku_grids() if is_solved(grid, MANY)]
    assert len(solutions) > 1 and data.sudoku_solutions(MANY) == tuple(solutions)
    for _ in range(300):
        grid = list(rng.choice(solutions))
        for cell in rng.sample(range(16), rng.randrange(3)):
            grid[cell] = rng.choice("01234")
        grid = "".join(grid)
        reward = data.TASKS["sudoku"].reward(f"<answer>{grid}</answer>", problem)
        best = max(
            sum(grid[i] == other[i] for i in range(16) if MANY[i] == "0") for other in solutions
        )
        assert reward == best / 14
        assert reward.correct == is_solved(grid, MANY)


@pytest.mark.parametrize(
    "text",
    ["<answer>{}</answer>", "<answer>{}", "maybe <answer>1111</answer> no: <answer>\\boxed{{{}}}",
     "\\boxed{{{}}}", "<answer>\n{}\n</answer> 9"],
)  # fmt: skip
def test_a_solved_grid_is_found_however_it_is_wrapped(text):
    problem = example("sudoku")
    grid = problem.answer["solution"]
    spaced = "\n".join(" ".join(grid[i : i + 4]) for i in range(0, 16, 4))
    for form in (grid, spaced):
        assert data.TASKS["sudoku"].reward(text.format(form), problem).correct


def test_a_sudoku_with_a_changed_clue_or_a_digit_too_many_is_not_solved():
    problem = example("sudoku")
    grid, clue = problem.answer["solution"], problem.answer["puzzle"].index("0") - 1
    changed = grid[:clue] + ("1" if grid[clue] != "1" else "2") + grid[clue + 1 :]
    for wrong in (changed, grid + "1", grid[:-1]):
        assert not data.TASKS["sudoku"].reward(f"<answer>{wrong}</answer>", problem).correct


# ---- countdown -----------------------------------------------------------------------------------


def countdown(numbers: list[int], target: int, expression: str) -> data.Reward:
    problem = data.TASKS["countdown"].problem({"numbers": numbers, "target": target})
    return data.TASKS["countdown"].reward(f"<answer>{expression}</answer>", problem)


@pytest.mark.parametrize(
    "expression, worth",
    [("8 / (3 - 8 / 3)", 1), ("8/(3-8/3) = 24", 1), ("\\boxed{8 \\div (3 - 8 \\div 3)}", 1),
     ("8 / 3 / (8 / 3)", 0.1), ("8 + 8 + 3 + 3", 0.1), ("8 + 3 + 3", 0), ("8 + 8 + 3 + 3 + 0", 0),
     ("24", 0), ("", 0), ("8 / (3 - 3) + 8", 0), ("(8 + 8 + 3 + 3", 0)],
)  # fmt: skip
def test_countdown_pays_1_for_the_target_and_a_tenth_for_the_right_numbers(expression, worth):
    reward = countdown([8, 3, 8, 3], 24, expression)
    assert (reward, reward.correct) == (worth, worth == 1)


@pytest.mark.parametrize(
    "attack",
    ["30**100**93", "30//100//93", "-30+100-93", "30,100,93", "30 100 93", "(lambda: 30)()",
     "3_0+100-93", "30.0+100-93", "0x1e+100-93", "٣٠+100-93", "30+100-93#", "30+100-93\x00",
     "30 if 100 else 93", "(" * 300 + "30+100-93" + ")" * 300, "30<100<93", "~30+100-93",
     "30e0+100-93", "030+100-93"],
)  # fmt: skip
def test_countdown_admits_nothing_but_arithmetic_on_whole_numbers(attack):
    assert countdown([30, 100, 93], 37, attack) == 0  # computed, some would never end


def test_countdown_values_are_all_there_and_each_expression_makes_its_own():
    for a, b, c in ([1, 2, 3], [4, 4, 7], [9, 9, 9], [2, 5, 1]):
        found = data.countdown_values((a, b, c))
        assert set(found) == {
            a + b + c, a + b - c, a - b + c, a - b - c, a * b + c, a * b - c, a + b * c, a - b * c,
            a * b * c,
        }  # fmt: skip
        for value, text in found.items():
            assert re.findall("[0-9]", text) == [str(a), str(b), str(c)]
            assert countdown([a, b, c], value, text).correct


def test_countdown_splits_share_no_problem_in_any_order_and_each_is_solvable():
    seen = {}
    for split in SPLITS:
        problems = data.TASKS["countdown"].load(split)
        for problem in problems:
            answer = problem.answer
            key = (*sorted(answer["numbers"]), answer["target"])
            assert seen.setdefault(key, split) == split
            text = f"<answer>{answer['solution']}</answer>"
            assert data.TASKS["countdown"].reward(text, problem) == 1


# ---- worded problems -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [("18", 18), ("$1,234.50", Fraction(2469, 2)), ("-3", -3), ("3/4 cup", Fraction(3, 4)),
     (".5", 0.5), ("2 + 2 = 4 apples", 4), ("\\$18", 18), ("1,2", 1), ("no", None), ("٣", None),
     ("5/0", 5),
     ("70\\text{ minutes}", 70), ("x =", None), ("= 7 =", 7), ("10,000,000", 10**7),
     ("3{,}000", 3000), ("3,\\!000", 3000), ("3\\,000", 3000), ("−4", -4), ("\\frac{6}{2}", 3),
     ("3\\times 4 = 12", 12), ("3\\times 10^2", None), ("2^3", None), ("4\\sqrt{2}", None),
     ("2.5e6", None), ("5e-07", None), ("3\\frac{1}{2}", None)],
)  # fmt: skip
def test_a_number_is_read_exactly(text, value):
    assert data.number(text) == value


@pytest.mark.parametrize(
    "completion, correct, form",
    [("<answer>\\boxed{4}</answer>", 1, 0.1), ("<answer>4</answer>", 1, 0), ("so it is 4.", 1, 0),
     ("\\boxed{5} no, <answer>\\boxed{4.00}</answer>", 1, 0.1), ("<answer>\\boxed{4}", 1, 0),
     ("<answer>\\boxed{5}</answer>", 0, 0.1), ("", 0, 0), ("<answer></answer>\\boxed{4}", 1, 0),
     ("<answer>\\boxed{}4</answer>", 1, 0.1), ("</answer>\\boxed{4}<answer>", 1, 0)],
)  # fmt: skip
def test_gsm8k_pays_for_the_number_and_a_little_for_the_form(completion, correct, form):
    reward = data.TASKS["gsm8k"].reward(completion, example("gsm8k"))
    assert reward.parts == {"correct": correct, "format": form}
    assert reward.correct == bool(correct)


@pytest.mark.parametrize(
    "found, gold, same",
    [("0.5", "\\frac{1}{2}", True), ("\\dfrac12", "\\frac{1}{2}", True), ("2(x+1)", "2x+2", True),
     ("\\{3, 1, 2\\}", "\\{1,2,3\\}", True), ("(1, 2)", "(2, 1)", False), ("x", "y", False),
     ("10080", "10,\\!080", True), ("\\sqrt{12}", "2\\sqrt{3}", True), ("36.00", "36", True),
     ("", "1", False), ("9^{9^{9^9}}", "1", False), ("30**100**93", "1", False),
     ("9999!", "1", False), ("1 1/2", "11/2", False), ("x = 5", "y = 5", False),
     ("10\\,080", "10,080", True), ("x=5", "5", True), ("r^2 \\pi", "\\pi r^2", True),
     ("\\left( 1,2 \\right)", "(1, 2)", True), ("\\text{east}", "east", True),
     ("45^\\circ", "45", True), ("1,234567", "1", False), ("1234,567", "1234", False),
     ("100, 200", "100200", False), ("200, 100", "100, 200", True), ("1,234", "1234", True)],
)  # fmt: skip
def test_math_answers_are_compared_as_algebra(found, gold, same):
    problem = data.TASKS["math"].problem({"problem": "?", "answer": gold})
    reward = data.TASKS["math"].reward(f"<answer>\\boxed{{{found}}}</answer>", problem)
    assert reward.correct == same  # computed, some of these would never end


@pytest.mark.parametrize(
    "a, b",
    [("  \\dfrac{1}{2} ", "\\frac{1}{2}"), ("( 1,\\, 2 )", "(1,2)"), ("10,\\!080", "10,080"),
     ("\\left[ 0, 1 \\right)", "[0,1)"), ("1 1/2", "1 1/2"), ("\\leftarrow", "\\leftarrow")],
)  # fmt: skip
def test_tidying_latex_drops_only_what_changes_its_looks(a, b):
    assert data.tidy(a) == b


def test_algebra_works_off_the_main_thread_and_a_comparison_that_hangs_is_given_up(monkeypatch):
    results = []
    algebra = data.algebra()
    monkeypatch.setattr(algebra, "wall_s", 1.0)

    def work():
        results.append(algebra.same("x + x", "2x"))
        results.append(algebra.same("9^{9^{9^{9}}}", "1"))  # would take forever
        results.append(algebra.same("x + x", "2x"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert results == [True, False, True]
    for stop in (signal.SIGKILL, signal.SIGSTOP):  # dead, or stuck where no timer reaches
        os.kill(algebra.process.pid, stop)
        assert algebra.same("x + x", "2x") is False and algebra.same("x + x", "2x") is True


# ---- programs ------------------------------------------------------------------------------------


def test_a_task_says_whether_it_runs_programs_and_the_first_call_starts_the_sandbox():
    running = {name for name, task in data.TASKS.items() if task.runs_code}
    assert running == {"toycode", "humaneval", "mbpp"}
    assert data.sandbox() is data.sandbox(unsafe=True)


def share(name: str, row: dict, completion: str) -> float:
    task = data.TASKS[name]
    return task.reward(completion, task.problem(row)).parts["tests"]


def test_the_program_is_the_last_block_that_defines_something():
    block = data.code_block
    assert block("```python\nx = 1\n```") == "x = 1\n"
    assert block("first ```python\ndef f(): 1\n``` then\n```\ndef g(): 2\n```") == "def g(): 2\n"
    assert block("```python\ndef f(): 1\n```\nUse it so:\n```python\nf()\n```") == "def f(): 1\n"
    assert block("```json\n{}\n```\ntext\n```py\ndef f(): 1") == "def f(): 1"
    assert block("def f(): 1") is None and block("``` ```") is None


def test_toycode_references_pass_and_other_functions_do_not():
    task = data.TASKS["toycode"]
    problems = task.load("test")[:40]
    right = task.rewards([fenced(p.answer["code"]) for p in problems], problems)
    assert all(reward == 1.1 and reward.correct for reward in right)
    other = task.rewards([fenced(p.answer["code"]) for p in problems[1:]], problems[:-1])
    assert not any(reward.correct for reward in other)
    assert any(0.1 < reward < 1.1 for reward in other)  # some of the tests pass: partial credit


def test_toycode_s_hidden_tests_tell_nearly_every_other_function_apart():
    functions = [eval(f"lambda a, b: {code}") for _, code in data.toycode_functions()]
    assert len(functions) > 2500
    ambiguous = 0
    for row in data.toycode_rows("val", None):
        tests = [tuple(map(int, re.findall(r"-?\d+", test))) for test in row["tests"]]
        agree = sum(all(of(a, b) == value for a, b, value in tests) for of in functions)
        assert agree >= 1
        ambiguous += agree > 1
    assert ambiguous <= 2


def test_a_program_is_paid_for_its_share_of_tests_and_a_little_for_a_closed_block():
    task, problem = data.TASKS["mbpp"], example("mbpp")
    half = "def double(x):\n    return 2 * x if x >= 0 else x"
    cases = {
        fenced(MBPP_ROW["code"]): (1.0, 0.1),
        fenced(half): (2 / 3, 0.1),
        f"```python\n{half}": (2 / 3, 0.0),
        MBPP_ROW["code"]: (1.0, 0.0),
        fenced("def triple(x): return 2 * x"): (0.0, 0.1),
        fenced("def double(x) return 2 * x"): (0.0, 0.1),
        "I do not know.": (0.0, 0.0),
    }
    rewards = task.rewards(list(cases), [problem] * len(cases))
    assert [(r.parts["tests"], r.parts["format"]) for r in rewards] == list(cases.values())
    assert [r.correct for r in rewards] == [r.parts["tests"] == 1 for r in rewards]


def test_humaneval_takes_a_whole_function_or_its_body_and_helpers_from_the_prompt_only():
    reference = HUMANEVAL_ROW["prompt"] + HUMANEVAL_ROW["canonical_solution"]
    whole = "def area(r):\n    return half(math.pi * r ** 2)"
    assert share("humaneval", HUMANEVAL_ROW, fenced(reference)) == 1
    assert share("humaneval", HUMANEVAL_ROW, fenced(whole)) == 1
    assert share("humaneval", HUMANEVAL_ROW, HUMANEVAL_ROW["canonical_solution"]) == 1
    cheat = "def half(x):\n    return 0\ndef area(r):\n    return 0"
    assert share("humaneval", HUMANEVAL_ROW, fenced(cheat)) == 0.5
    assert share("humaneval", HUMANEVAL_ROW, "    ") == 0
    assert len(example("humaneval").answer["job"]["tests"]) == 2  # `assert True` is no test


def test_kodcode_rows_become_one_test_a_function():
    problem = data.TASKS["mbpp"].problem(KODCODE_ROW)
    assert len(problem.answer["job"]["tests"]) == 3 and "def root(n):" in problem.prompt
    assert share("mbpp", KODCODE_ROW, fenced(KODCODE_ROW["solution"])) == 1
    assert share("mbpp", KODCODE_ROW, fenced("def root(n):\n    return n")) == 0
    assert share("mbpp", KODCODE_ROW, fenced("def root(n):\n    return int(abs(n)**0.5)")) == 2 / 3


def test_what_only_pytest_could_run_harms_no_other_test_of_its_row():
    beside = """
@pytest.fixture(scope="module")
def nine():
    return 9

def test_nine_again(nine):
    assert root(nine) == 3

class TestRoot:
    @pytest.mark.parametrize("n", [9])
    def test_n(self, n):
        assert root(n) == 3
"""
    row = KODCODE_ROW | {"test": KODCODE_ROW["test"] + beside}
    assert len(data.TASKS["mbpp"].problem(row).answer["job"]["tests"]) == 3
    assert share("mbpp", row, fenced(row["solution"])) == 1
    assert share("mbpp", row, fenced("def root(n):\n    return n")) == 0


def test_the_approx_of_kodcodes_tests_is_pytests():
    cases = [
        "1e6 + 0.5 == pytest.approx(1e6)", "not 1e6 + 0.5 == pytest.approx(1e6, abs=0.1)",
        "1e6 + 9 == pytest.approx(1e6, rel=1e-5, abs=0.1)", "not 1.1 == pytest.approx(1)",
        "float('inf') == pytest.approx(float('inf'))", "[1, 2.0000001] == pytest.approx([1, 2])",
        "{'a': 0.1 + 0.2} == pytest.approx({'a': 0.3})", "not [1] == pytest.approx([1, 2])",
    ]  # fmt: skip
    tests = [f"def test_{i}():\n    assert {case}\n" for i, case in enumerate(cases)]
    row = KODCODE_ROW | {"test": "import pytest\nfrom solution import root\n" + "\n".join(tests)}
    assert share("mbpp", row, fenced(row["solution"])) == 1
    for case in cases:
        assert eval(case)


def test_kodcode_tests_may_import_the_solution_whole():
    test = "import solution\n\ndef test_nine():\n    assert solution.root(9) == 3\n"
    row = KODCODE_ROW | {"test": test}
    assert share("mbpp", row, fenced(row["solution"])) == 1
    assert share("mbpp", row, fenced("def root(n):\n    return n")) == 0
    test = "from solution import root\n\ndef test_nine():\n    solution = root(9)\n"
    row = KODCODE_ROW | {"test": test, "solution": "def helper(): pass\n" + row["solution"]}
    assert data.TASKS["mbpp"].problem(row).answer["job"]["names"] == ["root"]


def test_references_of_the_published_sets_pass_and_return_none_does_not():
    for task in (data.TASKS["humaneval"], data.TASKS["mbpp"]):
        problems = task.load("test", EXCERPTS)
        for wrap, passes in ((str, True), (lambda code: code.split("def ")[0], False)):
            texts = [fenced(wrap(problem.answer["code"])) for problem in problems]
            assert {reward.correct for reward in task.rewards(texts, problems)} == {passes}


# ---- loading -------------------------------------------------------------------------------------


def test_training_never_sees_a_test_item_and_validation_is_a_fixed_part_of_training():
    mbpp = data.TASKS["mbpp"]
    train, val, test = (mbpp.load(split, EXCERPTS, "mbpp") for split in SPLITS)
    numbers = [{int(problem.id.split("/")[1]) for problem in part} for part in (train, val, test)]
    assert numbers[0] | numbers[1] == {601, 602, 974} and not numbers[0] & numbers[1]
    assert numbers[2] == {11, 12}  # of the sanitized set; 602 is not in its test split
    gsm8k = data.TASKS["gsm8k"]
    assert [len(gsm8k.load(split, EXCERPTS)) for split in SPLITS] == [9, 1, 10]
    assert gsm8k.load("val", EXCERPTS) == gsm8k.load("val", EXCERPTS)
    for name in ("math", "humaneval"):
        assert len(data.TASKS[name].load("test", EXCERPTS)) == 10
    humaneval = data.TASKS["humaneval"].load("train", EXCERPTS, "mbpp")
    assert [p.prompt for p in humaneval] == [p.prompt for p in train]


def test_a_row_of_the_sanitized_mbpp_has_other_names_and_imports_for_its_tests():
    row = {
        "source_file": "?", "task_id": 11, "prompt": "Write a function for the area of a circle.",
        "code": "def area(r):\n    return 3.14159265 * r * r", "test_imports": ["import math"],
        "test_list": ["assert math.isclose(area(2), 4 * math.pi, rel_tol=1e-6)"],
    }  # fmt: skip
    assert "area of a circle" in data.TASKS["mbpp"].problem(row).prompt
    assert share("mbpp", row, fenced(row["code"])) == 1
    assert share("mbpp", row, fenced("def area(r):\n    return 3 * r * r")) == 0
    row["test_imports"] = "import math"
    assert share("mbpp", row, fenced(row["code"])) == 1


def test_the_common_countdown_set_gives_three_numbers_that_no_other_split_asks(tmp_path):
    rng, rows = random.Random(0), []
    for _ in range(600):
        rows.append({"target": rng.randint(10, 99), "nums": rng.sample(range(1, 100), 3)})
        rows.append({"target": 50, "nums": rng.sample(range(1, 100), 4)})
    rows += [row | {"nums": row["nums"][::-1]} for row in rows[::2]]  # the same in another order
    rows.append({"target": 23, "nums": [93, 30, 100]})  # which the test asks
    (tmp_path / "countdown_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test = Path(EXCERPTS, "countdown_test.jsonl").read_bytes()
    (tmp_path / "countdown_test.jsonl").write_bytes(test)
    task, seen, orders = data.TASKS["countdown"], {}, {}
    for split in SPLITS:
        problems = task.load(split, str(tmp_path), "published")
        orders[split] = len(problems)
        for problem in problems:
            numbers, target = problem.answer["numbers"], problem.answer["target"]
            assert len(numbers) == 3 and f"Target: {target}" in problem.prompt
            assert seen.setdefault((*sorted(numbers), target), split) == split
    assert orders == {"train": 2 * 540, "val": 60, "test": 10}
    assert task.load("val", str(tmp_path)) != task.load("val", str(tmp_path), "published")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "countdown_train.jsonl").write_text('{"target": 5, "nums": "1 2 3"}\n')
    with pytest.raises(ValueError, match="countdown_train.jsonl, line 1: numbers are '1 2 3'"):
        task.load("train", str(tmp_path / "bad"), "published")


def test_the_common_puzzle_files_are_the_test_split_where_they_are():
    first = data.TASKS["countdown"].load("test", EXCERPTS)[0].answer
    assert (first["numbers"], first["target"]) == ([30, 100, 93], 23)
    problems = data.TASKS["sudoku"].load("test", EXCERPTS)
    several = [p for p in problems if len(data.sudoku_solutions(p.answer["puzzle"])) > 1]
    assert len(problems) == 10 and len(several) == 2
    assert data.TASKS["sudoku"].load("val", EXCERPTS) == data.TASKS["sudoku"].load("val")


def test_rows_that_cannot_be_judged_are_left_out_and_counted(tmp_path):
    needs_numpy = KODCODE_ROW | {"solution": "import numpy\ndef root(n): return numpy.sqrt(n)"}
    no_test = KODCODE_ROW | {"test": "class TestRoot:\n    pass\n"}
    rows = [KODCODE_ROW] * 8 + [needs_numpy, no_test]
    (tmp_path / "kodcode.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(
        UserWarning, match="train: 2 of 9 rows cannot be judged.*line .*no test is left"
    ):
        train = data.TASKS["humaneval"].load("train", str(tmp_path))
    assert len(train) == 7


def test_your_own_rows_train_any_task_and_a_tenth_of_them_validates(tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": i + 1}) for i in range(40)]
    file.write_text("\n\n".join(lines))
    train, val = (data.TASKS["gsm8k"].load(split, file=str(file)) for split in ("train", "val"))
    assert len(train) == 36 and len(val) == 4
    assert {p.answer for p in train + val} == set(range(1, 41))
    file.write_text("\n".join(lines * 2), encoding="utf-8-sig")  # as spreadsheets write it
    train, val = (data.TASKS["gsm8k"].load(split, file=str(file)) for split in ("train", "val"))
    assert train and len(val) == 8
    assert not {p.prompt for p in train} & {p.prompt for p in val}


@pytest.mark.parametrize(
    "text, line, expected",
    [('{"question": "?", "answer": 1}\n{"question": ', 2, "a JSON object a line"),
     ('{"question": "?", "answer": 1}\n\n{"question": "?"}', 3, "no field 'answer'"),
     ('{"question": "?", "answer": "none"}', 1, "no number in the answer 'none'"),
     ("[1]", 1, "a JSON object a line"), ('{"question": 3, "answer": 1}', 1, "must be a text"),
     ("\x00", 1, "a JSON object a line"), ("", None, "no rows"),
     ('{"question": "?", "answer": [1, 2]}', 1, "no number in the answer '[1, 2]'"),
     ('{"question": "half \\ud83d", "answer": 1}', 1, "surrogates not allowed")],
)  # fmt: skip
def test_a_malformed_file_is_named_with_its_line_and_a_reason(tmp_path, text, line, expected):
    file = tmp_path / "mine.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(ValueError) as caught:
        data.TASKS["gsm8k"].load("val", file=str(file))
        data.TASKS["gsm8k"].load("train", file=str(file))
    message = str(caught.value)
    assert str(file) in message and expected in message and "\n" not in message
    assert line is None or f"line {line}:" in message


def test_malformed_puzzles_archives_and_requests_are_refused(tmp_path):
    (tmp_path / "sudoku_test.csv").write_text("Puzzle,Solution\n4000003000000000,1\n")
    with pytest.raises(ValueError, match="sudoku_test.csv, line 2.*is not solved by 1"):
        data.TASKS["sudoku"].load("test", str(tmp_path))
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="HumanEval.jsonl.gz, line 1: expected a JSON object"):
        data.TASKS["humaneval"].load("test", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: no such file"):
        data.TASKS["math"].load("train", file=str(tmp_path / "nothing.jsonl"))
    with pytest.raises(FileNotFoundError, match="--data-dir .*absent: no such folder"):
        data.TASKS["sudoku"].load("train", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="--train-set kodcode: not for gsm8k"):
        data.TASKS["gsm8k"].load("train", train_set="kodcode")
    with pytest.raises(ValueError, match="split"):
        data.TASKS["sudoku"].load("validation")


def test_without_a_connection_one_line_says_what_to_download_and_how_to_name_it(tmp_path):
    script = (
        "import data\ntry:\n    data.TASKS['math'].load('train', '.')\n"
        "except FileNotFoundError as error:\n    print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    printed = subprocess.check_output(command, cwd=tmp_path, env=env, text=True, timeout=120)
    (line,) = printed.splitlines()
    assert "DigitalLearningGmbH/MATH-lighteval" in line and "--data-dir as math_train.jsonl" in line


# ---- your own task -------------------------------------------------------------------------------


def test_a_task_is_added_from_outside_in_under_25_lines(tmp_path):
    def rows(split, data_dir=None):
        words = {"train": ["banana", "kiwi", "plum"], "val": ["pear"], "test": ["fig"]}
        return [{"word": word} for word in words[split]]

    def build(row):
        return f"Spell this word backwards: {row['word']}", row["word"][::-1]

    def judge(completion, answer):
        right = sum(a == b for a, b in zip(completion.strip(), answer)) / len(answer)
        return data.Reward(right, completion.strip() == answer)

    task = data.Task("backwards", rows, build, judge, fields="word")
    (problem,) = task.load("test")
    assert problem.prompt == "Spell this word backwards: fig"
    assert task.reward("gif", problem) == 1 and task.reward("gif", problem).correct
    assert task.rewards(["gix", "no"], [problem] * 2) == [2 / 3, 0]
    (tmp_path / "words.jsonl").write_text('{"word": "ab"}\n{"wrod": "cd"}\n')
    with pytest.raises(ValueError, match="words.jsonl, line 2: no field 'word'; a row of back"):
        [task.load(split, file=str(tmp_path / "words.jsonl")) for split in ("train", "val")]
