"""How good is a gradient, and how good a guess? Measured at one state of the policy, without a run.

    python bench/estimator.py gradient --model MODEL --task TASK [--batches 80] [--others 40]
    python bench/estimator.py value    --model MODEL --task TASK [--states 128] [--completions 16]
    python bench/estimator.py gate     --model MODEL --task TASK [--states 128]
    python bench/estimator.py entropy RUN

gradient  Every arm's gradient of the same batches of 128 trajectories, against that of all steps
          under the exact likelihood. `aslant`: the sine of the angle between the two means, what no
          learning rate mends. `signal`: the squared length of the arm's mean gradient over the
          variance of one batch's, times how many batches of the arm cost as much as one of the
          reference; `of_entropy` its ratio to entropy's, of the same batches. Products are taken
          between different batches, so that noise cancels; intervals are 95 % by bootstrap over
          batches, and short of that where batches are few. The reference has --batches, the others
          --others. After an interruption, or with more, it goes on from what --sketches holds.
value     The reward of the greedy one-step guess at a state against the mean reward of sampled
          completions from it, by denoising step: mean of both, how many states are distinct, and
          the correlation over all, and over those of a problem alone (each less its problem's
          mean), which is what a group's baseline leaves. A trajectory is continued by keeping its
          noise up to there and drawing the rest anew.
gate      The deviation of the guesses' rewards within a group at the selected steps, as a share of
          that of the rewards. Below a half, stepwise advantages say next to nothing there.
entropy   A picture of a run's log: where entropy lies and which steps learn, over training.

MODEL is a folder: tiny, or a checkpoint. Results are printed, and appended to bench/estimator.jsonl
with --write. Gradients are kept as sketches of 2^14 numbers (products within about 1 %). Where the
record says runs/hard, which solves more from step to step:

    python bench/arms.py plain --task sudoku-hard --T 24 --K 2 --lam 0 --steps 12 --eval-every 2 \\
        --save-every 3 --keep 9 --no-test --out runs/hard
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import arms
import torch
from torch import Tensor
from tqdm import tqdm

import data
import egspo
import events
import plan
import run as running
from config import of_model
from model import texts

HALF = "random of half"  # random selection among the more uncertain half of the steps
ARMS = {  # changes of the settings
    "exact, all": dict(select="all", likelihood="exact"),
    "exact, entropy": dict(likelihood="exact"),
    "all": dict(select="all"),
    "entropy": dict(),
    "uniform": dict(select="uniform"),
    "random": dict(select="random"),
    HALF: dict(select="random"),
    "sampled": dict(select="sampled"),
    "stepwise": dict(lam=0.5),
}
REFERENCE = "exact, all"
SKETCH = 1 << 14


def open_run(args: argparse.Namespace) -> running.Run:
    """A run that is not trained; no file is written. What the arms change is as in the paper,
    whatever the model was trained with."""
    changes = dict(beta=0.0, lam=0.0, minibatches=1, max_grad_norm=1e30, lora_r=0)
    changes |= dict(select="entropy", likelihood="tokens", cache="none", normalise=False)
    cfg = replace(of_model(args.model, args.task), K=args.K, T=args.T, seed=args.seed, **changes)
    ranks = running.Ranks()
    problems = running.load_problems(cfg, "train")
    policy, tokenizer = running.load_policy(cfg, cfg.model, ranks.device)
    cfg = running.measured(cfg, policy, problems, tokenizer)
    running.accelerate(policy, running.use_bf16(cfg.precision, ranks.device), cfg.compile)
    return running.Run(cfg, policy, tokenizer, ranks, [], problems)


def trajectories(run: running.Run, step: int):
    """A batch of B*G: problems, rollout, rewards."""
    cfg = run.cfg
    asked = running.batch(run.train_set, cfg.B, step, cfg.seed, run.ranks)
    asked = [problem for problem in asked for _ in range(cfg.G)]
    roll = egspo.rollout(run.policy, *run.prompts(asked), cfg, noise(run, len(asked), step))
    answers = texts(roll.token_NC, run.tokenizer, run.policy.ends)
    rewards = torch.tensor(run.judge(answers, asked).result(), device=run.ranks.device)
    return asked, roll, rewards


def noise(run: running.Run, N: int, step: int, *key) -> Tensor:
    cfg = run.cfg
    u_NT2J = running.uniform((cfg.T, 2, cfg.block), range(N), cfg.seed, step, "draw", *key)
    return u_NT2J.to(run.ranks.device)


# ---- gradients -----------------------------------------------------------------------------------


class Sketcher:
    """Stands where `update` has its optimizer, and keeps a sketch of the gradient: every entry is
    added, with a sign, to one of 2^14 numbers."""

    def __init__(self, policy):
        parameters = [p for p in policy.parameters() if p.requires_grad]
        self.param_groups = [{"params": parameters, "lr": 0.0}]
        size, stream = sum(p.numel() for p in parameters), torch.Generator().manual_seed(0)
        self.place = torch.randint(0, SKETCH, (size,), generator=stream)
        self.sign = torch.randint(0, 2, (size,), generator=stream).float() * 2 - 1

    def step(self) -> None:
        flat = torch.cat([p.grad.flatten().cpu() for p in self.param_groups[0]["params"]])
        self.sketch = torch.zeros(SKETCH).index_add(0, self.place, flat * self.sign).double()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


def gradients(run: running.Run, batches: dict[str, int], file: Path) -> tuple[dict, dict]:
    """Of each arm the sketches [batches, 2^14] and the FLOPs of a batch; all of one rollout."""
    policy, sketcher = run.policy, Sketcher(run.policy)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = torch.load(file) if file.exists() else {"cfg": asdict(run.cfg), "flops": {}}
    if kept["cfg"] != asdict(run.cfg):
        sys.exit(f"--sketches {file}: of other settings; remove it, or name another file")
    flops, sketches = kept["flops"], kept.setdefault("sketches", {arm: [] for arm in ARMS})
    lacks = {arm: range(len(sketches[arm]), batches[arm]) for arm in ARMS}
    for step in tqdm(sorted(set().union(*lacks.values())), "batches"):
        asked, roll, rewards = trajectories(run, step)
        for arm in (arm for arm in ARMS if step in lacks[arm]):
            cfg = replace(run.cfg, **ARMS[arm])
            rows = range(len(asked))
            moves = selected(roll, cfg, policy, step, rows, arm)
            if cfg.stepwise:
                guess_SC = egspo.log_probs(policy, moves, cfg, guess=True)[2]
                moves = moves._replace(early_S=egspo.early_rewards(run, asked, guess_SC))
            moves = egspo.credit(moves, rewards, cfg)
            egspo.update(policy, sketcher, moves, cfg, run.ranks, running.Tally())
            sketches[arm].append(sketcher.sketch)
            L = roll.prompt_NP.shape[1] + cfg.C
            S = int(egspo.passed(moves, cfg).sum())
            _, cost = plan.step_cost(cfg, policy, L, roll.forwards, S)
            flops.setdefault(arm, sum(cost.values()))  # of the first batch, which all arms have
        torch.save(kept, whole := file.with_suffix(".writing"))
        whole.replace(file)
    return {arm: torch.stack(rows[: batches[arm]]) for arm, rows in sketches.items()}, flops


def selected(roll, cfg, policy, step: int, rows: range, arm: str) -> egspo.Moves:
    if arm != HALF:
        return egspo.choose_moves(roll, cfg, policy, step, rows)
    u_NT = running.uniform((cfg.T,), rows, cfg.seed, step, "select").to(roll.entropy_NC.device)
    t_NK = egspo.select_steps(arms.uncertain_half(roll.entropy_NT), cfg.K, "random", u_NT)
    return egspo.gather_moves(roll, t_NK, policy.config.mask_id)


def product(gram_XW: Tensor, count_W: Tensor) -> float:
    """<E a, E b> over pairs of different batches: unbiased, whatever the noise. gram_XW holds the
    products of the X batches of a with the W of b, X <= W; count_W how often each was drawn."""
    pair_XW = count_W[: len(gram_XW), None] * count_W[: gram_XW.shape[1]]
    pair_XW.fill_diagonal_(0)  # a batch that was drawn twice would meet its own noise
    return ((gram_XW * pair_XW).sum() / pair_XW.sum()).item()


def compare(grams: tuple[Tensor, Tensor, Tensor], count_W: Tensor, cheaper: float):
    """`aslant` (1 for one that points away) and `signal`; nan where the noise leaves no mean
    gradient to speak of."""
    signal, both, ref = (product(gram_XW, count_W) for gram_XW in grams)
    count_X = count_W[: len(grams[0])]
    square = ((grams[0].diagonal() * count_X).sum() / count_X.sum()).item()
    length = (signal * ref) ** 0.5 if signal > 0 and ref > 0 else math.nan
    return {
        "aslant": (1 - min(1, max(0, both / length)) ** 2) ** 0.5 if length > 0 else math.nan,
        "signal": cheaper * signal / max(1e-30, square - signal),
    }


def gradient(args: argparse.Namespace) -> list[dict]:
    run, rows = open_run(args), []
    batches = dict.fromkeys(ARMS, min(args.others, args.batches)) | {REFERENCE: args.batches}
    sketches, flops = gradients(run, batches, args.sketches)
    ref_WD, stream, W = sketches[REFERENCE], torch.Generator().manual_seed(0), args.batches
    drawn_IW = torch.randint(0, W, (1000, W), generator=stream)  # all arms' alike: they share noise
    counts = [torch.ones(W).double()]  # first each batch once: the estimate itself
    counts += [drawn_W.bincount(minlength=W).double() for drawn_W in drawn_IW]
    found = {}
    for arm, arm_XD in sketches.items():
        grams = arm_XD @ arm_XD.T, arm_XD @ ref_WD.T, ref_WD @ ref_WD.T
        cheaper = flops[REFERENCE] / flops[arm]
        found[arm] = [compare(grams, count_W, cheaper) for count_W in counts]
    for arm, each in found.items():
        for one, entropys in zip(each, found["entropy"]):
            one["of_entropy"] = one["signal"] / entropys["signal"]
        row = {"arm": arm, "batches": len(sketches[arm])}
        row["flops_of_reference"] = flops[arm] / flops[REFERENCE]
        for name, value in each[0].items():
            values = torch.tensor([one[name] for one in each[1:]])
            lo, hi = values.nanquantile(torch.tensor([0.025, 0.975])).tolist()
            row |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        rows.append(row)
    return rows


# ---- the one-step value --------------------------------------------------------------------------


def value(args: argparse.Namespace) -> list[dict]:
    """By denoising step; `states` trajectories, each continued `completions` times from there."""
    run, rows = open_run(args), []
    cfg, policy = run.cfg, run.policy
    N = cfg.B * cfg.G
    for t in tqdm(range(0, cfg.T, max(1, cfg.T // args.steps)), "steps"):
        early, mean, group, state = [], [], [], []
        for step in range(-(-args.states // N)):
            asked, roll, _ = trajectories(run, step)
            moves = egspo.gather_moves(roll, torch.full((N, 1), t), policy.config.mask_id)
            guess_SC = egspo.log_probs(policy, moves, replace(cfg, K=1), guess=True)[2]
            total = torch.zeros(N)
            for i in range(args.completions):
                u_NT2J = noise(run, N, step)
                u_NT2J[:, t:] = noise(run, N, step, "again", t, i)[:, t:]
                again = egspo.rollout(policy, *run.prompts(asked), cfg, u_NT2J)
                same = torch.where(again.when_NC < t, again.token_NC, policy.config.mask_id)
                assert torch.equal(same[moves.live_SU[:, 0]], moves.state_SC[moves.live_SU[:, 0]])
                answers = texts(again.token_NC, run.tokenizer, policy.ends)
                total += torch.tensor(run.judge(answers, asked).result())
            live = moves.live_SU[:, 0].cpu()
            early.append(egspo.early_rewards(run, asked, guess_SC).cpu()[live])
            mean.append((total / args.completions)[live])
            group.append((step * cfg.B + torch.arange(N) // cfg.G)[live])
            state.append(moves.state_SC.cpu()[live])
        early, mean, group, state = (
            torch.cat(some)[: args.states] for some in (early, mean, group, state)
        )
        inside = [
            x - (group.bincount(x) / group.bincount().clamp(min=1))[group] for x in (early, mean)
        ]
        everywhere, within = (
            torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in ((early, mean), inside)
        )
        distinct = torch.cat((group[:, None], state), dim=1).unique(dim=0)
        rows.append(
            {
                "t": t, "states": len(early), "each": args.completions,
                "guess": early.mean().item(), "completions": mean.mean().item(),
                "distinct": len(distinct), "correlation": everywhere, "within": within,
            }
        )  # fmt: skip
    return rows


def gate(args: argparse.Namespace) -> list[dict]:
    """Do guesses of a group differ enough for stepwise advantages to say anything? The deviation of
    their rewards within group and slot, against that of the rewards themselves."""
    run, early, final = open_run(args), [], []
    cfg = replace(run.cfg, lam=0.5)
    for step in tqdm(range(-(-args.states // (cfg.B * cfg.G))), "batches"):
        asked, roll, rewards = trajectories(run, step)
        moves = egspo.choose_moves(roll, cfg, run.policy, step, range(len(asked)))
        guess_SC = egspo.log_probs(run.policy, moves, cfg, guess=True)[2]
        early_NK = egspo.early_rewards(run, asked, guess_SC).view(-1, cfg.K)
        live_NK = moves.live_SU.any(1).view(-1, cfg.K)
        early.append(torch.where(live_NK, early_NK, rewards[:, None]).view(-1, cfg.G, cfg.K))
        final.append(rewards.view(-1, cfg.G))
    guess, reward = (torch.cat(x).var(1).mean().sqrt().item() for x in (early, final))
    return [{"deviation_of_guess": guess, "deviation": reward, "share": guess / reward}]


# ---- entropy over training -----------------------------------------------------------------------


def entropy(args: argparse.Namespace) -> list[dict]:
    """Two maps side by side, iterations downwards and denoising steps across: mean entropy, and the
    share of rows that chose the step."""
    from matplotlib import pyplot

    steps = {event["it"]: event for event in events.read(args.run) if event["e"] == "step"}.values()
    chosen = [[count / event["n"] for count in event["sel"]] for event in steps]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.5), sharey=True)
    shown = ("entropy, nats", [event["ent"] for event in steps]), ("share of rows", chosen)
    for axis, (title, cells) in zip(axes, shown):
        image = axis.imshow(cells, aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=axis, label=title)
        axis.set_xlabel("denoising step")
    axes[0].set_ylabel("iteration")
    figure.tight_layout()
    figure.savefig(HERE / f"entropy-{args.run.name}.png", dpi=150)
    return [{"written": f"bench/entropy-{args.run.name}.png"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("gradient", "value", "gate", "entropy"))
    parser.add_argument("run", nargs="?", type=Path, help="of entropy: a run folder")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="sudoku-hard", choices=data.TASKS)
    parser.add_argument("--T", type=int, default=24)
    parser.add_argument("--K", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=80, help="of gradient: of the reference")
    parser.add_argument("--others", type=int, default=40, help="of gradient: of the other arms")
    parser.add_argument("--sketches", type=Path, default=Path("runs/sketches.pt"))
    parser.add_argument("--states", type=int, default=128, help="of value and gate")
    parser.add_argument("--completions", type=int, default=16, help="of value, from each state")
    parser.add_argument("--steps", type=int, default=8, help="of value: denoising steps looked at")
    parser.add_argument("--write", action="store_true", help="append to bench/estimator.jsonl")
    args = parser.parse_args()
    about = dict(what=args.what, model=args.model, task=args.task, T=args.T, K=args.K)
    for row in globals()[args.what](args):
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(row), flush=True)
        if args.write:
            with open(HERE / "estimator.jsonl", "a") as file:
                file.write(json.dumps(about | row) + "\n")


if __name__ == "__main__":
    main()
