"""Where do problems come from, and what is an answer worth?

A task is three functions: `rows` gives plain dicts (generated here, or read from a file or the
hub), `build` turns a row into a prompt and the answer that its reward needs, `judge` compares a
completion with that answer. `TASKS`, at the end, maps names to tasks;
`TASKS["mine"] = Task("mine", ...)` adds one.

    task        reward: the sum of these parts                                correct
    sudoku      cells: share of the empty cells right                         solved, clues kept
    countdown   expression: 1, or 0.1 where only the numbers are right        makes the target
    gsm8k       correct: 1; format: 0.1 for a box between <answer> tags       the same number
    math        the same                                                      equal by math-verify
    toycode     tests: share of the tests passed; format: 0.1 for a block     all tests passed
    humaneval   the same
    mbpp        the same

Every reward is total: any string in, a finite number out, in bounded time. A policy writes these
strings, so nothing here executes them: arithmetic has a calculator of its own, LaTeX is compared in
a process that can be killed, and programs go to sandbox.py.

    python data.py --task math --score outputs.jsonl    scores anybody's outputs, see score.py
"""

import ast
import atexit
import contextlib
import csv
import gzip
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Any

from sandbox import Sandbox

LONGEST = 20_000  # of a longer completion only this many characters count, the last ones
END_TOKENS = "<|eot_id|>", "<|endoftext|>", "<|im_end|>"  # of a turn, in the published families
HELD_OUT = 256  # problems for validation, and for the test of generated tasks


@dataclass(frozen=True)
class Problem:
    """One prompt (the user message, before any chat template) and what its reward needs."""

    task: str
    prompt: str
    answer: Any
    id: str


class Reward(float):
    """The number trained on, with `.correct` (what accuracy counts) and `.parts` (their sum)."""

    correct: bool
    parts: dict[str, float]

    def __new__(cls, value: float, correct: bool = False, /, **parts: float) -> "Reward":
        if not math.isfinite(value):
            raise ValueError(f"a reward must be a finite number, not {value}")
        if parts and not math.isclose(sum(parts.values()), value, abs_tol=1e-9):
            raise ValueError(f"a reward of {value} has parts that add up to {sum(parts.values())}")
        reward = super().__new__(cls, value)
        reward.correct = bool(correct)
        reward.parts = parts or {"reward": float(value)}
        return reward

    def weighted(self, weights: Mapping[str, float]) -> "Reward":
        """The sum with some parts (by name) times a weight; `correct` does not change."""
        parts = {name: value * weights.get(name, 1.0) for name, value in self.parts.items()}
        return Reward(sum(parts.values()), self.correct, **parts) if weights else self


class Unusable(ValueError):
    """A well-formed row that cannot be judged here. It is left out, with a warning."""


class Row(dict):
    """The fields of a row, and the file and line they came from, for error messages."""

    def __init__(self, fields: Mapping, where: str) -> None:
        super().__init__(fields)
        self.where = where


MALFORMED = (  # what building a problem of a bad row raises; the last two on a mad program
    LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Where the problems of one task come from, and how a completion is judged."""

    name: str
    rows: Callable[..., Iterable[dict]]  # (split, data_dir[, one of train_sets]) -> rows
    build: Callable[[dict], tuple[str, Any]]  # row -> prompt, answer; ValueError if malformed
    judge: Callable[[str, Any], Reward]  # any completion, answer -> reward; never raises
    fields: str = "other fields"  # what a row should hold, for the message about a malformed one
    train_sets: tuple[str, ...] = ()  # choices of --train-set, the default first
    judge_all: Callable[[list[str], list[Any]], list[Reward]] | None = None  # a batch, if faster
    runs_code: bool = False  # judging runs programs, so it takes the sandbox
    asks: str = ""  # how its prompts begin; {question} in a --prompt file is what follows

    def load(
        self,
        split: str,
        data_dir: str | None = None,
        train_set: str | None = None,
        file: str | None = None,
    ) -> list[Problem]:
        """The problems of "train", "val" or "test", always the same ones in the same order.

        data_dir: look here before the hub. train_set: the training data, where there is a choice.
        file: your own rows (.jsonl, .jsonl.gz, .csv) to train on; a fixed tenth of them is "val".
        Raises ValueError or FileNotFoundError, naming file and line, for what cannot be used.
        """
        if split not in ("train", "val", "test"):
            raise ValueError(f'split is "train", "val" or "test", not {split!r}')
        if train_set and train_set not in self.train_sets:
            known = " or ".join(self.train_sets) or "leave it out"
            raise ValueError(f"--train-set {train_set}: not for {self.name}; {known}")
        if data_dir and not Path(data_dir).is_dir():
            raise FileNotFoundError(f"--data-dir {data_dir}: no such folder")
        if file and split != "test":
            rows = hold_out(read_file(Path(file)), split)
        else:
            rows = list(self.rows(split, data_dir or None, *filter(None, [train_set])))
        problems, why = [], ""
        for i, row in enumerate(rows):
            try:
                problems.append(self.problem(row, f"{split}-{i}"))
            except Unusable as error:
                why = f" ({error})"
        if len(problems) < len(rows):
            left_out = f"{len(rows) - len(problems)} of {len(rows)} rows cannot be judged here"
            warnings.warn(f"{self.name}, {split}: {left_out} and are left out{why}", stacklevel=2)
        if file and split == "train":  # a question that comes twice may be held out
            held = {problem.prompt for problem in self.load("val", file=file)}
            problems = [problem for problem in problems if problem.prompt not in held]
        if not problems:
            few = f"too few usable rows, none is left for {split}{why}"
            raise ValueError(f"{file or self.name}: {few}")
        return problems

    def problem(self, row: dict, name: str = "0") -> Problem:
        """The problem of one row. ValueError names the row and says what one holds."""
        where = getattr(row, "where", "") or f"row {name}"
        try:
            prompt, answer = self.build(row)
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt is {prompt!r:.60}, not a text")
            return Problem(self.name, prompt, answer, f"{self.name}/{row.get('task_id', name)}")
        except Unusable as error:
            raise Unusable(f"{where}: {error}") from None
        except MALFORMED as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            message = f"{where}: {what}; a row of {self.name} holds {self.fields}"
            raise ValueError(message) from error

    def reward(self, completion: str, problem: Problem) -> Reward:
        """What this completion (cut at its first end token) is worth; never raises."""
        return self.judge(completion[-LONGEST:], problem.answer)

    def rewards(self, completions: list[str], problems: list[Problem]) -> list[Reward]:
        """`reward` of each pair; the code tasks run their programs in parallel."""
        pairs = list(zip(completions, problems, strict=True))
        if self.judge_all is None:
            return [self.reward(completion, problem) for completion, problem in pairs]
        return self.judge_all([c[-LONGEST:] for c, _ in pairs], [p.answer for _, p in pairs])


# ---- reading rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A published data set: its file in --data-dir, where the hub has it, and which task_ids."""

    file: str
    hub: str = ""  # id@revision
    config: str = ""
    split: str = ""
    ids: range | None = None
    instead: str = ""  # a file that will do in --data-dir, with a warning


GSM8K = "openai/gsm8k@740312add88f781978c0658806c59bc2815b9866", "main"
MATH = "DigitalLearningGmbH/MATH-lighteval@0530c78699ea5e8eb5530600900e1f328b48acad", "default"
MATH500 = "HuggingFaceH4/MATH-500@6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "default"
HUMANEVAL = "openai/openai_humaneval@7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", "openai_humaneval"
MBPP = "google-research-datasets/mbpp@4bb6404fdc6cacfda99d4ac4205087b89d32030c"
COUNTDOWN_3TO4 = "Jiayi-Pan/Countdown-Tasks-3to4@408f70d177020686d34a56bba5952feb45aaaee4"
KODCODE = "KodCode/KodCode-Light-RL-10K@dcf78a8bbba9a613b596ce993c4921a38687dfcc", "default"
SOURCES = {
    "sudoku_test": Source("sudoku_test.csv"),
    "countdown_train": Source("countdown_train.jsonl", COUNTDOWN_3TO4, "default", "train"),
    "countdown_test": Source("countdown_test.jsonl"),
    "gsm8k_train": Source("gsm8k_train.jsonl", *GSM8K, "train"),
    "gsm8k_test": Source("gsm8k_test.jsonl", *GSM8K, "test"),
    "math_train": Source("math_train.jsonl", *MATH, "train"),
    "math_test": Source("math500.jsonl", *MATH500, "test"),
    "humaneval_test": Source("HumanEval.jsonl.gz", *HUMANEVAL, "test"),
    "mbpp_train": Source("mbpp.jsonl", MBPP, "full", "train", range(601, 975)),
    "mbpp_test": Source(
        "mbpp_sanitized.jsonl", MBPP, "sanitized", "test", range(11, 511), instead="mbpp.jsonl"
    ),
    "kodcode_train": Source("kodcode.jsonl", *KODCODE, "train"),
}


def files(train: str, test: str) -> Callable[..., list[Row]]:
    """The `rows` of a task that trains on one published data set and is tested on another."""

    def rows(split: str, data_dir: str | None, train_set: str = train) -> list[Row]:
        if split == "test":
            return read(f"{test}_test", data_dir)
        return hold_out(read(f"{train_set}_train", data_dir), split)

    return rows


def read(name: str, data_dir: str | None) -> list[Row]:
    """A published data set: its file in data_dir, else the hub's copy."""
    source, rows = SOURCES[name], stored(name, data_dir)
    if not rows:
        from datasets import load_dataset  # takes a second, and most tasks never need it

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our message is enough
        name, _, revision = source.hub.partition("@")
        try:
            found = load_dataset(name, source.config, split=source.split, revision=revision)
        except Exception as error:  # unreachable, gated, cut short: each has its own class
            raise FileNotFoundError(
                f"cannot get {name} from the hub ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}): download its {source.split} split as JSON "
                f"lines and put it into --data-dir as {source.file}"
            ) from error
        rows = [Row(row, f"{name}, row {i}") for i, row in enumerate(found)]
    return [row for row in rows if source.ids is None or row.get("task_id") in source.ids]


def stored(name: str, data_dir: str | None) -> list[Row]:
    """The rows of a published data set's file in data_dir; none where there is no such file."""
    source, folder = SOURCES[name], Path(data_dir or "nowhere")
    file = folder / source.file
    if not file.exists() and source.instead and (folder / source.instead).exists():
        file = folder / source.instead
        warnings.warn(
            f"{name}: no {source.file} in {folder}, all of {file.name} serves", stacklevel=2
        )
    return read_file(file) if data_dir and file.exists() else []


def read_file(path: Path) -> list[Row]:
    """The rows of a .jsonl, .jsonl.gz or .csv file. ValueError names the malformed line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected rows as JSON lines or CSV")
    is_csv, utf8 = path.suffix.lower() == ".csv", "utf-8-sig"  # spreadsheets begin with a mark
    rows, number = [], int(is_csv)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding=utf8) as lines:
            table = csv.DictReader(lines) if is_csv else None
            for row in table or map(parse_line, lines):
                number = table.line_num if table else number + 1
                if row is not None:
                    rows.append(Row(row, f"{path}, line {number}"))
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        expected = "CSV" if is_csv else "a JSON object a line"
        raise ValueError(f"{path}, line {number + 1}: expected {expected} ({error})") from error
    if not rows:
        raise ValueError(f"{path}: no rows; expected {'CSV' if is_csv else 'a JSON object a line'}")
    return rows


def parse_line(line: str) -> dict | None:
    """The JSON object of a line; None for a blank one."""
    row = json.loads(line) if line.strip() else None
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    if not isinstance(row, dict | None):
        raise ValueError(f"found {line.strip()[:40]}")
    return row


def hold_out(rows: list[Row], split: str) -> list[Row]:
    """A fixed random tenth of the training rows, at most 256, is "val"; the rest is "train"."""
    rows = random.Random(0).sample(rows, len(rows))
    n = min(HELD_OUT, max(1, len(rows) // 10))
    return rows[:n] if split == "val" else rows[n:]


def text_of(row: dict, field: str) -> str:
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"{field} must be a text, not {row[field]!r:.60}")
    return row[field]


def texts_of(row: dict, field: str) -> list[str]:
    texts = row[field]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{field} must be a list of at least one text, not {texts!r:.60}")
    return texts


# ---- reading an answer ---------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of the text holds; a box that is never closed runs to the end."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[:i]
    return rest if box else None


def final_answer(completion: str) -> str | None:
    r"""What the last <answer> tag holds, closed or not, out of its \boxed{} if it is in one;
    without a tag, or with nothing in it, the last \boxed{}; without either None."""
    answer = completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if "<answer>" not in completion or not answer:
        return boxed(completion)
    return (boxed(answer) or answer).strip()


def well_formed(completion: str) -> float:
    """The format term of worded problems: 0.1 for a box between <answer> and </answer>."""
    answer, end, _ = completion.rpartition("<answer>")[2].partition("</answer>")
    return 0.1 if "<answer>" in completion and end and boxed(answer) is not None else 0.0


def number(text: str) -> Fraction | None:
    """The first number after the last equals sign, exactly: -3, $1,234.50, .5, 3/4, and as LaTeX
    writes them. None where it is only the beginning of a product, a power (2e6 too) or a root."""
    text = re.sub(r"\\[,!]|[{](?=,})|(?<={,)[}]", "", text).replace("−", "-")
    text = re.sub(r"(?<!\d)\\[dt]?frac{(\d+)}{(\d+)}", r"\1/\2", text)
    digits = r"\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d{1,40}"
    pattern = rf"(-?)\$? ?((?:{digits})(?:\.\d{{1,40}})?|\.\d{{1,40}})(?:/(\d{{1,40}}))?"
    for part in reversed(text.split("=")):
        if re.search(r"\\(times|cdot|sqrt|d?frac)|\^|\de[+-]?\d", part):
            return None
        if found := re.search(pattern, part, re.ASCII):
            sign, above, below = found.groups()
            value = Fraction(sign + above.replace(",", ""))
            return value / int(below) if below and int(below) else value
    return None


# ---- sudoku: 4x4, generated, split by solution ---------------------------------------------------

SUDOKU = (
    "Solve this 4x4 Sudoku: every row, every column and every 2x2 box holds 1, 2, 3 and 4 once. "
    "The 16 cells are written row by row, 0 is an empty cell. "
    "Give the 16 digits of the solved grid between <answer> and </answer>.\nPuzzle: "
)


@cache
def sudoku_grids() -> tuple[str, ...]:
    """All 288 solved 4x4 grids, as strings of 16 digits."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    bands = [a + b for a in rows for b in rows if {*a[:2], *b[:2]} == {*a[2:], *b[2:]} == {*a}]
    pairs = (top + low for top in bands for low in bands)
    return tuple(grid for grid in pairs if all(len({*grid[c::4]}) == 4 for c in range(4)))


@cache
def grids_with() -> dict[tuple[int, str], int]:
    """(cell, digit) -> the grids that have it there, as a bit set; an empty cell allows all."""
    has = {(cell, "0"): (1 << len(sudoku_grids())) - 1 for cell in range(16)}
    for i, grid in enumerate(sudoku_grids()):
        for key in enumerate(grid):
            has[key] = has.get(key, 0) | 1 << i
    return has


def matching(puzzle: Iterable[str]) -> int:
    """The grids that keep the clues, as a bit set."""
    left = -1
    for key in enumerate(puzzle):
        left &= grids_with()[key]
    return left


@lru_cache(maxsize=50_000)
def sudoku_solutions(puzzle: str) -> tuple[str, ...]:
    """Every grid that keeps the clues of a puzzle (16 digits, 0 for an empty cell)."""
    left = matching(puzzle)
    return tuple(grid for i, grid in enumerate(sudoku_grids()) if left >> i & 1)


def sudoku_rows(split: str, data_dir: str | None, fewest: int = 4) -> list[dict]:
    """Puzzles with one solution and `fewest` to 11 empty cells. Of the 288 grids, 200 are for
    training, 44 for validation and 44 for the test, so no split knows another's solutions. A
    sudoku_test.csv in data_dir replaces the test split; of its puzzles most have a solution that
    training knows."""
    if split == "test" and (rows := stored("sudoku_test", data_dir)):
        return rows
    grids = random.Random(0).sample(sudoku_grids(), 288)
    grids = {"train": grids[:200], "val": grids[200:244], "test": grids[244:]}[split]
    n = 4000 if split == "train" else HELD_OUT
    rng, puzzles = random.Random(f"sudoku {split}"), {}
    while len(puzzles) < n:
        grid = grids[len(puzzles) % len(grids)]
        cells, empty = list(grid), rng.randint(fewest, 11)
        for cell in rng.sample(range(16), 16):
            cells[cell] = "0"
            if matching(cells).bit_count() > 1:
                cells[cell] = grid[cell]
            if cells.count("0") == empty:
                break
        if cells.count("0") >= fewest:
            puzzles["".join(cells)] = grid
    return [{"puzzle": puzzle, "solution": grid} for puzzle, grid in puzzles.items()]


def sudoku_build(row: dict) -> tuple[str, dict]:
    row = {str(field).lower(): value for field, value in row.items()}
    puzzle, solution = row.get("puzzle"), str(row.get("solution") or "")
    if not isinstance(puzzle, str) or not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle:
        raise ValueError(f"the puzzle is {puzzle!r:.60}")
    solutions = sudoku_solutions(puzzle)
    if not solutions or solution not in ("", *solutions):
        raise ValueError(f"the puzzle {puzzle} is not solved by {solution or 'any grid'}")
    return SUDOKU + puzzle, {"puzzle": puzzle, "solution": solution or solutions[0]}


def sudoku_judge(completion: str, answer: dict) -> Reward:
    """The share of the empty cells that are right, by the puzzle's solution that fits best. Correct
    are 16 digits that keep the clues and complete every row, column and box."""
    puzzle, digits = answer["puzzle"], re.sub("[^0-9]", "", final_answer(completion) or "")
    empty = [i for i, clue in enumerate(puzzle) if clue == "0"]
    filled = [i for i in empty if i < len(digits)]
    solutions = sudoku_solutions(puzzle)
    share = max(sum(digits[i] == grid[i] for i in filled) for grid in solutions) / len(empty)
    return Reward(share, digits in solutions, cells=share)


# ---- countdown: three numbers, exact arithmetic --------------------------------------------------

COUNTDOWN = (
    "Use each of the given numbers exactly once, with + - * / and parentheses, to make the target. "
    "Give the expression between <answer> and </answer>.\n"
)

OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def calculate(
    text: str, operators: dict[type, Callable] = OPERATORS, kinds: tuple[type, ...] = (int,)
) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of + - * / ( ) and whole numbers, and the numbers in it.

    ValueError for anything else (powers, signs, names, floats, more than 200 characters);
    `operators` (by AST class) and `kinds` of constants can allow more. ZeroDivisionError as usual.
    """
    if len(text) > 200 or not re.fullmatch(r"[0-9+\-*/().\s]+", text):
        raise ValueError("not an arithmetic expression")
    used = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in kinds:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.operand))
        raise ValueError("not an arithmetic expression")

    try:
        return value(ast.parse(text.strip(), mode="eval").body), used
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not an arithmetic expression") from error


@lru_cache(maxsize=100_000)
def countdown_values(numbers: tuple[int, ...]) -> dict[int, str]:
    """What + - * make of the numbers in this order, without brackets: value -> an expression."""
    found = {}
    for signs in itertools.product("+-*", repeat=len(numbers) - 1):
        text = str(numbers[0]) + "".join(f" {sign} {n}" for sign, n in zip(signs, numbers[1:]))
        found.setdefault(int(calculate(text)[0]), text)
    return found


def countdown_rows(split: str, data_dir: str | None, train_set: str = "generated") -> list[dict]:
    """Three numbers and a target. No two splits share them, in any order of the numbers. A
    countdown_test.jsonl in data_dir replaces the test split.

    generated: numbers from 1 to 9, in an order in which + - * alone make the target (1 to 99): a
    search that a small model can learn. published: the common set, with larger numbers."""
    if split == "test" and (rows := stored("countdown_test", data_dir)):
        return rows
    if split != "test" and train_set == "published":
        kept = hold_out(published_countdown(data_dir), split)
        return [row for orders in kept for row in (orders if split == "train" else orders[:1])]
    rng, orders = random.Random("countdown"), {}
    for numbers in itertools.product(range(1, 10), repeat=3):
        for target in countdown_values(numbers):
            if 1 <= target <= 99:
                orders.setdefault((*sorted(numbers), target), []).append(numbers)
    problems = rng.sample(sorted(orders), len(orders))
    held = {"train": slice(2 * HELD_OUT, None), "val": slice(HELD_OUT)}
    rows = []
    for *numbers, target in problems[held.get(split, slice(HELD_OUT, 2 * HELD_OUT))]:
        kept = orders[*numbers, target]
        kept = kept if split == "train" else [rng.choice(kept)]
        for order in kept:
            solution = countdown_values(order)[target]
            rows.append({"numbers": list(order), "target": target, "solution": solution})
    rng.shuffle(rows)
    return rows


@cache
def published_countdown(data_dir: str | None) -> list[list[dict]]:
    """The part of the common training set with three numbers, less what the test split asks; rows
    that differ in the order of their numbers stand together."""

    def key(row: dict) -> tuple[tuple[int, ...], int]:
        answer = TASKS["countdown"].problem(row).answer
        return tuple(sorted(answer["numbers"])), answer["target"]

    asked, orders = {key(row) for row in countdown_rows("test", data_dir)}, {}
    for row in read("countdown_train", data_dir):
        numbers, target = key(row)
        if len(numbers) == 3 and (numbers, target) not in asked:
            orders.setdefault((numbers, target), []).append(row)
    return list(orders.values())


def countdown_build(row: dict) -> tuple[str, dict]:
    if "input" in row:  # the common test file: "30,100,93" and "23"
        numbers, target = [int(n) for n in row["input"].split(",")], int(row["output"])
    else:
        numbers, target = row["nums" if "nums" in row else "numbers"], row["target"]
    whole = isinstance(numbers, list) and all(type(n) is int for n in [*numbers, target])
    if not whole or not 2 <= len(numbers) <= 6:
        raise ValueError(f"numbers are {numbers!r:.60} and target is {target!r:.60}")
    prompt = f"{COUNTDOWN}Numbers: {' '.join(map(str, numbers))}\nTarget: {target}"
    return prompt, {"numbers": numbers, "target": target, "solution": row.get("solution")}


def countdown_judge(completion: str, answer: dict) -> Reward:
    """1 for an expression that makes the target; 0.1 for one that uses the right numbers once each.
    The expression ends at an equals sign, and may use LaTeX's operators and brackets."""
    text = (final_answer(completion) or "").partition("=")[0]
    text = re.sub(r"\\times|\\cdot|×", "*", text)
    text = re.sub(r"\\div|÷", "/", text).replace("−", "-")
    text = re.sub(r"\\left|\\right|\\[()\[\]]|\$", " ", text)
    worth = 0.0
    with contextlib.suppress(ValueError, ZeroDivisionError):
        value, numbers = calculate(" ".join(text.split()))
        if sorted(numbers) == sorted(answer["numbers"]):
            worth = 1.0 if value == answer["target"] else 0.1
    return Reward(worth, worth == 1, expression=worth)


# ---- toycode: small functions described in words -------------------------------------------------

BLOCK = "Answer with the whole program in one ```python block.\n"
TOYCODE = f"{BLOCK}Write a Python function f(a, b) that returns "


def toycode_terms() -> Iterator[tuple[str, str]]:
    """What functions are made of, in words and in Python."""
    for v in "ab":
        yield v, v
        yield f"the square of {v}", f"{v} * {v}"
        yield from ((f"{word} {v}", f"{k} * {v}") for word, k in (("twice", 2), ("three times", 3)))
        yield from ((f"{v} plus {k}", f"{v} + {k}") for k in range(1, 10))
        yield from ((f"{v} minus {k}", f"{v} - {k}") for k in range(1, 10))


@cache
def toycode_functions() -> list[tuple[str, str]]:
    """All functions of the grammar, in words and in Python; of those that agree on nine inputs only
    the first."""
    terms, inputs = list(toycode_terms()), list(itertools.product((-7, 2, 9), (-4, 3, 12)))
    functions = list(terms)
    for (x, x_code), (y, y_code) in itertools.product(terms, repeat=2):
        x_factor, y_factor = (f"({c})" if "+" in c or "-" in c else c for c in (x_code, y_code))
        functions += [
            (f"the sum of {x} and {y}", f"{x_code} + {y_code}"),
            (f"the difference of {x} and {y}", f"{x_code} - {y_factor}"),
            (f"the product of {x} and {y}", f"{x_factor} * {y_factor}"),
            (f"the larger of {x} and {y}", f"max({x_code}, {y_code})"),
            (f"the smaller of {x} and {y}", f"min({x_code}, {y_code})"),
        ]
    distinct = {}
    for words, code in functions:
        of = eval(f"lambda a, b: {code}")  # the grammar's own text, never a model's
        distinct.setdefault(tuple(of(a, b) for a, b in inputs), (words, code))
    return random.Random("toycode").sample(list(distinct.values()), len(distinct))


def toycode_rows(split: str, data_dir: str | None) -> list[dict]:
    """Functions of two numbers and eight hidden tests each. No two splits share a function."""
    part = {"val": slice(HELD_OUT), "test": slice(HELD_OUT, 2 * HELD_OUT)}
    rng, rows = random.Random(f"toycode {split}"), []
    for words, code in toycode_functions()[part.get(split, slice(2 * HELD_OUT, None))]:
        of = eval(f"lambda a, b: {code}")
        inputs = [(rng.randint(-9, 9), rng.randint(-9, 9)) for _ in range(4)]
        low, high = -rng.randint(10, 20), rng.randint(10, 20)  # to reach both arms of max and min
        inputs += [(low, high), (high, low), (0, high), (high, 1)]
        tests = [f"assert f({a}, {b}) == {of(a, b)}" for a, b in inputs]
        rows.append({"text": words, "code": f"def f(a, b):\n    return {code}", "tests": tests})
    return rows


def toycode_build(row: dict) -> tuple[str, dict]:
    code, tests = text_of(row, "code"), texts_of(row, "tests")
    job = {"names": defined(code), "before": "", "setup": "", "tests": tests}
    return f"{TOYCODE}{text_of(row, 'text')}.", {"code": code, "job": job}


# ---- gsm8k and math: worded problems -------------------------------------------------------------

WORDED = (
    "Solve this problem. Reason step by step between <reasoning> and </reasoning>, then give the "
    "final answer in \\boxed{} between <answer> and </answer>.\nProblem: "
)


def gsm8k_build(row: dict) -> tuple[str, Fraction]:
    plain = isinstance(row["answer"], str | int | float)
    gold = number(str(row["answer"]).rpartition("####")[2]) if plain else None
    if gold is None:
        raise ValueError(f"no number in the answer {str(row['answer'])[-40:]!r}")
    return WORDED + text_of(row, "question"), gold


def gsm8k_judge(completion: str, answer: Fraction | None) -> Reward:
    """The number of the final answer; without a tag and a box, the last number of the text."""
    found = final_answer(completion)
    if found is None:
        numbers = re.findall(r"-?\$?\.?\d[\d,.]{0,40}", completion, re.ASCII)
        found = numbers[-1].rstrip(".,") if numbers else ""
    value, form = number(found), well_formed(completion)
    correct = value is not None and value == answer
    return Reward(correct + form, correct, correct=float(correct), format=form)


def math_build(row: dict) -> tuple[str, str]:
    told = row.get("answer")
    gold = boxed(text_of(row, "solution")) if told is None else str(told)
    if not gold or not gold.strip():
        raise ValueError("neither a field answer nor a \\boxed{} in the solution")
    return WORDED + text_of(row, "problem" if "problem" in row else "question"), gold


def math_judge(completion: str, answer: str) -> Reward:
    """The final answer against the gold one: the same text once normalised, or equal as algebra."""
    found, form = final_answer(completion), well_formed(completion)
    correct = found is not None and same_math(found, answer)
    return Reward(correct + form, correct, correct=float(correct), format=form)


NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,40})(?:\.\d{1,30})?", re.ASCII)
HOPELESS = re.compile(  # would take for ever to work out, or is no answer
    r"\^\s*(?:\{[^{}]*|[\w.(]+)\s*\^|\^[\s{(+-]*\d{4}|[)}]\s*\^[\s{(+-]*\d{3}"  # towers of powers
    r"|\d{3}\s*[)}]*\s*!|!\s*!"  # large factorials
    r"|\\(?:sum|prod|int|lim|boxed)|[-+*/]{4}|[({[]{6}|[^ -~\s]|[`#@\"]|<\W"  # not answers
)


def tidy(latex: str) -> str:
    r"""Without what only changes how LaTeX looks: spaces, \left and \right, sizes of fractions. A
    space between two digits stays: 1 1/2 is not 11/2."""
    text = " ".join(latex.split())
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[!,]|(?<!\d) | (?!\d)", "", text)
    return re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)


@lru_cache(maxsize=100_000)
def same_math(found: str, gold: str) -> bool:
    """Whether two LaTeX answers are equal: as text, as numbers, or as algebra; that is not tried on
    sentences, on more than 200 characters, or where it would take for ever."""
    tidy_found, tidy_gold = tidy(found), tidy(gold)
    if tidy_found == tidy_gold:
        return True
    listed = ", " in found + gold
    if NUMBER.fullmatch(tidy_found) and NUMBER.fullmatch(tidy_gold) and not listed:
        return number(tidy_found) == number(tidy_gold)
    if len(found) > 200 or found.count("{") != found.count("}") or not re.search(r"\w", found):
        return False
    letters = re.sub(r"\\(?:text\w*|mbox|begin|end)\s*{[^{}]*}|\\[a-z]+|[^a-zA-Z]", "", found)
    is_sentence = len(letters) > 12
    if is_sentence or HOPELESS.search(found.replace("**", "^")):
        return False
    return algebra().same(found, gold)


class Algebra:
    """math-verify in a process of its own: the signal that limits its time works in a main thread
    only, and some comparisons end only when their process is killed."""

    cpu_s, wall_s = 0.5, 5.0  # limits of one comparison; the second is the backstop

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--serve-algebra"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError("math-verify does not start; is it installed?")

    def same(self, found: str, gold: str) -> bool:
        with self.lock:
            try:
                self.process.stdin.write(json.dumps([found, gold]).encode() + b"\n")
                self.process.stdin.flush()
                if select.select([self.process.stdout], [], [], self.wall_s)[0]:
                    if reply := self.process.stdout.readline():
                        return reply == b"1\n"
            except BrokenPipeError:
                pass
            self.close()
            self.start()
            return False

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()  # reaps it and closes its pipes

    @staticmethod
    def serve() -> None:
        """The other side: a line of JSON in, 1 or 0 out."""
        from math_verify import parse, verify

        class OutOfTime(BaseException):
            """Not an Exception, so that no handler inside sympy swallows it."""

        def stop(*_: object) -> None:
            raise OutOfTime

        @lru_cache(maxsize=10_000)
        def parsed(text: str) -> list:
            return parse(f"\\boxed{{{text}}}", parsing_timeout=None)

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.signal(signal.SIGVTALRM, stop)
        verify(parsed("\\frac{1}{2}"), parsed("(0, 0.5]"), timeout_seconds=None)  # warm up
        print("ready", flush=True)
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


@cache
def algebra() -> Algebra:
    """This process's server, started when the first two answers are compared."""
    server = Algebra()
    atexit.register(server.close)
    return server


# ---- humaneval, mbpp, kodcode: programs, judged by the sandbox -----------------------------------

PYTEST = """
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
    def __init__(self, value, rel=None, abs=None):
        self.value, self.given = value, (rel, abs)
    def __eq__(self, other):
        value, (rel, least) = self.value, self.given
        if isinstance(value, (list, tuple, dict)):
            keys = value if isinstance(value, dict) else range(len(value))
            near = (approx(value[key], rel, least) == other[key] for key in keys)
            return len(value) == len(other) and all(near)
        if isinstance(value, str) or value is None or value in (float("inf"), -float("inf")):
            return other == value
        rel = 1e-6 * (least is None) if rel is None else rel  # an abs alone counts alone
        return abs(other - value) <= max(rel * abs(value), 1e-12 if least is None else least)
class mark:
    def __getattr__(self, name):
        return self
    def __call__(self, *given, **more):
        return given[0] if given and callable(given[0]) else self
sys.modules["pytest"] = types.ModuleType("pytest")
vars(sys.modules["pytest"]).update(raises=raises, approx=approx, mark=mark(), fixture=mark())
"""  # the part of pytest that KodCode's tests use, and decorators of what only stands beside them


def parse(code: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # odd escapes in a program's strings
        return ast.parse(code)


def defined(code: str) -> list[str]:
    """The names that a program defines at top level."""
    names = []
    for node in parse(code).body:
        for target in node.targets if isinstance(node, ast.Assign) else [node]:
            names.append(getattr(target, "name", getattr(target, "id", None)))
    return [name for name in dict.fromkeys(names) if name]


def imported(code: str) -> set[str]:
    """The modules that a program imports, without their submodules."""
    modules = set()
    for node in ast.walk(parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    return modules


def sandbox_job(code: str, setup: str, tests: list[str]) -> dict:
    """A job for the sandbox. `names`: what the reference defines and the tests use, or all of it if
    they import the `solution` whole; `before`: the reference's imports."""
    tree, tests_tree = parse(code), parse("\n".join([setup, *tests]))
    used = {getattr(node, "id", getattr(node, "name", None)) for node in ast.walk(tests_tree)}
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    whole = any(isinstance(n, ast.Import) and "solution" in ast.unparse(n) for n in tests_tree.body)
    names = [name for name in defined(code) if whole or name in used]
    return {"names": names, "before": "\n".join(imports), "setup": setup, "tests": tests}


def code_build(row: dict) -> tuple[str, dict]:
    """A row of HumanEval, MBPP or KodCode, told apart by its fields, as a prompt and a job."""
    if "entry_point" in row:
        return humaneval_build(row)
    return mbpp_build(row) if "test_list" in row else kodcode_build(row)


def humaneval_build(row: dict) -> tuple[str, dict]:
    """Each assert of check(candidate) is a test; where it does more than assert, all of it is one.
    Helpers in the prompt run in the judge, never as the program redefines them."""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    stub = next((n for n in parse(prompt).body if getattr(n, "name", "") == entry), None)
    tree = parse(text_of(row, "test")).body
    check = next((node for node in tree if getattr(node, "name", "") == "check"), None)
    if not stub or not check:
        raise ValueError(f"no function {entry} in the prompt, or no check(candidate) in the test")
    tests = [test for node in check.body if "candidate" in (test := ast.unparse(node))]
    if not tests or not all(isinstance(node, ast.Assert) for node in check.body):
        tests = [f"{ast.unparse(check)}\ncheck(candidate)"]
    before = "\n".join(prompt.splitlines()[: stub.lineno - 1]) + "\n"
    setup = [ast.unparse(node) for node in tree if node is not check] + [f"candidate = {entry}"]
    job = {"names": [entry], "before": before, "setup": "\n".join(setup), "tests": tests}
    code = prompt + text_of(row, "canonical_solution")
    ask = f"{BLOCK}Complete this Python function:\n{prompt}"
    return ask, {"code": code, "job": job, "prompt": prompt, "entry": entry}


def mbpp_build(row: dict) -> tuple[str, dict]:
    """A row of the full set, or of the sanitized one, which has other names for two fields."""
    text = text_of(row, "prompt" if "prompt" in row else "text")
    tests, code, imports = texts_of(row, "test_list"), text_of(row, "code"), row.get("test_imports")
    imports = [imports] if isinstance(imports, str) else imports
    job = sandbox_job(code, "\n".join(imports or [row.get("test_setup_code") or ""]), tests)
    listed = "\n".join(tests)
    return f"{BLOCK}{text}\nIt must pass these tests:\n{listed}", {"code": code, "job": job}


def kodcode_build(row: dict) -> tuple[str, dict]:
    """Each test function of the row's pytest file is a test, except for those with arguments or
    decorators, which need pytest itself. Unusable without any, or if a module is not Python's."""
    code, test, tests, setup = text_of(row, "solution"), text_of(row, "test"), [], []
    for node in parse(test).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
            setup.append(ast.unparse(node))
        elif not node.args.args and not node.decorator_list:
            tests.append(f"{ast.unparse(node)}\n{node.name}()")
    if not tests or imported(f"{code}\n{test}") - sys.stdlib_module_names - {"pytest", "solution"}:
        raise Unusable("no test is left, or a module is not Python's own")
    job = sandbox_job(code, "\n".join(setup), tests)
    job["setup"] = (PYTEST if "pytest" in test else "") + job["setup"]
    declared = [info["function_declaration"] for info in row.get("test_info") or []]
    return BLOCK + "\n".join([text_of(row, "question"), *declared]), {"code": code, "job": job}


def code_block(completion: str) -> str | None:
    """The last ```python (or bare ```) block, closed or not, preferably one that has a `def`."""
    blocks = []
    for fenced in completion.split("```")[1::2]:
        language, newline, code = fenced.partition("\n")
        if newline and language.strip() in ("", "python", "python3", "py"):
            blocks.append(code)
    return ([code for code in blocks if "def " in code] or blocks or [None])[-1]


def program(completion: str, answer: dict) -> str | None:
    """The program of a completion; None if it does not parse or lacks a name that the tests use.
    For HumanEval the prompt goes first: all of it if only the body was written, else what stands
    above the function."""
    code = code_block(completion)
    code = completion if code is None else code
    if "entry" in answer:
        indented = code.strip() and code.lstrip("\r\n")[:1] in (" ", "\t")
        only_body = indented and f"def {answer['entry']}" not in code
        code = (answer["prompt"] if only_body else answer["job"]["before"]) + code
    try:
        tree = parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    names = {getattr(node, "name", getattr(node, "id", None)) for node in ast.walk(tree)}
    return code if names.issuperset(answer["job"]["names"]) else None


def code_judge_all(completions: list[str], answers: list[dict]) -> list[Reward]:
    """The share of tests passed, and 0.1 for a closed block. What does not parse is not run, and
    the same program for the same problem runs only once."""
    runs = [(program(c, answer), id(answer)) for c, answer in zip(completions, answers)]
    jobs = {run: {"code": run[0], **a["job"]} for run, a in zip(runs, answers) if run[0]}
    verdicts = dict(zip(jobs, sandbox().run(jobs.values()))) if jobs else {}
    rewards = []
    for completion, run in zip(completions, runs):
        ok = verdicts[run]["ok"] if run in verdicts else [False]
        closed = completion.count("```") % 2 == 0 and code_block(completion) is not None
        share, form = sum(ok) / len(ok), 0.1 if closed else 0.0
        rewards.append(Reward(share + form, all(ok), tests=share, format=form))
    return rewards


def code_judge(completion: str, answer: dict) -> Reward:
    return code_judge_all([completion], [answer])[0]


def cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many this process may use: by its affinity, and by the quotas of its control groups."""
    affine = hasattr(os, "sched_getaffinity")
    most = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    lines = own.read_text().splitlines() if own.exists() else []
    inside = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    for folder in (groups / inside, *(groups / inside).parents):
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
            most = min(most, most if quota == "max" else max(1, int(quota) // int(period)))
    return most


started: Sandbox | None = None


def sandbox(unsafe: bool = False) -> Sandbox:
    """This process's sandbox. The first call starts it, and its `unsafe` decides whether to run
    where the locks are missing (ValueError if not); later calls return the same one regardless."""
    global started
    if started is None:
        workers = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        started = Sandbox(workers=min(max(workers, 1), 16), unsafe=unsafe)
        atexit.register(started.close)
    return started


# ---- the tasks -----------------------------------------------------------------------------------

CODE = (
    "text, code and test_list (as MBPP), question, solution and test (as KodCode) or prompt, "
    "entry_point, canonical_solution and test (as HumanEval)"
)
PROGRAMS = {"judge": code_judge, "judge_all": code_judge_all, "runs_code": True}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sudoku", sudoku_rows, sudoku_build, sudoku_judge, asks=SUDOKU,
             fields="puzzle (16 digits, 0 for an empty cell) and, if you like, solution"),
        Task("countdown", countdown_rows, countdown_build, countdown_judge, asks=COUNTDOWN,
             fields="numbers (a list of 2 to 6 whole numbers) and target (a whole number)",
             train_sets=("generated", "published")),
        Task("toycode", toycode_rows, toycode_build, **PROGRAMS, asks=BLOCK,
             fields="text (what follows: a function f(a, b) that returns), code and tests"),
        Task("gsm8k", files("gsm8k", "gsm8k"), gsm8k_build, gsm8k_judge, asks=WORDED,
             fields="question and answer (a number, or a text that ends in #### and a number)"),
        Task("math", files("math", "math"), math_build, math_judge, asks=WORDED,
             fields="problem and answer (LaTeX), or problem and solution (with a \\boxed{})"),
        Task("humaneval", files("kodcode", "humaneval"), code_build, **PROGRAMS, asks=BLOCK,
             fields=CODE, train_sets=("kodcode", "mbpp")),
        Task("mbpp", files("kodcode", "mbpp"), code_build, **PROGRAMS, asks=BLOCK,
             fields=CODE, train_sets=("kodcode", "mbpp")),
    )
}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve-algebra"]:
        Algebra.serve()
    else:
        import score  # which imports `data`: as a script, this file is not that module

        score.main()
