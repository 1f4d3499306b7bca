"""What must stay true of act, choose, credit and learn. Oracles are loops from the formulas."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch

import config
import data
import egspo
import events
import model
import run
from toy import toy_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy") / "toy")


def settings(**changes) -> config.Config:
    base = dict(
        C=12, T=6, block=4, K=3, G=2, B=3, micro=4, minibatches=1, compile=False,
        precision="float32", lora_r=0,
    )  # fmt: skip
    return config.Config(**(base | changes))


@pytest.fixture(scope="module")
def policy(folder):
    return run.load_policy(settings(), str(folder), CPU)[0]


def prompts(N: int = 6, P: int = 7, seed: int = 0):
    """Left-padded random prompts of different lengths."""
    stream = torch.Generator().manual_seed(seed)
    ids_NP = torch.randint(0, 200, (N, P), generator=stream)
    size_N = torch.arange(N) % (P - 1) + 1
    real_NP = torch.arange(P) >= P - size_N[:, None]
    return torch.where(real_NP, ids_NP, 258), real_NP


def chat_ids(problems, tokenizer):
    return model.chat_ids([problem.prompt for problem in problems], tokenizer)


def act(policy, cfg, N: int = 6, step: int = 0, greedy: bool = False, P: int = 7):
    u = run.uniform((cfg.T, 2, cfg.block), range(N), cfg.seed, step, "draw")
    return egspo.rollout(policy, *prompts(N, P), cfg, None if greedy else u)


# ---- act -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_every_position_is_revealed_once_and_R_a_step_inside_the_current_block(policy, order):
    cfg = settings(order=order)
    roll = act(policy, cfg)
    R, steps = cfg.C // cfg.T, cfg.block * cfg.T // cfg.C
    for when_C, token_C in zip(roll.when_NC.tolist(), roll.token_NC.tolist()):
        live = sorted(t for t in when_C if t < cfg.T)
        assert live == sorted(list(range(len(live) // R)) * R)
        for i, t in enumerate(when_C):
            assert t == cfg.T or t // steps == i // cfg.block
        assert 257 not in token_C and 258 not in token_C


def test_a_row_ends_with_the_block_that_holds_the_end_token(folder):
    cfg = settings()
    net = run.load_policy(cfg, str(folder), CPU)[0]
    with torch.no_grad():
        net.unembed.weight[256] *= 2.5  # the end token now wins now and then
    roll = act(net, cfg, N=40)
    ended = 0
    for when_C, token_C in zip(roll.when_NC.tolist(), roll.token_NC.tolist()):
        blocks = [token_C[i : i + cfg.block] for i in range(0, cfg.C, cfg.block)]
        first = next((b for b, block in enumerate(blocks) if 256 in block), len(blocks))
        for b, block in enumerate(blocks):
            dead = [t == cfg.T for t in when_C[b * cfg.block : (b + 1) * cfg.block]]
            assert all(dead) if b > first else not any(dead)
            assert b <= first or block == [256] * cfg.block
        ended += first < len(blocks) - 1
    assert 0 < ended < 40
    assert roll.forwards < 40 * cfg.T  # rows that have ended leave the batch


def test_sampling_follows_the_policy_and_its_tail(policy):
    logits_V = torch.tensor([3.0, 1.0, 0.0, -2.0, -14.0]).double()

    class Fixed(torch.nn.Module):
        never_V = torch.tensor([False, False, True, False, False])

        def head(self, h):
            return logits_V.expand(*h.shape[:-1], 5)

    u_NJ = ((torch.arange(100_000) + 0.5) / 100_000).reshape(1000, 100)  # evenly spread
    token_NJ, logp_NJ, sure_NJ, entropy_NJ = model.draw(
        Fixed(), torch.zeros(1000, 100, 1), u_NJ.double(), 0.5
    )
    p_V = torch.softmax((logits_V / 0.5)[[0, 1, 3, 4]], 0)
    share_V = torch.bincount(token_NJ.flatten(), minlength=5)[[0, 1, 3, 4]] / 100_000
    assert torch.allclose(share_V.double(), p_V, atol=2e-5)
    assert (token_NJ != 2).all()
    assert torch.allclose(entropy_NJ, -(p_V * p_V.log()).sum().expand_as(entropy_NJ))
    for value_NJ, heat in ((logp_NJ, 0.5), (sure_NJ, 1.0)):
        logp_V = torch.log_softmax(torch.where(Fixed.never_V, -math.inf, logits_V) / heat, 0)
        assert torch.allclose(value_NJ, logp_V[token_NJ])
    last = torch.nextafter(torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    token, logp, _, _ = model.draw(Fixed(), torch.zeros(1, 1, 1), last, 0.5)
    assert token.item() == 4 and logp.item() < -33  # p = 2e-15 is reachable: float32 is too coarse


def test_a_large_vocabulary_is_sampled_like_a_small_one_and_nan_draws_a_token():
    logits_MV = 3 * torch.randn(200, 1300, generator=torch.Generator().manual_seed(0)).double()
    logits_MV[:, 600:] -= 40  # far out in the tail, in other parts of the vocabulary

    class Plain(torch.nn.Module):
        never_V = torch.zeros(1300, dtype=torch.bool)

        def head(self, h):
            return h

    share = 1 - torch.logspace(-20, 0, 200, dtype=torch.float64)[:, None]
    token_M1, _, _, _ = model.draw(Plain(), logits_MV[:, None], share, 1.0)
    cdf_MV = logits_MV.softmax(1).cumsum(1)
    want_M = (cdf_MV <= share * cdf_MV[:, -1:]).sum(1).clamp(max=1299)
    near_M1 = cdf_MV.gather(1, token_M1) - share * cdf_MV[:, -1:]  # 0 or a rounding from it
    assert ((token_M1[:, 0] == want_M) | (near_M1[:, 0].abs() < 1e-15)).all()
    assert (token_M1 > 600).sum() > 10 and (token_M1 < 600).sum() > 10
    token_M1, _, _, entropy_M1 = model.draw(Plain(), logits_MV[:, None] * math.nan, share, 1.0)
    assert (token_M1 < 1300).all() and entropy_M1.isnan().all()  # the run stops at the entropy


@pytest.mark.skipif(not run.can_compile(), reason="no C++ compiler here")
def test_compiled_blocks_give_the_same_scores_as_eager_ones_and_a_first_ratio_of_one():
    cfg = dataclasses.replace(config.of_model("tiny", "sudoku"), B=2, G=4, micro=16, lora_r=4)
    problems = data.TASKS["sudoku"].load("val")[: cfg.B * cfg.G]
    net, tokenizer = run.load_policy(cfg, "tiny", CPU)
    net.blocks = net.blocks[:1]  # one graph of training: enough
    for lora in model.adapters(net).values():
        torch.nn.init.normal_(lora.lora_B, std=0.05)
    P = run.measured(cfg, net, problems, tokenizer).P
    prompts = model.left_pad(chat_ids(problems, tokenizer), P, net.config.pad_id)
    u_NT2J = run.uniform((cfg.T, 2, cfg.block), range(len(problems)), 0)
    roll = egspo.rollout(net, *prompts, cfg, u_NT2J)
    moves = egspo.choose_moves(roll, cfg, net, 0, range(len(problems)))
    scores = []
    for compiled in (False, True):
        run.accelerate(net, bf16=True, compiled=compiled)
        scores.append(egspo.log_probs(net, moves, cfg)[0][moves.live_SU])
    eager_S, compiled_S = scores
    assert len(eager_S) > 16  # more than one micro-batch
    assert not torch.equal(eager_S, compiled_S)  # it was compiled
    assert torch.allclose(eager_S, compiled_S, atol=0.1)
    parts = egspo.micro_batches(moves, cfg)  # as an update scores them, before any
    logp_SU = [egspo.move_logp(net, egspo.completion_features(net, mb), mb, cfg)[0] for mb in parts]
    place_S = egspo.passed(moves, cfg).cumsum(0) - 1
    assert torch.equal(torch.cat(logp_SU)[place_S][moves.live_SU], compiled_S)


def test_slabs_cover_every_position_once():
    never_V, h_MD = torch.zeros(2**21, dtype=torch.bool), torch.zeros(11, 1)
    some = model.slabs(h_MD, never_V)
    assert [i for part in some for i in range(11)[part]] == list(range(11))
    assert len(some) == 6


def test_a_row_does_not_depend_on_its_batch_mates_nor_on_padding(policy):
    cfg = settings()
    roll = act(policy, cfg)
    u = run.uniform((cfg.T, 2, cfg.block), range(6), cfg.seed, 0, "draw")
    prompt_NP, real_NP = prompts()
    for row in range(6):
        size = int(real_NP[row].sum())
        for keep in (size, 7):  # without any padding, and as it was
            alone = egspo.rollout(
                policy, prompt_NP[row : row + 1, -keep:], real_NP[row : row + 1, -keep:], cfg,
                u[row : row + 1],
            )  # fmt: skip
            assert torch.equal(alone.token_NC[0], roll.token_NC[row])
            assert torch.equal(alone.when_NC[0], roll.when_NC[row])
            assert torch.allclose(alone.logp_NC[0], roll.logp_NC[row], atol=1e-4)


def test_noise_belongs_to_the_row_and_not_to_the_rank(policy):
    whole = run.uniform((3,), range(8), 0, 5, "draw")
    assert torch.equal(whole[4:], run.uniform((3,), range(4, 8), 0, 5, "draw"))
    assert not torch.equal(whole, run.uniform((3,), range(8), 0, 6, "draw"))
    assert not torch.equal(whole, run.uniform((3,), range(8), 1, 5, "draw"))


def test_large_vocabularies_are_cut_into_slabs_without_a_trace(policy, monkeypatch):
    cfg = settings()
    whole = act(policy, cfg)
    monkeypatch.setattr(model, "slabs", lambda h_MD, _: [slice(i, i + 1) for i in range(len(h_MD))])
    sliced = act(policy, cfg)
    assert torch.equal(whole.token_NC, sliced.token_NC)
    assert len(model.slabs(torch.zeros(3, 1), None)) == 3  # the patched one: one by one


def test_a_cached_rollout_starts_every_block_exactly_and_its_moves_are_weighed(policy):
    exact, cached = settings(), settings(cache="block")
    plain, near = act(policy, exact), act(policy, cached)
    first_NC = plain.when_NC == 0  # nothing is old yet
    assert torch.equal(first_NC, near.when_NC == 0)
    assert torch.equal(plain.logp_NC[first_NC], near.logp_NC[first_NC])
    for roll, cfg in ((plain, exact), (near, cached)):
        t_NK = egspo.select_steps(roll.entropy_NT, cfg.T, "all")
        moves = egspo.gather_moves(roll, t_NK, 257)
        moves = moves._replace(old_SU=egspo.log_probs(policy, moves, cfg)[0])
        weight_S, live_S = egspo.cache_weight(moves)[:, 0], moves.live_SU[:, 0]
        starts_S = (t_NK % (cfg.T * cfg.block // cfg.C) == 0).flatten() & live_S
        assert torch.allclose(weight_S[starts_S], torch.ones(()), atol=1e-4)
        for S in (~starts_S & live_S).nonzero().flatten().tolist():
            row, t = divmod(S, cfg.T)
            drawn = roll.logp_NC[row][roll.when_NC[row] == t].sum()
            expected = min(math.exp(moves.old_SU[S, 0] - drawn), 2.0)
            assert weight_S[S].item() == pytest.approx(expected, rel=1e-4)
        others_S = weight_S[~starts_S & live_S]
        assert torch.allclose(others_S, torch.ones(()), atol=1e-3) == (cfg is exact)
        reward_N, early_NK = torch.arange(6.0), torch.zeros(6, cfg.T)
        plain_S = egspo.stepwise_advantages(
            reward_N, early_NK, live_S.view(6, -1), cfg.G, cfg.lam
        ).flatten()
        moves = moves._replace(early_S=early_NK.flatten())
        adv_S = egspo.credit(moves, reward_N, cfg).adv_SU[:, 0]
        assert torch.equal(adv_S, plain_S * weight_S if cfg is cached else plain_S)


# ---- choose --------------------------------------------------------------------------------------


def test_entropy_selection_keeps_the_K_most_uncertain_steps_in_order():
    entropy_NT = torch.tensor(
        [[0.1, 0.9, 0.3, 0.9, 0.2], [1.0, 0.5, -math.inf, -math.inf, -math.inf]]
    )
    assert egspo.select_steps(entropy_NT, 3, "entropy").tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("T, K", [(12, 4), (128, 8), (7, 3), (5, 5), (6, 1)])
def test_uniform_selection_takes_the_last_of_equal_parts_and_random_any_steps(T, K):
    entropy_NT = torch.rand(50, T)
    t_NK = egspo.select_steps(entropy_NT, K, "uniform")
    assert t_NK[0].tolist() == [math.ceil((k + 1) * T / K) - 1 for k in range(K)]
    u_NT = torch.rand(50, T)
    t_NK = egspo.select_steps(entropy_NT, K, "random", u_NT)
    assert all(len(set(row)) == K and row == sorted(row) for row in t_NK.tolist())
    if K < T:
        assert (t_NK[:, -1] < T - 1).any()  # the last step is not always among them
    assert egspo.select_steps(entropy_NT, K, "all")[0].tolist() == list(range(T))


@pytest.mark.parametrize("how", ["entropy", "uniform", "random"])
def test_steps_after_the_end_are_only_chosen_when_nothing_else_is_left(how):
    entropy_NT = torch.rand(20, 10)
    entropy_NT[:, 6:] = -math.inf
    u_NT = torch.rand(20, 10)
    assert (egspo.select_steps(entropy_NT, 4, how, u_NT) < 6).all()
    t_NK = egspo.select_steps(entropy_NT, 8, how, u_NT)
    assert ((t_NK < 6).sum(1) == 6).all()
    assert (egspo.select_steps(entropy_NT, 8, "sampled", u_NT) < 6).all()


def test_a_state_differs_from_the_next_exactly_at_its_moves(policy):
    cfg = settings(K=6)
    roll = act(policy, cfg)
    moves = egspo.gather_moves(roll, egspo.select_steps(roll.entropy_NT, 6, "all"), mask=257)
    state_NTC = moves.state_SC.unflatten(0, (6, cfg.T))
    at_NTR = moves.at_SR.unflatten(0, (6, cfg.T))
    for row in range(6):
        for t in range(cfg.T):
            before, end = state_NTC[row, t], roll.token_NC[row]
            after = state_NTC[row, t + 1] if t + 1 < cfg.T else end
            changed = (before != after).nonzero().flatten().tolist()
            if moves.live_SU[row * cfg.T + t]:
                assert changed == at_NTR[row, t].tolist()
                assert (before[changed] == 257).all() and torch.equal(after[changed], end[changed])
    assert (state_NTC[:, 0] == 257).all()


# ---- credit --------------------------------------------------------------------------------------


def slow_advantages(reward, early, live, G, lam):
    """Section 5 with three loops."""
    N, K = len(reward), len(early[0])
    adv = [[0.0] * K for _ in range(N)]
    for group in range(N // G):
        for k in range(K):
            rows, returns = range(group * G, group * G + G), {}
            for n in rows:
                guess = early[n][k] if live[n][k] else reward[n]
                returns[n] = (reward[n] + lam * (reward[n] - guess)) / (1 + lam)
            for n in rows:
                adv[n][k] = (returns[n] - sum(returns.values()) / G) if live[n][k] else 0.0
    return torch.tensor(adv)


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_advantages_equal_the_loops(lam):
    reward_N, early_NK, live_NK = torch.rand(12), torch.rand(12, 5), torch.rand(12, 5) > 0.3
    fast = egspo.stepwise_advantages(reward_N, early_NK, live_NK, 4, lam)
    slow = slow_advantages(reward_N.tolist(), early_NK.tolist(), live_NK.tolist(), 4, lam)
    assert torch.allclose(fast, slow, atol=1e-6)


def test_advantages_ignore_a_constant_follow_a_permutation_and_vanish_for_equal_rewards():
    reward_N, early_NK, live_NK = torch.rand(8), torch.rand(8, 3), torch.ones(8, 3).bool()
    adv = egspo.stepwise_advantages(reward_N, early_NK, live_NK, 4, 0.5)
    moved = egspo.stepwise_advantages(reward_N + 7, early_NK + 7, live_NK, 4, 0.5)
    assert torch.allclose(adv, moved, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])
    assert torch.allclose(
        adv[order], egspo.stepwise_advantages(reward_N[order], early_NK[order], live_NK, 4, 0.5)
    )
    same = egspo.stepwise_advantages(torch.ones(8), torch.full((8, 3), 0.5), live_NK, 4, 0.5)
    assert same.abs().max() == 0
    egspo_only = egspo.stepwise_advantages(reward_N, early_NK, live_NK, 4, 0.0)
    without = egspo.stepwise_advantages(reward_N, None, live_NK, 4, 0.5)
    assert torch.equal(without, egspo_only)
    group = reward_N.unflatten(0, (2, 4))
    assert torch.allclose(
        egspo_only[:, 0], (group - group.mean(1, keepdim=True)).flatten(), atol=1e-6
    )


def test_the_guess_keeps_what_is_revealed_and_is_the_argmax_elsewhere(policy):
    cfg = settings()
    roll = act(policy, cfg)
    moves = egspo.gather_moves(roll, egspo.select_steps(roll.entropy_NT, 3, "entropy"), 257)
    _, _, guess_SC = egspo.log_probs(policy, moves, cfg, guess=True)
    ids_SL = torch.cat((moves.prompt_SP, moves.state_SC), dim=1)
    logits = policy(ids_SL, model.with_completion(moves.real_SP, cfg.C))[:, 7:].masked_fill(
        policy.never_V, -math.inf
    )
    for s in range(len(guess_SC)):
        for i in range(cfg.C):
            hidden = moves.state_SC[s, i] == 257
            want = logits[s, i].argmax() if hidden else moves.state_SC[s, i]
            assert guess_SC[s, i] == want


# ---- learn ---------------------------------------------------------------------------------------


def learn(policy, cfg, reward_N, N: int = 6, seed: int = 1):
    """One rollout, credited with these rewards; the moves are ready for an update."""
    roll = act(policy, cfg, N)
    moves = egspo.choose_moves(roll, cfg, policy, 0, range(N))
    old_SU, token_SU, _ = egspo.log_probs(policy, moves, cfg)
    early_S = torch.rand(len(old_SU), generator=torch.Generator().manual_seed(seed))
    moves = moves._replace(old_SU=old_SU, ref_SU=token_SU)
    if cfg.stepwise:
        moves = moves._replace(early_S=early_S)
    return egspo.credit(moves, reward_N, cfg)


def one_update(folder, cfg, reward_N, N: int = 6):
    policy = run.load_policy(cfg, str(folder), CPU)[0]
    moves = learn(policy, cfg, reward_N, N)
    tally = run.Tally()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    grads = {}
    optimizer = run.make_optimizer(policy, cfg)
    optimizer.register_step_pre_hook(
        lambda *_: grads.update({n: p.grad.clone() for n, p in policy.named_parameters()})
    )
    ratio_SU = egspo.update(policy, optimizer, moves, cfg, run.Ranks(), tally)
    return policy, before, grads, ratio_SU, tally.means(run.Ranks().gather)


VARIANTS = [
    dict(), dict(likelihood="exact"), dict(order="random"), dict(method="diffu_grpo", P=7),
    dict(select="uniform"), dict(select="random"), dict(lam=0.0), dict(select="all", K=6),
    dict(select="sampled"), dict(normalise=True),
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(folder, variant):
    _, _, _, ratio_SU, m = one_update(folder, settings(**variant), torch.rand(6))
    assert (ratio_SU == 1).all()
    assert m["kl"] == 0 and m["clip_hi"] == 0 and m["clip_lo"] == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_micro_batch_size_changes_nothing(folder, variant):
    reward_N = torch.rand(6, generator=torch.Generator().manual_seed(3))
    sums = []
    for micro in (1, 4, 100):
        _, _, grads, _, m = one_update(folder, settings(micro=micro, **variant), reward_N)
        sums.append((torch.cat([g.flatten() for g in grads.values()]), m["loss"]))
    scale = sums[0][0].norm()
    assert scale > 0
    for flat, loss in sums[1:]:
        assert (flat - sums[0][0]).norm() < 1e-4 * scale
        assert math.isclose(loss, sums[0][1], abs_tol=1e-6)


def test_moves_of_rows_that_had_ended_pass_through_no_network_and_change_nothing(
    folder, monkeypatch
):
    """Sharded, all of them pass: what is learnt is the same."""
    cfg, shapes, found = settings(select="all", K=6, micro=2), [], []
    policy = run.load_policy(cfg, str(folder), CPU)[0]
    features = policy.features
    monkeypatch.setattr(policy, "features", lambda *a: (shapes.append(len(a[0])), features(*a))[1])
    roll = act(policy, cfg)
    roll.when_NC[1:4, 4:] = cfg.T  # as if they had ended in their first block
    moves = egspo.choose_moves(roll, cfg, policy, 0, range(6))
    live_S = moves.live_SU[:, 0]
    assert 0 < (~live_S).sum() and not live_S.view(6, 6)[1].all()
    for dense in (False, True):
        shapes.clear()
        sharded = dataclasses.replace(cfg, shard=dense)
        logp_SU, _, guess_SC = egspo.log_probs(policy, moves, sharded, guess=True)
        assert shapes == [2] * -(-int(36 if dense else live_S.sum()) // 2)
        found.append((logp_SU[live_S], guess_SC[live_S]))
    assert torch.equal(found[0][1], found[1][1]) and torch.allclose(found[0][0], found[1][0])


def test_equal_rewards_give_no_gradient(folder):
    _, before, grads, _, _ = one_update(folder, settings(lam=0.0), torch.ones(6))
    assert all(g.abs().max() == 0 for g in grads.values())


def test_an_update_makes_rewarded_moves_more_likely_and_punished_ones_less(folder):
    cfg = settings(lr=1e-3, warmup=0, beta=0.0, weight_decay=0.0, lam=0.0)
    policy = run.load_policy(cfg, str(folder), CPU)[0]
    moves = learn(policy, cfg, torch.tensor([1.0, 0, 0, 1, 1, 0]))
    egspo.update(policy, run.make_optimizer(policy, cfg), moves, cfg, run.Ranks(), run.Tally())
    after_SU, _, _ = egspo.log_probs(policy, moves, cfg)
    gain_SU = (after_SU - moves.old_SU) * moves.adv_SU.sign()
    assert gain_SU[moves.live_SU].mean() > 0


def slow_loss(logp, token, old, ref, adv, live, cfg, R):
    """Section 4, move by move."""
    total = 0.0
    for i in range(len(logp)):
        if not live[i]:
            continue
        ratio = math.exp(logp[i] - old[i])
        clipped = min(max(ratio, 1 - cfg.eps_low), 1 + cfg.eps_high)
        k3 = math.exp(ref[i] - token[i]) - (ref[i] - token[i]) - 1
        total += (-min(ratio * adv[i], clipped * adv[i]) + cfg.beta * k3) / R
    return total / sum(live)


def one_ratio_each(R, live_S, *adv_old_ref_S):
    """Moves of R tokens with nothing but what the loss reads."""
    adv, old, ref = (x_S[:, None] for x_S in adv_old_ref_S)
    at_SR = torch.zeros(len(live_S), R)
    return egspo.Moves(*[None] * 3, at_SR, None, live_S[:, None], None)._replace(
        adv_SU=adv, old_SU=old, ref_SU=ref
    )


def test_the_loss_equals_the_loop_and_counts_its_clips():
    cfg = settings(beta=0.3)
    logp, token, old, ref, adv = torch.randn(5, 40, dtype=torch.float64).unbind()
    live = torch.rand(40) > 0.2
    mb = one_ratio_each(2, live, adv, old, ref)
    loss_SU, stats = egspo.clipped_loss(logp[:, None], token[:, None], mb, cfg)
    loss = loss_SU[mb.live_SU].mean()
    want = slow_loss(*(x.tolist() for x in (logp, token, old, ref, adv, live)), cfg, 2)
    assert math.isclose(loss.item(), want, rel_tol=1e-9)
    ratio = (logp - old).exp()
    high = sum(r > 1.5 and a > 0 for r, a in zip(ratio.tolist(), adv.tolist()))
    low = sum(r < 0.8 and a < 0 for r, a in zip(ratio.tolist(), adv.tolist()))
    assert stats["clip_hi"].sum() == high > 0 and stats["clip_lo"].sum() == low > 0


@pytest.mark.parametrize(
    "adv, logp, has_gradient",
    [(1.0, 1.0, False), (1.0, -1.0, True), (-1.0, -1.0, False), (-1.0, 1.0, True)],
)
def test_a_clipped_move_has_no_gradient_and_only_on_the_side_it_should(adv, logp, has_gradient):
    cfg = settings(beta=0.0)
    logp_SU = torch.tensor([[logp]], requires_grad=True)
    mb = one_ratio_each(2, torch.ones(1).bool(), torch.tensor([adv]), *torch.zeros(2, 1))
    egspo.clipped_loss(logp_SU, logp_SU, mb, cfg)[0].sum().backward()
    assert (logp_SU.grad.abs().item() > 0) == has_gradient


def test_exact_probability_equals_brute_force_over_what_losers_could_have_drawn():
    """What they did draw counts too, even where it is now surer than the least sure winner."""
    stream = torch.Generator().manual_seed(0)
    logits_SJV = torch.randn(6, 4, 7, generator=stream).double()
    logp_SJV, sure_SJV = (torch.log_softmax(logits_SJV / heat, -1) for heat in (0.5, 1.0))
    hidden_SJ = torch.tensor([[True] * 4] * 4 + [[True, False, True, True]] * 2)
    at_SR = torch.tensor([[0, 2]] * 6)
    token_SR = sure_SJV[:, [0, 2]].argmax(-1)
    drawn_SJ = sure_SJV.argmin(-1)
    drawn_SJ[5] = sure_SJV[5].argmax(-1)
    drawn_SJ[:, [0, 2]] = token_SR
    surer = 0
    args = logits_SJV, 0.5, hidden_SJ, at_SR, token_SR, drawn_SJ
    fast_S, token_S = egspo.exact_logp(*args)
    for s in range(6):
        won = list(zip(at_SR[s].tolist(), token_SR[s].tolist()))
        floor = min(sure_SJV[s, at, token].item() for at, token in won)
        tokens = sum(logp_SJV[s, at, token].item() for at, token in won)
        assert math.isclose(token_S[s].item(), tokens, rel_tol=1e-9)
        want = tokens
        for j in (1, 3):
            if hidden_SJ[s, j]:
                counts = [v for v in range(7) if sure_SJV[s, j, v] <= floor or v == drawn_SJ[s, j]]
                surer += sum(sure_SJV[s, j, v].item() > floor for v in counts)
                want += math.log(sum(math.exp(logp_SJV[s, j, v]) for v in counts))
        assert math.isclose(fast_S[s].item(), want, rel_tol=1e-9)
    assert surer > 0


def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_change(folder):
    cfg = settings()
    policy = run.load_policy(cfg, str(folder), CPU)[0]
    moves = learn(policy, cfg, torch.rand(6))
    moves = moves._replace(adv_SU=moves.adv_SU * math.nan)
    before = policy.unembed.weight.detach().clone()
    with pytest.raises(run.Halt, match="gradient norm is nan"):
        egspo.update(policy, run.make_optimizer(policy, cfg), moves, cfg, run.Ranks(), run.Tally())
    assert torch.equal(before, policy.unembed.weight)


# ---- optimizers ----------------------------------------------------------------------------------


def test_adamw8bit_keeps_real_8_bit_states_and_learns(folder):
    cfg = settings(optimizer="adamw8bit", lr=1e-2)
    policy = run.load_policy(cfg, str(folder), CPU)[0]
    optimizer = run.make_optimizer(policy, cfg)
    weight = policy.unembed.weight
    before = weight.detach().clone()
    policy(torch.zeros(1, 4, dtype=torch.long)).square().sum().backward()
    optimizer.step()
    assert (weight - before).abs().max() > 0
    states = {state["state1"].dtype for state in optimizer.state.values() if "state1" in state}
    assert torch.uint8 in states


def test_bf16_weights_would_not_move_at_a_small_learning_rate_and_ours_do(folder):
    """An update of 1e-6 is below half a bf16 step of any weight of a common size."""
    cfg = settings(lr=1e-6, precision="bf16")
    ours = run.load_policy(cfg, str(folder), CPU)[0]
    plain = copy.deepcopy(ours).to(torch.bfloat16)
    run.accelerate(ours, bf16=True, compiled=False)
    moved = {}
    for name, net in (("ours", ours), ("plain", plain)):
        weight = net.blocks[0].q.weight
        before, common = weight.detach().clone(), weight.detach().abs() > 1e-3
        optimizer = run.make_optimizer(net, cfg)
        for _ in range(20):
            net.head(net.features(torch.arange(12).view(1, 12))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[name] = (weight != before)[common].float().mean()
    assert weight.dtype == torch.bfloat16 and ours.blocks[0].q.weight.dtype == torch.float32
    assert moved["plain"] == 0 and moved["ours"] > 0.99


def test_the_learning_rate_is_a_function_of_the_step(folder, policy):
    cfg = settings(lr=1.0, warmup=4)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    rates = []
    for step in range(6):
        run.set_learning_rate(optimizer, cfg, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_resumed_optimizer_decays_weights_as_the_settings_say(folder, policy):
    before, after = (run.make_optimizer(policy, settings(weight_decay=w)) for w in (0.1, 0.0))
    after.load_state_dict(before.state_dict())
    run.set_learning_rate(after, settings(weight_decay=0.0), 0)
    assert {group["weight_decay"] for group in after.param_groups} == {0.0}


# ---- prompts, statistics, settings ---------------------------------------------------------------


def test_each_epoch_is_a_permutation_and_ranks_share_a_step_by_arithmetic():
    @dataclasses.dataclass
    class Two:
        rank: int
        world: int = 2

    problems = list(range(20))
    seen = [
        p
        for step in range(5)
        for rank in range(2)
        for p in run.batch(problems, 2, step, 0, Two(rank))
    ]
    assert sorted(seen) == problems
    alone = [p for step in range(5) for p in run.batch(problems, 4, step, 0, Two(0, 1))]
    assert seen == alone
    again = [p for step in range(5, 10) for p in run.batch(problems, 4, step, 0, Two(0, 1))]
    assert sorted(again) == problems and again != alone


def test_prompts_are_left_padded_and_never_cut(folder):
    net, tokenizer = run.load_policy(settings(), str(folder), CPU)
    problems = data.TASKS["sudoku"].load("val")[:3]
    P = run.measured(settings(), net, problems, tokenizer).P
    prompt_BP, real_BP = model.left_pad(chat_ids(problems, tokenizer), P + 5, 258)
    assert (prompt_BP[:, :5] == 258).all() and not real_BP[:, :5].any()
    assert tokenizer.decode(prompt_BP[0, 5:]) == problems[0].prompt + "\n"
    with pytest.raises(
        ValueError, match=rf"--P 20: 3 of 3 prompts are longer \(the longest has {P} "
    ):
        run.measured(settings(P=20), net, problems, tokenizer)


def test_a_batch_is_padded_to_its_own_longest_prompt_and_there_are_few_lengths(folder):
    """Lengths as those of MBPP: a mean of 143 tokens and one of 3,729, which costs its own batch
    eight times the work and no other."""
    lengths = [model.padded_length(longest, 3729) for longest in range(1, 3730)]
    assert all(x <= y <= max(x + 63, 5 * x // 4) for x, y in enumerate(lengths, 1))
    assert lengths[3700] == 3729 and len({*lengths}) == 20
    assert {*lengths[:245]} == {64, 128, 192, 256}
    net, tokenizer = run.load_policy(settings(), str(folder), CPU)
    ask = lambda sizes: [data.Problem("", "x" * (size - 1), None, "") for size in sizes]  # and \n
    cfg = run.measured(settings(), net, ask([18, 20, 900]), tokenizer)
    opened = run.Run(cfg, net, tokenizer, run.Ranks(), [])
    for sizes, P in (([18, 20], 64), ([65, 18], 128), ([18, 900], 900)):
        prompt_BP, real_BP = opened.prompts(ask(sizes))
        assert real_BP.shape == prompt_BP.shape == (2, P)
        assert real_BP.sum(1).tolist() == sizes and real_BP[:, -1].all()
    tally, roll = run.Tally(), egspo.Rollout(prompt_BP[:, :64], *[None] * 6, T=6, forwards=12)
    roll.token_NC = prompt_BP[:, :12]
    opened.count(tally, roll, 6)
    per_row = run.step_cost(cfg, net, 64 + cfg.C, 12, 6)[1]  # what was computed, not the longest
    assert tally.totals["compute/tflop"] == pytest.approx(sum(per_row.values()) / 1e12)


def test_texts_stop_at_the_first_end_token_and_lengths_count_up_to_it(folder):
    _, tokenizer = run.load_policy(settings(), str(folder), CPU)
    ids = tokenizer("ab")["input_ids"]
    token_NC = torch.tensor([ids + [256] + ids, ids + ids + ids[:1]])
    ends = torch.tensor([256])
    assert model.texts(token_NC, tokenizer, ends) == ["ab", "ababa"]
    roll = egspo.Rollout(None, None, token_NC, None, None, None, None, T=5)
    assert roll.lengths(ends).tolist() == [2, 5]


def test_pieces_join_to_the_text_and_a_split_character_stands_at_its_first_token(folder):
    _, tokenizer = run.load_policy(settings(), str(folder), CPU)
    ids = tokenizer("a→b")["input_ids"]
    assert events.pieces(ids, tokenizer) == ["a", "→", "", "", "b"]


def test_a_tally_is_a_weighted_mean_over_everything_it_was_given():
    tally = run.Tally()
    tally.add("x", torch.tensor([1.0, 2.0]))
    tally.add("x", torch.tensor([6.0, math.nan]), torch.tensor([True, False]))
    tally.add("x", 3.0)
    assert tally.means(run.Ranks().gather)["x"] == 3.0


def test_the_wilson_interval_is_the_textbook_one():
    lo, hi = run.wilson(0.5, 100)
    assert math.isclose(lo, 0.4038, abs_tol=1e-4) and math.isclose(hi, 0.5962, abs_tol=1e-4)
    assert run.wilson(0.0, 256)[0] == 0 and 0.01 < run.wilson(0.0, 256)[1] < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(K=200), "--K 200: cannot select more steps than --T 6"),
        (dict(T=5), "--T 5: must divide --C 12"),
        (dict(block=5), "--block 5: must divide --C 12"),
        (dict(C=12, T=4, block=4), "--block 4: must be a multiple of C/T = 3"),
        (dict(G=1), "--G 1: a group needs at least 2"),
        (dict(task="chess"), "--task chess: choose one of sudoku"),
        (dict(select="best"), "--select best: choose one of entropy uniform random all sampled"),
        (dict(temperature=0.0), "--temperature 0.0: must be above 0"),
        (dict(lr=math.nan), "--lr nan: must be above 0 and finite"),
        (dict(quantize="nf4"), "--quantize nf4: quantised weights are frozen"),
        (dict(method="diffu_grpo", likelihood="exact"), "--likelihood exact: diffu_grpo does not"),
        (dict(method="diffu_grpo", minibatches=4), "--minibatches 4: diffu_grpo makes --mu"),
    ],
)
def test_a_bad_value_is_named_with_its_flag_and_what_would_do(change, message):
    with pytest.raises(ValueError) as caught:
        settings(**change)
    assert str(caught.value).startswith(message)
