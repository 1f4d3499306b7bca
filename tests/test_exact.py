"""The gradient identity, by enumeration: every trajectory of a toy, with all that could be drawn.

dJ/dtheta by autograd through the enumerated expectation is the truth. What the project's functions
make of the same trajectories (which moves learn, their log-probs, advantages and loss) must, in
expectation, equal it where the log-probability of a move is exact and no step is chosen by what
comes later. No sampling noise on either side; float64.
"""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import egspo
from config import Config

C, V, MASK, END = 4, 4, 2, 3  # ids 0 and 1 are words
SHAPES = {
    "two blocks, a token a step": dict(block=2, T=4),
    "one block, two tokens a step": dict(block=4, T=2),
}
EXACT = [
    dict(order="low_confidence", likelihood="exact"),
    dict(order="random", likelihood="tokens"),
]
BASELINES = {  # a level that is subtracted, and the weight lam of r - r_hat_t
    "none": (0.0, 0.0),
    "constant": (0.4, 0.0),
    "the guess's reward": (0.0, 0.5),
    "both": (0.7, 2.0),
}


class Table(torch.nn.Module):
    """A policy with logits of its own for every state: the most general one."""

    def __init__(self, seed: int, ends: bool):
        super().__init__()
        self.config = SimpleNamespace(mask_id=MASK, eos_id=END, pad_id=END)
        self.never_V = torch.tensor([False, False, True, not ends])
        self.ends, self.blocks = torch.tensor([END]), ()
        stream = torch.Generator().manual_seed(seed)
        size = (V**C, C, V)
        self.theta = torch.nn.Parameter(torch.randn(size, dtype=torch.float64, generator=stream))

    def features(self, ids_NL, real_NL=None, at_J=None, cache=None):
        """The logits themselves, so that `head` has nothing to do; no prompt: L = C."""
        h_NLV = self.theta[number(ids_NL)]
        return h_NLV if at_J is None else h_NLV[:, at_J]

    def head(self, h):
        return h


def number(token_NC):
    return (token_NC * V ** torch.arange(C)).sum(1)


def settings(**changes) -> Config:
    base = dict(C=C, T=4, block=2, temperature=0.9, lam=0.0, G=2, minibatches=1, beta=0.0)
    changes = base | changes
    return Config(**({"K": changes["T"]} | changes))


class World:
    """All trajectories of a policy, a row for each thing that could be drawn, losers included.

    prob_NT: what a row's draws at each step were worth; 1 where it had ended.
    """

    def __init__(self, seed: int, cfg: Config, ends: bool = True, policy: Table | None = None):
        self.cfg, self.policy = cfg, policy or Table(seed, ends)
        stream = torch.Generator().manual_seed(seed + 100)
        self.rewards = torch.rand(V**C, dtype=torch.float64, generator=stream)
        empty, zero_NC = torch.zeros((1, 0), dtype=torch.long), torch.zeros(1, C).double()
        token_NC, drawn_NTJ = torch.full((1, C), MASK), torch.full((1, cfg.T, cfg.block), MASK)
        self.roll = egspo.Rollout(
            empty, empty.bool(), token_NC, torch.full((1, C), cfg.T), zero_NC, zero_NC.clone(),
            drawn_NTJ, cfg.T,
        )  # fmt: skip
        self.prob_NT = torch.ones(1, 0).double()
        for t in range(cfg.T):
            self.branch(t, [0, 1, END] if ends else [0, 1])
        self.roll.token_NC[self.roll.token_NC == MASK] = END
        assert math.isclose(self.prob_NT.prod(1).sum().item(), 1, rel_tol=1e-12)

    def branch(self, t: int, words: list[int]) -> None:
        """Every row that goes on becomes as many as there are draws, and orders, at step t."""
        cfg, R = self.cfg, self.cfg.C // self.cfg.T
        first = t * R // cfg.block * cfg.block
        M = first + cfg.block - t * R  # positions that are hidden
        draws, orders = [*itertools.product(words, repeat=M)], [()]
        if cfg.order == "random":
            orders = [*itertools.combinations(range(M), R)]
        live_N = ~(self.roll.token_NC[:, :first] == END).any(1)
        ways_N = torch.where(live_N, len(draws) * len(orders), 1)
        n_N = torch.arange(len(live_N)).repeat_interleave(ways_N)
        self.roll, live_n = self.take(n_N), live_N[n_N].nonzero().squeeze(1)
        state_nC = self.roll.token_NC[live_n]
        at_nM = (state_nC[:, first : first + cfg.block] == MASK).nonzero()[:, 1].view(-1, M)
        drawn_DM = torch.tensor(draws).repeat_interleave(len(orders), dim=0)
        drawn_nM = drawn_DM.repeat(len(live_n) // len(drawn_DM), 1)

        logits_nMV = self.policy.theta[number(state_nC)[:, None], first + at_nM]
        logits_nMV = torch.where(self.policy.never_V, -math.inf, logits_nMV)
        logp_nMV = (logits_nMV / cfg.temperature).log_softmax(-1)
        logp_nM = logp_nMV.gather(-1, drawn_nM[..., None]).squeeze(-1)
        score_nM = logits_nMV.detach().softmax(-1).gather(-1, drawn_nM[..., None]).squeeze(-1)
        if cfg.order == "random":
            score_OM = torch.tensor([[float(m in order) for m in range(M)] for order in orders])
            score_nM = score_OM.repeat(len(live_n) // len(orders), 1)
        best_nR = egspo.reveal(score_nM, R)

        prob_n = logp_nM.sum(1).exp() / len(orders)
        prob_N = torch.ones(len(n_N)).double().index_put((live_n,), prob_n)
        self.prob_NT = torch.cat((self.prob_NT[n_N], prob_N[:, None]), dim=1)
        cells = live_n[:, None], first + at_nM.gather(1, best_nR)
        self.roll.token_NC[cells] = drawn_nM.gather(1, best_nR)
        self.roll.when_NC[cells] = t
        entropy_nM = torch.special.entr(logp_nMV.detach().exp()).sum(-1)
        self.roll.entropy_NC[cells] = entropy_nM.gather(1, best_nR)
        self.roll.drawn_NTJ[live_n[:, None], t, at_nM] = drawn_nM

    def worth(self, token_NC):
        return self.rewards[number(token_NC)]

    def mean_reward(self) -> float:
        return (self.prob_NT.prod(1) * self.worth(self.roll.token_NC)).sum().item()

    def truth(self, steps=None):
        """dJ/dtheta; of some steps only, as if the moves of the others were not ours."""
        ours_T = torch.tensor([steps is None or t in steps for t in range(self.cfg.T)])
        prob_NT = torch.where(ours_T, self.prob_NT, self.prob_NT.detach())
        J = (prob_NT.prod(1) * self.worth(self.roll.token_NC)).sum()
        return torch.autograd.grad(J, self.policy.theta, retain_graph=True)[0]

    def take(self, rows) -> egspo.Rollout:
        tensors = {name: x[rows] for name, x in vars(self.roll).items() if torch.is_tensor(x)}
        return replace(self.roll, **tensors)

    def returns(self, moves, reward_N, level, lam):
        """A_t = (r + lam (r - r_hat_t)) / (1 + lam) - level [N, K]."""
        h_SCV = egspo.completion_features(self.policy, moves)
        early_S = self.worth(egspo.greedy_guess(self.policy, h_SCV, moves.state_SC))
        reward_N1 = reward_N[:, None]
        early_NK = early_S.view(len(reward_N), -1)
        return (reward_N1 + lam * (reward_N1 - early_NK)) / (1 + lam) - level

    def expected(self, moves, adv_NK, prob_N, learn: Config | None = None):
        """The mean over rows of the gradient that these moves and advantages give: minus the sum of
        the project's losses, times R."""
        cfg, K = learn or self.cfg, adv_NK.shape[1]
        adv_SU = adv_NK.reshape(-1, 1)
        if moves.weight_SU is not None:
            adv_SU = adv_SU * moves.weight_SU
        moves = moves._replace(adv_SU=adv_SU.detach())
        h_SCV = egspo.completion_features(self.policy, moves)
        logp_SU, token_SU = egspo.move_logp(self.policy, h_SCV, moves, cfg)
        loss_SU, _ = egspo.clipped_loss(logp_SU, token_SU, moves, cfg)
        loss_N = torch.where(moves.live_SU, loss_SU, 0).view(-1, K).sum(1)
        gain = -(prob_N.detach() * loss_N).sum() * (cfg.C // cfg.T)
        return torch.autograd.grad(gain, self.policy.theta)[0]

    def estimate(self, steps=None, baseline=(0.0, 0.0), how="all", learn: Config | None = None):
        """The expected gradient of the moves at fixed steps, or at 2 chosen by `how`; baseline: the
        level and lam of `returns`."""
        N, K, every = len(self.prob_NT), 2, "all" if how == "random" else how
        t_NK = egspo.select_steps(self.roll.entropy_NT, K, every)
        if steps is not None:
            t_NK = torch.tensor(steps).expand(N, -1)
        moves = egspo.gather_moves(self.roll, t_NK, MASK)
        adv_NK = self.returns(moves, self.worth(self.roll.token_NC), *baseline)
        if how == "random":  # any 2 of those that are live: each as often as another
            live_N1 = moves.live_SU.view(N, -1).sum(1, keepdim=True)
            adv_NK = adv_NK * (K / live_N1).clamp(max=1)
        return self.expected(moves, adv_NK, self.prob_NT.prod(1), learn)


def error(truth, estimate) -> float:
    return ((estimate - truth).norm() / truth.norm()).item()


def astray(truth, estimate) -> float:
    """The relative error that no learning rate mends: the sine of the angle between the two."""
    unit = estimate / estimate.norm()
    along = (truth * unit).sum().clamp(min=0)  # no rate mends a step the other way either
    return ((truth - along * unit).norm() / truth.norm()).item()


# ---- where the gradient is exact -----------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("policy", EXACT, ids=lambda x: x["order"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(shape, policy, seed):
    world = World(seed, settings(**SHAPES[shape], **policy))
    dead = (world.roll.when_NC == world.cfg.T).any(1)
    assert dead.any() == (world.cfg.block < C)  # rows end early where there is a later block
    for steps in (None, (0,), (1,), (0, world.cfg.T - 1)):
        truth = world.truth(steps)
        for baseline in BASELINES.values():
            assert error(truth, world.estimate(steps, baseline)) < 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_one_block_of_four_steps_too(seed):
    world = World(seed, settings(block=4, T=4, likelihood="exact"), ends=False)
    assert error(world.truth(), world.estimate()) < 1e-9
    assert error(world.truth((1, 2)), world.estimate((1, 2), BASELINES["both"])) < 1e-9


@pytest.mark.parametrize("ends", [False, True], ids=["all rows last", "some end early"])
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("policy", EXACT, ids=lambda x: x["order"])
def test_the_mean_of_a_group_is_a_baseline_that_only_scales_the_gradient(policy, lam, ends):
    """All pairs of trajectories, as groups of two; a mean that includes oneself costs 1/G. Rows
    that have ended are in it."""
    world = World(0, settings(lam=lam, **policy), ends)
    adv_NK = group_advantages(world, world.cfg, torch.arange(4).expand(len(world.roll.token_NC), 4))
    moves = egspo.gather_moves(world.roll, torch.arange(4).expand_as(adv_NK), MASK)
    estimate = world.expected(moves, adv_NK, world.prob_NT.prod(1))
    assert error(world.truth() / 2, estimate) < 1e-9


def group_advantages(world, cfg, t_NK, roll=None, prob_N=None):
    """The advantage of each move [N, K], averaged over who the other one of its group is."""
    roll = roll or world.roll
    prob_N = (world.prob_NT.prod(1) if prob_N is None else prob_N).detach()
    moves, reward_N = egspo.gather_moves(roll, t_NK, MASK), world.worth(roll.token_NC)
    h_SCV = egspo.completion_features(world.policy, moves)
    early_NK = world.worth(egspo.greedy_guess(world.policy, h_SCV, moves.state_SC))
    early_NK = early_NK.view(t_NK.shape)
    live_NK, kinds = moves.live_SU.view(t_NK.shape), {}
    rows = torch.cat((reward_N[:, None], early_NK, live_NK), dim=1).tolist()
    for n, key in enumerate(map(tuple, rows)):
        kinds.setdefault(key, []).append(n)  # rows that are worth the same are the same to others
    adv_NK = torch.zeros_like(early_NK)
    for others in kinds.values():
        m = others[0]
        pair_2N = torch.stack((torch.arange(len(reward_N)), torch.full((len(reward_N),), m)), 1)
        pair_2N = pair_2N.flatten()
        given = reward_N[pair_2N], early_NK[pair_2N], live_NK[pair_2N], 2, cfg.lam
        adv_NK = adv_NK + prob_N[others].sum() * egspo.stepwise_advantages(*given)[::2]
    return adv_NK


# ---- steps drawn by chance -----------------------------------------------------------------------


def sampled(world, K, monkeypatch):
    """All K-tuples that `sampled` could draw: (trajectories, moves, chance of each row)."""
    cfg = replace(world.cfg, select="sampled", K=K)
    chance_NT = egspo.step_chances(world.roll.entropy_NT)
    assert torch.allclose(chance_NT.sum(1), torch.ones(()).double(), rtol=0, atol=1e-12)
    after_NT = chance_NT.cumsum(1)
    middle_NT = after_NT - chance_NT / 2  # the u that draws each step
    tuples = torch.tensor(list(itertools.product(range(cfg.T), repeat=K)))
    u_NK = middle_NT[:, tuples].flatten(0, 1)
    prob_N = (world.prob_NT.prod(1)[:, None] * chance_NT[:, tuples].prod(2)).flatten()
    possible = prob_N > 0
    u_NK, prob_N = u_NK[possible], prob_N[possible]
    roll = world.take(torch.arange(len(middle_NT)).repeat_interleave(len(tuples))[possible])
    monkeypatch.setattr(egspo, "uniform", lambda shape, rows, *key: u_NK)
    moves = egspo.choose_moves(roll, cfg, world.policy, 0, range(len(u_NK)))
    assert moves.live_SU.all()
    return roll, moves, prob_N


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("policy", EXACT, ids=lambda x: x["order"])
def test_steps_sampled_by_entropy_and_weighed_give_the_whole_gradient(policy, seed, monkeypatch):
    """A mean over K draws with weights 1 / (T p): a T-th of the sum over all steps."""
    world = World(seed, settings(**policy))
    roll, moves, prob_N = sampled(world, 2, monkeypatch)
    for baseline in BASELINES.values():
        adv_NK = world.returns(moves, world.worth(roll.token_NC), *baseline)
        estimate = world.expected(moves, adv_NK, prob_N) / 2
        assert error(world.truth() / world.cfg.T, estimate) < 1e-9


@pytest.mark.parametrize("level", [0.0, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_minibatch_of_sampled_steps_has_the_whole_gradient_too(seed, level, monkeypatch):
    """Draws are shared out in the order they were made: by entropy, weights made for a draw would
    weigh the larger of two."""
    world = World(seed, settings(likelihood="exact"))
    roll, moves, prob_N = sampled(world, 2, monkeypatch)
    adv_NK = world.returns(moves, world.worth(roll.token_NC), level, 0.0)
    parts = list(egspo.minibatches(moves, settings(K=2, minibatches=2)))
    assert len(parts) == 2
    for part in parts:
        adv_N1 = adv_NK.flatten()[part][:, None]
        estimate = world.expected(moves.take(part), adv_N1, prob_N)
        assert error(world.truth() / world.cfg.T, estimate) < 1e-9


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_steps_sampled_by_entropy_keep_the_mean_of_a_group_a_baseline(lam, monkeypatch):
    world = World(0, settings(likelihood="exact", lam=lam), ends=False)
    roll, moves, prob_N = sampled(world, 2, monkeypatch)
    adv_NK = group_advantages(world, world.cfg, moves.t_S.view(-1, 2), roll, prob_N)
    estimate = world.expected(moves, adv_NK, prob_N) / 2
    assert error(world.truth() / world.cfg.T / 2, estimate) < 1e-9


def test_sampling_draws_each_step_with_its_chance_and_no_weight_is_above_ten():
    entropy_NT = torch.tensor([[0.1, 0.0, 2.0, 0.9], [0.0, 0.0, -math.inf, -math.inf]])
    chance_NT = egspo.step_chances(entropy_NT)
    share_NT = torch.tensor([[1 / 30, 0, 2 / 3, 0.3], [0.5, 0.5, 0, 0]])
    live_NT = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0]])
    assert torch.allclose(chance_NT.float(), 0.9 * share_NT + 0.1 * live_NT, atol=1e-6)
    u_NT = ((torch.arange(4000) + 0.5) / 4000).repeat(2).view(-1, 1).double()
    t_NK = egspo.select_steps(entropy_NT.repeat_interleave(4000, dim=0), 1, "sampled", u_NT)
    for row, t_K in enumerate(t_NK.view(2, -1)):
        share_T = torch.bincount(t_K, minlength=4) / 4000
        assert torch.allclose(share_T, chance_NT[row].float(), atol=1e-3)


# ---- what is not exact, in numbers ---------------------------------------------------------------


def test_the_biases_that_the_method_tolerates_are_printed_and_are_not_zero(record_property):
    """Relative errors of the policy gradient, three seeds; conftest.py prints them at the end."""
    block = SHAPES["one block, two tokens a step"]
    tokens, exact = (settings(likelihood=kind, **block) for kind in ("tokens", "exact"))
    random = settings(order="random", **block)
    one = dict(temperature=1.0)  # the score's; all were sampled at 0.9
    cases = {
        "token product, low confidence, no baseline": (tokens, tokens, False),
        "token product, low confidence, mean reward as baseline": (tokens, tokens, True),
        "sampled at 0.9, scored at 1.0, random order": (random, replace(random, **one), True),
        "sampled at 0.9, scored at 1.0, exact likelihood": (exact, replace(exact, **one), True),
    }
    for name, (act, learn, baseline) in cases.items():
        errors = []
        for world in (World(seed, act) for seed in range(3)):
            level = world.mean_reward() if baseline else 0.0
            errors.append(error(world.truth(), world.estimate(None, (level, 0.0), learn=learn)))
        record_property(name, " ".join(f"{e:.3f}" for e in errors))
        assert min(errors) > 0.01


@pytest.mark.parametrize("ends", [False, True], ids=["all rows last", "some end early"])
def test_what_choosing_two_of_four_steps_costs_is_printed(ends, record_property):
    """As above at the best scale: what no learning rate mends. A choice that ignores the trajectory
    costs what it leaves out, with any baseline the same; one by chance costs nothing on average.
    Where rows end early the number of live steps is such a look ahead."""
    for how in ("entropy", "uniform", "random"):
        errors = {}
        for world in (World(seed, settings(likelihood="exact"), ends) for seed in range(3)):
            truth = world.truth()
            for name, level in (("no", 0.0), ("mean reward as", world.mean_reward())):
                error = astray(truth, world.estimate(None, (level, 0.0), how))
                errors.setdefault(name, []).append(error)
        for name, of_seeds in errors.items():
            when = "early stop, " if ends else ""
            record_property(
                f"2 of 4 by {how}, {when}{name} baseline", " ".join(f"{e:.3f}" for e in of_seeds)
            )
        without, with_mean = (torch.tensor(of_seeds) for of_seeds in errors.values())
        if how == "random" and not ends:
            assert without.max() < 1e-7 and with_mean.max() < 1e-7
        else:
            assert without.min() > 0.01
        looks_ahead = ends or how == "entropy"
        assert torch.allclose(without, with_mean, atol=1e-7) != looks_ahead


@pytest.mark.parametrize("policy", EXACT, ids=lambda x: x["order"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_no_derivative_sees_of_a_ranking_is_printed(shape, policy, record_property):
    """The reward jumps where two draws tie in sureness and another one is revealed: a change of
    the policy does more than the derivative says, and a random order has no such ties."""
    shares = []
    for world in (World(seed, settings(**SHAPES[shape], **policy)) for seed in range(3)):
        truth, rewards = world.truth(), []
        for h in (0.1, -0.1):
            moved = copy.deepcopy(world.policy)
            with torch.no_grad():
                moved.theta += h * truth / truth.norm()
            there = World(0, world.cfg, policy=moved)
            there.rewards = world.rewards
            rewards.append(there.mean_reward())
        shares.append((rewards[0] - rewards[1]) / 0.2 / truth.norm().item())
    name = f"change over 0.1 to either side, by the gradient's: {policy['order']}, {shape}"
    record_property(name, " ".join(f"{share:.3f}" for share in shares))
    off = max(abs(share - 1) for share in shares)
    assert off < 0.01 if policy["order"] == "random" else off > 0.5


# ---- the enumeration itself ----------------------------------------------------------------------


def trajectories(roll) -> list:
    """(tokens, when) of each row."""
    return [*zip(*(map(tuple, x_NC.tolist()) for x_NC in (roll.token_NC, roll.when_NC)))]


def added_up(roll, weight_N) -> dict:
    """The sum of a number over the rows of each trajectory, whatever the losers drew."""
    found = {}
    for key, weight in zip(trajectories(roll), weight_N.tolist()):
        found[key] = found.get(key, 0) + weight
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_stated_probabilities_are_those_of_everything_that_could_be_drawn(shape, tied):
    """With ties too, which go to the earlier position in the move and in its probability."""
    cfg = settings(likelihood="exact", temperature=0.4, **SHAPES[shape])
    policy = Table(0, ends=True)
    if tied:
        with torch.no_grad():
            policy.theta[:] = torch.tensor([1.0, 0, 0, 0])  # alike everywhere: positions decide
    world = World(0, cfg, policy=policy)
    moves = egspo.gather_moves(world.roll, torch.arange(cfg.T).expand(len(world.prob_NT), -1), MASK)
    h_SCV = egspo.completion_features(policy, moves)
    logp_SU, _ = egspo.move_logp(policy, h_SCV, moves, cfg)
    logp_N = torch.where(moves.live_SU, logp_SU, 0).view(-1, cfg.T).sum(1)
    found = added_up(world.roll, world.prob_NT.prod(1))
    stated = dict(zip(trajectories(world.roll), logp_N.exp().tolist()))
    assert found.keys() == stated.keys()
    for key, prob in found.items():
        assert math.isclose(stated[key], prob, rel_tol=1e-9)


@pytest.mark.parametrize("order", ["low_confidence", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rollout_draws_the_enumerated_trajectories_as_often_as_stated(shape, order):
    cfg, N = settings(order=order, temperature=0.4, **SHAPES[shape]), 20_000
    world = World(0, cfg)
    stream = torch.Generator().manual_seed(0)
    u_NT2J = torch.rand(N, cfg.T, 2, cfg.block, dtype=torch.float64, generator=stream)
    empty = torch.zeros((N, 0), dtype=torch.long)
    want = added_up(world.roll, world.prob_NT.prod(1))
    roll = egspo.rollout(world.policy.float(), empty, empty.bool(), cfg, u_NT2J)
    seen = added_up(roll, torch.ones(N))
    assert seen.keys() <= want.keys()
    common = [key for key in want if want[key] * N >= 5]
    chi = sum((seen.get(key, 0) - N * want[key]) ** 2 / (N * want[key]) for key in common)
    assert abs(chi - len(common)) < 4 * math.sqrt(2 * len(common))
