"""What does an iteration cost? Every figure is a ratio of two times measured in this one run.

    python bench/throughput.py iteration    one iteration against a straightforward implementation
    python bench/throughput.py floor        rollout and update against the machine's matmul rate
    python bench/throughput.py cache        the paper's 256 tokens with a cache against without
    python bench/throughput.py vocabulary   a rollout at V = 126,464 against V = 1,000
    python bench/throughput.py start        to the first step's line: compiling all, and again
    python bench/throughput.py ranks        two processes of one thread against one process of one
    python bench/throughput.py log          the event log's share of an iteration
    python bench/throughput.py memory       the peak that --dry-run expects against the measured one

`--size tiny|25m|8b` chooses a random model of that shape; 8b wants a GPU with 80 GB. Results are
printed, and appended to bench/throughput.jsonl with --write.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import egspo
import events
import model
import plan
import run as running
from config import Config

SHAPES = {
    "tiny": dict(d_model=128, n_layers=7, n_heads=4, mlp_hidden_size=352),
    "25m": dict(d_model=512, n_layers=8, n_heads=8, mlp_hidden_size=1376),
    "8b": dict(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288),
}
SETTINGS = {  # P, then the fields of a Config
    "tiny": (18, dict(C=24, T=12, block=24, K=4, B=16, G=8, micro=128, checkpointing=False)),
    "25m": (64, dict(C=64, T=32, block=32, K=4, B=2, G=4, micro=8, checkpointing=False)),
    "8b": (200, dict(C=256, T=128, block=32, K=8, B=6, G=8, micro=8)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config(size: str, **changes) -> Config:
    lora = dict(lora_r=128) if size == "8b" else dict(lora_r=0)
    return Config(**(SETTINGS[size][1] | lora | changes))


def network(size: str, vocabulary: int, cfg: Config):
    ids = dict(eos_token_id=0, pad_token_id=0, mask_token_id=1)
    raw = dict(model_type="llada", vocab_size=vocabulary, rope_theta=500000.0, **ids)
    dtype = (
        torch.bfloat16 if cfg.lora_r and running.use_bf16(cfg.precision, DEVICE) else torch.float32
    )
    torch.manual_seed(0)
    net = model.from_config(raw | SHAPES[size], DEVICE, dtype)
    if cfg.lora_r:
        model.add_lora(net, cfg.lora_r, cfg.lora_alpha)
    net.checkpointing = cfg.checkpointing
    net.never_V[:2] = True  # nor the end token, so that every row is decoded to its end
    return net


def ready(net, cfg: Config):
    return running.accelerate(net, running.use_bf16(cfg.precision, DEVICE), cfg.compile)


def prompts(size: str, cfg: Config):
    N, P = cfg.B * cfg.G, SETTINGS[size][0]
    ids = torch.randint(2, 300, (N, P), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def seconds(function, repeats: int = 3) -> float:
    """The fastest of a few runs after one that compiles; without repeats, the first counts."""
    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return min(times[1:] or times)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# ---- one iteration, ours and a straightforward one -----------------------------------------------


def act(net, size: str, cfg: Config) -> egspo.Rollout:
    rows = range(cfg.B * cfg.G)
    u_NT2J = running.uniform((cfg.T, 2, cfg.block), rows, 0, 0, "draw").to(DEVICE)
    return egspo.rollout(net, *prompts(size, cfg), cfg, u_NT2J)


def credit(roll: egspo.Rollout, cfg: Config) -> egspo.Moves:
    """Moves with made-up advantages: the reward is not what is measured here."""
    t_NK = egspo.select_steps(roll.entropy_NT, cfg.K, "entropy")
    moves = egspo.gather_moves(roll, t_NK, mask=1)
    adv_SU = torch.linspace(-1, 1, len(moves.live_SU), device=DEVICE)[:, None]
    return moves._replace(adv_SU=adv_SU)


def ours(net, optimizer, size: str, cfg: Config, reference=None) -> None:
    roll = act(net, size, cfg)
    moves = credit(roll, cfg)
    old_SU, _, _ = egspo.log_probs(net, moves, cfg, guess=True)
    with reference or contextlib.nullcontext(net) as other, torch.no_grad():
        _, ref_SU, _ = egspo.log_probs(other, moves, cfg)
    moves = moves._replace(old_SU=old_SU, ref_SU=ref_SU)
    egspo.update(net, optimizer, moves, cfg, running.Ranks(), running.Tally())


def straightforward(net, optimizer, size: str, cfg: Config) -> None:
    """The method as it is usually written: head and softmax at every position of prompt and
    completion at every step, Gumbel noise over the vocabulary, moves scored one by one, eager."""
    prompt_NP, _ = prompts(size, cfg)
    (N, P), R = prompt_NP.shape, cfg.C // cfg.T
    ids_NL = torch.cat((prompt_NP, prompt_NP.new_ones(N, cfg.C)), dim=1)
    states, entropies, at = [], [], []
    with torch.no_grad():
        for t in range(cfg.T):
            states.append(ids_NL.clone())
            logits = net(ids_NL).masked_fill(net.never_V, -torch.inf)
            noise = -torch.log(-torch.log(torch.rand_like(logits)))
            drawn = (logits / cfg.temperature + noise).argmax(-1)
            prob = torch.softmax(logits / cfg.temperature, -1)
            sure = prob.gather(-1, drawn[..., None]).squeeze(-1)
            entropy = torch.special.entr(prob).sum(-1)
            block = torch.arange(P + cfg.C, device=DEVICE)
            here = block >= P + t * R // cfg.block * cfg.block
            here &= block < P + (t * R // cfg.block + 1) * cfg.block
            sure = torch.where((ids_NL == 1) & here, sure, -1)
            chosen = sure.topk(R, dim=1).indices
            ids_NL = ids_NL.scatter(1, chosen, drawn.gather(1, chosen))
            entropies.append(entropy.gather(1, chosen).mean(1))
            at.append(chosen)
    t_NK = torch.stack(entropies, 1).topk(cfg.K, dim=1).indices

    def logp(n: int, t: int):
        logits = net(states[t][n : n + 1]).masked_fill(net.never_V, -torch.inf)
        logps = torch.log_softmax(logits / cfg.temperature, -1)[0, at[t][n]]
        return logps.gather(-1, ids_NL[n, at[t][n]][:, None]).sum(), logits.argmax(-1)

    for n in range(N):
        for t in t_NK[n].tolist():
            with torch.no_grad():
                (old, _), (ref, _) = logp(n, t), logp(n, t)
            new, _ = logp(n, t)
            loss = -(new - old).exp() + cfg.beta * ((ref - new).exp() - (ref - new) - 1)
            (loss / (N * cfg.K * R)).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def iteration(size: str, readings: int = 3) -> dict:
    """Both sides in turn, so that a neighbour's load falls on both; the ratio is the median's."""
    cfg, V = config(size), 340 if size == "tiny" else 126_464
    slow_net, net = network(size, V, cfg), ready(network(size, V, cfg), cfg)
    slow_optimizer, optimizer = (running.make_optimizer(one, cfg) for one in (slow_net, net))
    ours(net, optimizer, size, cfg)  # compiles
    pairs = []
    for _ in range(readings):
        slow = seconds(lambda: straightforward(slow_net, slow_optimizer, size, cfg), repeats=0)
        pairs.append((slow, seconds(lambda: ours(net, optimizer, size, cfg), repeats=0)))
        print(f"straightforward {slow:.2f} s, ours {pairs[-1][1]:.2f} s", file=sys.stderr)
    slow, fast = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    return dict(straightforward_s=slow, ours_s=fast, times_faster=ratio, readings=readings)


# ---- against the floor ---------------------------------------------------------------------------


def matmul_rate() -> float:
    """FLOP/s of a large matmul in the precision that the run uses."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    dtype = torch.bfloat16 if running.use_bf16("auto", DEVICE) else torch.float32
    a = torch.randn(n, n, dtype=dtype, device=DEVICE)
    return 2 * n**3 / seconds(lambda: a @ a, repeats=10)


def floor(size: str) -> dict:
    cfg, V = config(size), 340 if size == "tiny" else 1000 if size == "25m" else 126_464
    net = ready(network(size, V, cfg), cfg)
    optimizer = running.make_optimizer(net, cfg)
    L = SETTINGS[size][0] + cfg.C
    roll = act(net, size, cfg)
    moves = credit(roll, cfg)
    old_SU, _, _ = egspo.log_probs(net, moves, cfg)
    moves = moves._replace(old_SU=old_SU, ref_SU=old_SU)
    rate = matmul_rate()
    _, flops = plan.step_cost(cfg, net, L, roll.forwards, len(moves.live_SU))
    rollout_s = seconds(lambda: act(net, size, cfg))
    update_s = seconds(
        lambda: egspo.update(net, optimizer, moves, cfg, running.Ranks(), running.Tally())
    )
    rate = max(rate, matmul_rate())
    return dict(
        matmul_tflops=rate / 1e12, rollout_of_floor=flops["rollout"] / rate / rollout_s,
        update_of_floor=flops["update"] / rate / update_s, rollout_s=rollout_s, update_s=update_s,
    )  # fmt: skip


def cache(size: str) -> dict:
    """Two rows, 256 tokens in 128 steps and blocks of 32: 8 whole passes, 120 over a block."""
    times, net = {}, None
    for kind in ("none", "block"):
        cfg = config(size, C=256, T=128, block=32, B=1, G=2, cache=kind)
        net = net or ready(network(size, 1000, cfg), cfg)
        times[kind] = seconds(lambda: act(net, size, cfg), repeats=2)
    return dict(
        exact_s=times["none"], cached_s=times["block"], times_faster=times["none"] / times["block"]
    )


def vocabulary(size: str) -> dict:
    """With adapters on frozen bf16 weights, as models of such a vocabulary are trained."""
    cfg, times = config(size, lora_r=8), {}
    for V in (1000, 126_464):
        net = ready(network(size, V, cfg), cfg)
        times[V] = seconds(lambda: act(net, size, cfg), repeats=2)
    return dict(
        small_s=times[1000], large_s=times[126_464], times_slower=times[126_464] / times[1000]
    )


def memory(size: str) -> dict:
    """One whole iteration in this process, as a run takes it: what comes on top of the imports."""
    cfg = config(size, compile=False, P=SETTINGS[size][0], checkpointing=True)
    bf16 = running.use_bf16(cfg.precision, DEVICE)
    before = peak_bytes()
    net = ready(network(size, 126_464, cfg), cfg)
    reference = model.as_reference(net)
    if not cfg.lora_r:
        frozen = ready(network(size, 126_464, cfg), cfg)
        running.halve(frozen, bf16)
        reference = contextlib.nullcontext(frozen)
    ours(net, running.make_optimizer(net, cfg), size, cfg, reference)
    measured = peak_bytes() - before
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(net.config.raw))
        told = plan.plan(replace(cfg, model=folder), bf16, device=DEVICE.type)
    expected = told.peak - told.held["Python"]
    return dict(expected_gb=expected / 1e9, measured_gb=measured / 1e9, ratio=expected / measured)


def peak_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- whole runs ----------------------------------------------------------------------------------


def default_run(out: Path, world: int, words: str, **env: str) -> list[dict]:
    """The steps in the log of a run of the embedded model, under torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    words = f"--model tiny --task sudoku --no-test --out {out} {words}".split()
    subprocess.run(
        [sys.executable, *start, HERE.parent / "egspo.py", *words], check=True,
        env=os.environ | env, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return [event for event in events.read(out) if event["e"] == "step"]


def start(size: str) -> dict:
    """From the command to the first step's line, the evaluation before it included: with nothing
    compiled, and again. In steps, too: the third to sixth of the second run."""
    took = {}
    with tempfile.TemporaryDirectory() as folder:
        for state, steps in (("cold", 1), ("warm", 6)):
            began, out = time.time(), Path(folder) / state
            done = default_run(out, 1, f"--steps {steps}", TORCHINDUCTOR_CACHE_DIR=f"{folder}/kept")
            took[state] = done[0]["ts"] - began
    step = statistics.median(event["m"]["t/total"] for event in done[2:])
    return dict(
        cold_s=took["cold"], warm_s=took["warm"], step_s=step, cold_steps=took["cold"] / step,
        warm_steps=took["warm"] / step,
    )  # fmt: skip


def ranks(size: str) -> dict:
    """The default run for some steps, the same total work: wall time of the steps alone."""
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        for world, B in ((1, 16), (2, 8)):
            words = f"--steps 8 --eval-n 2 --B {B}"
            steps = default_run(Path(folder) / str(world), world, words, OMP_NUM_THREADS="1")
            speeds[world] = statistics.median(event["m"]["t/total"] for event in steps[2:])
    return dict(one_s=speeds[1], two_s=speeds[2], throughput=speeds[1] / speeds[2])


def log(size: str) -> dict:
    """Time spent in EventLog's own methods against a step's, in the default run."""
    spent = [0.0]

    def timed(function):
        def wrapper(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[0] += time.perf_counter() - began
            return result

        return wrapper

    for name in ("write", "tell"):  # `write` inside the other is counted twice
        setattr(events.EventLog, name, timed(getattr(events.EventLog, name)))
    out = f"/tmp/egspo-bench-{os.getpid()}-log"
    sys.argv = f"egspo.py --model tiny --task sudoku --steps 8 --eval-n 2 --out {out}".split()
    egspo.main()
    total = sum(event["m"]["t/total"] for event in events.read(out) if event["e"] == "step")
    return dict(log_s=spent[0], steps_s=total, share=spent[0] / total)


def main() -> None:
    parts = dict(
        iteration=iteration, floor=floor, cache=cache, vocabulary=vocabulary, start=start,
        ranks=ranks, log=log, memory=memory,
    )  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--size", choices=SHAPES, default="25m")
    parser.add_argument("--write", action="store_true", help="append to bench/throughput.jsonl")
    args = parser.parse_args()
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    figures = {key: float(f"{value:.3g}") for key, value in parts[args.part](args.size).items()}
    line = json.dumps(dict(part=args.part, size=args.size, device=name, **figures))
    print(line)
    if args.write:
        with open(HERE / "throughput.jsonl", "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
