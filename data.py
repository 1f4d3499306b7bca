"""Where do problems come from, and what is an answer worth?

A task is three functions: `rows` yields plain dicts (generated here, or read from a file or the hub),
`build` turns a row into a prompt and the answer that its reward needs, `judge` scores a completion
against that answer. `TASKS` maps names to tasks; adding one is `TASKS["mine"] = Task("mine", ...)`.

    task        reward (its parts add up to it)                              correct
    sudoku      cells: share of the empty cells right                        solved, clues kept
    countdown   expression: 1, or 0.1 if only the numbers are right          makes the target
    toycode     tests: share of the tests passed; format 0.1: a code block   all tests passed
    humaneval   the same
    mbpp        the same
    gsm8k       correct: 1; format 0.1: a box between <answer> tags          the same number, exactly
    math        correct: 1; format 0.1: a box between <answer> tags          equal by math-verify

Every reward is total: any string in, a finite number out, in bounded time. The policy writes these
strings, so none of them is ever handed to eval here: arithmetic has its own evaluator, programs run
in sandbox.py, and LaTeX is compared in a process that can be killed.

    python data.py --task math --score outputs.jsonl [--compat]      score anybody's outputs
"""

import argparse
import ast
import atexit
import csv
import gzip
import itertools
import json
import math
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import warnings
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

LONGEST = 20_000  # characters of a completion that are looked at, counted from its end
HELD_OUT = 256  # problems in the validation split, and in the test split of generated tasks


@dataclass(frozen=True)
class Problem:
    """One prompt (the user message, before any chat template) and what its reward needs."""

    task: str
    prompt: str
    answer: Any
    id: str


class Reward(float):
    """The number trained on, with `.correct` (what accuracy counts) and `.parts`, which sum to it."""

    correct: bool
    parts: dict[str, float]

    def __new__(cls, value: float, correct: bool = False, /, **parts: float) -> "Reward":
        if not math.isfinite(value):
            raise ValueError(f"a reward must be a finite number, not {value}")
        reward = super().__new__(cls, value)
        reward.correct = bool(correct)
        reward.parts = parts or {"reward": float(value)}
        return reward


class Row(dict):
    """A row that remembers the file and line it came from, for the message when it is malformed."""

    where = ""


@dataclass(frozen=True)
class Task:
    """Where the problems of one task come from and how they are judged."""

    name: str
    rows: Callable[..., Iterable[dict]]  # (split, data_dir) or, with train_sets, (.., train_set)
    build: Callable[[dict], tuple[str, Any]]  # row -> prompt, answer; ValueError if malformed
    judge: Callable[[str, Any], Reward]  # completion, answer -> reward; never raises
    fields: str = ""  # what a row holds, for the error message and for users' own rows
    train_sets: tuple[str, ...] = ()  # choices of --train-set, the default first
    judge_all: Callable[[list[str], list[Any]], list[Reward]] | None = None  # where a batch is faster

    def load(
        self,
        split: str,
        data_dir: str | None = None,
        train_set: str | None = None,
        file: str | None = None,
    ) -> list[Problem]:
        """The problems of "train", "val" or "test": always the same ones in the same order.

        data_dir: look here before the hub. train_set: which training data, where a task has several.
        file: your own training rows (.jsonl, .jsonl.gz or .csv); a fixed tenth becomes "val".
        Raises ValueError or FileNotFoundError, naming the file and line, for what cannot be read.
        """
        if split not in ("train", "val", "test"):
            raise ValueError(f'split is "train", "val" or "test", not {split!r}')
        if train_set and train_set not in self.train_sets:
            known = f"choose {' or '.join(self.train_sets)}" if self.train_sets else "it has one"
            raise ValueError(f"--train-set {train_set}: not a training set of {self.name}; {known}")
        if file and split != "test":
            rows = hold_out(read_file(Path(file)), split)
        else:
            rows = self.rows(split, data_dir or None, *filter(None, [train_set]))
        return [self.problem(row, f"{split}-{i}") for i, row in enumerate(rows)]

    def problem(self, row: dict, name: str = "0") -> Problem:
        """The problem of one row. Raises ValueError, naming the row, for a malformed one."""
        try:
            prompt, answer = self.build(row)
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            where = getattr(row, "where", "") or f"row {name}"
            raise ValueError(f"{where}: {what}; a row of {self.name} holds {self.fields}") from error
        return Problem(self.name, prompt, answer, f"{self.name}/{row.get('task_id', name)}")

    def reward(self, completion: str, problem: Problem) -> Reward:
        """What this completion (cut at its first end token) is worth; never raises."""
        return self.judge(completion[-LONGEST:], problem.answer)

    def rewards(self, completions: list[str], problems: list[Problem]) -> list[Reward]:
        """`reward` of each pair; the code tasks run their programs in parallel."""
        if self.judge_all is None:
            return [self.reward(c, p) for c, p in zip(completions, problems, strict=True)]
        if len(completions) != len(problems):
            raise ValueError(f"{len(completions)} completions for {len(problems)} problems")
        return self.judge_all([c[-LONGEST:] for c in completions], [p.answer for p in problems])


# ---- reading rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A published data set: its file name in --data-dir, and where the hub has it."""

    file: str
    hub: str = ""
    config: str = ""
    split: str = ""
    revision: str = ""


SOURCES = {
    "sudoku": Source("sudoku_test.csv"),
    "countdown": Source("countdown_test.jsonl"),
    "gsm8k_train": Source("gsm8k_train.jsonl", "openai/gsm8k", "main", "train",
                          "740312add88f781978c0658806c59bc2815b9866"),
    "gsm8k_test": Source("gsm8k_test.jsonl", "openai/gsm8k", "main", "test",
                         "740312add88f781978c0658806c59bc2815b9866"),
    "math_train": Source("math_train.jsonl", "DigitalLearningGmbH/MATH-lighteval", "default", "train",
                         "0530c78699ea5e8eb5530600900e1f328b48acad"),
    "math_test": Source("math500.jsonl", "HuggingFaceH4/MATH-500", "default", "test",
                        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
    "humaneval": Source("HumanEval.jsonl.gz", "openai/openai_humaneval", "openai_humaneval", "test",
                        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"),
    "mbpp": Source("mbpp.jsonl", "google-research-datasets/mbpp", "full", "train+test",
                   "4bb6404fdc6cacfda99d4ac4205087b89d32030c"),
    "kodcode": Source("kodcode.jsonl", "KodCode/KodCode-Light-RL-10K", "default", "train",
                      "dcf78a8bbba9a613b596ce993c4921a38687dfcc"),
}  # fmt: skip


def read(name: str, data_dir: str | None) -> list[Row]:
    """The rows of a published data set: from its file in data_dir, else from the hub."""
    source = SOURCES[name]
    if data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: no such folder")
    if data_dir and (Path(data_dir) / source.file).exists():
        return read_file(Path(data_dir) / source.file)
    from datasets import load_dataset  # here, because it takes a second and most tasks do without

    try:
        found = load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError) as error:  # no connection, and no copy in the cache
        raise FileNotFoundError(
            f"cannot get {source.hub} from the hub ({type(error).__name__}); download its "
            f"{source.split} split as JSON lines and put it into --data-dir as {source.file}"
        ) from error
    rows = [Row(row) for row in found]
    for i, row in enumerate(rows):
        row.where = f"{source.hub}, row {i}"
    return rows


def read_file(path: Path) -> list[Row]:
    """The rows of a .jsonl, .jsonl.gz or .csv file; ValueError names the line that is malformed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected rows as JSON lines or CSV")
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            parsed = csv.DictReader(lines) if path.suffix == ".csv" else map(parse_line, lines)
            for number, row in enumerate(parsed, 2 if path.suffix == ".csv" else 1):
                if row is not None:
                    rows.append(Row(row))
                    rows[-1].where = f"{path}, line {number}"
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        number = len(rows) + 1 + (path.suffix == ".csv")
        raise ValueError(f"{path}, line {number}: expected a JSON object a line ({error})") from error
    if not rows:
        raise ValueError(f"{path}: no rows; expected a JSON object a line")
    return rows


def parse_line(line: str) -> dict | None:
    """The JSON object of a line, None for a blank line."""
    if not line.strip():
        return None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"found {line.strip()[:40]}")
    return row


def hold_out(rows: list[Row], split: str) -> list[Row]:
    """A fixed random tenth of the training rows, at most 256, is "val"; the rest is "train"."""
    rows = random.Random(0).sample(rows, len(rows))
    n = min(HELD_OUT, max(1, len(rows) // 10))
    return rows[:n] if split == "val" else rows[n:]


def has_file(name: str, data_dir: str | None) -> bool:
    return data_dir is not None and (Path(data_dir) / SOURCES[name].file).exists()


# ---- reading an answer ------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of the text holds; a box that is never closed runs to the end."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return text[start:]


def final_answer(completion: str) -> str | None:
    r"""What the last <answer> tag holds, closed or not, else the last \boxed{}; None without either.
    A box inside the tag is unpacked."""
    _, tag, answer = completion.rpartition("<answer>")
    if not tag:
        return boxed(completion)
    answer = answer.partition("</answer>")[0]
    inner = boxed(answer)
    return (answer if inner is None else inner).strip()


def well_formed(completion: str) -> float:
    """The format term of the worded tasks: 0.1 for a box between <answer> and </answer>."""
    _, tag, answer = completion.rpartition("<answer>")
    answer, end, _ = answer.partition("</answer>")
    return 0.1 if tag and end and boxed(answer) is not None else 0.0


def code_block(completion: str) -> str | None:
    """The last ```python (or bare ```) block that defines something, closed or not; None without."""
    blocks = []
    for fenced in completion.split("```")[1::2]:
        language, newline, code = fenced.partition("\n")
        if newline and language.strip() in ("", "python", "python3", "py"):
            blocks.append(code)
    defining = [code for code in blocks if "def " in code]
    return (defining or blocks or [None])[-1]


def number(text: str) -> Fraction | None:
    """The first number after the last = sign, exactly: 1,234.50, $5, -3/4; None without one."""
    for part in reversed(text.split("=")):
        found = re.search(r"(-?)\$? ?(\d[\d,]{0,40}(?:\.\d{1,40})?|\.\d{1,40})(?:/(\d{1,40}))?", part, re.A)
        if found:
            sign, digits, below = found.groups()
            value = Fraction(digits.replace(",", ""))
            return (-value if sign else value) / (int(below or 1) or 1)
    return None


# ---- sudoku: 4x4, generated, split by solution ------------------------------------------------------

SUDOKU = (
    "Solve this 4x4 Sudoku: every row, every column and every 2x2 box holds 1, 2, 3 and 4 once. "
    "The 16 cells are written row by row, 0 is an empty cell. "
    "Give the 16 digits of the solved grid between <answer> and </answer>.\nPuzzle: "
)


@lru_cache(maxsize=None)
def sudoku_grids() -> tuple[str, ...]:
    """All 288 solved 4x4 grids, as strings of 16 digits."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    bands = [  # two rows that fill their two boxes
        top + low for top in rows for low in rows
        if set(top[:2] + low[:2]) == set(top[2:] + low[2:]) == set("1234")
    ]  # fmt: skip
    return tuple(
        a + b for a in bands for b in bands if all(len({*(a + b)[c::4]}) == 4 for c in range(4))
    )


@lru_cache(maxsize=None)
def _grids_with() -> dict[tuple[int, str], int]:
    """(cell, digit) -> the grids that have it there, as a bit set."""
    has = {(cell, digit): 0 for cell in range(16) for digit in "1234"}
    for i, grid in enumerate(sudoku_grids()):
        for key in enumerate(grid):
            has[key] |= 1 << i
    return has


@lru_cache(maxsize=50_000)
def sudoku_solutions(puzzle: str) -> tuple[str, ...]:
    """Every grid that keeps the clues (a puzzle is 16 characters, 0 for an empty cell)."""
    has, grids = _grids_with(), sudoku_grids()
    left = (1 << len(grids)) - 1
    for cell, digit in enumerate(puzzle):
        left &= has[cell, digit] if digit != "0" else left
    return tuple(grid for i, grid in enumerate(grids) if left >> i & 1)


def sudoku_rows(split: str, data_dir: str | None) -> list[dict]:
    """Puzzles with one solution and 4 to 11 empty cells. 200 of the 288 grids make the training
    puzzles, 44 the validation and 44 the test puzzles, so no split knows another's solutions. A sudoku_test.csv in data_dir is the test split instead."""
    if split == "test" and has_file("sudoku", data_dir):
        return read("sudoku", data_dir)
    grids = list(sudoku_grids())
    random.Random(0).shuffle(grids)
    grids, n = {
        "train": (grids[:200], 4000),
        "val": (grids[200:244], HELD_OUT),
        "test": (grids[244:], HELD_OUT),
    }[split]
    has, rng, puzzles = _grids_with(), random.Random(f"sudoku {split}"), {}
    while len(puzzles) < n:
        grid = grids[len(puzzles) % len(grids)]
        clues, to_empty = set(range(16)), rng.randint(4, 11)
        for cell in rng.sample(range(16), 16):
            left = -1
            for clue in clues - {cell}:
                left &= has[clue, grid[clue]]
            if left.bit_count() == 1:
                clues.remove(cell)
            if 16 - len(clues) == to_empty:
                break
        puzzles["".join(d if i in clues else "0" for i, d in enumerate(grid))] = grid
    return [{"puzzle": puzzle, "solution": grid} for puzzle, grid in puzzles.items()]


def sudoku_build(row: dict) -> tuple[str, dict]:
    puzzle, solution = row.get("puzzle", row.get("Puzzle")), row.get("solution", row.get("Solution"))
    if "completion" in row:  # an output to score
        found = re.search("[0-4]{16}", row["question"])
        puzzle, solution = found and found[0], row["answer"]
    if not isinstance(puzzle, str) or not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle:
        raise ValueError(f"the puzzle is {puzzle!r}")
    if not sudoku_solutions(puzzle):
        raise ValueError(f"the puzzle {puzzle} has no solution")
    solution = solution or sudoku_solutions(puzzle)[0]
    if solution not in sudoku_solutions(puzzle):
        raise ValueError(f"{solution!r} does not solve the puzzle {puzzle}")
    return SUDOKU + puzzle, {"puzzle": puzzle, "solution": solution}


def sudoku_judge(completion: str, answer: dict) -> Reward:
    """The share of the empty cells that are right, for the best of the puzzle's solutions; correct:
    16 digits that keep the clues and complete every row, column and box."""
    puzzle, digits = answer["puzzle"], re.sub("[^0-9]", "", final_answer(completion) or "")
    empty = [i for i, clue in enumerate(puzzle) if clue == "0" and i < len(digits)]
    solutions = sudoku_solutions(puzzle)
    share = max(sum(digits[i] == grid[i] for i in empty) for grid in solutions) / puzzle.count("0")
    return Reward(share, digits in solutions, cells=share)


# ---- countdown: three numbers, exact arithmetic -----------------------------------------------------

COUNTDOWN = (
    "Use each of the given numbers exactly once, with + - * / and parentheses, to make the target. "
    "Give the expression between <answer> and </answer>."
)
ARITHMETIC = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def bounded_power(a: Fraction, b: Fraction) -> Fraction:
    if b.denominator != 1 or abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > 10_000:
        raise ValueError("not a power worth computing")
    return a ** int(b)


PYTHON = ARITHMETIC | {
    ast.Pow: bounded_power,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
}


def evaluate(text: str, python: bool = False) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of + - * / ( ) and whole numbers, and the numbers it uses.

    Raises ValueError for anything else (powers, signs, names, floats, more than 200 characters) and
    ZeroDivisionError. `python` admits signs, **, // and floats too, as the published scorer does.
    """
    if len(text) > 200 or not re.fullmatch(r"[0-9+\-*/().\s]+", text):
        raise ValueError("not an arithmetic expression")
    operators, used = PYTHON if python else ARITHMETIC, []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float)[: 1 + python]:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.operand))
        raise ValueError("not an arithmetic expression")

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not an arithmetic expression") from error
    return value(tree.body), used


@lru_cache(maxsize=None)
def _expressions(numbers: tuple[int, ...]) -> tuple[tuple[str, Fraction], ...]:
    """Every expression that uses each number once, in this order or any other, with its value."""
    if len(numbers) == 1:
        return ((str(numbers[0]), Fraction(numbers[0])),)
    found = {}
    for n in range(1, len(numbers)):
        for left in itertools.combinations(range(len(numbers)), n):
            right = [i for i in range(len(numbers)) if i not in left]
            for (x, a), (y, b) in itertools.product(
                _expressions(tuple(numbers[i] for i in left)),
                _expressions(tuple(numbers[i] for i in right)),
            ):
                x_bracket = f"({x})" if "+" in x or "-" in x else x
                y_bracket = f"({y})" if "+" in y or "-" in y else y
                y_whole = y if y.isdigit() else f"({y})"
                found[f"{x} + {y}"] = a + b
                found[f"{x} - {y_bracket}"] = a - b
                found[f"{x_bracket} * {y_bracket}"] = a * b
                if b:
                    found[f"{x_bracket} / {y_whole}"] = a / b
    return tuple(found.items())


def countdown_solutions(numbers: Iterable[int], target: int) -> list[str]:
    """Every expression that makes the target from the numbers (spaced, with no needless brackets)."""
    return [text for text, value in _expressions(tuple(sorted(numbers))) if value == target]


def countdown_rows(split: str, data_dir: str | None) -> list[dict]:
    """Three numbers of 1 to 9 and a target of 1 to 50 that they make. Splits share no (numbers,
    target), whatever the order of the numbers; training shows every order. A countdown_test.jsonl in
    data_dir is the test split instead."""
    if split == "test" and has_file("countdown", data_dir):
        return read("countdown", data_dir)
    rng, pairs = random.Random("countdown"), []
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        values = {value for _, value in _expressions(numbers)}
        pairs += [(numbers, target) for target in range(1, 51) if target in values]
    rng.shuffle(pairs)
    if split == "train":
        pairs = pairs[2 * HELD_OUT :]
        pairs = [(order, t) for n, t in pairs for order in sorted({*itertools.permutations(n)})]
        rng.shuffle(pairs)
    else:
        pairs = pairs[:HELD_OUT] if split == "val" else pairs[HELD_OUT : 2 * HELD_OUT]
        pairs = [(tuple(rng.sample(n, 3)), t) for n, t in pairs]
    return [{"numbers": list(numbers), "target": target} for numbers, target in pairs]


def countdown_build(row: dict) -> tuple[str, dict]:
    if "completion" in row:  # an output to score
        numbers, target = row["answer"]
    elif "input" in row:  # the common test file: "30,100,93" and "23"
        numbers, target = [int(n) for n in row["input"].split(",")], int(row["output"])
    else:
        numbers, target = row["numbers"], row["target"]
    if not 2 <= len(numbers) <= 6 or not all(type(n) is int for n in [*numbers, target]):
        raise ValueError(f"numbers are {numbers!r} and target is {target!r}")
    solution = next(iter(countdown_solutions(numbers, target)), None) if len(numbers) < 5 else None
    prompt = f"{COUNTDOWN}\nNumbers: {' '.join(map(str, numbers))}\nTarget: {target}"
    return prompt, {"numbers": numbers, "target": target, "solution": solution}


def countdown_judge(completion: str, answer: dict) -> Reward:
    """1 for an expression that makes the target; 0.1 for one that uses the right numbers once each.
    LaTeX signs are read, and what follows an equals sign is not."""
    text = final_answer(completion) or ""
    for latex, plain in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""),
                         ("\\right", ""), ("×", "*"), ("÷", "/"), ("−", "-")):  # fmt: skip
        text = text.replace(latex, plain)
    text = " ".join(re.sub(r"\\[()\[\]]|\$", " ", text).partition("=")[0].split())
    try:
        value, numbers = evaluate(text)
    except (ValueError, ZeroDivisionError):
        return Reward(0.0, expression=0.0)
    correct = value == answer["target"]
    worth = (1.0 if correct else 0.1) if sorted(numbers) == sorted(answer["numbers"]) else 0.0
    return Reward(worth, worth == 1, expression=worth)


# ---- toycode: small functions described in words ----------------------------------------------------

TOYCODE = "Answer with one function in a ```python block.\nWrite a Python function f(a, b) that returns "
Term = tuple[str, str, Callable[[int, int], int]]  # words, code, function


def _terms() -> Iterator[Term]:
    """The parts that functions are made of: what is said, what is written, what it computes."""
    for v, get in (("a", lambda a, b: a), ("b", lambda a, b: b)):
        yield v, v, get
        for word, k in (("twice", 2), ("three times", 3), ("five times", 5)):
            yield f"{word} {v}", f"{k} * {v}", lambda a, b, get=get, k=k: k * get(a, b)
        yield f"the square of {v}", f"{v} * {v}", lambda a, b, get=get: get(a, b) ** 2
        for k in range(1, 10):
            yield f"{v} plus {k}", f"({v} + {k})", lambda a, b, get=get, k=k: get(a, b) + k
            yield f"{v} minus {k}", f"({v} - {k})", lambda a, b, get=get, k=k: get(a, b) - k


def _functions() -> Iterator[Term]:
    """Every function of the grammar; the same one may be described in more than one way."""
    yield from _terms()
    for (x, x_code, x_of), (y, y_code, y_of) in itertools.product(list(_terms()), repeat=2):
        for words, code, of in (
            ("the sum of {} and {}", "{} + {}", lambda x, y: x + y),
            ("the difference of {} and {}", "{} - {}", lambda x, y: x - y),
            ("the product of {} and {}", "{} * {}", lambda x, y: x * y),
            ("the larger of {} and {}", "max({}, {})", max),
            ("the smaller of {} and {}", "min({}, {})", min),
        ):
            both = lambda a, b, of=of, x_of=x_of, y_of=y_of: of(x_of(a, b), y_of(a, b))  # noqa: E731
            yield words.format(x, y), code.format(x_code, y_code), both


def toycode_rows(split: str, data_dir: str | None) -> list[dict]:
    """Distinct functions of a and b (no two agree on a grid of inputs), split by function."""
    inputs, distinct = [(-7, 3), (4, 9), (8, -2), (1, 0), (-3, -5), (12, 13), (6, 6)], {}
    for words, code, of in _functions():
        distinct.setdefault(tuple(of(a, b) for a, b in inputs), (words, code, of))
    functions = list(distinct.values())
    rng = random.Random("toycode")
    rng.shuffle(functions)
    part = {"val": (0, HELD_OUT), "test": (HELD_OUT, 2 * HELD_OUT), "train": (2 * HELD_OUT, 5000)}
    rows = []
    for words, code, of in functions[slice(*part[split])]:
        args = [(rng.randint(-9, 9), rng.randint(-9, 9)) for _ in range(4)] + [(2, 7), (8, 3)]
        tests = [f"assert f({a}, {b}) == {of(a, b)}" for a, b in args]
        code = code[1:-1] if code[0] == "(" and code.find(")") == len(code) - 1 else code
        rows.append({"text": words, "code": f"def f(a, b):\n    return {code}", "tests": tests})
    return rows


def toycode_build(row: dict) -> tuple[str, dict]:
    text, code, tests = row["text"], row["code"], strings(row["tests"], "tests")
    job = {"names": defined(code), "before": "", "setup": "", "tests": tests}
    return TOYCODE + text + ".", {"code": code, "job": job}


# ---- gsm8k and math: worded problems ----------------------------------------------------------------

WORDED = (
    "Solve this problem. Reason step by step between <reasoning> and </reasoning>, then give the "
    "final answer in \\boxed{} between <answer> and </answer>.\nProblem: "
)


def gsm8k_rows(split: str, data_dir: str | None) -> list[Row]:
    if split == "test":
        return read("gsm8k_test", data_dir)
    return hold_out(read("gsm8k_train", data_dir), split)


def gsm8k_build(row: dict) -> tuple[str, Fraction | None]:
    gold = number(str(row["answer"]).rpartition("####")[2])
    if gold is None and not ("completion" in row and row["answer"] is None):  # scored: always wrong
        raise ValueError(f"no number in the answer {str(row['answer'])[-40:]!r}")
    return WORDED + text_of(row, "question"), gold


def gsm8k_judge(completion: str, answer: Fraction) -> Reward:
    """The number of the final answer; without a tag or a box, the last number of the text."""
    found = final_answer(completion)
    if found is None:
        numbers = re.findall(r"-?\$?\.?\d[\d,.]{0,40}", completion, re.A)
        found = numbers[-1].rstrip(".,") if numbers else ""
    correct, form = number(found) == answer, well_formed(completion)
    return Reward(correct + form, correct, correct=float(correct), format=form)


def math_rows(split: str, data_dir: str | None) -> list[Row]:
    if split == "test":
        return read("math_test", data_dir)
    return hold_out(read("math_train", data_dir), split)


def math_build(row: dict) -> tuple[str, str]:
    gold = str(row["answer"]) if "answer" in row else boxed(text_of(row, "solution"))
    if not gold or not gold.strip():
        raise ValueError("no answer: neither a field answer nor a \\boxed{} in the solution")
    return WORDED + text_of(row, "problem" if "problem" in row else "question"), gold


def math_judge(completion: str, answer: str) -> Reward:
    """The final answer against the gold one: the same text once normalised, or equal as algebra."""
    found, form = final_answer(completion), well_formed(completion)
    correct = found is not None and same_math(found, answer)
    return Reward(correct + form, correct, correct=float(correct), format=form)


@lru_cache(maxsize=100_000)
def same_math(found: str, gold: str) -> bool:
    """Whether two LaTeX answers are equal. Towers of powers, factorials of large numbers and texts of
    more than 300 characters are compared as strings only: evaluating them may take forever."""
    if published_equal(found, gold):
        return True
    power = found.replace("**", "^")
    if len(found) > 300 or not re.search(r"[\w\\]", found):
        return False
    if re.search(r"\^\s*(\{[^{}]*|[\w.(]+)\s*\^|\^[\s{(+-]*\d{4}|\d{3}\s*[)}]*\s*!|!\s*!", power):
        return False
    return algebra().same(found, gold)


class Algebra:
    """math-verify in a process of its own. Its own time limit is a signal, which works neither off the
    main thread nor inside a big-number operation; a process can always be killed."""

    cpu_s, wall_s = 0.5, 3.0  # of one comparison: the first decides, the second is the backstop

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--serve-algebra"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)
        self.process.stdout.readline()  # it is warm

    def same(self, found: str, gold: str) -> bool:
        with self.lock:
            try:
                self.process.stdin.write(json.dumps([found, gold]).encode() + b"\n")
                self.process.stdin.flush()
                if select.select([self.process.stdout], [], [], self.wall_s)[0]:
                    reply = self.process.stdout.readline()
                    if reply:
                        return reply == b"1\n"
            except BrokenPipeError:
                pass
            self.process.kill()
            self.process.wait()
            self.start()
            return False

    @staticmethod
    def serve() -> None:
        """The other side: a line of JSON in, 1 or 0 out."""
        import resource

        from math_verify import parse, verify

        class OutOfTime(BaseException):
            """Not an Exception, so that no handler inside sympy keeps it."""

        def stop(*_: object) -> None:
            raise OutOfTime

        @lru_cache(maxsize=10_000)
        def parsed(text: str) -> list:
            return parse(f"\\boxed{{{text}}}", parsing_timeout=None)

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.signal(signal.SIGVTALRM, stop)
        verify(parsed("\\frac{1}{2}"), parsed("(0, 0.5]"), timeout_seconds=None)  # warm up
        print("warm", flush=True)
        for line in sys.stdin:
            found, gold = json.loads(line)
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, Algebra.cpu_s, 0.05)
                same = verify(parsed(gold), parsed(found), timeout_seconds=None)
            except (OutOfTime, MemoryError, RecursionError):
                same = False
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            print(int(same), flush=True)


@lru_cache(maxsize=None)
def algebra() -> Algebra:
    return Algebra()


# ---- humaneval and mbpp: programs, judged by the sandbox --------------------------------------------

PROGRAM = "Answer with the whole program in one ```python block.\n"
PYTEST = '''
import re, sys, types
class raises:
    def __init__(self, kinds, match=""):
        self.kinds, self.match = kinds, match
    def __enter__(self):
        return self
    def __exit__(self, kind, value, trace):
        assert kind is not None, "nothing was raised"
        self.value = value
        return issubclass(kind, self.kinds) and re.search(self.match or "", str(value)) is not None
class approx:
    def __init__(self, value, rel=1e-6, abs=1e-12):
        self.value, self.rel, self.abs = value, rel, abs
    def __eq__(self, other):
        if isinstance(self.value, (list, tuple)):
            pairs = zip(self.value, other)
            return len(self.value) == len(other) and all(
                approx(a, self.rel, self.abs) == b for a, b in pairs)
        return abs(other - self.value) <= max(self.rel * abs(self.value), self.abs)
sys.modules["pytest"] = types.ModuleType("pytest")
vars(sys.modules["pytest"]).update(raises=raises, approx=approx)
'''  # what the tests of KodCode use of pytest, which the sandbox does not have


def text_of(row: dict, field: str) -> str:
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"{field} must be a text, not {row[field]!r}")
    return row[field]


def strings(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{field} must be a list of at least one text, not {value!r}")
    return value


def defined(code: str) -> list[str]:
    """The names a program defines at top level."""
    names = []
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names += [n for t in targets if (n := getattr(t, "name", getattr(t, "id", None)))]
    return names


def used(code: str) -> set[str]:
    tree = ast.walk(ast.parse(code))
    return {getattr(node, "id", getattr(node, "name", None)) for node in tree}


def imports(code: str) -> str:
    found = [n for n in ast.parse(code).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return "\n".join(map(ast.unparse, found))


def code_build(row: dict) -> tuple[str, dict]:
    """A row of HumanEval, MBPP or KodCode, told apart by its fields, as a prompt and a sandbox job."""
    if "entry_point" in row:
        return humaneval_build(row)
    return mbpp_build(row) if "test_list" in row else kodcode_build(row)


def humaneval_build(row: dict) -> tuple[str, dict]:
    """The tests are the asserts of check(candidate), one by one; where it does more than assert, the
    whole of it is one test. Helpers of the prompt are the prompt's, never the program's."""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    start = next(n.lineno for n in ast.parse(prompt).body if getattr(n, "name", "") == entry) - 1
    before = "\n".join(prompt.splitlines()[:start])
    tree = ast.parse(text_of(row, "test")).body
    check = next(node for node in tree if getattr(node, "name", "") == "check")
    setup = "\n".join(ast.unparse(node) for node in tree if node is not check)
    tests = [f"{ast.unparse(check)}\ncheck(candidate)"]
    if all(isinstance(node, ast.Assert) for node in check.body):
        tests = [test for node in check.body if "candidate" in (test := ast.unparse(node))]
    job = {"names": [entry], "before": before, "setup": f"{setup}\ncandidate = {entry}", "tests": tests}
    code = prompt + text_of(row, "canonical_solution")
    ask = f"Complete this Python function. {PROGRAM}{prompt}"
    return ask, {"code": code, "job": job, "prompt": prompt, "entry": entry}


def mbpp_build(row: dict) -> tuple[str, dict]:
    tests, code = strings(row["test_list"], "test_list"), text_of(row, "code")
    names = [name for name in defined(code) if name in used("\n".join(tests))]
    job = {
        "names": names,
        "before": imports(code),
        "setup": row.get("test_setup_code", ""),
        "tests": tests,
    }
    ask = f"{PROGRAM}{text_of(row, 'text')}\nIt must pass these tests:\n" + "\n".join(tests)
    return ask, {"code": code, "job": job}


def kodcode_build(row: dict) -> tuple[str, dict]:
    """The tests are the test functions of a pytest file; one with fixtures or decorators is left out."""
    code, test = text_of(row, "solution"), text_of(row, "test")
    tree = ast.parse(test).body
    is_test = [isinstance(n, ast.FunctionDef) and n.name.startswith("test") for n in tree]
    tests = [
        f"{ast.unparse(node)}\n{node.name}()"
        for node, wanted in zip(tree, is_test)
        if wanted and not node.args.args and not node.decorator_list
    ]
    setup = "\n".join(ast.unparse(node) for node, wanted in zip(tree, is_test) if not wanted)
    job = {
        "names": [name for name in defined(code) if name in used(test)],
        "before": imports(code),
        "setup": (PYTEST if "pytest" in test else "") + setup,
        "tests": strings(tests, "test functions"),
    }
    declared = [info["function_declaration"] for info in row.get("test_info") or []]
    ask = PROGRAM + text_of(row, "question") + "".join(f"\nIt defines: {line}" for line in declared)
    return ask, {"code": code, "job": job}


def code_rows(split: str, data_dir: str | None, train_set: str, test: str) -> list[Row]:
    """Training rows of KodCode or of MBPP's own training part; the test rows of `test`."""
    if split != "test":
        rows = read(train_set, data_dir)
        if train_set == "mbpp":
            rows = [row for row in rows if 601 <= row["task_id"] <= 974]
        return hold_out(rows, split)
    rows = read(test, data_dir)
    return [row for row in rows if test != "mbpp" or 11 <= row["task_id"] <= 510]


def humaneval_rows(split: str, data_dir: str | None, train_set: str = "kodcode") -> list[Row]:
    return code_rows(split, data_dir, train_set, "humaneval")


def mbpp_rows(split: str, data_dir: str | None, train_set: str = "kodcode") -> list[Row]:
    return code_rows(split, data_dir, train_set, "mbpp")


def program(completion: str, answer: dict) -> str | None:
    """The program of a completion, None where it does not parse. HumanEval's prompt goes before it:
    all of it where only the body was written, else the imports and helpers."""
    code = code_block(completion)
    code = completion if code is None else code
    if "entry" in answer:
        whole = f"def {answer['entry']}" in code
        code = (answer["job"]["before"] + "\n" if whole else answer["prompt"]) + code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd string escapes
            ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return code


def code_judge_all(completions: list[str], answers: list[dict]) -> list[Reward]:
    """Each completion's share of tests passed, and 0.1 for a closed block. A program that does not
    parse is not run, and the same program for the same problem runs once."""
    programs = [program(c, a) for c, a in zip(completions, answers)]
    jobs = {
        (code, id(answer)): {"code": code, **answer["job"]}
        for code, answer in zip(programs, answers)
        if code is not None
    }
    verdicts = dict(zip(jobs, sandbox().run(list(jobs.values())))) if jobs else {}
    rewards = []
    for completion, code, answer in zip(completions, programs, answers):
        ok = verdicts[code, id(answer)]["ok"] if code is not None else [False]
        share, form = sum(ok) / len(ok), 0.1 if code_closed(completion) else 0.0
        rewards.append(Reward(share + form, all(ok), tests=share, format=form))
    return rewards


def code_judge(completion: str, answer: dict) -> Reward:
    return code_judge_all([completion], [answer])[0]


def code_closed(completion: str) -> bool:
    return completion.count("```") % 2 == 0 and code_block(completion) is not None


@lru_cache(maxsize=1)
def sandbox(unsafe: bool = False) -> "Sandbox":
    """The one sandbox of this process, started when the first program is judged."""
    from sandbox import Sandbox

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    box = Sandbox(workers=max(1, min(16, (os.cpu_count() or 1) // ranks)), unsafe=unsafe)
    atexit.register(box.close)
    return box


# ---- the published scorer ---------------------------------------------------------------------------
# The rules behind the published table (d1's evaluation, which the method's authors reuse), faults
# included, so that `--compat` reproduces its rows: the first box counts for GSM8K, a whole text without
# a box is the answer, Sudoku is compared with one stored grid. Facts only; the code is our own.

END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")


def first_tag(text: str) -> str | None:
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else None


def published_box(text: str) -> str | None:
    """The last box's content; the whole text where there is none; None for one that never closes."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = max(text.rfind("\\boxed"), -1)
    start = start if start >= 0 else text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            box = text[start : i + 1]
            return box[7:-1] if box.startswith("\\boxed{") else box
    return None


def published_form(text: str) -> str:
    """Hendrycks' normal form of a LaTeX answer. ValueError or IndexError: it has none."""
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
                     ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
                     ("\\$", "")):  # fmt: skip
        text = text.replace(old, new)
    if "\\text{ " in text:  # units on the right
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, *right = text.split("=")
    if len(right) == 1 and len(left) <= 2:  # x = 5
        text = right[0]
    head, *tails = text.split("\\sqrt")
    text = head + "".join("\\sqrt" + (t if t[0] == "{" else f"{{{t[0]}}}{t[1:]}") for t in tails)
    text = text.replace(" ", "")
    head, *tails = text.split("\\frac")
    if all(tail[0] == "{" or len(tail) >= 2 for tail in tails):
        text = head
        for t in tails:
            below = t[1:2] if t[1:2] == "{" else f"{{{t[1:2]}}}"
            text += "\\frac" + (t if t[0] == "{" else f"{{{t[0]}}}{below}{t[2:]}")
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") == 1:
        above, below = map(int, text.split("/"))
        text = f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
    return text


def published_equal(a: str, b: str) -> bool:
    try:
        return published_form(a) == published_form(b)
    except (ValueError, IndexError):
        return a == b


def published_gsm8k(completion: str, answer: Fraction) -> bool:
    """The first box with a number in it, its first number; else the last number in the tag."""
    def read_number(text: str, which: int) -> float | None:
        try:
            return float(text)
        except ValueError:
            numbers = re.findall(r"-?\d+\.?\d*", text)
            return float(numbers[which]) if numbers else None

    boxes = [box.strip() for box in re.findall(r"\\boxed{(.*?)}", completion)]
    numbers = [read_number(box, 0) for box in boxes if box.strip(".")]
    numbers = [n for n in numbers if n is not None] or [read_number(first_tag(completion) or "", -1)]
    return None not in (numbers[0], answer) and numbers[0] == float(answer)


def published_math(completion: str, answer: str) -> bool:
    found = published_box(completion) or first_tag(completion)
    return found is not None and published_equal(found, answer)


def published_countdown(completion: str, answer: dict) -> bool:
    """Any expression Python accepts, powers and floats included; what is before an equals sign."""
    text = published_box(completion)
    if text is None:
        text = first_tag(completion)
        text = completion if text is None else text
    for latex, plain in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
        text = text.replace(latex, plain)
    for left, right in itertools.pairwise(text.split("=")):
        run = left[len(left.rstrip("0123456789+-*/() ")) :]
        if run and right[:1] and right[0] in "0123456789. ":
            text = run
            break
    if sorted(map(int, re.findall(r"\d{1,40}", text))) != sorted(answer["numbers"]):
        return False
    try:
        value, _ = evaluate(text.strip(), python=True)
        return abs(value - answer["target"]) < 1e-5
    except (ValueError, ArithmeticError):
        return False


def published_sudoku(completion: str, answer: dict) -> int:
    """The number of empty cells that agree with the stored grid, in the first of five places."""
    _, opened, tail = completion.partition("<answer>")
    fence = re.search(r"```([\d\s]+)```", tail) if opened else None
    places = [fence[1] if fence else ""]
    end = re.search(END.pattern + "|</answer>", tail)
    places.append(tail[: end.start()] if end else "")
    _, closed, rest = completion.partition("</answer>")
    places.append(END.split(rest)[0] if closed else "")
    places += re.findall(r"(\d{16})\s*</answer>", completion)[:1]
    places += re.findall(r"\b(\d{16})\b", completion)[:1]
    grid = re.sub(r"\s", "", next((place for place in places if place.strip()), ""))
    cells = zip(answer["puzzle"], grid, answer["solution"])
    return sum(clue == "0" and digit == gold for clue, digit, gold in cells)


PUBLISHED = {
    "gsm8k": published_gsm8k,
    "math": published_math,
    "countdown": published_countdown,
    "sudoku": published_sudoku,
}


# ---- the tasks --------------------------------------------------------------------------------------

CODE_FIELDS = (
    "text, code, test_list (as MBPP), or question, solution, test (as KodCode), "
    "or prompt, entry_point, canonical_solution, test (as HumanEval)"
)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sudoku", sudoku_rows, sudoku_build, sudoku_judge,
             "puzzle (16 digits, 0 for an empty cell) and, if you like, solution"),
        Task("countdown", countdown_rows, countdown_build, countdown_judge,
             "numbers (a list of 2 to 6 whole numbers) and target (a whole number)"),
        Task("toycode", toycode_rows, toycode_build, code_judge,
             "text (after: a Python function f(a, b) that returns), code, tests (a list of asserts)",
             judge_all=code_judge_all),
        Task("gsm8k", gsm8k_rows, gsm8k_build, gsm8k_judge,
             "question and answer (a number, or a text that ends in #### and a number)"),
        Task("math", math_rows, math_build, math_judge,
             "problem and answer (LaTeX), or problem and solution (with a \\boxed{})"),
        Task("humaneval", humaneval_rows, code_build, code_judge, CODE_FIELDS,
             ("kodcode", "mbpp"), code_judge_all),
        Task("mbpp", mbpp_rows, code_build, code_judge, CODE_FIELDS,
             ("kodcode", "mbpp"), code_judge_all),
    )
}  # fmt: skip


# ---- scoring anybody's outputs ----------------------------------------------------------------------


def score(name: str, file: str, compat: bool) -> dict:
    """Score rows of question, completion, answer (for code, answer is the data set's row)."""
    task, published = TASKS[name], PUBLISHED.get(name)
    if compat and published is None:
        raise ValueError(f"--compat: no published rules for {name}, only for {', '.join(PUBLISHED)}")
    rows = read_file(Path(file))
    for row in rows:
        if not isinstance(row.get("completion"), str):
            raise ValueError(f"{row.where}: expected question, completion (a text) and answer")
    fields = [row["answer"] if isinstance(row.get("answer"), dict) else row for row in rows]
    problems = [task.problem(row) for row in fields]
    if compat:
        results = [published(r["completion"], p.answer) for r, p in zip(rows, problems)]
    else:
        results = task.rewards([END.split(r["completion"])[0] for r in rows], problems)
    tally = {"task": name, "n": len(rows)}
    if name == "sudoku":
        empty = [p.answer["puzzle"].count("0") for p in problems]
        cells = results if compat else [round(r * n) for r, n in zip(results, empty)]
        solved = [a == b for a, b in zip(cells, empty)] if compat else [r.correct for r in results]
        tally |= {"correct": sum(solved), "accuracy": sum(solved) / len(rows)}
        return tally | {"cells": sum(cells), "cells_accuracy": sum(cells) / sum(empty)}
    correct = sum(results) if compat else sum(r.correct for r in results)
    return tally | {"correct": correct, "accuracy": correct / len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Score outputs of any model.", usage=argparse.SUPPRESS)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--score", required=True, metavar="FILE", help="rows: question, completion, answer")
    parser.add_argument("--compat", action="store_true", help="by the rules of the published table")
    args = parser.parse_args()
    try:
        print(json.dumps(score(args.task, args.score, args.compat)))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    Algebra.serve() if sys.argv[1:] == ["--serve-algebra"] else main()
