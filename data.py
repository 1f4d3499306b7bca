"""Where do problems come from, and what is an answer worth?

A task is three functions: `rows` yields plain dicts (generated, or read from a file), `build` turns a
row into a prompt and the answer that its reward needs, `judge` scores one completion against it.
`TASKS` maps the names to the tasks. Sudoku, countdown and toycode are generated here from fixed seeds.

Every reward is total: any string in, a finite number out, in bounded time.
"""

import ast
import itertools
import math
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Callable, Iterable, Iterator

Row = dict[str, Any]
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
    """The number trained on, with `.correct` (what accuracy counts) and `.parts` (they add up to it)."""

    correct: bool
    parts: dict[str, float]

    def __new__(cls, value: float, correct: bool = False, **parts: float) -> "Reward":
        if not math.isfinite(value):
            raise ValueError(f"a reward must be a finite number, not {value}")
        reward = super().__new__(cls, value)
        reward.correct = bool(correct)
        reward.parts = parts or {"reward": float(value)}
        return reward


@dataclass(frozen=True)
class Task:
    """`rows(split)` -> dicts; `build(row)` -> (prompt, answer); `judge(completion, answer)` -> Reward."""

    name: str
    rows: Callable[[str], Iterable[Row]]
    build: Callable[[Row], tuple[str, Any]]
    judge: Callable[[str, Any], Reward]

    def load(self, split: str, data_dir: str | None = None) -> list[Problem]:
        """The problems of "train", "val" or "test", always the same ones in the same order."""
        if split not in ("train", "val", "test"):
            raise ValueError(f'split is "train", "val" or "test", not {split!r}')
        return [
            Problem(self.name, *self.build(row), f"{self.name}/{split}/{i}")
            for i, row in enumerate(self.rows(split))
        ]

    def reward(self, completion: str, problem: Problem) -> Reward:
        """What this completion (cut at its first end token) is worth; never raises."""
        return self.judge(completion[-LONGEST:], problem.answer)

    def rewards(self, completions: list[str], problems: list[Problem]) -> list[Reward]:
        """`reward` of each pair; identical pairs are judged once."""
        judged = {}
        for completion, problem in zip(completions, problems, strict=True):
            if (completion, problem.id) not in judged:
                judged[completion, problem.id] = self.reward(completion, problem)
        return [judged[c, p.id] for c, p in zip(completions, problems)]


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


def tagged(text: str) -> str | None:
    """What the last <answer> tag holds, closed or not, out of its \\boxed{}; None without a tag."""
    _, tag, answer = text.rpartition("<answer>")
    if not tag:
        return None
    answer = answer.partition("</answer>")[0]
    inner = boxed(answer)
    return (answer if inner is None else inner).strip()


def code_block(text: str) -> str | None:
    """The last ```python (or bare ```) block, closed or not; None without a fence."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return blocks[-1] if blocks else None


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


def sudoku_rows(split: str) -> list[Row]:
    """Puzzles with one solution and 4 to 11 empty cells. 200 of the 288 grids make the training
    puzzles, 44 the validation and 44 the test puzzles, so no split knows another's solutions."""
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


def sudoku_build(row: Row) -> tuple[str, Row]:
    return SUDOKU + row["puzzle"], {"puzzle": row["puzzle"], "solution": row["solution"]}


def sudoku_judge(completion: str, answer: Row) -> Reward:
    """The share of the empty cells that are right, for the best of the puzzle's solutions; correct:
    16 digits that keep the clues and complete every row, column and box."""
    puzzle, text = answer["puzzle"], tagged(completion)
    if text is None:
        text = boxed(completion) or ""
    digits = re.sub("[^0-9]", "", text)
    empty = [i for i, clue in enumerate(puzzle) if clue == "0" and i < len(digits)]
    solutions = sudoku_solutions(puzzle)
    right = max(sum(digits[i] == grid[i] for i in empty) for grid in solutions)
    share = right / puzzle.count("0")
    return Reward(share, correct=digits in solutions, cells=share)


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


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of + - * / ( ) and whole numbers, and the numbers it uses.

    Raises ValueError for anything else (powers, signs, names, floats, more than 200 characters)
    and ZeroDivisionError. Nothing is ever handed to eval.
    """
    if len(text) > 200 or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        raise ValueError("not an arithmetic expression")
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
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


def countdown_rows(split: str) -> list[Row]:
    """Three numbers of 1 to 9 and a target of 1 to 50 that they make. Splits share no (numbers,
    target), whatever the order of the numbers; training shows every order."""
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


def countdown_build(row: Row) -> tuple[str, Row]:
    numbers, target = row["numbers"], row["target"]
    solution = next(iter(countdown_solutions(numbers, target)), None)
    prompt = f"{COUNTDOWN}\nNumbers: {' '.join(map(str, numbers))}\nTarget: {target}"
    return prompt, {"numbers": numbers, "target": target, "solution": solution}


def countdown_judge(completion: str, answer: Row) -> Reward:
    """1 for an expression that makes the target; 0.1 for one that uses the right numbers once each."""
    text = tagged(completion)
    if text is None:
        text = boxed(completion) or ""
    for latex, plain in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""),
                         ("\\right", ""), ("×", "*"), ("÷", "/"), ("−", "-")):  # fmt: skip
        text = text.replace(latex, plain)
    text = " ".join(re.sub(r"\\[()\[\]]|\$", " ", text).partition("=")[0].split())
    try:
        value, used = evaluate(text)
    except (ValueError, ZeroDivisionError):
        return Reward(0.0, expression=0.0)
    if sorted(used) != sorted(answer["numbers"]):
        return Reward(0.0, expression=0.0)
    correct = value == answer["target"]
    return Reward(1.0 if correct else 0.1, correct=correct, expression=1.0 if correct else 0.1)


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


def toycode_rows(split: str) -> list[Row]:
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


def toycode_build(row: Row) -> tuple[str, Row]:
    return TOYCODE + row["text"] + ".", {"code": row["code"], "tests": row["tests"]}


def toycode_judge(completion: str, answer: Row) -> Reward:
    """The share of hidden tests passed, and 0.1 for a block; correct: all tests passed."""
    code = code_block(completion)
    share = _share_passed(code or "", answer["tests"])
    form = 0.0 if code is None else 0.1
    return Reward(share + form, correct=share == 1, tests=share, format=form)


def _share_passed(code: str, tests: list[str]) -> float:
    """Interim, until the sandbox: `def f(a, b): return <expression>` by substitution."""
    match = re.fullmatch(r"\s*def f\(a, b\):\s*return ([^\n]{1,60})\s*", code)
    passed = 0
    for test in tests if match else []:
        a, b, want = re.fullmatch(r"assert f\((-?\d+), (-?\d+)\) == (-?\d+)", test).groups()
        try:
            text = re.sub(r"\b[ab]\b", lambda m: f"(0 + {a})" if m[0] == "a" else f"(0 + {b})", match[1])
            passed += _minmax(text.replace("+ -", "- ")) == int(want)
        except (ValueError, ZeroDivisionError):
            pass
    return passed / len(tests)


def _minmax(text: str) -> Fraction:
    for name, pick in (("max", max), ("min", min)):
        if text.startswith(f"{name}(") and text.endswith(")"):
            left, comma, right = text[4:-1].partition(",")
            if comma:
                return pick(evaluate(left)[0], evaluate(right)[0])
    return evaluate(text)[0]


# ---- the tasks --------------------------------------------------------------------------------------

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sudoku", sudoku_rows, sudoku_build, sudoku_judge),
        Task("countdown", countdown_rows, countdown_build, countdown_judge),
        Task("toycode", toycode_rows, toycode_build, toycode_judge),
    )
}
