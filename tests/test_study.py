"""The study: its statistics, and the arms that exchange a function of egspo.py."""

import itertools
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import arms
import estimator
import study

import egspo
from test_method import act, policy, settings, toy  # noqa: F401  fixtures


@pytest.fixture
def exchange(monkeypatch):
    """Makes an arm's exchange, which ends with the test."""
    for name in ("select_steps", "draw", "rollout", "unfinished", "early_rewards"):
        monkeypatch.setattr(egspo, name, getattr(egspo, name))
    return lambda arm: arms.ARMS[arm]()


def test_the_uncertain_half_of_a_row_is_that_of_its_live_steps():
    end = -math.inf
    entropy_NT = torch.tensor(
        [[0.0, 3, 1, 2], [2, 1, 0, end], [0, 0, end, end], [1, end, end, end]]
    )
    kept_NT = arms.uncertain_half(entropy_NT) > end
    want = [[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert kept_NT.int().tolist() == want


def row(*accuracies: float, cost: float = 1.0) -> dict:
    points = enumerate(accuracies)
    return {"curve": [dict(samples=cost * i, accuracy=share) for i, share in points]}


def test_the_area_is_the_mean_over_the_run_up_to_a_limit():
    assert study.area(row(0, 1), "samples") == pytest.approx(0.5)
    assert study.area(row(0, 1, 1, cost=64.0), "samples") == pytest.approx(0.75)
    assert study.area(row(0, 1, 1), "samples", limit=0.5) == pytest.approx(0.25)
    assert study.area(row(0, 1, 1), "samples", limit=1.5) == pytest.approx(1 / 1.5)


def test_the_sign_flip_test_counts_all_patterns_and_holm_corrects_from_the_smallest():
    import numpy

    assert study.sign_flip(numpy.array([1.0, 1, 1, 1])) == pytest.approx(2 / 16)
    assert study.sign_flip(numpy.array([1.0, -1, 1, -1])) == 1
    rng = random.Random(0)
    values = [rng.gauss(0.4, 1) for _ in range(10)]
    means = [
        sum(s * v for s, v in zip(signs, values)) for signs in itertools.product((1, -1), repeat=10)
    ]
    seen = sum(abs(m) >= abs(sum(values)) - 1e-12 for m in means) / len(means)
    assert study.sign_flip(numpy.array(values)) == pytest.approx(seen)
    assert study.sign_flip(numpy.array(values * 2)) < seen  # 20 pairs: sampled patterns
    assert study.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_a_contrast_pairs_equal_seeds_and_stops_where_the_first_run_stops():
    rows = {("a", seed): row(0, 1, 1) for seed in range(4)}
    rows |= {("b", seed): row(0, 0.5) for seed in range(1, 9)}
    found = study.contrast(rows, "a", "b", "samples")
    assert found["n"] == 3 and found["mean"] == pytest.approx(0.25)
    assert found["p"] == pytest.approx(2 / 8) and found["hi"] == math.inf
    assert found["ends"]["means"].tolist() == [1, 0.5]
    assert study.contrast(rows, "a", "c", "samples")["n"] == 0


def test_an_interval_holds_the_means_that_the_test_does_not_reject():
    import numpy

    rng = numpy.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(0.3, 1, 8)
        lo, hi = study.interval(values)
        assert lo < values.mean() < hi
        assert (lo < 0 < hi) == (study.sign_flip(values) > 0.05)
        covered += lo < 0.3 < hi
    assert 182 <= covered  # of 190 expected; a bootstrap covers some 176


def test_the_lowest_arm_selects_the_surest_live_steps(exchange):
    exchange("lowest")
    entropy_NT = torch.tensor([[0.1, 0.9, 0.3, 0.2], [1.0, 0.5, -torch.inf, -torch.inf]])
    assert egspo.select_steps(entropy_NT, 2, "entropy").tolist() == [[0, 3], [0, 1]]


def test_the_joint_arm_ranks_steps_by_all_that_is_hidden_in_their_block(policy, exchange):  # noqa: F811
    cfg, total = settings(lam=0.0, C=12, T=12, block=12, K=3), {}
    exchange("joint")
    roll = act(policy, cfg)
    with torch.no_grad():
        for t in range(cfg.T):
            state_NC = torch.where(roll.when_NC < t, roll.token_NC, policy.config.mask_id)
            ids_NL = torch.cat((roll.prompt_NP, state_NC), dim=1)
            real_NL = torch.cat((roll.real_NP, torch.ones_like(state_NC).bool()), dim=1)
            logits = policy(ids_NL, real_NL)[:, roll.prompt_NP.shape[1] :]
            logits = logits.masked_fill(policy.never_V, -torch.inf) / cfg.temperature
            entropy_NC = torch.special.entr(logits.softmax(-1)).sum(-1)
            hidden_NC = state_NC == policy.config.mask_id
            total[t] = torch.where(hidden_NC, entropy_NC, 0).sum(1)
    order_NT = torch.stack([total[t] for t in range(cfg.T)], 1)
    want_NK = order_NT.topk(cfg.K, dim=1).indices.sort(dim=1).values
    moves = egspo.choose_moves(roll, cfg, policy, 0, range(6))
    assert moves.t_S.view(6, -1).tolist() == want_NK.tolist()


def test_the_placebo_shuffles_the_rewards_of_guesses_within_group_and_slot(exchange, monkeypatch):
    cfg = settings(G=3, B=2, K=4)
    early_S = torch.arange(24.0)
    monkeypatch.setattr(egspo, "early_rewards", lambda run, problems, guess_SC: early_S)
    exchange("placebo")
    run = SimpleNamespace(cfg=cfg, log=SimpleNamespace(it=5))
    mixed_BGK = egspo.early_rewards(run, None, None).view(2, 3, 4)
    early_BGK = early_S.view(2, 3, 4)
    assert not torch.equal(mixed_BGK, early_BGK)
    assert torch.equal(mixed_BGK.sort(1).values, early_BGK)
    assert torch.equal(mixed_BGK, egspo.early_rewards(run, None, None).view(2, 3, 4))


def test_hard_puzzles_have_one_solution_of_their_splits_grids():
    import data

    seen = set()
    for split in ("train", "val", "test"):
        rows = arms.hard_rows(split, None)
        assert all(9 <= row["puzzle"].count("0") <= 11 for row in rows)
        assert all(data.sudoku_solutions(row["puzzle"]) == (row["solution"],) for row in rows)
        grids = {row["solution"] for row in rows}
        assert not seen & grids
        seen |= grids


def test_mean_gradients_are_compared_without_the_noise_of_their_batches():
    """Squared, a mean of 40 batches would be 7.4 instead of 1: noise of 64 numbers, 2 wide."""
    stream = torch.Generator().manual_seed(0)
    mean_D, drawn = (
        torch.full((64,), 1 / 8, dtype=torch.float64),
        {"all": [], "again": [], "few": []},
    )
    for _ in range(300):
        a_XD = mean_D + 2 * torch.randn(40, 64, generator=stream, dtype=torch.float64)
        again_X = torch.randint(0, 40, (40,), generator=stream).bincount(minlength=40).double()
        for name, count_X in (("all", torch.ones(40).double()), ("again", again_X)):
            drawn[name].append(estimator.product(a_XD @ a_XD.T, count_X))
        drawn["few"].append(estimator.product(a_XD[:25] @ a_XD.T, again_X))  # of the other's
    for found in map(torch.tensor, drawn.values()):
        assert abs(found.mean() - 1) < 4 * found.std() / 300**0.5 < 1


@pytest.mark.parametrize(
    "arm, aslant", [([2.0, 0.0], 0.0), ([1.0, 1.0], 0.5**0.5), ([0.0, 3.0], 1.0)], ids=str
)
def test_the_angle_between_an_arm_and_the_reference(arm, aslant):
    both = torch.tensor([arm, [1.0, 0.0]], dtype=torch.float64)
    x_XD, ref_XD = (mean_D.expand(5, 2) for mean_D in both)
    grams = x_XD @ x_XD.T, x_XD @ ref_XD.T, ref_XD @ ref_XD.T
    assert estimator.compare(grams, torch.ones(5), 1.0)["aslant"] == pytest.approx(aslant, abs=1e-6)
    away = x_XD @ x_XD.T, -(x_XD @ ref_XD.T), ref_XD @ ref_XD.T
    assert estimator.compare(away, torch.ones(5), 1.0)["aslant"] == 1
    opposed_XD = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # no mean at all
    grams = opposed_XD @ opposed_XD.T, opposed_XD @ ref_XD[:2].T, ref_XD[:2] @ ref_XD[:2].T
    assert math.isnan(estimator.compare(grams, torch.ones(2), 1.0)["aslant"])
