"""EGSPO-SA as one loop, with the real functions and no run folder: the file to copy and change.

    python examples/loop.py

Each line names the function to edit. No evaluation, no checkpoints, no monitor: `python egspo.py`.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
from config import of_model
from egspo import choose_moves, credit, log_probs, rollout, update
from model import chat_ids, left_pad, texts
from run import Ranks, Tally, batch, load_policy, make_optimizer, uniform


def main(steps: int = 12) -> None:
    ranks, task = Ranks(), data.TASKS["sudoku"]
    cfg = replace(of_model("tiny", task.name), B=4, lr=3e-4)
    policy, tokenizer = load_policy(cfg, cfg.model, ranks.device)
    reference, optimizer, c = copy.deepcopy(policy), make_optimizer(policy, cfg), policy.config
    problems = task.load("train")
    P = max(map(len, chat_ids([problem.prompt for problem in problems], tokenizer)))
    for step in range(steps):
        asked = batch(problems, cfg.B, step, cfg.seed, ranks)
        asked = [problem for problem in asked for _ in range(cfg.G)]
        prompts = left_pad(chat_ids([p.prompt for p in asked], tokenizer), P, c.pad_id)
        prompts = [x.to(ranks.device) for x in prompts]
        noise = uniform((cfg.T, 2, cfg.block), range(len(asked)), cfg.seed, step, "draw")

        roll = rollout(policy, *prompts, cfg, noise.to(ranks.device))  # act
        moves = choose_moves(roll, cfg, policy, step, range(len(asked)))  # choose
        old_SU, _, guess_SC = log_probs(policy, moves, cfg, guess=True)
        with torch.no_grad():
            _, ref_SU, _ = log_probs(reference, moves, cfg)
        rewards = task.rewards(texts(roll.token_NC, tokenizer, policy.ends), asked)  # credit
        asked = [problem for problem in asked for _ in range(cfg.K)]
        early = task.rewards(texts(guess_SC, tokenizer, policy.ends), asked)
        early_S, reward_N = (torch.tensor(x, device=ranks.device) for x in (early, rewards))
        moves = moves._replace(old_SU=old_SU, ref_SU=ref_SU, early_S=early_S)
        moves, tally = credit(moves, reward_N, cfg), Tally()
        update(policy, optimizer, moves, cfg, ranks, tally)  # learn
        m, solved = tally.means(ranks.gather), sum(r.correct for r in rewards) / len(rewards)
        print(f"step {step}  reward {reward_N.mean():.3f}  solved {solved:.2f}  kl {m['kl']:.3f}")


if __name__ == "__main__":
    sys.exit(__doc__) if sys.argv[1:] else main()
