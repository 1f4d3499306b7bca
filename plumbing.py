"""What does a run need that is not the method: ranks, speed, checkpoints, the event log, its costs?

Nothing here knows what is learnt, and egspo.py reads as the paper without it. `cfg` is an
egspo.Config, `run` an egspo.Run, `roll` an egspo.Rollout.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable

import torch
import torch.distributed as dist

# Before there is a group: this module keeps the one it finds when it is imported (at the latest by
# the first optimizer) beyond destroy_process_group, and its threads then abort some exits.
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor, nn

import model

if TYPE_CHECKING:
    from egspo import Config, Rollout, Run

HERE = Path(__file__).resolve().parent

# ---- ranks, statistics, stopping -----------------------------------------------------------------


class Halt(Exception):
    """The run ends here: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def demand_finite(name: str, x: Tensor, ranks: Ranks) -> None:
    """Stop all ranks, before anything is changed, if this number is nan or inf on any of them."""
    here = bool(torch.isfinite(x))
    if ranks.any(not here):
        raise Halt(f"{name} is {'not finite on another rank' if here else x.item()}")


class Ranks:
    """This process among `world` (torchrun's environment), and the sums across them."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)

    def rows(self, N: int) -> range:
        """The numbers of this rank's N rows in the rollout of all ranks."""
        return range(self.rank * N, (self.rank + 1) * N)

    def sum(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, x) -> list:
        if self.world == 1:
            return [x]
        parts = [None] * self.world
        dist.all_gather_object(parts, x)
        return parts

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """One flattened all-reduce. A gradient is already divided by the count of all ranks."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


class Tally:
    """Means over everything a metric names: all rows, micro-batches, updates and ranks.

    Sums stay tensors on the device until the one read in `means`.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float, where: Tensor | None = None) -> None:
        value = torch.as_tensor(value).double()
        where = torch.ones_like(value, dtype=torch.bool) if where is None else where
        pair = torch.stack((torch.where(where, value, 0).sum(), where.sum().double()))
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def peak(self, name: str, value: Tensor) -> None:
        self.peaks[name] = value.max()

    def means(self, ranks: Ranks) -> dict[str, float]:
        mine = {name: pair.tolist() for name, pair in self.sums.items()}
        peaks = {name: value.item() for name, value in self.peaks.items()}
        means = {}
        parts = ranks.gather((mine, peaks))
        for name in dict.fromkeys(name for sums, _ in parts for name in sums):
            pairs = [sums[name] for sums, _ in parts if name in sums]
            means[name] = sum(total for total, _ in pairs) / max(1, sum(n for _, n in pairs))
        for name in peaks:
            means[name] = max(part[name] for _, part in parts)
        return means


class StopSignal:
    """Ctrl-C and SIGTERM are noted, and acted on between two steps; a second one ends at once."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        say("stopping after this step; once more to stop at once, without a checkpoint")


def say(line: str, file=None) -> None:
    """To the terminal, from the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, file=file, flush=True)


def complain(error: Exception, stop: StopSignal | None) -> None:
    """One line to stderr: from the first rank, or from another whose trouble the first has not."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(2)  # where the first has said it and ended, torchrun ends this one meanwhile
    if rank == 0 or stop is None or stop.signal is None:
        print(f"egspo: {f'rank {rank}: ' * (rank > 0)}{error}", file=sys.stderr, flush=True)


def progress(iterable, what: str, ranks: Ranks):
    """A bar for what takes longer than two seconds, on a terminal."""
    from tqdm import tqdm

    quiet = ranks.rank > 0 or not sys.stderr.isatty()
    return tqdm(iterable, what, disable=quiet, delay=2, leave=False)


# ---- speed and memory ----------------------------------------------------------------------------


def use_bf16(cfg: Config, device: torch.device) -> bool:
    if cfg.precision != "auto":
        return cfg.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def accelerate(net: nn.Module, cfg: Config, device: torch.device) -> nn.Module:
    """The one place where speed is bought: bf16 autocast, and torch.compile of each block.

    The blocks are alike, so they share one compiled graph for each shape; the head stays in the
    weights' own precision, all after it in float32. Parameter names do not change.
    """
    if use_bf16(cfg, device):
        net.hidden = torch.autocast(device.type, torch.bfloat16)(net.hidden)
    if cfg.compile:
        for block in net.blocks:
            block.compile(dynamic=False)
    return net


def freeze(net: nn.Module, cfg: Config, device: torch.device) -> None:
    """Make a reference: its linear maps are stored as autocast reads them, in half the memory."""
    net.requires_grad_(False)
    if use_bf16(cfg, device):
        for block in net.blocks:
            for _, linear in model.linears(block):
                linear.to(torch.bfloat16)


def shard(net: nn.Module, cfg: Config, ranks: Ranks) -> None:
    """Leave each rank its part of every weight; a block's are gathered while it is used (FSDP2).

    Before `accelerate`, so that autocast and the compiled blocks see gathered weights. With bf16
    the blocks' are gathered as bf16: autocast's own copies would stay, whole, on every rank.
    Gradients are sums over the ranks: the loss is already divided by the count of all.
    """
    from torch.distributed import fsdp

    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
    for module in (*net.blocks, net):
        narrow = torch.bfloat16 if module is not net and use_bf16(cfg, ranks.device) else None
        precision = fsdp.MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
        fsdp.fully_shard(module, mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    for method in ("hidden", "head"):
        fsdp.register_fsdp_forward_method(net, method)


def can_compile() -> bool:
    """Triton brings its own compiler; on a CPU torch.compile needs the machine's."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    return torch.cuda.is_available() or any(shutil.which(name) for name in names)


def make_optimizer(net: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    parameters = [p for p in net.parameters() if p.requires_grad]
    settings = dict(lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: Config, step: int) -> None:
    """Linear warm-up, then constant: a function of the step alone."""
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(run: Run, step: int) -> None:
    """checkpoints/step-N, complete on disk before it gets its name; then `latest` points at it."""
    first = run.ranks.rank == 0
    if not first and not run.cfg.shard:
        return
    from safetensors import SafetensorError

    folder = Path(run.cfg.out) / "checkpoints"
    temporary, final = folder / ".writing", folder / f"step-{step}"
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        weights = save_shards(run, temporary / "sharded") if run.cfg.shard else None
        if not first:
            return
        model.save(run.policy, temporary, weights)
        run.tokenizer.save_pretrained(temporary)
        state = {} if run.cfg.shard else {"optimizer": run.optimizer.state_dict()}
        torch.save({"step": step, **state}, temporary / "trainer.pt")
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        link(folder / "latest", final.name)
        prune(folder, run.cfg.keep)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Halt(f"cannot write the checkpoint {final}: {error}")
    run.log.write("ckpt", it=step, path=str(final), durable=True)


def save_shards(run: Run, folder: Path) -> dict[str, Tensor]:
    """The optimizer's shards into `folder`; returns the whole weights, on the first rank alone.

    OSError on all ranks if one of them could not write.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    run.ranks.any(False)  # wait for the first rank to make room
    run.policy.reshard()  # after a forward pass the root's weights are still gathered
    try:
        state = get_optimizer_state_dict(run.policy, run.optimizer)
        checkpoint.save(state, checkpoint_id=folder)
    except checkpoint.CheckpointException as error:  # of every rank; itself no Exception
        raise OSError(next(iter(error.failures.values()))[0]) from None
    whole = ((name, p.detach().full_tensor()) for name, p in run.policy.named_parameters())
    return {name: weight.cpu() for name, weight in whole if run.ranks.rank == 0}


def load_shards(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The optimizer's state, for whatever number of ranks."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    state = state_dict.get_optimizer_state_dict(policy, optimizer)  # zeros, to be filled
    checkpoint.load(state, checkpoint_id=folder)
    state_dict.set_optimizer_state_dict(policy, optimizer, state)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    saved = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    best = (folder / "best").resolve().name
    for old in saved[:-keep]:
        if old.name != best:
            shutil.rmtree(old)


def note_evaluation(out: str, step: int, m: dict[str, float]) -> None:
    """Write the score into the step's checkpoint, if it has one; `best` follows the accuracy."""
    folder = Path(out) / "checkpoints"
    if not (folder / f"step-{step}").exists():
        return
    best = folder / "best" / "validation.json"
    record = json.loads(best.read_text())["accuracy"] if best.exists() else -1
    score = {"step": step, "split": "val", **m}
    (folder / f"step-{step}" / "validation.json").write_text(json.dumps(compact(score)) + "\n")
    if m["accuracy"] > record:
        link(folder / "best", f"step-{step}")


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def link(name: Path, target: str) -> None:
    """Point a symbolic link somewhere else in one step: a reader sees the old or the new one."""
    temporary = name.with_name(f".{name.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, name)
    sync(name.parent)


def last_checkpoint(out: str) -> str:
    latest = Path(out) / "checkpoints" / "latest"
    if not latest.exists():
        return "there is no checkpoint yet"
    return f"the last checkpoint is {latest.resolve()}"


# ---- the event log -------------------------------------------------------------------------------


def compact(x):
    """Numbers to 4 significant digits; nan and inf as strings, since JSON has none."""
    if isinstance(x, float):
        return float(f"{x:.4g}") if math.isfinite(x) else str(x)
    if isinstance(x, dict):
        return {key: compact(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [compact(value) for value in x]
    return x


PHASES = ("rollout", "logp", "score", "update")


class EventLog:
    """events.jsonl, schema 1, written by the first rank: one line and one os.write an event.

    A log that cannot be written is reported once and never stops training. A torn last line is
    closed first; after `resume` readers forget what came from later steps.
    """

    LONGEST = 65536

    def __init__(self, cfg: Config, ranks: Ranks):
        self.cfg, self.ranks = cfg, ranks
        self.fd, self.q, self.it, self.lost, self.torn = None, 0, 0, 0, False
        self.wrote = self.shown = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.pace: list[float] = []
        self.lock, self.closed = threading.Lock(), threading.Event()
        if ranks.rank > 0:
            return
        file = Path(cfg.out) / "events.jsonl"
        self.fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {cfg.out}: another process is writing this run") from None
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, 2 * self.LONGEST, max(0, size - 2 * self.LONGEST))
        if tail and not tail.endswith(b"\n"):
            os.write(self.fd, b"\n")
        self.q = next_number(tail)
        threading.Thread(target=self.heartbeat, daemon=True).start()

    def write(self, e: str, durable: bool = False, **fields) -> None:
        if self.fd is None:
            return
        with self.lock:
            head = f'{{"e":"{e}","q":{self.q},"ts":{time.time():.3f},'
            line = head + json.dumps(compact(fields), separators=(",", ":"), allow_nan=False)[1:]
            for optional in ("x0", "text", "prompt"):
                if len(line) >= self.LONGEST and optional in fields:
                    fields[optional] = None
                    line = head + json.dumps(compact(fields), separators=(",", ":"))[1:]
            text = ("\n" * self.torn + line + "\n").encode()
            try:
                self.torn = os.write(self.fd, text) < len(text)  # the disk is full
                if durable:
                    os.fsync(self.fd)
            except OSError as error:
                self.lost += 1
                if self.lost == 1:
                    say(f"warning: cannot write {self.cfg.out}/events.jsonl: {error}; going on")
            self.q += 1
            self.wrote = time.monotonic()

    def heartbeat(self) -> None:
        while not self.closed.wait(15):
            if time.monotonic() - self.wrote >= 15:
                self.write("hb", pid=os.getpid())

    def meta(self, resume: int | None) -> None:
        cfg = self.cfg
        boot = Path("/proc/sys/kernel/random/boot_id")
        self.write(
            "meta", v=1, run=Path(cfg.out).name, host=platform.node(),
            boot=boot.read_text().strip() if boot.exists() else "", pid=os.getpid(),
            git=git_commit(), argv=sys.argv, model=model_name(cfg.model), task=cfg.task,
            iters=cfg.steps, T=cfg.T, K=cfg.K, L=cfg.C, block=cfg.block,
            N=cfg.B * cfg.G * self.ranks.world, G=cfg.G, cfg=dataclasses.asdict(cfg), resume=resume,
        )  # fmt: skip

    @contextlib.contextmanager
    def phase(self, step: int, name: str):
        self.it = step
        self.write("phase", it=step, name=name)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def watcher(self, step: int, run: Run, prompt: str) -> Callable | None:
        """For `rollout`: at most `log_live` times a second, the steps since the last look."""
        if self.fd is None or self.cfg.log_live == 0:
            return None
        seen = 0

        def watch(t: int, roll: Rollout) -> None:
            nonlocal seen
            now = time.monotonic()
            if now - self.shown < 1 / self.cfg.log_live and t < self.cfg.T - 1:
                return
            self.shown = now
            entropy_NT = roll.entropy_NT[:, seen : t + 1]
            live_NT = entropy_NT > -math.inf
            mean_T = torch.where(live_NT, entropy_NT, 0).sum(0) / live_NT.sum(0)
            fields = (roll.when_NC, roll.token_NC, roll.entropy_NC)
            when, ids, nats = (x_NC[0].tolist() for x_NC in fields)
            shown = [
                [i, run.tokenizer.decode([ids[i]]), nats[i]]
                for i in range(self.cfg.C)
                if seen <= when[i] <= t
            ]
            what = {} if seen else {"prompt": prompt}
            self.write("denoise", it=step, b=0, t0=seen, H=mean_T.tolist(), s=0, rv=shown, **what)
            seen = t + 1

        return watch

    def step(self, step: int, m: dict[str, float], roll: Rollout, t_NK: Tensor | None) -> None:
        """The step's record, and one line on the terminal."""
        cfg, total = self.cfg, sum(self.seconds.get(name, 0) for name in PHASES)
        self.pace = (self.pace + [total])[-20:]
        left = (cfg.steps - step - 1) * sum(self.pace) / len(self.pace)
        m["reward/std"] = math.sqrt(max(0.0, m.pop("reward/square") - m["reward/mean"] ** 2))
        m["clip_frac"] = m["clip_hi"] + m["clip_lo"]
        m["tok_s"] = m["len/mean"] * len(roll.token_NC) * self.ranks.world / self.seconds["rollout"]
        m.update({f"t/{name}": self.seconds[name] for name in PHASES})
        m.update({"t/total": total, "eta_s": left})
        if self.ranks.device.type == "cuda":
            m["mem/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        live_NT = roll.entropy_NT > -math.inf
        ent_T = torch.where(live_NT, roll.entropy_NT, 0).sum(0) / live_NT.sum(0)
        sel_T = []
        if t_NK is not None:  # steps after a row's end fill up its K and do not count
            t_M = t_NK[live_NT.gather(1, t_NK)]
            sel_T = torch.bincount(t_M, minlength=cfg.T).tolist()
        self.write("step", it=step, m=m, ent=ent_T.tolist(), sel=sel_T, n=len(roll.token_NC))
        say(
            f"step {step + 1:>4}/{cfg.steps}  reward {m['reward/mean']:.3f}"
            f"  correct {m['correct']:.3f}  entropy {m['entropy/mean']:.2f}  kl {m['kl']:.4f}"
            f"  clip {m['clip_frac']:.3f}  {total:.1f} s  eta {left / 60:.1f} min"
        )

    def eval(self, step: int, m: dict[str, float], split: str) -> None:
        self.write("eval", it=step, m=m, n=m["n"], split=split, step=step)
        say(
            f"{split:<4} {step:>4}/{self.cfg.steps}  accuracy {m['accuracy']:.3f}"
            f" [{m['lo']:.3f}, {m['hi']:.3f}]"
            f"  reward {m['reward']:.3f}  of {m['n']} held out  {m['seconds']:.1f} s"
        )

    def samples(
        self, run, problems, answers, rewards, roll, t_NK, moves, ratio_S, early_NK, guess_SC
    ) -> None:
        """The whole trajectory of the first row of two prompts, and the first prompt's group."""
        if self.fd is None:
            return
        step, G, end = self.it, self.cfg.G, run.policy.config.eos_id
        length = roll.lengths(end).tolist()
        for row in dict.fromkeys((0, min(G, len(problems) - 1) // G * G)):
            ids = roll.token_NC[row].tolist()
            K = 0 if t_NK is None else t_NK.shape[1]
            own = [i for i in range(row * K, (row + 1) * K) if moves.live_S[i]]
            guess = None if guess_SC is None else guess_SC[own].tolist()
            self.write(
                "sample", it=step, s=row, p=row // G, g=row % G, prompt=problems[row].prompt,
                tok=pieces(ids, run.tokenizer), rev=roll.when_NC[row].tolist(),
                tent=(roll.entropy_NC[row] * 50).round().int().tolist(),
                ent=roll.entropy_NT[row].tolist(),
                sel=t_NK.flatten()[own].tolist() if K else [],
                srw=early_NK.flatten()[own].tolist() if guess else [],
                adv=moves.adv_S[own].tolist() if K else [],
                ratio=ratio_S[own].tolist() if K else [],
                rw={"reward": float(rewards[row]), **rewards[row].parts},
                gold=str(problems[row].answer)[:200], pred=answers[row][-200:],
                ok=rewards[row].correct, eos=0, len=length[row],
                x0=[pieces(x, run.tokenizer) for x in guess] if guess else None,
            )  # fmt: skip
        for p in range(min(2, len(problems) // G)):
            own = slice(p * G, (p + 1) * G)
            marks = [float(reward) for reward in rewards[own]]
            self.write("group", it=step, p=p, text=answers[own], rw=marks, len=length[own])

    def end(self, status: str, error: str | None = None) -> None:
        self.closed.set()
        if status == "crashed":
            self.write("alert", it=self.it, level="error", msg=error)
        self.write("end", status=status, it=self.it, err=error, durable=True)


def next_number(tail: bytes) -> int:
    """One more than the last event's number."""
    for line in reversed(tail.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(line)["q"] + 1
    return 0


def pieces(ids: list[int], tokenizer) -> list[str]:
    """Each token as text; a character split over tokens stands at the first, the rest are empty."""
    texts, first = [], 0
    for i in range(len(ids)):
        text = tokenizer.decode(ids[first : i + 1])
        if text.endswith("\ufffd") and i - first < 3:
            texts.append("")
            continue
        texts.append("")
        texts[first], first = text, i + 1
    return texts


def model_name(path: str) -> str:
    """What to call a model: a checkpoint by its run."""
    folder = Path(path)
    return folder.parents[1].name if folder.parent.name == "checkpoints" else folder.name


def git_commit() -> str:
    ask = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    return ""


# ---- what a run costs, and what made it ----------------------------------------------------------


def describe_run(cfg: Config, out: Path) -> None:
    """What a reader needs to repeat the run: settings, source and versions."""
    text = json.dumps(dataclasses.asdict(cfg) | {"resume": False}, indent=2)
    temporary = out / ".config.json"
    temporary.write_text(text + "\n")
    sync(temporary)
    os.replace(temporary, out / "config.json")  # the old one or the new one, whenever we are killed
    (out / "source").mkdir(exist_ok=True)
    for file in HERE.glob("*.py"):
        shutil.copy(file, out / "source")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    names = ("torch", "transformers", "tokenizers", "safetensors", "tyro", "bitsandbytes")
    versions = [f"{name} {version(name)}" for name in names]
    lines = [f"python {platform.python_version()}", *versions, f"gpu {gpu}", f"git {git_commit()}"]
    lines.append(f"torchrun {os.environ.get('TORCHELASTIC_RUN_ID', 'none')}")
    (out / "source" / "env.txt").write_text("\n".join(lines) + "\n")


def restarted(out: Path) -> bool:
    """Has torchrun (--max-restarts) started the run in this folder anew after a failure?

    An agent counts only the failures of its own workers; on other nodes the job's id tells.
    """
    job, file = os.environ.get("TORCHELASTIC_RUN_ID", "none"), out / "source" / "env.txt"
    if not file.exists() or job == "none":
        return file.exists() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return f"torchrun {job}" in file.read_text().splitlines()


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def forward_flops(net: nn.Module, L: int, positions: int) -> float:
    """Of one row: each weight of a block times each token, attention, and the head where asked."""
    c, weights = net.config, sum(w.numel() for w in net.blocks.parameters())
    attention = 4 * c.n_layers * c.d_model * L**2
    return 2 * weights * L + attention + 2 * positions * c.d_model * c.vocab_size


def plan(cfg: Config, bf16: bool, ranks: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes at the peak of a rank by part, FLOPs of its iteration by phase, from shapes alone."""
    folder = model.find_folder(cfg.model, cfg.revision or None, ["config.json"])
    net = model.from_config(folder, "meta")
    wide, d_ff = 2 if bf16 else 4, net.blocks[0].up.out_features
    if cfg.lora_r:
        model.add_lora(net, cfg.lora_r, cfg.lora_alpha)
    c = net.config
    maps = sum(
        (linear.base if cfg.lora_r else linear).weight.numel()
        for block in net.blocks for _, linear in model.linears(block)
    )  # fmt: skip
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    other = sum(p.numel() for p in net.parameters()) - maps - (trained if cfg.lora_r else 0)
    P, R, S = cfg.P or 256, cfg.C // cfg.T, cfg.B * cfg.G * cfg.K
    L, S = P + cfg.C, S if cfg.method == "egspo" else cfg.B * cfg.G
    each = {"none": wide, "int8": 1, "nf4": 0.516}[cfg.quantize]  # nf4: 4 bits and its scales
    saved = cfg.micro * L * (14 * c.d_model + 4 * d_ff) * wide  # what a block keeps for backward
    stream = cfg.micro * L * c.d_model * wide
    head = cfg.micro * R * c.vocab_size * 4 * 5  # float32 logits, log-softmax and their gradients
    memory = {
        "weights": maps * each + other * wide + trained * 4 if cfg.lora_r else (maps + other) * 4,
        "reference": 0 if cfg.lora_r else maps * wide + other * 4,
        "bf16 copies": 0 if cfg.lora_r or not bf16 else maps * 2,
        "gradients": trained * 4,
        "optimizer": trained * (8 if cfg.optimizer == "adamw" else 2.1),
        "activations": c.n_layers * stream + saved if cfg.checkpointing else c.n_layers * saved,
        "logits": max(head, min(2**24, cfg.B * cfg.G * cfg.block * c.vocab_size) * 40),
    }
    if cfg.shard:  # but what is gathered for one block at a time is small
        for part in ("weights", "reference", "gradients", "optimizer"):
            memory[part] /= ranks
        memory["bf16 copies"] /= c.n_layers
    once = forward_flops(net, L, R)
    backward = (2 if cfg.lora_r else 3) + cfg.checkpointing  # a frozen weight has no gradient
    flops = {
        "rollout": cfg.B * cfg.G * cfg.T * forward_flops(net, L, cfg.block),
        "logp": S * (once + forward_flops(net, L, R + cfg.C)),
        "update": cfg.mu * S * backward * once,
    }
    return {"parameters": maps + other, "trained": trained, **memory}, flops


def dry_run(cfg: Config) -> int:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    memory, flops = plan(cfg, cfg.precision != "float32", ranks)
    parameters, trained = memory.pop("parameters"), memory.pop("trained")
    total = sum(memory.values())
    say(f"{cfg.model}: {parameters / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained")
    P = cfg.P or "256 (assumed)"
    say(
        f"a step on each rank: {cfg.B} prompts x {cfg.G} samples, P {P}, C {cfg.C}, T {cfg.T}, "
        f"K {cfg.K}, micro {cfg.micro}"
    )
    for part, size in memory.items():
        say(f"  {part:<12} {size / 1e9:>8.2f} GB")
    fits = [f"{gb} GB: {'fits' if total < 0.92e9 * gb else 'no'}" for gb in (24, 48, 80, 141)]
    say(f"  {'peak':<12} {total / 1e9:>8.2f} GB    {'   '.join(fits)}")
    for phase, count in flops.items():
        say(f"  {phase:<12} {count / 1e12:>8.1f} TFLOP")
    return 0
