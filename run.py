"""What does a run need that is not the method: ranks, speed, optimizer, checkpoints, its opening?

`open_run` loads everything into a `Run`, which `egspo.train` then works with; `--merge`,
which needs no run, is here too. Nothing in this module knows how a step learns.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Before there is a group: this module keeps the one it finds when it is imported (at the latest by
# the first optimizer) beyond destroy_process_group, and its threads then abort some exits.
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor, nn

import data
import model
from config import Config, Mode, bring_defaults, carry_on, for_task, model_name
from events import EventLog, compact, git_commit, say
from model import use_bf16
from plan import step_cost

# ---- ranks ---------------------------------------------------------------------------------------


class Ranks:
    """This process among `world` (torchrun's environment), and the sums across them."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if cuda:
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= there:
                raise ValueError(f"--nproc-per-node: more than the {there} GPUs of this machine")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # a long save, download or reward is no failure; a rank that ends is noticed at once
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
            atexit.register(dist.destroy_process_group)
            sys.excepthook = last_words

    def rows(self, N: int) -> range:
        """The numbers of this rank's N rows in the rollout of all ranks."""
        return range(self.rank * N, (self.rank + 1) * N)

    def sum(self, x: Tensor) -> Tensor:
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def gather(self, x) -> list:
        if self.world == 1:
            return [x]
        parts = [None] * self.world
        dist.all_gather_object(parts, x)
        return parts


def sum_and_clip(parameters: list[nn.Parameter], cfg: Config, ranks: Ranks) -> Tensor:
    """Add up the gradients of all ranks, clip them, and return their norm before that.

    A gradient is already divided by the count of all ranks, so the sum is the mean. With --shard
    the backward pass has done it.
    """
    if ranks.world > 1 and not cfg.shard:
        sum_gradients([p.grad for p in parameters if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    return norm.full_tensor() if cfg.shard else norm


def sum_gradients(grads: list[Tensor], most: int = 2**24) -> None:
    """Over the ranks, in place. Small ones travel together, about `most` numbers at a time: a
    flattened copy of all would be 32 GB of an 8B model."""
    for grad in grads:
        if grad.numel() >= most:
            dist.all_reduce(grad)
    small = [grad for grad in grads if grad.numel() < most]
    ends = itertools.accumulate(grad.numel() for grad in small)
    for _, some in itertools.groupby(zip(ends, small), key=lambda pair: pair[0] // most):
        some = [grad for _, grad in some]
        flat = torch.cat([grad.flatten() for grad in some])
        dist.all_reduce(flat)
        for grad, part in zip(some, flat.split([grad.numel() for grad in some])):
            grad.copy_(part.view_as(grad))


class Tally:
    """Means over everything a metric names: all rows, micro-batches, updates and ranks. Also peaks
    and totals.

    Sums stay tensors on the device until the one read in `means`.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}
        self.totals: dict[str, float] = {}

    def add(self, name: str, value: Tensor | Sequence | float, where: Tensor | None = None) -> None:
        value = torch.as_tensor(value, dtype=torch.float64)
        where = torch.ones_like(value, dtype=torch.bool) if where is None else where
        pair = torch.stack((torch.where(where, value, 0).sum(), where.sum().double()))
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def total(self, name: str, value: float) -> None:
        self.totals[name] = self.totals.get(name, 0) + value

    def peak(self, name: str, value: Tensor) -> None:
        value = value.max()
        self.peaks[name] = torch.maximum(self.peaks[name], value) if name in self.peaks else value

    def means(self, gather: Callable[[object], list]) -> dict[str, float]:
        """`gather` brings together what all ranks have (`Ranks.gather`)."""
        mine, peaks = numbers(self.sums), numbers(self.peaks)
        means, parts = {}, gather((mine, peaks, self.totals))
        for name in dict.fromkeys(name for sums, *_ in parts for name in sums):
            pairs = [sums[name] for sums, *_ in parts if name in sums]
            means[name] = sum(total for total, _ in pairs) / max(1, sum(n for _, n in pairs))
        for name in peaks:
            means[name] = max(part[name] for _, part, _ in parts)
        for name in self.totals:
            means[name] = sum(part[name] for *_, part in parts)
        if torch.cuda.is_available():
            means["mem/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return means


def numbers(tensors: dict[str, Tensor]) -> dict[str, float | list[float]]:
    """Of tensors of one shape, fetched together: the device is waited for once."""
    found = {}
    for device in dict.fromkeys(x.device for x in tensors.values()):
        some = {name: x for name, x in tensors.items() if x.device == device}
        found.update(zip(some, torch.stack([*some.values()]).tolist()))
    return found


# ---- how a run ends ------------------------------------------------------------------------------


class Halt(Exception):
    """The run ends here: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def demand_finite(name: str, x: Tensor, ranks: Ranks) -> None:
    """Stop all ranks, before anything is changed, if this number is nan or inf on any of them."""
    if ranks.sum(1.0 - torch.isfinite(x).float()) > 0:
        here = math.isfinite(x)
        raise Halt(f"{name} is {'not finite on another rank' if here else x.item()}")


class StopSignal:
    """Ctrl-C and SIGTERM are noted, and acted on between two steps; a second one ends at once."""

    def __init__(self):
        self.number: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        say("stopping after this step; once more to stop at once, without a checkpoint")


def stopped(run: Run) -> Halt:
    """What to raise after a signal: how to go on."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", run.ranks.world))
    nodes = f"--nnodes {run.ranks.world // here} " * (run.ranks.world > here)
    start = f"torchrun {nodes}--nproc-per-node {here}" if run.ranks.world > 1 else "python"
    again = f"{start} {shlex.join([sys.argv[0], '--out', run.cfg.out, '--resume'])}"
    code = 128 + (run.stop.number or signal.SIGTERM)
    return Halt(f"stopped by a signal; continue with: {again}", code)


@contextlib.contextmanager
def closing(run: Run) -> Iterator[None]:
    """Write into the log how the run ended, whatever ended it; a Halt becomes an exit code."""
    try:
        with enough_memory(run.cfg, Halt):
            yield
        run.log.end("finished")
    except Halt as halt:
        run.log.end("stopped" if halt.code > 2 else "crashed", str(halt))
        latest = Path(run.cfg.out) / "checkpoints" / "latest"
        saved = f"the last checkpoint is {latest.resolve()}"
        saved = saved if latest.exists() else "there is no checkpoint yet"
        raise SystemExit(complain(f"step {run.log.it}: {halt}; {saved}", halt.code)) from None
    except BaseException as error:
        run.log.end("crashed", repr(error))
        raise


def leave(code: int) -> int:
    """The exit code of a failure. One of several ranks ends here: to take their group down first
    would be to wait for those inside a collective, and torchrun must see that this one failed."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def last_words(kind: type, error: BaseException, trace) -> None:
    """The traceback of one of several ranks, or a line where a collective failed: mostly because
    another has ended and said why; and its end."""
    if "third_party/gloo" in str(error) or isinstance(error, dist.DistError):
        complain(f"lost the other ranks: {' '.join(str(error).split())}", 1)
    sys.__excepthook__(kind, error, trace)
    leave(1)


@contextlib.contextmanager
def enough_memory(cfg: Config, kind: Callable) -> Iterator[None]:
    """Where a GPU's is not, one line with what takes less, as an exception of this kind."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = [f"--micro {cfg.micro // 2}"] * (cfg.micro > 1)
        less += ["--checkpointing"] * (not cfg.checkpointing)
        less += ["--quantize nf4"] * (cfg.lora_r > 0 and cfg.quantize == "none")
        less += ["--optimizer adamw8bit"] * (cfg.optimizer == "adamw" and not cfg.shard)
        told = str(error).partition(". GPU")[0]
        raise kind(f"{told}. Less takes: {', '.join([*less, 'fewer --B'])}") from None


def complain(error: Exception | str, code: int = 2) -> int:
    """One line to stderr, about bad usage or why this rank ends, and the exit code."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:  # if the first rank has said the same and ended, torchrun ends this one now
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    print(f"egspo: {f'rank {rank}: ' * (rank > 0)}{error}", file=sys.stderr, flush=True)
    return leave(code)


def progress(iterable, what: str, ranks: Ranks):
    """A bar for what takes longer than two seconds, on a terminal."""
    from tqdm import tqdm

    return tqdm(iterable, what, disable=ranks.rank > 0 or None, delay=2, leave=False)


# ---- what a step draws ---------------------------------------------------------------------------


def batch(problems: list[data.Problem], B: int, step: int, seed: int, ranks: Ranks) -> list:
    """This rank's B problems of a step.

    Every epoch is a permutation of its own; nothing is drawn and thrown away.
    """
    first = (step * ranks.world + ranks.rank) * B
    return [
        problems[permutation(len(problems), seed, i // len(problems))[i % len(problems)]]
        for i in range(first, first + B)
    ]


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    return uniform((n,), range(1), seed, "epoch", epoch)[0].argsort().tolist()


def uniform(shape: tuple[int, ...], rows: Sequence[int], *key) -> Tensor:
    """Uniform numbers [len(rows), *shape] in float64, a function of `key` and the row alone.

    Each row of the whole step's rollout has its own stream, so neither ranks nor batch-mates change
    what it draws, and there is no generator state to save.
    """
    streams = []
    for row in rows:
        digest = hashlib.blake2b(repr((*key, row)).encode(), digest_size=8).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        streams.append(torch.rand(shape, dtype=torch.float64, generator=stream))
    return torch.stack(streams)


# ---- speed ---------------------------------------------------------------------------------------


@functools.cache
def can_compile() -> bool:
    """On a CPU torch.compile needs the machine's C++ compiler, on a GPU Triton its C compiler."""
    kind, *names = ("C++", os.environ.get("CXX", "g++"), "clang++")
    if torch.cuda.is_available():
        kind, *names = ("C", os.environ.get("CC", "gcc"), "clang")
    lacks = "" if any(map(shutil.which, names)) else f"{kind} compiler ({' or '.join(names)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacks = lacks or "Python.h (of the package python3-dev)"
    if lacks:
        say(f"warning: no {lacks} found: --no-compile, 4 times slower")
    return not lacks


def accelerate(net: nn.Module, bf16: bool, compiled: bool) -> nn.Module:
    """The one place where speed is bought: bf16 autocast, and torch.compile of each block.

    The blocks are alike, so they share their graphs: one for each length and use (rollout, update,
    a reference in bf16). Past torch's limit of 8 it would go on uncompiled; prompts alone may have
    20 lengths (`model.padded_length`). The head stays in the weights' own precision, all after it
    in float32. Parameter names do not change.
    """
    net.bf16, net.compiled = bf16, compiled and can_compile()
    if net.compiled:
        torch._dynamo.config.recompile_limit = 128
        for block in net.blocks:
            block.compile(dynamic=False)
    return net


def halve(net: nn.Module, bf16: bool) -> None:
    """Store a reference's linear maps as autocast reads them. In float32 it stays as it is, even
    `requires_grad`, for a copy that differs in nothing has no graph of its own: the rollout's."""
    if bf16:
        net.requires_grad_(False)
        for block in net.blocks:
            for _, linear in model.linears(block):
                linear.to(torch.bfloat16)


def shard(net: nn.Module, bf16: bool, ranks: Ranks) -> None:
    """Leave each rank its part of every weight; a block's are gathered while it is used (FSDP2).

    With bf16 the blocks' are gathered as bf16: autocast's own copies would stay, whole, on every
    rank. Gradients are sums over the ranks: the loss is already divided by the count of all.
    """
    from torch.distributed import fsdp

    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
    for module in (*net.blocks, net):
        narrow = torch.bfloat16 if module is not net and bf16 else None
        precision = fsdp.MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
        fsdp.fully_shard(module, mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    for method in ("features", "head"):
        fsdp.register_fsdp_forward_method(net, method)


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
        group["weight_decay"] = cfg.weight_decay  # a checkpoint brings that of its time


# ---- opening a run -------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run holds; what training changes is in `policy` and `optimizer` alone."""

    cfg: Config
    policy: model.Transformer
    tokenizer: object
    ranks: Ranks
    test_set: list[data.Problem]
    train_set: list[data.Problem] = ()
    val_set: list[data.Problem] = ()
    others: dict[str, tuple[Config, list]] = field(default_factory=dict)  # tasks of --eval-also
    reference: Callable | None = None  # () -> context manager: the network without what was learnt
    optimizer: torch.optim.Optimizer | None = None
    log: EventLog | None = None
    stop: StopSignal | None = None
    background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def prompts(self, problems: list[data.Problem]) -> tuple[Tensor, Tensor]:
        """Left-padded ids [B, P] on this rank's device, and where they are real. P is near the
        longest of these: padding changes no result, and one long prompt costs its own batch only.
        """
        rows = prompt_ids(self.cfg, problems, self.tokenizer)
        P = model.padded_length(max(map(len, rows)), self.cfg.P)
        pair = model.left_pad(rows, P, self.policy.config.pad_id)
        return tuple(x.to(self.ranks.device) for x in pair)

    def stopping(self) -> bool:
        """Has somebody signalled one of the ranks?"""
        return any(self.ranks.gather(self.stop.number is not None))

    def count(self, tally: Tally, roll, S: int) -> None:
        """What a step took, of samples, updates, passes of a row through the network, and FLOPs."""
        cfg, L = self.cfg, roll.prompt_NP.shape[1] + self.cfg.C
        passes, flops = step_cost(cfg, self.policy, L, roll.forwards, S)
        tally.total("compute/samples", len(roll.token_NC))
        tally.total("compute/updates", cfg.repeats * cfg.updates_a_pass / self.ranks.world)
        tally.total("compute/forwards", sum(passes.values()))
        tally.total("compute/tflop", sum(flops.values()) / 1e12)

    def judge(self, answers: list[str], problems: list[data.Problem]) -> Future:
        """Their rewards, in a thread of its own, so that the device need not wait for them."""
        return self.background.submit(judged, self.cfg, answers, problems)


def judged(cfg: Config, answers: list[str], problems: list[data.Problem]) -> list[data.Reward]:
    """What is trained on: the reward of the answers with their given beginning, parts weighted."""
    beginning, weights = cfg.template.answer, cfg.part_weights
    rewards = data.TASKS[cfg.task].rewards([beginning + answer for answer in answers], problems)
    return [reward.weighted(weights) for reward in rewards]


def prompt_ids(cfg: Config, problems: list[data.Problem], tokenizer) -> list[list[int]]:
    prompts, template = [problem.prompt for problem in problems], cfg.template
    return model.chat_ids(prompts, tokenizer, template.system, template.answer)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder now, so that trouble with it is found first; not kept if it stays empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder}: cannot write there; name another folder")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def open_run(cfg: Config, ranks: Ranks, mode: Mode) -> tuple[Run, int]:
    """Load everything and say what was chosen. Returns the run and the step it starts from."""
    # the first rank's: clocks differ, and so may what a link on a network's disk points at
    out, path = ranks.gather((cfg.out, model.pinned(cfg.model)))[0]
    cfg = replace(cfg, out=out, model=path)
    with making(Path(cfg.out)), enough_memory(cfg, ValueError):
        if mode.eval_only:
            return open_evaluation(cfg, ranks), 0
        return load_run(cfg, ranks, mode.resume)


def load_run(cfg: Config, ranks: Ranks, resume: bool) -> tuple[Run, int]:
    out, checkpoint, log = Path(cfg.out), None, None
    if cfg.shard and ranks.world == 1:
        raise ValueError("--shard: one rank has nothing to share; start with torchrun")
    if cfg.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--optimizer adamw8bit: needs bitsandbytes (pip install bitsandbytes)")
    if resume:
        log = EventLog(cfg.out, ranks.rank)  # first of all: is nobody else writing it?
        latest, saved = out / "checkpoints" / "latest", checkpoints(out / "checkpoints")
        for name in ("latest", "best"):
            if (linked := out / "checkpoints" / name).is_dir() and not linked.is_symlink():
                raise ValueError(f"--resume: {linked} should be a link, not a copy: remove it")
        newest = latest.resolve() if latest.exists() else saved[-1] if saved else None
        if not newest and latest.is_symlink():
            raise ValueError(f"--resume: {latest.resolve()} is gone, and no other is left")
        checkpoint = ranks.gather(newest)[0]
        if not all(ranks.gather(checkpoint is None or checkpoint.exists())):
            raise ValueError(f"--out {out}: not one folder for all ranks, some lack {checkpoint}")
        if checkpoint and (checkpoint / "sharded").exists() != cfg.shard:
            flag = "--no-shard" if cfg.shard else "--shard"
            raise ValueError(f"--resume: {checkpoint} was written with {flag}: add that flag")
    train_set, val_set = load_problems(cfg, "train"), load_problems(cfg, "val", cfg.eval_n)
    test_set = load_problems(cfg, "test", cfg.eval_n) if cfg.test else []
    others = {task: for_task(cfg, task) for task in cfg.eval_also}
    others = {task: (own, load_problems(own, "val", cfg.eval_n)) for task, own in others.items()}
    policy, tokenizer = load_policy(cfg, str(checkpoint or cfg.model), ranks.device)
    cfg = measured(cfg, policy, train_set + val_set + test_set, tokenizer)
    for task, (own, problems) in others.items():
        others[task] = measured(own, policy, problems, tokenizer), problems
    bf16 = use_bf16(cfg.precision, ranks.device)
    if cfg.shard:  # before the reference is loaded: never two whole networks at a time
        shard(policy, bf16, ranks)
    reference = make_reference(cfg, policy, checkpoint, bf16, ranks)
    optimizer, start, compute = make_optimizer(policy, cfg), 0, {}
    if checkpoint:
        start, compute = restore(cfg, policy, optimizer, checkpoint, ranks)
    accelerate(policy, bf16, cfg.compile)
    log = log or EventLog(cfg.out, ranks.rank)
    if ranks.rank == 0:
        describe(cfg, out)
    name, ends = model_name(cfg.model), policy.ends
    log.compute = compute
    log.begin(cfg, name, ranks, tokenizer, ends, start if resume else None)
    introduce(cfg, policy, ranks, start)
    run = Run(
        cfg, policy, tokenizer, ranks, test_set, train_set, val_set, others, reference, optimizer,
        log, StopSignal(),
    )  # fmt: skip
    return run, start


def open_evaluation(cfg: Config, ranks: Ranks) -> Run:
    """What an evaluation on the test split needs: no optimizer, no reference, no log."""
    problems = load_problems(cfg, "test", cfg.eval_n)
    policy, tokenizer = load_policy(cfg, cfg.model, ranks.device)
    cfg = measured(cfg, policy, problems, tokenizer)
    accelerate(policy, use_bf16(cfg.precision, ranks.device), cfg.compile)
    return Run(cfg, policy, tokenizer, ranks, problems)


def load_problems(cfg: Config, split: str, most: int = 0) -> list[data.Problem]:
    task = data.TASKS[cfg.task]
    if task.runs_code:
        data.sandbox(cfg.unsafe_code)  # says now, before a model is loaded, what this machine lacks
    problems = task.load(split, cfg.data_dir, cfg.train_set, cfg.data)
    try:
        reward = task.reward("", problems[0])
    except Exception as error:  # no bad input, but a mistake in the code of a judge
        raise RuntimeError(f"the judge of {task.name} fails on an empty completion") from error
    if not isinstance(reward, data.Reward):
        raise ValueError(f"the judge of {task.name} must return a data.Reward, not {reward!r:.40}")
    if unknown := {*cfg.part_weights} - {*reward.parts}:
        known = f"a reward of {task.name} has {' and '.join(reward.parts)}"
        raise ValueError(f"--weights {cfg.weights}: no {' '.join(sorted(unknown))}; {known}")
    template = cfg.template
    return [template.asked(problem, task.asks) for problem in problems[: most or None]]


def load_policy(cfg: Config, path: str, device: torch.device) -> tuple[model.Transformer, object]:
    """The network with its adapters, and its tokenizer.

    A frozen base may be bf16. Weights that are trained stay float32 and are read as bf16 by
    autocast: added to a bf16 weight, an update of 1e-6 of it would be rounded away.
    """
    adapted = model.adapter_rank(path)
    if cfg.shard and adapted:
        raise ValueError(f"--shard: {path} is an adapter, and adapters are not sharded")
    if adapted not in (0, cfg.lora_r):
        say(f"{path}: an adapter of rank {adapted}, which --lora-r {cfg.lora_r} does not change")
    frozen = adapted or cfg.lora_r > 0
    dtype = torch.bfloat16 if frozen and use_bf16(cfg.precision, device) else torch.float32
    net = model.load(path, "cpu" if cfg.shard else device, dtype, cfg.quantize)
    if frozen and not adapted:
        torch.manual_seed(cfg.seed)  # the adapters start alike on all ranks
        model.add_lora(net, cfg.lora_r, cfg.lora_alpha)
    net.checkpointing = cfg.checkpointing
    tokenizer = model.load_tokenizer(path)
    net.never_V = net.never_V.to(device)  # with --shard the weights follow a block at a time
    net.never_V[len(tokenizer) :] = True
    net.ends = torch.tensor(
        model.end_ids(path, net.config, tokenizer, data.END_TOKENS), device=device
    )
    net.never_V[net.ends] = False  # padding too, where it ends an answer
    return net, tokenizer


def measured(cfg: Config, policy, problems: list[data.Problem], tokenizer) -> Config:
    """The settings with what only model and data can tell: the rank of an adapter that was loaded,
    and P, if it is 0, by the longest prompt. ValueError where a prompt would have to be cut."""
    sizes = list(map(len, prompt_ids(cfg, problems, tokenizer)))
    longer = sum(size > cfg.P for size in sizes)
    if cfg.P and longer:
        raise ValueError(
            f"--P {cfg.P}: {longer} of {len(sizes)} prompts are longer (the longest has "
            f"{max(sizes)} tokens), and prompts are never cut; raise --P, or 0 for the longest"
        )
    rank = next((lora.r for lora in model.adapters(policy).values()), 0)
    return replace(cfg, P=cfg.P or max(sizes), lora_r=rank)


def make_reference(
    cfg: Config, policy: model.Transformer, checkpoint: Path | None, bf16: bool, ranks: Ranks
) -> Callable | None:
    """What the KL is measured to, as a function that returns a context manager: the network that
    the run started from, by its adapters as they were, or off if they are new, or a frozen copy.
    None where no KL is."""
    if cfg.beta == 0:
        return None
    if cfg.lora_r > 0:
        if model.adapter_rank(cfg.model):
            model.keep_start(policy, model.find_folder(cfg.model))
        return functools.partial(model.as_reference, policy)
    if checkpoint or cfg.shard:
        frozen, _ = load_policy(cfg, cfg.model, ranks.device)
    else:
        frozen = copy.deepcopy(policy)
    halve(frozen, bf16)
    if cfg.shard:
        shard(frozen, bf16, ranks)
        return functools.partial(in_turn, policy, accelerate(frozen, bf16, cfg.compile))
    return functools.partial(contextlib.nullcontext, accelerate(frozen, bf16, cfg.compile))


@contextlib.contextmanager
def in_turn(policy: nn.Module, frozen: nn.Module) -> Iterator[nn.Module]:
    """The frozen copy, sharded as the policy is. What FSDP gathers first of a network, embedding
    and head, stays whole until it is told otherwise: 4 GB each at 8B, so only one at a time."""
    policy.reshard()
    yield frozen
    frozen.reshard()


def introduce(cfg: Config, policy: model.Transformer, ranks: Ranks, start: int) -> None:
    total, trained = model.count(policy)
    precision = "bf16" if policy.bf16 else "float32"
    speed = "compiled, a graph for each length" if policy.compiled else "eager"
    count = f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
    say(f"{cfg.task} with {cfg.model}: {count}")
    say(f"{ranks.world} x {ranks.device.type}, {precision}, {speed}")
    learnt = f"{cfg.K} of them learn, lam {cfg.lam}"
    learnt = learnt if cfg.method == "egspo" else f"{cfg.mu} updates of {cfg.method}"
    say(
        f"a step: {cfg.B * ranks.world} prompts x {cfg.G} samples, P {cfg.P}, C {cfg.C} in {cfg.T} "
        f"denoising steps, {learnt}"
    )
    if total < 1e8 and cfg.task in ("gsm8k", "math", "humaneval", "mbpp"):
        say(f"so small a model scores about zero on {cfg.task}: this run only shows that it works")
    if start:
        say(f"resuming after {start} of {cfg.steps} steps")
    say(f"watch it: python tui.py {cfg.out}")


def describe(cfg: Config, out: Path) -> None:
    """What a reader needs to repeat the run: settings, source and versions."""
    put(out / "config.json", json.dumps(asdict(cfg), indent=2))
    (out / "source").mkdir(exist_ok=True)
    started = Path(sys.argv[0])  # perhaps a task of the user's own
    for file in (*Path(__file__).resolve().parent.glob("*.py"), started):
        if file.suffix == ".py" and file.exists():
            shutil.copy(file, out / "source")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    lines = [f"python {platform.python_version()}", *versions, f"gpu {gpu}", f"git {git_commit()}"]
    lines.append(f"torchrun {os.environ.get('TORCHELASTIC_RUN_ID', 'none')}")  # config.restarted
    (out / "source" / "env.txt").write_text("\n".join(lines) + "\n")


# ---- between two steps ---------------------------------------------------------------------------


def between_steps(run: Run, step: int, start: int, evaluate: Callable) -> None:
    """With `step` steps done: save, stop if somebody asked for it, evaluate (`egspo.evaluate`)."""
    cfg, last = run.cfg, step == run.cfg.steps
    stopping = run.stopping()
    if step > start and (step % cfg.save_every == 0 or last or stopping):
        with run.log.phase(step, "save"):
            save_checkpoint(run, step)
    if stopping:
        raise stopped(run)
    if step % cfg.eval_every and not last:
        return
    splits, told = {"val": (cfg, run.val_set), **run.others}, {}
    if last and run.test_set:
        splits["test"] = cfg, run.test_set
    for split, (asked, problems) in splits.items():
        with run.log.phase(step, "eval"):
            told[split] = evaluate(replace(run, cfg=asked), problems, asked)
        run.log.eval(step, told[split], split)
    note_validation(run, step, told)


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(run: Run, step: int) -> None:
    """checkpoints/step-N, complete on disk before it gets its name; then `latest` points at it."""
    cfg, first = run.cfg, run.ranks.rank == 0
    if not first and not cfg.shard:
        return
    folder = Path(cfg.out) / "checkpoints"
    temporary, final = folder / ".writing", folder / f"step-{step}"
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        weights = save_shards(run, temporary / "sharded") if cfg.shard else None
        if not first:
            return
        model.save(run.policy, temporary, weights)
        run.tokenizer.save_pretrained(temporary)
        model.bring_ends(cfg.model, temporary)
        text = json.dumps(carry_on(cfg), indent=2)
        (temporary / "defaults.json").write_text(text + "\n")
        state = {} if cfg.shard else {"optimizer": run.optimizer.state_dict()}
        state |= {"step": step, "compute": run.log.compute, "world": run.ranks.world}
        torch.save(state, temporary / "trainer.pt")
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        link(folder / "latest", final.name)
        prune(folder, cfg.keep)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Halt(f"cannot write the checkpoint {final}: {error}") from None
    run.log.write("ckpt", it=step, path=str(final), durable=True)


def restore(
    cfg: Config, policy: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, ranks: Ranks
) -> tuple[int, dict[str, float]]:
    """The optimizer as it was; returns the steps that were done, and what they took."""
    state = read_state(checkpoint / "trainer.pt", ranks.device)
    if state["step"] > cfg.steps:
        raise ValueError(f"--steps {cfg.steps}: the run in {cfg.out} has done {state['step']}")
    if cfg.shard:
        load_shards(policy, optimizer, checkpoint / "sharded")
    else:
        optimizer.load_state_dict(state["optimizer"])
    if (world := state.get("world", ranks.world)) != ranks.world:
        say(
            f"warning: the run had {world} processes, now {ranks.world}: a step has other prompts, "
            "and some come again before all have had their turn"
        )
    return state["step"], state.get("compute", {})


def read_state(file: Path, device: torch.device | str, mmap: bool = False) -> dict:
    """What torch.save wrote there; ValueError names a file that is damaged."""
    try:
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; `latest` may point at an older checkpoint") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        raise ValueError(f"{file} is damaged or cut short") from None


def save_shards(run: Run, folder: Path) -> dict[str, Tensor]:
    """The optimizer's shards into `folder`; returns the whole weights, on the first rank alone.

    OSError on all ranks if one of them could not write.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    dist.barrier()  # for the first rank to make room
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


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first; a copy that somebody made beside them is none."""
    saved = (path for path in folder.glob("step-*") if path.name[5:].isdecimal())
    return sorted(saved, key=lambda path: int(path.name[5:]))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints by step, the best, the latest one, which is not
    among them where a run was set back, and those with an evaluation; or as much as can be."""
    linked = [(folder / name).resolve().name for name in ("best", "latest")]
    for old in checkpoints(folder)[:-keep]:
        if old.name not in linked and not any(old.glob("test-*")):
            shutil.rmtree(old, ignore_errors=True)


def note_validation(run: Run, step: int, told: dict[str, dict]) -> None:
    """Write what was told of each split into the step's checkpoint, if it has one; `best` follows
    the accuracy on the validation split."""
    folder, m = Path(run.cfg.out) / "checkpoints", told["val"]
    if run.ranks.rank > 0 or not (folder / f"step-{step}").exists():
        return
    record = validation(folder / "best").get("accuracy", -1)
    note = {"step": step, "split": "val", **m, "also": {task: told[task] for task in run.others}}
    put(folder / f"step-{step}" / "validation.json", json.dumps(compact(note)))
    if compact(m["accuracy"]) > record:  # which was rounded so
        link(folder / "best", f"step-{step}")


def validation(checkpoint: Path) -> dict:
    """What its validation.json says; empty without one that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return model.read_json(checkpoint / "validation.json")
    return {}


def put(file: Path, text: str) -> None:
    """Write a small file: the old one or the new one is there, whenever we are killed."""
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_text(text + "\n")
        sync(temporary)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error}") from None


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


# ---- what stands apart from training -------------------------------------------------------------

EVALUATED = "length  steps  accuracy  [95 % interval]  reward  tokens  tokens/s  forwards  seconds"


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share `p` of `n` (Wilson 1927)."""
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def evaluate_only(run: Run, mode: Mode, evaluate: Callable) -> None:
    """The test split by `egspo.evaluate`, once for each length: a table on the terminal, and files
    in --out (by default beside the weights), one of the figures and one of each length's answers.
    Figures of other lengths and other models stay; a length's answers are the last model's.
    """
    cfg, n, earlier = run.cfg, mode.samples, []
    file = Path(cfg.out) / f"test-{cfg.task}{'-samples' * bool(n)}.json"
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(file.read_text())
    results = {(row.get("model"), row["length"]): row for row in earlier}
    name = str(Path(cfg.model).resolve()) if Path(cfg.model).is_dir() else cfg.model
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once; what is written stays
    if m := validation(Path(cfg.model)):
        say(f"{cfg.model}: validation accuracy {m['accuracy']} after {m['step']} steps")
    how = f"{n} samples each" if n else "greedy"
    say(f"{len(run.test_set)} test problems of {cfg.task}, {how}")
    say(EVALUATED)
    for length in mode.lengths or (0,):
        shape = dict(C=length, T=length // 2, block=min(cfg.block, length)) if length else {}
        at_length = replace(cfg, **shape, K=1, minibatches=1)
        with enough_memory(cfg, lambda told: SystemExit(complain(told, 1))):
            m = evaluate(run, run.test_set, at_length, n, said := [])
        say_evaluation(at_length, m)
        what = {"model": name, "task": cfg.task, "split": "test", "length": at_length.C}
        results.pop((None, at_length.C), None)  # of a version that did not say
        results[name, at_length.C] = what | {"T": at_length.T} | m
        rows = answer_rows(run, said)
        if run.ranks.rank == 0:
            text = "\n".join(json.dumps(row, default=str, skipkeys=True) for row in rows)
            try:
                put(file, json.dumps(compact([*results.values()]), indent=1))
                put(file.with_name(f"{file.stem}-{at_length.C}.jsonl"), text)
            except OSError as error:
                raise SystemExit(complain(error, 1)) from None
    say(f"written: {file}, and the answers of each length in {file.stem}-LENGTH.jsonl")


def answer_rows(run: Run, said: list[tuple]) -> list[dict]:
    """All ranks' answers in the order of the problems, as rows that `data.py --score` reads."""
    place = {problem.id: i for i, problem in enumerate(run.test_set)}
    said = [each for part in run.ranks.gather(said) for each in part]
    return [
        {
            "id": problem.id, "question": problem.prompt, "answer": problem.answer,
            "completion": run.cfg.template.answer + answer, "correct": reward.correct,
            "reward": float(reward), **{f"reward/{name}": x for name, x in reward.parts.items()},
        }
        for problem, answer, reward in sorted(said, key=lambda each: place[each[0].id])
    ]  # fmt: skip


def pass_at(tally: Tally, rewards: list[data.Reward], n: int) -> None:
    """pass@k of each problem's n samples, which stand together, for some k (arXiv 2107.03374)."""
    for i in range(0, len(rewards), n):
        wrong = sum(not reward.correct for reward in rewards[i : i + n])
        for k in sorted({k for k in (1, 2, 5, 10, 20, 50, 100, n) if k <= n}):
            tally.add(f"pass@{k}", 1 - math.comb(wrong, k) / math.comb(n, k))


def say_evaluation(cfg: Config, m: dict[str, float]) -> None:
    """A line of the table of an evaluation."""
    say(
        f"{cfg.C:>6}  {cfg.T:>5}  {m['accuracy']:>8.3f}  [{m['lo']:.3f}, {m['hi']:.3f}]  "
        f"{m['reward']:>7.3f}  {m['tokens']:>6.1f}  {m['tok_s']:>8.0f}  {m['forwards']:>8.1f}  "
        f"{m['seconds']:>7.1f}"
    )
    for name in (name for name in m if name.startswith("pass@")):
        say(f"        {name} {m[name]:.3f}")


def merge(cfg: Config) -> int:
    """Fold the adapter of --model into full weights, a model folder of its own in --out: float32,
    or bf16 with --precision bf16. On the CPU, whose memory holds the whole. What was trained over
    nf4 goes onto the weights before they were rounded."""
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    if not model.adapter_rank(cfg.model):
        raise ValueError(f"--merge: {cfg.model} has no adapter")
    out = Path(cfg.out)
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {cfg.out}: not a new folder; name another")
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    policy = model.load(cfg.model, "cpu", dtype)
    model.merge_lora(policy)
    try:
        model.save(policy, cfg.out)
        model.load_tokenizer(cfg.model).save_pretrained(cfg.out)
        model.bring_ends(cfg.model, cfg.out)
        bring_defaults(cfg.model, cfg.out)
        (out / "README.md").write_text(model_card(cfg))
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)  # ours: it was empty
        raise ValueError(f"--out {out}: {error}") from None
    say(f"written: {cfg.out}, with a README.md to complete; to publish it:")
    say(f"  hf upload OWNER/{Path(cfg.out).name} {cfg.out}")
    return 0


def model_card(cfg: Config) -> str:
    """What a hub shows of a merged model: where it comes from, how it was trained and decoded, and
    its score on the validation split, if that was taken."""
    folder = model.find_folder(cfg.model)
    base, score = model.adapter_base(folder), ""
    if m := validation(folder):
        interval = f"95 % interval {m['lo']:.1%} to {m['hi']:.1%}, {m['n']} problems"
        rounded = ", over the base rounded to nf4" * (cfg.quantize == "nf4")
        score = f"Validation accuracy {m['accuracy']:.1%} ({interval}), greedy decoding{rounded}.\n"
    return (
        f"---\nbase_model: {base}\ntags: [masked-diffusion, reinforcement-learning]\n---\n"
        f"# {Path(cfg.out).name}\n\n{base}, trained by reinforcement learning on {cfg.task} "
        f"with a code for EGSPO (arXiv 2603.12554): an adapter of rank "
        f"{model.adapter_rank(cfg.model)}, merged into all weights.\n"
        f"Decoded in {cfg.T} denoising steps of {cfg.C // cfg.T} tokens, blocks of {cfg.block}, "
        f"{cfg.C} tokens in all.\n\n{score}"
    )
