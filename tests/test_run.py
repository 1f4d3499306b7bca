"""Whole runs as a user starts them: real processes, real signals, real torchrun."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

import config
import egspo
import model
import plan
import run as running
from events import History
from events import read as finished
from processes import (
    LETTERS,
    REPO,
    SMALL,
    Forked,
    command,
    environment,
    events,
    run,
    same,
    train,
    trainer,
    weights,
)  # fmt: skip
from toy import toy_model

FIXTURES = REPO / "tests" / "fixtures"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Path:
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(toy, out, "--steps", 6)
    return out


# ---- the run folder ------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_the_monitor_and_a_reader_need(whole, toy):
    cfg = json.loads((whole / "config.json").read_text())
    assert cfg["steps"] == 6 and cfg["P"] > 0 and cfg["task"] == "letters"
    assert (whole / "source" / "egspo.py").read_text() == (REPO / "egspo.py").read_text()
    assert (whole / "source" / "letters.py").read_text() == LETTERS.read_text(), "its own task"
    assert "torch" in (whole / "source" / "env.txt").read_text()
    assert (whole / "checkpoints" / "latest").resolve().name == "step-6"
    assert not same(weights(whole), load_file(toy / "model.safetensors"))
    own = config.of_model(str(whole))  # what its checkpoint says of itself
    assert (own.task, own.C, own.T, own.block, own.B, own.G, own.K) == (
        "letters",
        12,
        6,
        12,
        2,
        2,
        2,
    )
    log = events(whole)
    assert [event["q"] for event in log] == list(range(len(log)))
    assert all(list(event)[:3] == ["e", "q", "ts"] for event in log)
    kinds = [event["e"] for event in log]
    assert kinds[0] == "meta" and kinds[-1] == "end" and log[-1]["status"] == "finished"
    evals = [(event["it"], event["split"]) for event in log if event["e"] == "eval"]
    assert evals == [(0, "val"), (4, "val"), (6, "val"), (6, "test")]
    assert [event["it"] for event in log if event["e"] == "ckpt"] == [2, 4, 6]
    steps = [event for event in log if event["e"] == "step"]
    assert [event["it"] for event in steps] == list(range(6))
    wanted = "reward/mean reward/std loss kl clip_frac clip_hi clip_lo ratio/mean ratio/max " \
        "adv/abs grad_norm lr entropy/mean entropy/sel zero_adv_frac len/mean len/max trunc_frac " \
        "tok_s t/rollout t/score t/logp t/update t/total eta_s"  # fmt: skip
    for event in steps:
        assert set(wanted.split()) <= event["m"].keys()
        assert len(event["ent"]) == 6 and sum(event["sel"]) == event["n"] * 2
    for event in (event for event in log if event["e"] == "eval"):
        assert event["m"]["lo"] <= event["m"]["accuracy"] <= event["m"]["hi"]
        assert event["n"] == 4
    for event in (event for event in log if event["e"] == "sample"):
        assert sorted(set(event["rev"])) == list(range(6)) and len(event["tok"]) == 12
        assert (
            len(event["sel"]) == len(event["adv"]) == len(event["ratio"]) == len(event["srw"]) == 2
        )
        assert len(event["x0"]) == 2 and len(event["x0"][0]) == 12
    rolling, shown = History(), {}
    for line in (whole / "events.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        rolling.feed(line)
        if event["e"] == "denoise":  # what the monitor shows while it is decoded, at last all
            shown[event["it"]] = rolling.live().rev
        if event["e"] == "sample" and event["s"] == 0:
            assert shown.pop(event["it"]) == event["rev"]
    assert len(shown) < 6, "no rollout was compared"
    assert "denoise" in kinds and "group" in kinds and "phase" in kinds
    assert all(len(line) < 65536 for line in (whole / "events.jsonl").read_bytes().splitlines())


def test_a_checkpoint_is_a_model_and_equal_seeds_are_equal_runs(whole, toy, tmp_path):
    again = command("--model", toy, *SMALL, "--out", tmp_path / "again", "--steps", 6)
    subprocess.run(again, env=environment(), check=True)  # not forked: with hashes of its own
    assert same(weights(whole), weights(tmp_path / "again"))
    done = run("--model", whole / "checkpoints" / "latest", *SMALL, "--eval-only", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train(toy, tmp_path / "other", "--steps", 6, "--seed", 1)
    assert not same(weights(whole), weights(tmp_path / "other"))


def test_a_step_that_a_row_draws_twice_was_selected_by_one_row(toy, tmp_path):
    train(toy, tmp_path / "out", "--steps", 2, "--select", "sampled", "--K", 6)
    for event in (event for event in events(tmp_path / "out") if event["e"] == "step"):
        assert 0 < max(event["sel"]) <= event["n"]


def test_a_folder_that_holds_a_run_is_refused_and_kept(whole, toy):
    before = (whole / "events.jsonl").read_bytes()
    done = run("--model", toy, *SMALL, "--out", whole)
    assert done.returncode == 2 and "--resume" in done.stderr and done.stderr.count("\n") == 1
    assert (whole / "events.jsonl").read_bytes() == before


# ---- resume --------------------------------------------------------------------------------------


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(whole, toy, tmp_path):
    out, chance, kills = tmp_path / "killed", random.Random(0), 0
    words = ["--model", toy, *SMALL, "--out", out, "--steps", 6]
    for _ in range(12):
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = Forked(LETTERS, [*words, *resume])
        if kills < 4:
            lines = chance.randrange(1, 4)  # of the steps and evaluations it reports
            lines += 3 if kills == 0 else 0  # the first checkpoint is there before the first kill
            for line in process.stdout:
                lines -= line.startswith(("step", "val"))
                if lines == 0:
                    time.sleep(chance.random() * 0.05)
                    os.kill(process.pid, signal.SIGKILL)
                    break
        done = process.wait()
        kills += done.returncode == -signal.SIGKILL
        if done.returncode == 0:
            break
    assert done.returncode == 0 and kills >= 2, done.stderr
    assert same(weights(whole), weights(out))
    assert same(trainer(whole), trainer(out))
    log, rewards = finished(out), events(whole)
    assert max(e["resume"] or 0 for e in log if e["e"] == "meta") >= 2  # not all from the start
    pick = lambda log: [(e["it"], e["m"]["reward/mean"], e["ent"]) for e in log if e["e"] == "step"]
    assert pick(log) == pick(rewards)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_so_in_its_exit_code(toy, whole, tmp_path, number, code):
    out = tmp_path / "stopped"
    words = ["--model", toy, *SMALL, "--out", out, "--steps", 6, "--save-every", 100]
    process = Forked(LETTERS, words)
    for line in process.stdout:
        if line.startswith("step    2"):
            break
    os.kill(process.pid, number)
    done = process.wait()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "step-" in done.stderr
    assert events(out)[-1]["e"] == "end" and events(out)[-1]["status"] == "stopped"
    train(toy, out, "--steps", 6, "--resume")
    assert same(weights(whole), weights(out))


def test_ctrl_c_that_ends_the_tee_behind_a_pipe_too_saves_all_the_same(toy, whole, tmp_path):
    out = tmp_path / "piped"
    process = Forked(LETTERS, ["--model", toy, *SMALL, "--out", out, "--steps", 6])
    for line in process.stdout:
        if line.startswith("step    2"):
            break
    process.stdout.close()
    os.kill(process.pid, signal.SIGINT)
    process.process.join()
    process.timer.cancel()
    assert process.process.exitcode == 130 and events(out)[-1]["status"] == "stopped"
    train(toy, out, "--steps", 6, "--resume")
    assert same(weights(whole), weights(out))


def test_a_resume_needs_no_link_and_minds_no_copy_of_a_checkpoint(toy, whole, tmp_path):
    out = tmp_path / "copied"
    train(toy, out, "--steps", 4, "--save-every", 1, "--keep", 2)
    folder = out / "checkpoints"
    (folder / "latest").unlink()
    shutil.copytree(folder / "step-4", folder / "step-4-copy")
    train(toy, out, "--steps", 6, "--save-every", 1, "--keep", 2, "--resume")
    assert events(out)[-1]["status"] == "finished" and same(weights(whole), weights(out))
    assert {"step-5", "step-6", "step-4-copy"} <= {path.name for path in folder.iterdir()}
    assert [e["resume"] for e in events(out) if e["e"] == "meta"] == [None, 4]


def test_steps_are_read_once_where_a_run_began_again_before_its_first_checkpoint(tmp_path):
    lines = [dict(e="meta", q=0), dict(e="step", q=1, it=0), dict(e="step", q=2, it=1)]
    lines += [dict(e="meta", q=3, resume=0), dict(e="step", q=4, it=0)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [e["q"] for e in finished(tmp_path) if e["e"] == "step"] == [4]


def test_a_damaged_optimizer_state_and_one_of_another_kind_are_named(toy, tmp_path):
    out = tmp_path / "damaged"
    train(toy, out, "--steps", 2)
    for words in (["--optimizer", "adamw8bit"], ["--lora-r", "4"]):
        done = run("--out", out, "--resume", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{' '.join(words)}: the run in --out {out} began with" in done.stderr
    file = (out / "checkpoints" / "latest").resolve() / "trainer.pt"
    os.truncate(file, file.stat().st_size // 2)
    done = run("--out", out, "--resume")
    assert done.returncode == 2 and done.stderr == f"egspo: {file} is damaged or cut short\n"


def test_a_run_whose_links_are_copies_or_whose_checkpoints_are_gone_is_not_resumed(toy, tmp_path):
    out = tmp_path / "copied"
    train(toy, out, "--steps", 2)
    folder = out / "checkpoints"
    shutil.copytree(folder, tmp_path / "links")  # as object stores and archives do it
    shutil.rmtree(folder)
    (tmp_path / "links").rename(folder)
    done = run("--out", out, "--resume", "--steps", 3)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{folder / 'latest'} should be a link" in done.stderr
    for name in ("latest", "best", "step-2"):
        shutil.rmtree(folder / name)
    (folder / "latest").symlink_to("step-2")
    before = (out / "events.jsonl").read_bytes()
    done = run("--out", out, "--resume", "--steps", 3)
    assert done.returncode == 2 and "step-2 is gone" in done.stderr
    assert (out / "events.jsonl").read_bytes() == before


def test_a_damaged_note_of_the_validation_stops_nothing(toy, tmp_path):
    out = tmp_path / "noted"
    train(toy, out, "--steps", 2)
    note = (out / "checkpoints" / "best").resolve() / "validation.json"
    note.write_text('{"step": 2, "acc')
    done = run("--model", out, *SMALL, "--eval-only")
    assert done.returncode == 0, done.stderr
    train(toy, out, "--resume", "--steps", 3)
    assert events(out)[-1]["status"] == "finished"


def test_resuming_a_finished_run_changes_nothing_and_steps_already_done_are_refused(whole):
    before = weights(whole), trainer(whole)
    done = run("--out", whole, "--resume")
    assert done.returncode == 0, done.stderr
    assert same(before[0], weights(whole)) and same(before[1], trainer(whole))
    for words in (["--steps", "5"], ["--task", "sudoku"]):
        done = run("--out", whole, "--resume", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert " ".join(words) in done.stderr


def test_a_run_that_torchrun_starts_again_goes_on_from_its_checkpoint(
    toy, whole, tmp_path, monkeypatch
):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(REPO / 'tests')!r}, {str(REPO)!r}]\n"
        "import egspo, letters\n"
        "between = egspo.running.between_steps\n"
        "def between_steps(run, step, *more):\n"
        "    between(run, step, *more)\n"
        "    if step == 3 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os._exit(9)\n"
        "egspo.running.between_steps = between_steps\n"
        "sys.exit(egspo.main())\n"
    )
    out = tmp_path / "restarted"
    words = [*command(ranks=1)[:-1], "--max-restarts", "1", script]
    words += ["--model", toy, *SMALL, "--out", out, "--steps", 6]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "resuming after 2 of 6 steps" in done.stdout  # and on nodes that count no failure:
    env = (out / "source" / "env.txt").read_text()
    job = env.split("torchrun ")[1].split()[0]
    for name, goes_on in ((job, True), ("another", False), ("none", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert config.restarted(out) == goes_on
    assert same(weights(whole), weights(out))


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default --out is a relative path
    folder = Path("runs/x/checkpoints")
    for step in (2, 9, 10, 11, 12):
        (folder / f"step-{step}").mkdir(parents=True)
    running.link(folder / "best", "step-9")
    running.prune(folder, keep=2)
    assert {path.name for path in folder.iterdir()} == {"step-9", "step-11", "step-12", "best"}
    assert config.newest("runs/x") == str((folder / "step-9").resolve())
    (folder / "step-10").mkdir()  # of a run that was set back before 11
    running.link(folder / "latest", "step-10")
    (folder / "step-9" / "test-sudoku.json").write_text("[]")
    running.link(folder / "best", "step-12")
    running.prune(folder, keep=2)
    assert (folder / "latest").exists()
    assert (folder / "step-9" / "test-sudoku.json").exists(), "somebody's evaluation"


@pytest.mark.parametrize(
    "world, start",
    [(1, "python"), (8, "torchrun --nproc-per-node 8"),
     (16, "torchrun --nnodes 2 --nproc-per-node 8")],
)  # fmt: skip
def test_a_stopped_run_says_how_all_its_processes_go_on(monkeypatch, world, start):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(world, 8)))
    monkeypatch.setattr(sys, "argv", ["egspo.py"])
    halted = SimpleNamespace(
        ranks=SimpleNamespace(world=world), cfg=config.Config(out="x"),
        stop=SimpleNamespace(number=signal.SIGINT),
    )  # fmt: skip
    assert f"continue with: {start} egspo.py --out x --resume" in str(running.stopped(halted))


def test_a_second_writer_is_refused(toy, tmp_path):
    out = tmp_path / "busy"
    process = Forked(LETTERS, ["--model", toy, *SMALL, "--out", out, "--steps", 1000])
    for line in process.stdout:
        if line.startswith("step"):
            break
    done = run("--out", out, "--resume")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL  # it had not ended by itself
    assert done.returncode == 2 and "another process" in done.stderr


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", ["--method egspo --mu 2 --cache block --block 6", "--method diffu_grpo"]
)
def test_two_processes_equal_one_with_the_same_total_work(toy, tmp_path, flags):
    words = ["--steps", 3, *flags.split()]
    train(toy, tmp_path / "two", *words, "--B", 1, ranks=2)
    train(toy, tmp_path / "one", *words, "--B", 2)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-4)
    pick = lambda out: [e["m"]["reward/mean"] for e in events(out) if e["e"] == "step"]
    assert pick(tmp_path / "one") == pytest.approx(pick(tmp_path / "two"), abs=1e-4)
    evals = lambda out: [e["m"]["reward"] for e in events(out) if e["e"] == "eval"]
    assert evals(tmp_path / "one") == pytest.approx(evals(tmp_path / "two"), abs=1e-4)


def test_no_thread_of_the_ranks_is_left_at_the_end(tmp_path):
    """Gloo's own, alive while the interpreter is taken down, abort one exit in some hundreds."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import atexit, os, sys\n"
        "tasks = lambda: (f'/proc/self/task/{i}/comm' for i in os.listdir('/proc/self/task'))\n"
        "names = lambda: [open(task).read() for task in tasks()]\n"
        "left = lambda: b'left %d\\n' % sum('gloo' in name for name in names())\n"
        "atexit.register(lambda: os.write(2, left()))\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "import run, torch\n"
        "ranks = run.Ranks()\n"
        "torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])\n"
        "assert ranks.gather(True) and any('gloo' in name for name in names())\n"
    )
    start = command(ranks=2)[:-1]
    done = subprocess.run([*start, script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left 0\n") == 2, done.stderr


# ---- trouble -------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(toy, tmp_path):
    out = tmp_path / "full"
    train(toy, out, "--steps", 2)
    before = weights(out)
    done = run("--out", out, "--resume", "--steps", 6, file_size=100_000)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "cannot write the checkpoint" in done.stderr
    assert "step-2" in done.stderr and same(before, weights(out))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["best", "latest", "step-2"]


BAD = [
    (["--task", "chess"], "--task"),
    (["--K", "200"], "--K 200"),
    (["--C", "13"], "--C 13"),
    (["--T", "5"], "--T 5"),
    (["--G", "1"], "--G 1"),
    (["--lr", "fast"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--colour", "red"], "--colour"),
    (["--select", "best"], "--select"),
    (["--steps"], "--steps"),
    (["--steps", "0"], "--steps 0"),
    (["--model", "/nowhere/model"], "/nowhere/model"),
    (["--cache", "block", "--method", "diffu_grpo"], "--cache block"),
    (["--samples", "2"], "--samples 2"),
    (["--eval-only", "--lengths", "24", "18"], "--lengths"),
    (["--resume"], "--out"),
    (["--resume", "--out", "/nowhere/run"], "/nowhere/run"),
    (["--data-dir", "/nowhere/data", "--task", "gsm8k"], "/nowhere/data"),
    (["--out", "/proc/run"], "/proc/run"),
    (["--out", "/proc/run", "--eval-only"], "/proc/run"),
    (["--P", "3"], "--P 3"),
    (["--quantize", "nf4", "--lora-r", "0"], "--quantize"),
    (["extra"], "extra"),
    (["--selct", "all"], "did you mean --select?"),
    (["--seed", "9" * 20], "--seed"),
    (["--eval-only", "--data", __file__], "--data"),
    (["--eval-only", "--eval-also", "sudoku"], "--eval-also"),
]


@pytest.mark.parametrize(
    "words, named", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_usage_is_one_line_that_names_the_flag(
    toy, tmp_path, monkeypatch, capsys, words, named
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["egspo.py", "--model", str(toy), *SMALL, *words])
    assert egspo.main() == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and named in stderr, stderr
    assert not list(tmp_path.rglob("events.jsonl")) and not list(tmp_path.glob("runs/*"))


def test_bad_usage_is_exit_code_2_without_a_traceback(toy, tmp_path):
    for words, named in (BAD[1], BAD[7], BAD[11]):
        done = run("--model", toy, *SMALL, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and named in done.stderr, done.stderr


def test_help_lists_every_flag_with_its_comment():
    done = run("--help")
    assert done.returncode == 0
    for flag in (*dataclasses.fields(config.Config), *dataclasses.fields(config.Mode)):
        assert f"--{flag.name.replace('_', '-')}" in done.stdout
    assert "selected denoising steps" in done.stdout


# ---- adapters, real models -----------------------------------------------------------------------


def test_an_adapter_run_resumes_exactly_is_a_model_and_merges(toy, tmp_path):
    lora = ["--lora-r", 4, "--lora-alpha", 8]
    train(toy, tmp_path / "whole", *lora, "--steps", 4)
    train(toy, tmp_path / "cut", *lora, "--steps", 2)
    train(toy, tmp_path / "cut", "--resume", "--steps", 4)
    read = lambda out: load_file(out / "checkpoints" / "latest" / "adapter_model.safetensors")
    assert same(read(tmp_path / "whole"), read(tmp_path / "cut"))
    before = [e["m"]["kl"] for e in events(tmp_path / "whole") if e["e"] == "step"]
    assert before[0] < 1e-9 and before[-1] > 1e-6  # the reference is the base, not the adapter
    checkpoint = tmp_path / "whole" / "checkpoints" / "latest"
    cfg = config.Config(task="letters", model=str(checkpoint), out="x", lora_r=4)
    assert plan.shapes(cfg)[1] == toy  # whose files are what is read
    done = run("--model", checkpoint, "--merge", "--out", tmp_path / "full")
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "full" / "model.safetensors").read_bytes()
    done = run("--model", checkpoint, "--merge", "--out", tmp_path / "full")
    assert done.returncode == 2 and "holds a model" in done.stderr  # it may be the base
    assert (tmp_path / "full" / "model.safetensors").read_bytes() == before
    for path in (checkpoint, tmp_path / "full"):
        words = [*SMALL, "--lora-r", 2, "--out", tmp_path / "scores"]
        done = run("--model", path, *words, "--eval-only")
        assert done.returncode == 0, done.stderr
        assert ("which --lora-r 2 does not change" in done.stdout) == (path == checkpoint)
    adapter, full = json.loads((tmp_path / "scores" / "test-letters.json").read_text())
    assert (adapter["model"], full["model"]) == (str(checkpoint.resolve()), str(path))
    assert adapter["reward"] == pytest.approx(full["reward"], abs=0.05)


def test_the_dry_run_counts_an_8b_model_and_says_where_it_fits(tmp_path):
    published = (FIXTURES / "llada-8b-instruct" / "config.json").read_text()
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").write_text(published)
    done = run("--model", tmp_path / "8b", "--dry-run", "--P", 200)
    assert done.returncode == 0, done.stderr
    assert "8,015.6 M parameters, 335.5 M trained" in done.stdout
    done = run(
        "--model", tmp_path / "8b", *"--dry-run --quantize nf4 --optimizer adamw8bit".split()
    )
    assert "24 GB: fits" in done.stdout


def test_the_real_chat_templates_work_without_remote_code(tmp_path, toy):
    dream, llada = (FIXTURES / f"{name}-instruct" for name in ("dream-7b", "llada-8b"))
    prompt = "Wie heißt du? 12 → 13"
    (tmp_path / "dream").mkdir()
    # the vocabularies are not here: the published settings over one that spells in bytes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate(alphabet)}
    ids |= {f"unused {i}": i for i in range(len(ids), 151_643)}
    for file in dream.glob("*.json"):
        (tmp_path / "dream" / file.name).write_text(file.read_text())
    (tmp_path / "dream" / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "dream" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = model.load_tokenizer(tmp_path / "dream")
    ids = model.chat_ids([prompt], tokenizer)[0]
    mask_id = json.loads((dream / "config.json").read_text())["mask_token_id"]
    assert tokenizer.mask_token_id == mask_id
    assert tokenizer.decode(ids).endswith(
        "<|im_start|>user\n" + prompt + "<|im_end|>\n<|im_start|>assistant\n"
    )
    # LLaDA's over the toy's, with the config that asks for remote code
    for file in (llada / "config.json", llada / "tokenizer_config.json", toy / "tokenizer.json"):
        (tmp_path / file.name).write_text(file.read_text())
    tokenizer = model.load_tokenizer(tmp_path)
    assert tokenizer.decode(model.chat_ids([prompt], tokenizer)[0]) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n" + prompt
        + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )  # fmt: skip


def test_evaluation_by_lengths_and_with_samples_writes_its_numbers(toy, tmp_path):
    words = "--eval-only --samples 4 --temperature 2.0".split()
    for lengths in ((4, 8), (8,)):  # the second time the first length's figures stay
        words += ["--lengths", *lengths]
        done = run("--model", toy, *SMALL, *words, "--block", 4, "--T", 6, "--K", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    results = json.loads((toy / "test-letters-samples.json").read_text())
    assert [(r["length"], r["T"]) for r in results] == [(4, 2), (8, 4)]
    for r in results:
        assert r["pass@1"] == pytest.approx(r["accuracy"], abs=1e-3) and r["pass@1"] <= r["pass@2"]
        assert r["pass@2"] <= r["pass@4"] and r["forwards"] <= r["T"]
        file = toy / f"test-letters-samples-{r['length']}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 4 * r["n"] and len({row["id"] for row in rows}) == r["n"]
        assert sum(row["correct"] for row in rows) / len(rows) == pytest.approx(r["accuracy"], 1e-3)


# ---- the default ---------------------------------------------------------------------------------


def test_the_embedded_model_learns_to_solve_sudoku(tmp_path):
    words = (
        "--model tiny --task sudoku --B 2 --micro 64 --steps 5 --lr 4e-4 --warmup 1 --eval-every 5 "
        "--eval-n 32 --no-test --no-compile"
    )
    start = command(*words.split(), "--out", tmp_path / "run", script=REPO / "egspo.py")
    done = subprocess.run(start, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    log = events(tmp_path / "run")
    before, after = (event["m"]["accuracy"] for event in log if event["e"] == "eval")
    assert before <= 0.2 and after >= before + 0.4
