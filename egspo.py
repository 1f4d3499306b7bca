"""Reinforcement learning of masked diffusion language models: EGSPO, EGSPO-SA (arXiv 2603.12554).

The decision process. A completion of C tokens starts as C masks. At each of T denoising steps the
policy draws a token for every hidden position of the current block and reveals R = C / T of them;
blocks are decoded from left to right; a revealed token is never masked again. So (token, when) is
the whole trajectory: the state before step t is "tokens with when < t, masks elsewhere", the move
at t is "positions with when == t". Time here is generation order: t = 0 sees only masks (the
diffusion literature counts the other way). The reward comes at the end.

The gradient. grad J = sum_t E[A_t grad log pi(a_t | s_t)], A_t = r - V(s_t): exact for any baseline
V that looks only at the state, and no likelihood of a sequence is needed.

  act      rollout              x_i ~ softmax(logits_i / temperature), the R surest are revealed
  choose   select_steps         the K steps of highest entropy H_t carry most of the gradient
  credit   stepwise_advantages  G_t = (r + lam (r - r_hat_t)) / (1 + lam), minus the group's mean
  learn    clipped_loss         -min(ratio A, clip(ratio) A) + beta k3, summed over moves, over R
  tell     EventLog.tell        events.jsonl, which `python tui.py` shows

r_hat_t is the reward of the greedy one-step completion of s_t, the guess. lam = 0 is EGSPO, above
it EGSPO-SA.

Where this file departs from the paper or from its released code, and why:

 1. A move is scored at the sampling temperature; all that follows the logits is float32 or more.
 2. `--likelihood exact` is the probability of the whole move, the choice of positions included;
    the product of token probabilities (`tokens`, the paper's) is exact only for random order.
 3. The guess is read off the forward pass that gives the old log-probability of a selected move:
    K wide heads per trajectory rather than T, and no forward pass of its own.
 4. The final and the one-step reward are the same function: no format bonus leaks into r - r_hat.
 5. The advantage is not divided by the group's standard deviation. A slot's baseline (the group's
    mean at its k-th selected step) mixes different times, and r_hat_t stays in the return.
 6. The old log-probability comes from the same function, shapes and mode as the new one: the first
    ratio is 1. There is no dropout anywhere.
 7. Padding is never attended to and positions count from the first real token, everywhere.
 8. A row that holds the end token in a finished block is done: nothing after that block is decoded,
    selected or scored, in training and evaluation alike.
 9. Randomness is a function of (seed, step, row): it depends on neither ranks nor batches, and a
    resumed run continues exactly.
10. `--cache block` (not in the paper) encodes what lies outside a block once per block. It draws
    from a slightly different policy: its moves carry a truncated importance weight, and the run
    logs how far the two are apart (cache/kl, cache/weight).

Names end in their dimensions: B prompts of this rank, G samples per prompt, N = B*G rows
(prompt-major), n of them still decoded, T denoising steps, K selected ones, S = N*K moves, R tokens
per step, U ratios per move, J positions of a block and M hidden ones, Q positions in all, P prompt,
C completion, L = P + C, V vocabulary, D width; X and W local counts. The settings are in config.py.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import data
import run as running
from config import Config, Mode, parse
from model import texts, with_completion
from run import Ranks, Run, Tally, batch, clip_gradients, demand_finite, set_learning_rate, uniform

# ---- train ---------------------------------------------------------------------------------------


def train(run: Run, start: int) -> None:
    """Act, choose, credit, learn, tell, until cfg.steps are done."""
    cfg, policy, ranks, log = run.cfg, run.policy, run.ranks, run.log
    mask, end = policy.config.mask_id, policy.config.eos_id
    rows = ranks.rows(cfg.B * cfg.G)
    for step in itertools.count(start):
        between_steps(run, step, start)
        if step == cfg.steps:
            return
        tally = Tally()
        problems = batch(run.train_set, cfg.B, step, cfg.seed, ranks)
        problems = [problem for problem in problems for _ in range(cfg.G)]

        with log.phase(step, "rollout"):  # act
            u_NT2J = uniform((cfg.T, 2, cfg.block), rows, cfg.seed, step, "draw").to(ranks.device)
            watch = log.watcher(step, problems[0].prompt)
            roll = rollout(policy, *run.prompts(problems), cfg, u_NT2J, watch)
            demand_finite("entropy of the rollout's logits", roll.entropy_NC.sum(), ranks)
            answers = texts(roll.token_NC, run.tokenizer, end)
            judged = run.judge(answers, problems)

        with log.phase(step, "logp"):  # choose
            moves = choose_moves(roll, cfg, mask, step, rows)
            old_SU, guess_SC = log_probs(policy, moves, cfg, guess=cfg.stepwise)
            with run.reference() as reference:
                ref_SU, _ = log_probs(reference, moves, cfg)
            moves = moves._replace(old_SU=old_SU, ref_SU=ref_SU, guess_SC=guess_SC)

        with log.phase(step, "score"):  # credit
            rewards, early_S = judged.result(), early_rewards(run, problems, guess_SC)
            reward_N = torch.tensor(rewards, device=ranks.device)
            moves = credit(moves._replace(early_S=early_S), reward_N, cfg)

        with log.phase(step, "update"):  # learn
            set_learning_rate(run.optimizer, cfg, step)
            for _ in range(cfg.mu):
                ratio_SU = update(policy, run.optimizer, moves, cfg, ranks, tally)
            moves = moves._replace(ratio_SU=ratio_SU)

        log.tell(step, tally, problems, answers, rewards, roll, moves)


def between_steps(run: Run, step: int, start: int) -> None:
    """With `step` steps done: save, stop if somebody asked for it, evaluate."""
    cfg, last = run.cfg, step == run.cfg.steps
    stopping = run.stopping()
    if step > start and (step % cfg.save_every == 0 or last or stopping):
        with run.log.phase(step, "save"):
            running.save_checkpoint(run, step)
    if stopping:
        raise running.stopped(run)
    splits = {}
    if step % cfg.eval_every == 0 or last:
        splits["val"] = run.val_set
    if last and run.test_set:
        splits["test"] = run.test_set
    for split, problems in splits.items():
        with run.log.phase(step, "eval"):
            m = evaluate(run, problems, cfg)
        run.log.eval(step, m, split)
        if split == "val":
            running.note_validation(run, step, m)


# ---- act -----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N trajectories. `when` is the step that revealed a token, T where the row had ended."""

    prompt_NP: Tensor
    real_NP: Tensor  # False at padding
    token_NC: Tensor
    when_NC: Tensor
    sure_NC: Tensor  # log-prob of each token when it was revealed
    entropy_NC: Tensor  # nats, of the distribution it was drawn from
    T: int
    forwards: int = 0  # forward passes times rows, for the cost

    @property
    def entropy_NT(self) -> Tensor:
        """H_t: the mean over the tokens revealed at each step; -inf where the row had ended."""
        size = (len(self.when_NC), self.T + 1)
        one_NC = torch.ones_like(self.entropy_NC)
        total_NT = one_NC.new_zeros(size).scatter_add(1, self.when_NC, self.entropy_NC)
        count_NT = one_NC.new_zeros(size).scatter_add(1, self.when_NC, one_NC)
        return torch.where(count_NT > 0, total_NT / count_NT, -math.inf)[:, : self.T]

    def lengths(self, end: int) -> Tensor:
        """Tokens before the first end token [N]."""
        return ((self.token_NC == end).cumsum(1) == 0).sum(1)


@torch.no_grad()
def rollout(
    policy: nn.Module,
    prompt_NP: Tensor,
    real_NP: Tensor,
    cfg: Config,
    u_NT2J: Tensor | None = None,
    watch: Callable[[int, Rollout], None] | None = None,
) -> Rollout:
    """Complete each prompt in T denoising steps (section 3); greedy at temperature 1 without noise.

    With `cfg.cache` "block", only a block's first step encodes the whole sequence; the others renew
    the block and see the rest as it was then (the dual cache of Fast-dLLM, arXiv 2505.22618).

    `watch(t, trajectories so far)` is called after each step. The host waits for the device once a
    block (which rows have ended?), and in between only where `watch` does.
    """
    (N, P), J, R = prompt_NP.shape, cfg.block, cfg.C // cfg.T
    end, mask = policy.config.eos_id, policy.config.mask_id
    temperature = 1.0 if u_NT2J is None else cfg.temperature
    token_NC = prompt_NP.new_full((N, cfg.C), mask)
    when_NC = torch.full_like(token_NC, cfg.T)
    sure_NC = torch.zeros((N, cfg.C), device=prompt_NP.device)
    entropy_NC = torch.zeros_like(sure_NC)
    roll = Rollout(prompt_NP, real_NP, token_NC, when_NC, sure_NC, entropy_NC, cfg.T)
    for first in range(0, cfg.C, J):
        rows = unfinished((token_NC[:, :first] == end).any(1), cfg.shard)
        prompt_nP, real_nL = prompt_NP[rows], with_completion(real_NP[rows], cfg.C)
        at_J = P + first + torch.arange(J, device=rows.device)
        cache = [[] for _ in policy.blocks] if cfg.cache == "block" else None
        for t in range(first // R, (first + J) // R):
            if len(rows) == 0:
                break
            ids_nL = torch.cat((prompt_nP, token_NC[rows]), dim=1)
            at_nM = places(ids_nL[:, at_J] == mask, first + J - t * R)  # every row hides as many
            h_nMD = pick(policy.features(ids_nL, real_nL, at_J, cache), at_nM)
            u_nM = place_nM = None
            if u_NT2J is not None:
                u_nM, place_nM = (u_nJ.gather(1, at_nM) for u_nJ in u_NT2J[rows, t].unbind(1))
            token_nM, sure_nM, entropy_nM = draw(policy, h_nMD, u_nM, temperature)
            random_order = cfg.order == "random" and place_nM is not None
            best_nR = reveal(place_nM if random_order else sure_nM, R)
            cells = rows[:, None], first + at_nM.gather(1, best_nR)
            token_NC[cells] = token_nM.gather(1, best_nR)
            when_NC[cells] = t
            sure_NC[cells] = sure_nM.gather(1, best_nR)
            entropy_NC[cells] = entropy_nM.gather(1, best_nR)
            roll.forwards += len(rows)
            if watch:
                watch(t, roll)
    cut_at_the_end(roll, J, end)
    return roll


def unfinished(done_N: Tensor, shard: bool) -> Tensor:
    """The rows to decode: those that have not ended, the first repeated up to a quarter of N.

    So the batch takes at most four sizes, and torch.compile sees four shapes. A repeated row draws
    with its own noise: it is written twice with the same tokens. With `shard` all of them: every
    rank must call the network equally often, and what rows that have ended decode is thrown away.
    """
    if shard:
        return torch.arange(len(done_N), device=done_N.device)
    live = (~done_N).nonzero().squeeze(1)
    quarter = -(-len(done_N) // 4)
    size = -(-len(live) // quarter) * quarter
    return live[torch.arange(min(size, len(done_N)), device=live.device) % max(1, len(live))]


def cut_at_the_end(roll: Rollout, J: int, end: int) -> None:
    """Fill the blocks after a row's first end token with end tokens that no step has revealed."""
    ended_NX = (roll.token_NC == end).unflatten(1, (-1, J)).any(2).cumsum(1).bool()
    before_NX = torch.cat((torch.zeros_like(ended_NX[:, :1]), ended_NX[:, :-1]), dim=1)
    after_NC = before_NX.repeat_interleave(J, dim=1)
    roll.token_NC = roll.token_NC.masked_fill(after_NC, end)
    roll.when_NC = roll.when_NC.masked_fill(after_NC, roll.T)
    roll.sure_NC = roll.sure_NC.masked_fill(after_NC, 0)
    roll.entropy_NC = roll.entropy_NC.masked_fill(after_NC, 0)


def log_policy(policy: nn.Module, h: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of features [..., D], ids never emitted left out."""
    logits = policy.head(h).masked_fill(policy.never_V, -math.inf)
    return torch.log_softmax(logits / temperature, dim=-1)


def draw(policy: nn.Module, h_NMD: Tensor, u_NM: Tensor | None, temperature: float):
    """A token for every position, its log-prob and the entropy (nats) there: three [N, M].

    Sampling inverts the distribution function at `u`: one random number a position whatever the
    vocabulary, and the tail is sampled. Without `u`, the most probable token.
    """
    h_QD, parts = h_NMD.flatten(0, 1), []
    for some in slabs(h_QD, policy.never_V):
        logp_QV = log_policy(policy, h_QD[some], temperature)
        prob_QV = logp_QV.exp()
        token_Q = logp_QV.argmax(-1) if u_NM is None else sample(prob_QV, u_NM.flatten()[some])
        sure_Q = logp_QV.gather(1, token_Q[:, None]).squeeze(1)
        parts.append((token_Q, sure_Q, torch.special.entr(prob_QV).sum(1)))
    return [torch.cat(part).view(h_NMD.shape[:2]) for part in zip(*parts)]


def sample(prob_QV: Tensor, u_Q: Tensor, W: int = 512) -> Tensor:
    """The token [Q] at `u` of the distribution function: first which W tokens, then which of them.

    So that float64, which the tail needs, is paid for W numbers and not for the vocabulary.
    """
    prob_QXW = nn.functional.pad(prob_QV, (0, -prob_QV.shape[1] % W)).unflatten(1, (-1, W))
    part_Q, rest_Q = invert(prob_QXW.sum(2), u_Q)
    prob_QW = prob_QXW.gather(1, part_Q[:, None, None].expand(-1, 1, W)).squeeze(1)
    token_Q = part_Q * W + invert(prob_QW, rest_Q)[0]
    return token_Q.clamp(max=prob_QV.shape[1] - 1)  # NaN would push the index past the end


def invert(prob_QX: Tensor, u_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum passes the share `u` of the total, and which share of the number there
    comes before that spot: two [Q]."""
    cdf_QX = prob_QX.double().cumsum(1)
    spot_Q1 = u_Q[:, None] * cdf_QX[:, -1:]
    at_Q1 = torch.searchsorted(cdf_QX, spot_Q1, right=True)
    at_Q1 = at_Q1.clamp(max=cdf_QX.shape[1] - 1)
    rest_Q1 = 1 - (cdf_QX.gather(1, at_Q1) - spot_Q1) / prob_QX.gather(1, at_Q1)
    return at_Q1.squeeze(1), rest_Q1.squeeze(1).clamp(min=0)


def slabs(h_QD: Tensor, never_V: Tensor) -> list[slice]:
    """Cut positions so that their logits stay small: memory without a knob.

    64 MiB a slab; 16 on a CPU, where malloc maps anything larger from the system each time.
    """
    most = 2**22 if never_V.device.type == "cpu" else 2**24
    size = max(1, most // len(never_V))
    return [slice(i, i + size) for i in range(0, len(h_QD), size)]


def reveal(score_NM: Tensor, R: int) -> Tensor:
    """Which R of the M hidden positions have the highest score [N, R], surest first; ties go to the
    earlier one."""
    return score_NM.sort(dim=1, descending=True, stable=True).indices[:, :R]


def places(where_NC: Tensor, count: int) -> Tensor:
    """The first `count` positions at which it is True [N, count], in order."""
    return where_NC.float().sort(dim=1, descending=True, stable=True).indices[:, :count]


def pick(x_SJD: Tensor, at_SR: Tensor) -> Tensor:
    """The vectors at these positions: [S, R, D]."""
    return x_SJD.gather(1, at_SR[..., None].expand(-1, -1, x_SJD.shape[-1]))


# ---- choose --------------------------------------------------------------------------------------


def select_steps(entropy_NT: Tensor, K: int, how: str, u_NT: Tensor | None = None) -> Tensor:
    """The K steps of each trajectory that learn [N, K], in order of time.

    The gradient lost by leaving a step out is bounded by its entropy (section 4), so `entropy`
    keeps the K largest. `uniform` takes the middle of K equal parts, `random` any (`u_NT`), `all`
    every step. Steps after a row's end (entropy -inf) come last, and only where nothing else is.
    """
    live_NT = entropy_NT > -math.inf
    if how == "all":
        return torch.arange(entropy_NT.shape[1], device=entropy_NT.device).expand_as(entropy_NT)
    if how == "uniform":
        t = torch.arange(entropy_NT.shape[1], device=entropy_NT.device)
        n_N1 = live_NT.sum(1, keepdim=True)
        part_NT, next_NT = (((t + i) * K / n_N1 + 0.5).floor() for i in (0, 1))
        score_NT = ((next_NT > part_NT) | (n_N1 <= K)).float()  # the K middles, or all there are
    else:
        score_NT = entropy_NT if how == "entropy" else u_NT
    score_NT = torch.where(live_NT, score_NT, -math.inf)
    return score_NT.sort(dim=1, descending=True, stable=True).indices[:, :K].sort(dim=1).values


class Moves(NamedTuple):
    """S moves to learn from: what was seen, what was done, and what it is worth.

    The R tokens of a move share U = 1 ratio. For diffu_grpo a row is one move of R = C tokens, and
    each has a ratio of its own, U = C.
    """

    prompt_SP: Tensor
    real_SP: Tensor
    state_SC: Tensor  # completion before the move: masks where hidden
    at_SR: Tensor  # positions in the completion
    token_SR: Tensor
    live_SU: Tensor  # False: the row had ended, or a filler
    t_S: Tensor | None = None  # when it was made
    drawn_SU: Tensor | None = None  # log-prob in the rollout, which may use a cache
    old_SU: Tensor | None = None  # log-prob under the policy that moved
    ref_SU: Tensor | None = None  # log-prob under the reference
    guess_SC: Tensor | None = None  # greedy one-step completion of the state
    early_S: Tensor | None = None  # its reward
    weight_SU: Tensor | None = None  # of a move drawn with a cache, already in its advantage
    adv_SU: Tensor | None = None
    ratio_SU: Tensor | None = None  # before the last update

    def take(self, rows: Tensor) -> Moves:
        return Moves(*(None if x is None else x[rows] for x in self))


def choose_moves(roll: Rollout, cfg: Config, mask: int, step: int, rows: range) -> Moves:
    """The moves of this rollout that learn."""
    device = roll.token_NC.device
    if cfg.method == "diffu_grpo":
        u_NP = uniform(roll.prompt_NP.shape[1:], rows, cfg.seed, step, "hide").to(device)
        return one_step_moves(roll, mask, u_NP)
    u_NT = None
    if cfg.select == "random":
        u_NT = uniform((cfg.T,), rows, cfg.seed, step, "select").to(device)
    return gather_moves(roll, select_steps(roll.entropy_NT, cfg.K, cfg.select, u_NT), mask)


def gather_moves(roll: Rollout, t_NK: Tensor, mask: int) -> Moves:
    """The moves made at the selected steps, trajectory by trajectory: S = N*K rows."""
    K, R, t_S1 = t_NK.shape[1], roll.token_NC.shape[1] // roll.T, t_NK.reshape(-1, 1)
    token_SC, when_SC, sure_SC, prompt_SP, real_SP = (
        x.repeat_interleave(K, dim=0)
        for x in (roll.token_NC, roll.when_NC, roll.sure_NC, roll.prompt_NP, roll.real_NP)
    )
    at_SR = places(when_SC == t_S1, R)
    return Moves(
        prompt_SP,
        real_SP,
        state_SC=torch.where(when_SC < t_S1, token_SC, mask),
        at_SR=at_SR,
        token_SR=token_SC.gather(1, at_SR),
        live_SU=(when_SC == t_S1).any(1, keepdim=True),
        t_S=t_S1.squeeze(1),
        drawn_SU=sure_SC.gather(1, at_SR).sum(1, keepdim=True),
    )


def one_step_moves(roll: Rollout, mask: int, u_NP: Tensor, hide: float = 0.15) -> Moves:
    """diffu_grpo (d1, arXiv 2504.12216): score the answer from a fully masked completion, once.

    The prompt loses 15 % of its tokens to masks, so that the mean-field estimate varies.
    """
    hidden_NP = (u_NP < hide) & roll.real_NP
    every_C = torch.arange(roll.token_NC.shape[1], device=u_NP.device)
    return Moves(
        torch.where(hidden_NP, mask, roll.prompt_NP),
        roll.real_NP,
        state_SC=torch.full_like(roll.token_NC, mask),
        at_SR=every_C.expand_as(roll.token_NC),
        token_SR=roll.token_NC,
        live_SU=roll.when_NC < roll.T,
    )


# ---- credit --------------------------------------------------------------------------------------


def early_rewards(run: Run, problems: list[data.Problem], guess_SC: Tensor | None) -> Tensor | None:
    """r_hat: the reward of the guess at each selected step [S], by the same function as r."""
    if guess_SC is None:
        return None
    guesses = texts(guess_SC, run.tokenizer, run.policy.config.eos_id)
    asked = [problem for problem in problems for _ in range(len(guesses) // len(problems))]
    return torch.tensor(run.judge(guesses, asked).result(), device=guess_SC.device)


def credit(moves: Moves, reward_N: Tensor, cfg: Config) -> Moves:
    """The moves with their advantage, which is the same for all ratios of a move."""
    live_NK = moves.live_SU.any(1).view(len(reward_N), -1)
    early_NK = None if moves.early_S is None else moves.early_S.view(live_NK.shape)
    adv_NK = stepwise_advantages(reward_N, early_NK, live_NK, cfg.G, cfg.lam)
    adv_SU = adv_NK.reshape(-1, 1).expand_as(moves.live_SU)
    if cfg.cache == "none":
        return moves._replace(adv_SU=adv_SU)
    weight_SU = cache_weight(moves)
    return moves._replace(adv_SU=adv_SU * weight_SU, weight_SU=weight_SU)


def stepwise_advantages(
    reward_N: Tensor, early_NK: Tensor | None, live_NK: Tensor, G: int, lam: float
) -> Tensor:
    """Advantage of each selected move [N, K] (section 5).

    Return G_t = (r + lam (r - r_hat_t)) / (1 + lam), minus the mean of the group's live moves in
    the same slot; 0 where the row had ended. Without early rewards G_t = r, which is EGSPO. No
    division by the standard deviation.
    """
    return_NK = reward_N[:, None].expand_as(live_NK)
    if early_NK is not None:
        return_NK = (return_NK + lam * (return_NK - early_NK)) / (1 + lam)
    return_BGK, live_BGK = (x_NK.unflatten(0, (-1, G)) for x_NK in (return_NK, live_NK))
    total_B1K = torch.where(live_BGK, return_BGK, 0).sum(1, keepdim=True)
    mean_B1K = total_B1K / live_BGK.sum(1, keepdim=True).clamp(min=1)
    return torch.where(live_BGK, return_BGK - mean_B1K, 0).flatten(0, 1)


def cache_weight(moves: Moves, cap: float = 2.0) -> Tensor:
    """min(pi(a) / pi_cached(a), cap) [S, U]: a cached rollout draws from a slightly different
    policy. This corrects the draw of the move itself, not of the states before and after it."""
    return (moves.old_SU - moves.drawn_SU).exp().clamp(max=cap)


# ---- learn ---------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(policy: nn.Module, moves: Moves, cfg: Config, guess: bool = False):
    """Log-prob of each move [S, U] under `policy`; with `guess` also its guess [S, C]."""
    S, logps, guesses = len(moves.live_SU), [], []
    for mb in micro_batches(moves, cfg.micro):
        h_SCD = completion_features(policy, mb)
        logps.append(move_logp(policy, h_SCD, mb, cfg))
        if guess:
            guesses.append(greedy_guess(policy, h_SCD, mb.state_SC))
    return torch.cat(logps)[:S], torch.cat(guesses)[:S] if guess else None


def update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    moves: Moves,
    cfg: Config,
    ranks: Ranks,
    tally: Tally,
) -> Tensor:
    """One optimizer step on all moves; the result depends on neither `micro` nor the rank count.

    Returns the ratios [S, U] before the step. Raises Halt where a number is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = ranks.sum(moves.live_SU.sum().float())
    ratios = []
    for mb in micro_batches(moves, cfg.micro):
        logp_SU = move_logp(policy, completion_features(policy, mb), mb, cfg)
        loss_SU, stats = clipped_loss(logp_SU, mb, cfg)
        (torch.where(mb.live_SU, loss_SU, 0).sum() / count).backward()
        for name, value_SU in stats.items():
            tally.add(name, value_SU, mb.live_SU)
        ratios.append(stats["ratio/mean"])
    norm = clip_gradients(parameters, cfg, ranks)
    demand_finite("gradient norm", norm, ranks)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tally.add("grad_norm", norm.detach())
    tally.add("lr", optimizer.param_groups[0]["lr"])
    return torch.cat(ratios)[: len(moves.live_SU)]


def clipped_loss(logp_SU: Tensor, mb: Moves, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate of section 4 [S, U], and its statistics by name, each [S, U].

    [-min(ratio A, clip(ratio) A) + beta k3] / R, where ratio = exp(logp - old) and k3 = exp(ref -
    logp) - (ref - logp) - 1. R, the tokens of a ratio, keeps a step of many from outweighing one
    of few.
    """
    ratio_SU = (logp_SU - mb.old_SU).exp()
    clipped_SU = ratio_SU.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)
    gain_SU = torch.minimum(ratio_SU * mb.adv_SU, clipped_SU * mb.adv_SU)
    away_SU = mb.ref_SU - logp_SU
    kl_SU = away_SU.exp() - away_SU - 1
    loss_SU = (cfg.beta * kl_SU - gain_SU) / (mb.at_SR.shape[1] // logp_SU.shape[1])
    stats = {
        "loss": loss_SU,
        "kl": kl_SU,
        "ratio/mean": ratio_SU,
        "clip_hi": ((ratio_SU > 1 + cfg.eps_high) & (mb.adv_SU > 0)).float(),
        "clip_lo": ((ratio_SU < 1 - cfg.eps_low) & (mb.adv_SU < 0)).float(),
    }
    return loss_SU, {name: value_SU.detach() for name, value_SU in stats.items()}


def move_logp(policy: nn.Module, h_SCD: Tensor, mb: Moves, cfg: Config) -> Tensor:
    """log pi(a_t | s_t) at the sampling temperature [S, U], of features of the completion."""
    if cfg.likelihood == "exact" and cfg.order == "low_confidence":
        first_S1 = mb.at_SR[:, :1] // cfg.block * cfg.block
        at_SJ = first_S1 + torch.arange(cfg.block, device=first_S1.device)
        logp_SJV = log_policy(policy, pick(h_SCD, at_SJ), cfg.temperature)
        hidden_SJ = mb.state_SC.gather(1, at_SJ) == policy.config.mask_id
        return exact_logp(logp_SJV, hidden_SJ, mb.at_SR - first_S1, mb.token_SR)[:, None]
    logp_SRV = log_policy(policy, pick(h_SCD, mb.at_SR), cfg.temperature)
    logp_SR = logp_SRV.gather(-1, mb.token_SR[..., None]).squeeze(-1)
    return logp_SR.unflatten(1, (mb.live_SU.shape[1], -1)).sum(2)


def exact_logp(logp_SJV: Tensor, hidden_SJ: Tensor, at_SR: Tensor, token_SR: Tensor) -> Tensor:
    """Log-prob [S] of a low-confidence move: its tokens, and that these positions won.

    log pi = sum_revealed log p_i(x_i) + sum_losers log F_j(c_min): positions draw independently, so
    each loser must have drawn something no surer than the least sure winner (ties go to the earlier
    position). Differentiable almost everywhere: which tokens count for F is piecewise constant.
    """
    sure_SR = pick(logp_SJV, at_SR).gather(-1, token_SR[..., None]).squeeze(-1)
    floor_S1 = sure_SR.detach().amin(1, keepdim=True)
    last_S1 = torch.where(sure_SR == floor_S1, at_SR, -1).amax(1, keepdim=True)
    position_J1 = torch.arange(logp_SJV.shape[1], device=at_SR.device)[:, None]
    below_SJV = logp_SJV < floor_S1[..., None]
    tie_SJV = (logp_SJV == floor_S1[..., None]) & (position_J1 > last_S1[..., None])
    prob_SJ = torch.where(below_SJV | tie_SJV, logp_SJV.exp(), 0).sum(-1)
    loser_SJ = hidden_SJ.scatter(1, at_SR, False)
    # a policy that moved far may leave a loser no token to draw: the smallest number, not log 0
    log_F_SJ = prob_SJ.clamp_min(torch.finfo(prob_SJ.dtype).tiny).log()
    return sure_SR.sum(1) + torch.where(loser_SJ, log_F_SJ, 0).sum(1)


@torch.no_grad()
def greedy_guess(policy: nn.Module, h_SCD: Tensor, state_SC: Tensor) -> Tensor:
    """The one-step completion [S, C]: the most probable token wherever the state is hidden."""
    hidden_SC, parts = state_SC == policy.config.mask_id, []
    h_QD = h_SCD[hidden_SC]
    for some in slabs(h_QD, policy.never_V):
        logits_QV = policy.head(h_QD[some]).masked_fill(policy.never_V, -math.inf)
        parts.append(logits_QV.argmax(-1))
    return state_SC.masked_scatter(hidden_SC, torch.cat(parts)) if parts else state_SC


def completion_features(policy: nn.Module, mb: Moves) -> Tensor:
    """What the head reads of the completion [S, C, D]."""
    ids_SL = torch.cat((mb.prompt_SP, mb.state_SC), dim=1)
    real_SL = with_completion(mb.real_SP, mb.state_SC.shape[1])
    return policy.features(ids_SL, real_SL)[:, mb.prompt_SP.shape[1] :]


def micro_batches(moves: Moves, micro: int) -> Iterator[Moves]:
    """Slices of exactly `micro` rows (static shapes); fillers at the end are not live."""
    S = len(moves.live_SU)
    for first in range(0, S, micro):
        rows = torch.arange(first, first + micro, device=moves.live_SU.device)
        mb = moves.take(rows % S)
        yield mb._replace(live_SU=mb.live_SU & (rows < S)[:, None])


# ---- evaluate ------------------------------------------------------------------------------------


def evaluate(
    run: Run, problems: list[data.Problem], cfg: Config, samples: int = 0
) -> dict[str, float]:
    """Decode every problem: accuracy with its Wilson 95 % interval, rewards, and what it cost.

    Greedy, or with `samples` that many draws a problem and pass@k. The ranks share the problems; a
    last batch is filled up with repeats that do not count, so that the shapes are the rollout's and
    every rank decodes as many batches.
    """
    policy, ranks, end, n = run.policy, run.ranks, run.policy.config.eos_id, max(1, samples)
    mine, tally = problems[ranks.rank :: ranks.world], Tally()
    size = max(1, cfg.B * cfg.G // n)
    began = time.monotonic()
    longest = len(problems[:: ranks.world])
    for first in running.progress(range(0, longest, size), "evaluating", ranks):
        chunk = mine[first : first + size]
        filled = itertools.islice(itertools.cycle(chunk or problems), size)
        asked = [problem for problem in filled for _ in range(n)]
        u_NT2J = None
        if samples:
            numbers = (ranks.rank + ranks.world * i for i in range(first, first + size))
            rows = [number * n + i for number in numbers for i in range(n)]
            u_NT2J = uniform((cfg.T, 2, cfg.block), rows, cfg.seed, "evaluate")
            u_NT2J = u_NT2J.to(ranks.device)
        roll = rollout(policy, *run.prompts(asked), cfg, u_NT2J)
        real = slice(len(chunk) * n)
        answers = texts(roll.token_NC, run.tokenizer, end)
        rewards = run.judge(answers[real], asked[real]).result()
        for reward in rewards:
            tally.add("accuracy", float(reward.correct))
            tally.add("reward", float(reward))
            for name, value in reward.parts.items():
                tally.add(f"reward/{name}", value)
        for i in range(0, len(rewards), n) if samples else ():
            wrong = sum(not reward.correct for reward in rewards[i : i + n])
            for k in sorted({k for k in (1, 2, 5, 10, 20, 50, 100, n) if k <= n}):
                tally.add(f"pass@{k}", 1 - math.comb(wrong, k) / math.comb(n, k))
        tally.add("tokens", roll.lengths(end)[real])
        tally.add("forwards", torch.full((len(chunk),), roll.forwards / len(asked)))
    m = tally.means(ranks.gather)
    seconds = time.monotonic() - began
    lo, hi = wilson(m["accuracy"], len(problems))
    speed = m["tokens"] * len(problems) * n / seconds
    return {**m, "lo": lo, "hi": hi, "n": len(problems), "seconds": seconds, "tok_s": speed}


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share `p` of `n` (Wilson 1927)."""
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def evaluate_only(run: Run, mode: Mode) -> None:
    """The test split, once for each length: a table on the terminal, its numbers in a file in --out
    (by default beside the weights)."""
    cfg, results = run.cfg, []
    running.introduce_evaluation(run, mode.samples)
    for length in mode.lengths or (cfg.C,):
        shape = dict(C=length, T=length // 2, block=min(cfg.block, length)) if mode.lengths else {}
        at_length = replace(cfg, **shape, K=1)
        m = evaluate(run, run.test_set, at_length, mode.samples)
        running.say_evaluation(at_length, m)
        results.append({"task": cfg.task, "split": "test", "length": length, "T": at_length.T, **m})
    running.write_evaluation(run, mode.samples, results)


# ---- main ----------------------------------------------------------------------------------------


def main() -> int:
    """Train, or what a mode asks for instead; returns the exit code.

    Only the opening turns a ValueError into a line about bad input: what goes wrong later on is a
    mistake in the code, perhaps in what you edited, and keeps its traceback.
    """
    try:
        cfg, mode = parse(sys.argv[1:])
        if mode.dry_run:
            return running.dry_run(cfg)
        if mode.merge:
            return running.merge(cfg)
        ranks, start = Ranks(), 0
        if mode.eval_only:
            run = running.open_evaluation(cfg, ranks)
        else:
            run, start = running.open_run(cfg, ranks, mode.resume)
    except (ValueError, OSError) as error:
        return running.complain(error)
    except KeyboardInterrupt:
        return 130
    if mode.eval_only:
        evaluate_only(run, mode)
    else:
        with running.closing(run):
            train(run, start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
