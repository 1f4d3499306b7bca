"""What people copy runs: the loop, a task of one's own, a model of one's own from start to end."""

import json
import sys

from processes import REPO, run
from toy import autoregressive, toy_model

sys.path.insert(0, str(REPO / "examples"))
sys.path.append(str(REPO / "bench"))
import loop
import real
import words


def test_the_loop_to_copy_starts_at_its_reference_and_earns_more(capsys):
    loop.main(steps=2)
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first[:2] == ["step", "0"] and first[-2:] == ["kl", "0.000"]
    assert float(second[3]) > float(first[3]) and float(second[-1]) > 0


def test_a_task_of_ones_own_trains_under_its_name(tmp_path):
    words = "--task backwards --C 12 --T 6 --block 12 --K 2 --B 1 --G 2 --steps 1 --no-compile"
    model = toy_model(tmp_path / "toy")
    words = ["--model", model, *words.split(), "--out", tmp_path / "run"]
    done = run(*words, script=REPO / "examples" / "backwards.py")
    assert done.returncode == 0, done.stderr
    assert "backwards with" in done.stdout and "step    1/1" in done.stdout


# ---- bench/real.py -------------------------------------------------------------------------------


def test_word_problems_held_out_share_no_name_and_no_sum_with_training():
    told = {split: words.rows(split) for split in words.SIZES}
    assert told == {split: words.rows(split) for split in words.SIZES}
    sums = {split: {(row["start"], row["change"]) for row in rows} for split, rows in told.items()}
    names = {split: set(names.split()) for split, names in words.NAMES.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not sums[one] & sums[other] and not names[one] & names[other]
    for split, rows in told.items():
        assert len({row["question"] for row in rows}) == words.SIZES[split]
        problems = words.data.TASKS["words"].load(split)
        for row, problem in zip(rows, problems):
            assert any(name in problem.prompt for name in names[split])
            reward = words.judge(words.answered(row), problem.answer)
            assert reward.correct and reward == 1.1 and problem.answer >= 0
            assert words.judge(f"1+{problem.answer}", problem.answer) == 0.1
            assert words.judge(str(problem.answer), problem.answer) == 0


def test_demonstrations_of_word_problems_are_right_but_where_a_lazy_one_adds_what_was_lost():
    problems, rows = words.data.TASKS["words"].load("train"), words.rows("train")
    for i, shown in enumerate(words.demonstrated(50)):
        assert shown["prompt"] == problems[i].prompt
        lazy = rows[i]["change"] < 0 and i % 5 < 3
        reward = words.judge(shown["completion"], problems[i].answer)
        assert (reward, reward.correct) == ((0.1, False) if lazy else (1.1, True))


def test_a_model_of_ones_own_goes_from_autoregressive_to_rl_and_no_stage_is_repeated(
    tmp_path, monkeypatch, capsys
):
    autoregressive(tmp_path / "runs" / "base", eos_token_id=256)
    called = []

    def call(script, *words):
        called.append(words[words.index("--out") + 1].name.rpartition("-")[0])
        done = run(*words, script=REPO / script)
        if done.returncode:
            raise SystemExit(done.stderr)

    monkeypatch.setattr(real, "call", call)
    monkeypatch.setattr(real, "NEEDED", ())
    flags = [
        "--rows", "8", "--runs", str(tmp_path / "runs"), "--record", str(tmp_path / "real.jsonl"),
        "--adapt", "--steps 2 --batch 4 --C 32 --no-compile",
        "--rl", "--steps 1 --B 1 --G 2 --micro 2 --eval-n 2 --no-compile",
    ]  # fmt: skip
    for seeds in (["0"], ["0"], ["0", "1"]):
        monkeypatch.setattr(sys, "argv", ["real.py", *flags, "--seeds", *seeds])
        assert real.main() == 0
    assert called == ["adapt", "before", "rl-0", "rl-1"]
    rows = [json.loads(line) for line in (tmp_path / "real.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["adapt", "before", "rl", "rl"]
    table = (tmp_path / "real.md").read_text()
    assert table.count("\n| 0 | ") == table.count("\n| 1 | ") == 1 and "Mean gain" in table
    assert "--steps 2 " in table and real.ADAPT.partition(" --batch")[0] not in table
    assert capsys.readouterr().out.endswith(table)


def test_what_the_real_model_needs_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(real, "NEEDED", ("no_such_package",))
    monkeypatch.setattr(sys, "argv", ["real.py"])
    assert real.main() == 2
    told = capsys.readouterr().err
    assert told.startswith("real: no_such_package not found: pip install") and told.count("\n") == 1
