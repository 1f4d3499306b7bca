"""Where do the published scorer and ours differ, and why?

    python bench/scoring.py DIR > bench/scoring.md

DIR holds raw outputs of a model (rows of question, completion, answer) as gsm8k*.jsonl,
math*.jsonl, countdown*.jsonl and sudoku*.jsonl. Writes one Markdown table: the differing items by
cause. Exits 1 if the published rules do not count what was published for d1's outputs of the base
model at length 256.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import score

HEAD = "| outputs | published rules | ours | differing | counted by | cause |\n" + "|---" * 6 + "|"
BASE = {"gsm8k_256": (863, 1130), "math500_256": (162, 500), "countdown_256": (50, 256),
        "sudoku_256": (137, 2048)}  # fmt: skip


def cause(task: str, text: str, answer: Any, ours_more: bool) -> str:
    """Why one output, cut at its end token, is worth more to one scorer than to the other."""
    if task == "sudoku" and not ours_more:
        return "digits outside the <answer> tag are taken"
    if task == "sudoku":
        bare = score.published_sudoku(digits_only(text), answer)
        signs = bare > score.published_sudoku(text, answer)
        return "signs between the digits shift them" if signs else "another solution fits better"
    if task == "countdown":
        return "an expression before the final answer is taken"
    if not ours_more:
        return "an earlier number is right, the final one is not"
    if score.published_box(text + "<|eot_id|>") is None or "\\boxed{" not in text:
        return "the final answer stands in no box, or in one that never closes"
    if task == "math":
        return "equal as algebra or as a number, written differently"
    if "," in (data.final_answer(text) or ""):
        return "a number is cut at its thousands comma"
    if "\n" in (data.boxed(text) or ""):
        return "a box with a line break in it is not seen"
    return "the first box is taken, the last is right"


def digits_only(text: str) -> str:
    digits = "".join(c for c in data.final_answer(text) or "" if c.isdigit())
    return f"<answer>{digits}</answer>"


def compare(task: str, path: Path) -> tuple[int, int]:
    """Print the rows of one file; what the published rules count, and out of how many."""
    completions, problems = score.read_outputs(task, path)
    texts = [score.END.split(completion)[0] for completion in completions]
    ours = data.TASKS[task].rewards(texts, problems)
    published = [score.PUBLISHED[task](c, p.answer) for c, p in zip(completions, problems)]
    if task == "sudoku":  # counts cells
        empty = [problem.answer["puzzle"].count("0") for problem in problems]
        ours, published = ([round(r * n) for r, n in zip(rs, empty)] for rs in (ours, published))
        total, unit = sum(empty), " cells"
    else:
        ours, published = ([r.correct for r in rewards] for rewards in (ours, published))
        total, unit = len(problems), ""
    causes = Counter(
        ("ours" if a > b else "published", cause(task, text, problem.answer, a > b))
        for text, problem, a, b in zip(texts, problems, ours, published)
        if a != b
    )
    counts = f"{path.stem} | {sum(published)}/{total}{unit} | {sum(ours)}"
    for i, ((who, why), n) in enumerate(causes.most_common()):
        print(f"| {' | | ' if i else counts} | {n} | {who} | {why} |")
    return sum(published), total


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    wrong = 0
    print(HEAD)
    for task in score.PUBLISHED:
        for path in sorted(Path(sys.argv[1]).glob(f"{task}*.jsonl")):
            counted, total = compare(task, path)
            published, whole = BASE.get(path.stem, (0, 0))
            if total == whole and counted != published:
                print(f"{path.name}: {counted}/{total}, published: {published}", file=sys.stderr)
                wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
