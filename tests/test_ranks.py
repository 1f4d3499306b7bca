"""Many ranks: who works on what, and what one of them alone may and may not bring about."""

import types

import pytest
import torch

import config
import egspo
import run as running
from processes import REPO, SMALL, run, same, start_ranks, train, weights
from toy import toy_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("model") / "toy")


class Rank(running.Ranks):
    """One of so many, alone in its process."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.device = rank, world, torch.device("cpu")

    def gather(self, x):
        return [x]


# ---- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("problems", [1000, 256, 7])
def test_64_ranks_share_every_epoch_without_overlap_or_gap_and_no_noise_twice(problems):
    world, B, G = 64, 3, 4
    ranks, drawn = [Rank(rank, world) for rank in range(world)], []
    for step in range(12):
        shares = [running.batch(range(problems), B, step, 5, rank) for rank in ranks]
        assert {len(share) for share in shares} == {B}
        drawn += sum(shares, [])
        assert drawn[-world * B :] == running.batch(range(problems), world * B, step, 5, Rank(0, 1))
    for first in range(0, len(drawn) - problems + 1, problems):
        assert sorted(drawn[first : first + problems]) == list(range(problems))
    rows = [row for rank in ranks for row in rank.rows(B * G)]
    assert rows == list(range(world * B * G))
    noise = torch.cat([running.uniform((2,), rank.rows(B * G), 5, 0, "draw") for rank in ranks])
    assert torch.equal(noise, running.uniform((2,), range(world * B * G), 5, 0, "draw"))
    assert len(noise.unique(dim=0)) == len(noise)


@pytest.mark.parametrize("count, samples", [(257, 0), (100, 3), (5, 0)])
def test_64_ranks_evaluate_every_problem_once_in_equally_many_batches(monkeypatch, count, samples):
    world, problems = 64, [types.SimpleNamespace(number=i) for i in range(count)]
    cfg = config.Config(task="sudoku", C=4, T=2, block=4, K=1, B=2, G=3, minibatches=1)
    judged, batches, rows, n = [], [], [], max(1, samples)
    uniform = lambda shape, row, *_: (rows.append(row), torch.zeros(len(row), *shape))[1]
    monkeypatch.setattr(egspo, "uniform", uniform)

    def rollout(policy, prompt_NP, real_NP, cfg, u_NT2J, greedy):
        batches[-1] += 1
        token_NC = torch.zeros(len(prompt_NP), 4, dtype=torch.long)
        return egspo.Rollout(prompt_NP, real_NP, token_NC, token_NC, None, None, None, T=2)

    def judge(answers, asked):
        judged.extend(problem.number for problem in asked)
        rewards = [egspo.data.Reward(1.0, True, whole=1.0) for _ in asked]
        return types.SimpleNamespace(result=lambda: rewards)

    monkeypatch.setattr(egspo, "rollout", rollout)
    monkeypatch.setattr(egspo, "texts", lambda token_NC, *_: [""] * len(token_NC))
    for rank in range(world):
        batches.append(0)
        the_run = types.SimpleNamespace(
            policy=types.SimpleNamespace(ends=torch.tensor([1])), ranks=Rank(rank, world),
            tokenizer=None, reference=None, judge=judge,
            prompts=lambda asked: (torch.zeros(len(asked), 1), torch.ones(len(asked), 1)),
        )  # fmt: skip
        if not problems[rank::world]:  # its sums are empty, and it has no mean of its own
            the_run.ranks.gather = lambda x: [x, ({"accuracy": [1, 1], "tokens": [1, 1]}, {}, {})]
        egspo.evaluate(the_run, problems, cfg, samples)
    assert len({*batches}) == 1
    assert sorted(judged) == sorted(i for i in range(count) for _ in range(n))
    drawn = sum(rows, [])
    assert len({*drawn}) == len(drawn) and {*range(count * n)} <= {*drawn}


def test_gradients_are_summed_in_place_a_bucket_or_a_large_one_at_a_time(monkeypatch):
    sent = []
    monkeypatch.setattr(running.dist, "all_reduce", lambda x: (sent.append(x), x.mul_(2)))
    grads = [torch.rand(size) for size in (3, 40, 5, 1, 100, 7, 2)]
    before = [grad.clone() for grad in grads]
    running.sum_gradients(grads, most=10)
    assert all(torch.equal(grad, 2 * old) for grad, old in zip(grads, before))
    assert sorted(len(x) for x in sent) == [9, 9, 40, 100]
    large = {x.data_ptr() for x in sent if len(x) >= 10}
    assert large == {grad.data_ptr() for grad in grads if len(grad) >= 10}  # no copy


# ---- one rank alone ------------------------------------------------------------------------------

ALONE = f"""
import datetime, os, resource, sys, time
sys.path[:0] = [{str(REPO / "tests")!r}, {str(REPO)!r}]
import torch.distributed as dist
import egspo, letters
running, rank, fault = egspo.running, int(os.environ["RANK"]), os.environ["FAULT"]
init, between = dist.init_process_group, running.between_steps

def patient(*args, timeout, **more):
    assert timeout >= datetime.timedelta(hours=1)
    return init(*args, timeout=timeout, **more)

def between_steps(run, step, *more):
    between(run, step, *more)
    if fault == "raises" and rank == 1 and step == 1:
        raise ValueError("rank 1 alone")

dist.init_process_group, running.between_steps = patient, between_steps
if fault in ("halts", "raises"):  # as on nccl, where it waits for the others
    dist.destroy_process_group = lambda: time.sleep(10**6)
if fault == "halts" and rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if fault == "old link" and rank == 1:
    resolve = running.Path.resolve
    old = lambda path, *a: path.parent / "step-2" if path.name == "latest" else resolve(path, *a)
    running.Path.resolve = old
if fault == "other folder" and rank == 1:
    exists = running.Path.exists
    running.Path.exists = lambda path: path.name != "step-4" and exists(path)
sys.exit(egspo.main())
"""


@pytest.fixture
def alone(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    return tmp_path / "alone.py"


@pytest.mark.parametrize(
    "fault, told",
    [("halts", "cannot write the checkpoint"), ("raises", "ValueError: rank 1 alone")],
)
def test_a_rank_that_fails_alone_ends_at_once_and_the_others_say_that_they_lost_it(
    toy, tmp_path, alone, fault, told
):
    words = ["--model", toy, *SMALL, "--out", tmp_path / "out", "--steps", 6, "--B", 1]
    done = [rank.wait() for rank in start_ranks(*words, ranks=2, script=alone, FAULT=fault)]
    assert [one.returncode for one in done] == [1, 1]
    failed, other = done[fault == "raises"], done[fault != "raises"]
    assert told in failed.stderr
    assert "lost the other ranks" in other.stderr and other.stderr.count("\n") == 1
    assert ("Traceback" in failed.stderr) == (fault == "raises")


def test_ranks_resume_what_the_first_one_finds_and_from_the_same_step(toy, tmp_path, alone):
    words = ["--model", toy, *SMALL, "--B", 1]
    train(toy, tmp_path / "whole", *words[2:], "--steps", 6, ranks=2)
    out = tmp_path / "cut"
    train(toy, out, *words[2:], "--steps", 4, ranks=2)
    again = ["--out", out, "--resume", "--steps", 6]
    done = run(*again, ranks=2, script=alone, FAULT="other folder")
    assert done.returncode == 2 and "not one folder for all ranks" in done.stderr
    done = run(*again, ranks=2, script=alone, FAULT="old link")
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(out)) and "warning" not in done.stdout
    done = run("--out", out, "--resume", "--steps", 7)
    assert "warning: the run had 2 processes, now 1" in done.stdout, done.stderr
