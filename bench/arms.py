"""egspo.py with one idea exchanged: what the study compares and no flag offers.

    python bench/arms.py ARM [flags of egspo.py]

    plain     nothing exchanged
    lowest    the K steps of lowest entropy learn, instead of highest
    joint     steps are ranked by the summed entropy of all hidden positions of their block, the
              paper's bound read literally, instead of by that of the revealed ones
    half      steps are selected among the more uncertain half of those of a trajectory; for
              `--select random` with K of at most half the steps
    placebo   the rewards of the guesses are shuffled within their group and slot; for tasks whose
              rows do not end before step K

It also knows tasks that separate better than the embedded ones: `sudoku-hard`, puzzles of 9 to 11
empty cells. Each arm replaces one function of egspo.py: a fork in one file.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import egspo

# ---- arms ----------------------------------------------------------------------------------------


def lowest() -> None:
    select = egspo.select_steps

    def reversed_(entropy_NT, K, how, u_NT=None):
        return select(torch.where(entropy_NT > -torch.inf, -entropy_NT, entropy_NT), K, how, u_NT)

    egspo.select_steps = reversed_


def uncertain_half(entropy_NT: torch.Tensor) -> torch.Tensor:
    """The entropies [N, T], -inf also at the less uncertain half of a row's live steps."""
    live_N1 = (entropy_NT > -torch.inf).sum(1, keepdim=True)
    rank_NT = entropy_NT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where(2 * rank_NT < live_N1, entropy_NT, -torch.inf)


def half() -> None:
    select = egspo.select_steps
    egspo.select_steps = lambda entropy_NT, *more: select(uncertain_half(entropy_NT), *more)


def joint() -> None:
    """`draw` is told of every hidden position: its entropies are added up for `select_steps`. All
    rows are decoded to their end, so that they stay in order."""
    select, draw, rollout, sums = egspo.select_steps, egspo.draw, egspo.rollout, []

    def adding(*args):
        drawn = draw(*args)
        sums.append(drawn[3].sum(1))
        return drawn

    def anew(*args, **more):
        sums.clear()
        return rollout(*args, **more)

    def by_sum(entropy_NT, K, how, u_NT=None):
        total_NT = torch.stack(sums, dim=1).to(entropy_NT)
        return select(torch.where(entropy_NT > -torch.inf, total_NT, entropy_NT), K, how, u_NT)

    egspo.draw, egspo.rollout, egspo.select_steps = adding, anew, by_sum
    egspo.unfinished = lambda done_N, shard: torch.arange(len(done_N))


def placebo() -> None:
    early = egspo.early_rewards

    def shuffled(run, problems, guess_SC):
        early_S, cfg = early(run, problems, guess_SC), run.cfg
        if early_S is None:
            return None
        early_BGK = early_S.view(-1, cfg.G, cfg.K)
        # a permutation, so one in G keeps its own
        u = egspo.uniform(early_BGK.shape[1:], range(len(early_BGK)), cfg.seed, run.log.it, "mix")
        return early_BGK.gather(1, u.argsort(1).to(early_BGK.device)).flatten()

    egspo.early_rewards = shuffled


ARMS = {
    "plain": lambda: None, "lowest": lowest, "half": half, "joint": joint, "placebo": placebo,
}  # fmt: skip

# ---- tasks ---------------------------------------------------------------------------------------


hard_rows = partial(data.sudoku_rows, fewest=9)
data.TASKS["sudoku-hard"] = data.Task(
    "sudoku-hard", hard_rows, data.sudoku_build, data.sudoku_judge, asks=data.SUDOKU
)

if __name__ == "__main__":
    arm, *flags = sys.argv[1:] or ["--help"]
    if arm not in ARMS:
        sys.exit(f"python bench/arms.py {'|'.join(ARMS)} [flags of egspo.py]")
    ARMS[arm]()
    sys.argv = [sys.argv[0], *flags]
    sys.exit(egspo.main())
