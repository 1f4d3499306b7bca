"""Where do the published scorer and ours differ, and why?

    python bench/scoring.py DIR > bench/scoring.md

DIR holds raw outputs of a model (rows of question, completion, answer) as gsm8k*.jsonl,
math*.jsonl, countdown*.jsonl and sudoku*.jsonl. Writes one Markdown table: the differing items by
cause.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import score

HEAD = "| outputs | published rules | ours | differing | counted by | cause |\n" + "|---" * 6 + "|"


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
    return "the first box is taken, the last is right"


def digits_only(text: str) -> str:
    digits = "".join(c for c in data.final_answer(text) or "" if c.isdigit())
    return f"<answer>{digits}</answer>"


def compare(task: str, path: Path) -> None:
    completions, problems = score.read_outputs(task, path)
    texts = [score.END.split(completion)[0] for completion in completions]
    ours = data.TASKS[task].rewards(texts, problems)
    published = [score.PUBLISHED[task](c, p.answer) for c, p in zip(completions, problems)]
    if task == "sudoku":  # counts cells
        empty = [problem.answer["puzzle"].count("0") for problem in problems]
        ours, published = ([round(r * n) for r, n in zip(rs, empty)] for rs in (ours, published))
        total = f"{sum(empty)} cells"
    else:
        ours, published = ([r.correct for r in rewards] for rewards in (ours, published))
        total = f"{len(problems)}"
    causes = Counter(
        ("ours" if a > b else "published", cause(task, text, problem.answer, a > b))
        for text, problem, a, b in zip(texts, problems, ours, published)
        if a != b
    )
    for i, ((who, why), n) in enumerate(causes.most_common()):
        left = f"{path.stem} | {sum(published)}/{total} | {sum(ours)}" if i == 0 else " | | "
        print(f"| {left} | {n} | {who} | {why} |")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(HEAD)
    for task in score.PUBLISHED:
        for path in sorted(Path(sys.argv[1]).glob(f"{task}*.jsonl")):
            compare(task, path)


if __name__ == "__main__":
    main()
