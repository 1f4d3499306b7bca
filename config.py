"""Which settings are there, which of them suit a model, and what is a bad value?

`parse` turns a command line into a `Config`, checked and constant from then on, and a `Mode`: what
to do instead of starting a new run. A model may bring its own defaults: `defaults.json` in its
folder, as tiny/ has it, with the `task` it was made for, `settings` for all tasks and `by_task`
what one of them wants otherwise. A checkpoint inherits the task and the sizes of its run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch

import data
import model


@dataclass(frozen=True)
class Settings:
    """Train a masked diffusion language model by reinforcement learning (EGSPO, EGSPO-SA)."""

    task: str = "sudoku"  # what to learn: sudoku countdown toycode gsm8k math humaneval mbpp
    model: str = "GSAI-ML/LLaDA-8B-Instruct"  # a folder, a hub id[@revision], or tiny (embedded)
    out: str = ""  # run folder; without it runs/<task>-<model>-<time>
    steps: int = 1000  # one rollout each, learnt in --mu times --minibatches updates
    seed: int = 0  # of everything random: batches, draws, selection, new adapters
    eval_every: int = 50  # steps between evaluations on the validation split
    eval_n: int = 0  # problems of an evaluation; 0: the whole split
    test: bool = True  # evaluate the test split once, after the last step
    eval_also: tuple[str, ...] = ()  # other tasks to evaluate too, on their validation splits
    save_every: int = 50  # steps between checkpoints; the best is one that was evaluated too
    keep: int = 3  # last checkpoints kept, beside the best on the validation split

    method: Literal["egspo", "diffu_grpo"] = "egspo"  # diffu_grpo: the one-step baseline of d1
    select: Literal["entropy", "uniform", "random", "all", "sampled"] = "entropy"  # which K learn
    likelihood: Literal["tokens", "exact"] = "tokens"  # exact: count the choice of positions too
    cache: Literal["none", "block"] = "none"  # block: encode the other blocks once, not T times
    order: Literal["low_confidence", "random"] = "low_confidence"  # which positions are revealed
    lam: float = 0.5  # weight of the stepwise advantage; 0 is EGSPO
    normalise: bool = False  # divide advantages by the standard deviation of the group's rewards
    K: int = 8  # selected denoising steps of a trajectory
    G: int = 8  # samples per prompt
    B: int = 6  # prompts per rollout on each rank
    C: int = 256  # tokens of a completion
    T: int = 128  # denoising steps
    block: int = 32  # tokens of a block
    P: int = 0  # longest prompt in tokens; 0: the longest of the data
    temperature: float = 0.9  # of sampling, and so of scoring
    eps_low: float = 0.2  # clip: the ratio's lower bound is 1 - eps_low
    eps_high: float = 0.5  # clip: the ratio's upper bound is 1 + eps_high
    beta: float = 0.04  # weight of the KL to the reference

    lr: float = 3e-5  # learning rate after the warm-up, constant
    warmup: int = 10  # steps of linear warm-up
    mu: int = 1  # times that all moves of a rollout are learnt; of diffu_grpo, its updates
    minibatches: int = 4  # optimizer steps that share them: highest entropy first, or as drawn
    weight_decay: float = 0.1  # of AdamW
    max_grad_norm: float = 0.2  # gradients are clipped to this norm
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments of 8 bits
    micro: int = 8  # rows per backward pass; changes memory and speed, not the result
    lora_r: int = 128  # rank of the adapters; 0 trains all weights
    lora_alpha: float = 64.0  # scales new adapters by alpha / r
    quantize: Literal["none", "nf4"] = "none"  # of the frozen base, with --lora-r
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 where the hardware has it
    compile: bool = True  # torch.compile the transformer's blocks
    checkpointing: bool = True  # recompute each block in backward: less memory, more time
    shard: bool = False  # shard weights, gradients and optimizer over the ranks (FSDP2)

    data_dir: str = ""  # look here for data sets before the hub
    train_set: str = ""  # code: kodcode or mbpp; countdown: generated or published
    data: str = ""  # learn your own rows: a .jsonl, .jsonl.gz or .csv file
    prompt: str = ""  # a file, a template of what the model is asked: see examples/prompt.txt
    weights: str = ""  # of the parts of a reward, such as correct=2,format=5; the others weigh 1
    unsafe_code: bool = False  # run code rewards even without seccomp and Landlock
    log_live: float = 4.0  # live denoising events a second; 0 turns them off
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # show the metrics there too


@dataclass(frozen=True)
class Config(Settings):
    """Settings that fit together: every value is checked here, once, and named in the message."""

    def __post_init__(self):
        check = checker(self)
        known = f"choose one of {' '.join(data.TASKS)}"
        own = f"{known}; one of your own is known to the script that defines it"
        check(self.task in data.TASKS, "task", own)
        others = self.eval_also
        check({*others} <= {*data.TASKS} - {self.task}, "eval_also", f"{known}, but --task itself")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                choices = " ".join(get_args(hint))
                check(getattr(self, name) in get_args(hint), name, f"choose one of {choices}")
        for flag in "steps eval_every save_every K B C T block micro mu minibatches keep".split():
            check(getattr(self, flag) >= 1, flag, "must be at least 1")
        for flag in ("lr", "temperature", "max_grad_norm", "lora_alpha"):
            check(0 < getattr(self, flag) < math.inf, flag, "must be above 0 and finite")
        for flag in ("lam", "beta", "weight_decay", "eps_high", "log_live"):
            check(0 <= getattr(self, flag) < math.inf, flag, "must be at least 0 and finite")
        for flag in ("P", "seed", "lora_r", "warmup", "eval_n"):
            check(0 <= getattr(self, flag) < 2**63, flag, "must be at least 0, and below 2^63")
        check(0 <= self.eps_low < 1, "eps_low", "must be in [0, 1)")
        check(not self.data or Path(self.data).is_file(), "data", "no such file")
        check(not self.data_dir or Path(self.data_dir).is_dir(), "data_dir", "no such folder")
        there = self.track == "none" or importlib.util.find_spec(self.track)
        check(there, "track", f"not installed: pip install {self.track}")
        check(self.G >= 2, "G", "a group needs at least 2 samples to compare")
        object.__setattr__(self, "prompt", template_text(self.prompt))
        weights = self.weights == "" or all(map(WEIGHT.fullmatch, self.weights.split(",")))
        check(weights, "weights", "name=number, of as many parts as you like, between commas")

        R = self.C // self.T
        check(self.C % self.block == 0, "block", f"must divide --C {self.C}")
        check(self.C % self.T == 0, "T", f"must divide --C {self.C}, so that each step reveals C/T")
        whole = f"must be a multiple of C/T = {R}, so that a block takes whole steps"
        check(self.block % R == 0, "block", whole)
        if self.select == "all":
            object.__setattr__(self, "K", self.T)
        check(self.K <= self.T, "K", f"cannot select more steps than --T {self.T}")

        unknown = "the rollout does not know the exact probability of a move: --likelihood tokens"
        check(self.cache == "none" or not self.counts_losers, "cache", unknown)
        moves = "diffu_grpo does not score the moves that were made: take --method egspo"
        check(self.method == "egspo" or self.cache == "none", "cache", moves)
        check(self.method == "egspo" or self.likelihood == "tokens", "likelihood", moves)
        own = "diffu_grpo makes --mu updates of a rollout, each of all rows: 1"
        check(self.method == "egspo" or self.minibatches == 1, "minibatches", own)
        frozen = "quantised weights are frozen: train adapters with --lora-r 128"
        check(self.quantize == "none" or self.lora_r > 0, "quantize", frozen)
        plain = self.lora_r == 0 and self.optimizer == "adamw"
        whole = "trains all weights: --lora-r 0 --optimizer adamw; adapters fit without it (nf4)"
        check(plain or not self.shard, "shard", whole)

    @property
    def template(self) -> Template:
        """How problems are put to the model."""
        return parse_template(self.prompt)

    @property
    def part_weights(self) -> dict[str, float]:
        pairs = (pair.split("=") for pair in self.weights.split(",") if pair)
        return {name: float(weight) for name, weight in pairs}

    @property
    def repeats(self) -> int:
        """Passes over the moves of a rollout; each of d1's has moves of its own."""
        return self.mu if self.method == "egspo" else 1

    @property
    def updates_a_pass(self) -> int:
        """Optimizer steps of one pass."""
        return self.minibatches if self.method == "egspo" else self.mu

    @property
    def looks_back(self) -> bool:
        """Is there a pass before the first update: for a guess, the weight of a cached move, or a
        log-prob that updates leave behind?"""
        return self.stepwise or self.cache == "block" or self.repeats * self.updates_a_pass > 1

    @property
    def stepwise(self) -> bool:
        """Is a move credited against the guess at its own step (EGSPO-SA)?"""
        return self.method == "egspo" and self.lam > 0

    @property
    def counts_losers(self) -> bool:
        """Does the likelihood of a move count the positions it did not reveal?"""
        return self.likelihood == "exact" and self.order == "low_confidence"

    @property
    def revealed(self) -> int:
        """Tokens of a move."""
        return self.C if self.method == "diffu_grpo" else self.C // self.T

    @property
    def scored(self) -> int:
        """Positions whose logits the likelihood of a move reads."""
        return self.block if self.counts_losers else self.revealed


@dataclass(frozen=True)
class Mode:
    """What to do instead of starting a new run."""

    resume: bool = False  # continue the run in --out
    eval_only: bool = False  # evaluate --model on the test split
    lengths: tuple[int, ...] = ()  # with --eval-only: completion lengths, 2 tokens a step
    samples: int = 0  # with --eval-only: sample so many answers a problem, for pass@k; 0: greedy
    dry_run: bool = False  # print parameters, memory and FLOPs, computed from the shapes
    merge: bool = False  # fold the adapter of --model into full weights: a model folder in --out

    def __post_init__(self):
        check = checker(self)
        check(self.samples >= 0, "samples", "must be at least 0")
        others = "resume", "eval_only", "dry_run", "merge"
        modes = [flag for flag in others if getattr(self, flag)]
        check(len(modes) < 2, modes[-1] if modes else "merge", "only one mode at a time")
        for flag in ("lengths", "samples"):
            check(self.eval_only or not getattr(self, flag), flag, "goes with --eval-only")


def checker(settings: object) -> Callable[[bool, str, str], None]:
    """check(holds, flag, what would do): ValueError names the flag and its value."""

    def check(holds: bool, flag: str, want: str) -> None:
        if not holds:
            value = getattr(settings, flag)
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"--{flag.replace('_', '-')} {value}: {want}")

    return check


# ---- templates of prompts ------------------------------------------------------------------------

WEIGHT = re.compile(r"\w+=\d{1,9}(\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True)
class Template:
    """How problems are put to the model, in training and evaluation.

    In a file each part stands under its name in brackets, on a line of its own: [system] and
    [answer], which may be left out, and [user], with {prompt} for the task's own prompt or
    {question} for what it asks without our instructions.
    """

    user: str = "{prompt}"
    system: str = ""
    answer: str = ""  # how the answer begins: the model goes on from there, both are judged

    def asked(self, problem: data.Problem, instructions: str) -> data.Problem:
        """The problem with the user's message as its prompt."""
        fill = {"{prompt}": problem.prompt, "{question}": problem.prompt.removeprefix(instructions)}
        return replace(problem, prompt=PLACEHOLDER.sub(lambda found: fill[found[0]], self.user))


PLACEHOLDER = re.compile(r"\{prompt\}|\{question\}")


def template_text(prompt: str) -> str:
    """What --prompt names, checked: the text of the file, so that a run and its checkpoints hold it
    themselves. What is text already, as in a config.json, has more than one line."""
    text = prompt
    try:
        if prompt and "\n" not in prompt:
            text = Path(prompt).read_text(encoding="utf-8-sig").strip() + "\n"
        parse_template(text)
    except FileNotFoundError:
        raise ValueError(f"--prompt {prompt}: no such file") from None
    except (ValueError, OSError) as error:
        where = "of these settings" if "\n" in prompt else prompt
        raise ValueError(f"--prompt {where}: {error}") from None
    return text


def parse_template(text: str) -> Template:
    """ValueError says what a template lacks."""
    if not text:
        return Template()
    before, *rest = re.split(r"^\[([a-z]+)\][ \t]*$", text, flags=re.MULTILINE)
    names, parts = rest[::2], [part.strip() for part in rest[1::2]]
    if before.strip() or len({*names}) < len(names) or {*names} - {"system", "user", "answer"}:
        found = " ".join([before.strip()[:20], *(f"[{name}]" for name in names)]).strip()
        known = "[system], [user] and [answer], each once and on a line of its own"
        raise ValueError(f"the parts of a template are {known}; found {found!r}")
    template = Template(**{"user": ""} | dict(zip(names, parts)))
    if not PLACEHOLDER.search(template.user):
        raise ValueError("[user] must hold {prompt}, or {question} for it without our instructions")
    if PLACEHOLDER.search(template.system + template.answer):
        raise ValueError("{prompt} and {question} stand in [user] only")
    return template


# ---- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CommandLine:
    """Reinforcement learning of masked diffusion language models: EGSPO, EGSPO-SA."""

    settings: Settings
    mode: Mode


def parse(argv: list[str]) -> tuple[Config, Mode]:
    """Settings and mode; ValueError, in one line, where something is wrong.

    Read twice: first for the few flags that decide the defaults of all others.
    """

    def basis(
        task: str = "",
        model: str = "",
        method: str = "egspo",
        out: str = "",
        resume: bool = False,
    ) -> Settings:
        goes_on = resume or restarted(Path(out or "nowhere"))
        return of_run(out) if goes_on else model_settings(model, task, method)

    defaults, _ = read(basis, argv, "egspo.py", return_unknown_args=True, add_help=False)
    line = read(CommandLine, argv, "egspo.py", default=CommandLine(defaults, Mode()))
    cfg, mode = Config(**vars(line.settings)), line.mode
    trains = not (mode.eval_only or mode.dry_run or mode.merge)
    if trains and restarted(Path(cfg.out or "nowhere")):
        mode = replace(mode, resume=True)
    cfg = replace(cfg, model=newest(cfg.model))
    if mode.resume and model.stands_for(cfg.model, defaults.model):
        cfg = replace(cfg, model=defaults.model)  # the state of it that the run began with
    for flag in ("task", "model", "lora_r", "optimizer") * mode.resume:
        began = f"the run in --out {cfg.out} began with {getattr(defaults, flag)}"
        checker(cfg)(getattr(cfg, flag) == getattr(defaults, flag), flag, began)
    if trains and not cfg.out and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("--out: name a folder, in which --max-restarts of torchrun can go on")
    if cfg.shard and (mode.eval_only or mode.merge):
        raise ValueError("--shard: not with --eval-only or --merge")
    writes = mode.merge or trains and not mode.resume
    log = Path(cfg.out or "nowhere") / "events.jsonl"
    if writes and log.exists() and log.stat().st_size:  # empty: it failed before it began
        raise ValueError(f"--out {cfg.out} holds a run: continue it with --resume, or name another")
    if writes and cfg.out and model.holds_weights(cfg.out):
        raise ValueError(f"--out {cfg.out} holds a model: name another folder")
    for flag in ("data", "eval_also") * mode.eval_only:
        checker(cfg)(not getattr(cfg, flag), flag, "--eval-only takes the test split of --task")
    for length in mode.lengths:
        block = min(cfg.block, length)
        if length < 1 or block % 2 or length % block:
            raise ValueError(
                f"--lengths {length}: it, and --block {cfg.block} if shorter, must be even; "
                "a longer length must be a multiple of the block"
            )
    return replace(cfg, out=cfg.out or run_folder(cfg.task, cfg.model, mode)), mode


def read(kind: Callable, argv: list[str], prog: str, **options):
    """tyro's reading of a command line; ValueError in one line where tyro would draw a box."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=argv, prog=prog, **options)
    except SystemExit as leaving:
        if not leaving.code:
            raise  # --help
    _, *inside = box.getvalue().splitlines()
    says = re.compile(r"\w").search  # a ruled line does not
    inside = itertools.dropwhile(lambda line: not says(line), inside)
    told = " ".join(line.strip("│ ") for line in itertools.takewhile(says, inside))
    meant = re.search(r"Perhaps you meant:[\s│]+(--\S+)", box.getvalue())
    told += f"; did you mean {meant[1]}?" if meant else ""
    raise ValueError(re.sub(r"^Error parsing (?!--)\w+: ", "", told))


METHODS = {  # what a method's authors use otherwise
    "egspo": {},
    "diffu_grpo": dict(lr=3e-6, mu=12, eps_low=0.5, eps_high=0.5),
}
ONLY = {  # and what it can do at all, whatever a model was trained by before
    "diffu_grpo": dict(minibatches=1, cache="none", likelihood="tokens"),
}

REASON = "[user]\n{prompt}\nReason step by step between <reasoning> and </reasoning> first.\n"
LARGE = {  # what a task wants otherwise of a model whose defaults.json does not say
    "sudoku": dict(prompt=REASON),
    "countdown": dict(prompt=REASON, train_set="published"),
    "toycode": dict(prompt=REASON),
    "humaneval": dict(prompt=REASON),
    "mbpp": dict(prompt=REASON),
}  # gsm8k and math ask for it in their own prompts


def of_model(path: str = "", task: str = "", method: str = "egspo") -> Config:
    """The defaults of a model: its own, where it has a defaults.json, or the paper's."""
    return Config(**vars(model_settings(path, task, method)))


def model_settings(path: str, task: str, method: str) -> Settings:
    """The same, not checked yet: flags may still override them."""
    path = newest(path or ("GSAI-ML/LLaDA-8B-Instruct" if torch.cuda.is_available() else "tiny"))
    own, file = model_defaults(path), f"{path}/defaults.json"
    for part in own.keys() - {"task", "settings", "by_task"}:
        raise ValueError(f"{file}: {part} is not one of task, settings, by_task")
    task, by_task = task or own.get("task", "sudoku"), own.get("by_task", {})
    parts = own.get("settings", {}), by_task.get(task, {}) if isinstance(by_task, dict) else None
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{file}: settings, and those of a task, must be an object")
    settings = METHODS.get(method, {}) | LARGE.get(task, {}) | parts[0] | parts[1]
    settings |= ONLY.get(method, {}) | dict(model=path, task=task, method=method)
    return configure(file, settings)


def for_task(cfg: Config, task: str) -> Config:
    """The same sizes for another task, which is asked as it is by default."""
    asked = model_settings(cfg.model, task, cfg.method)
    own = dict(prompt=asked.prompt, train_set=asked.train_set, weights="", data="", P=0)
    return replace(cfg, task=task, eval_also=(), **own)


def of_run(out: str) -> Settings:
    """The settings of the run in this folder; flags may change them."""
    if not out:
        raise ValueError("--resume: say which run with --out runs/<name>")
    file = Path(out) / "config.json"
    if not file.exists():
        raise ValueError(f"--resume: no run in --out {out} (no config.json there)")
    return configure(str(file), model.read_json(file))


def configure(file: str, settings: dict) -> Settings:
    """What a file says, if it is of the right types. ValueError names the file."""
    plain, hints = Settings(), get_type_hints(Settings)
    for name, value in settings.items():
        if name not in hints:
            raise ValueError(f"{file}: not of this version (no setting is called {name})")
        kind = type(getattr(plain, name))
        if kind is tuple and type(value) is list:
            settings = settings | {name: tuple(map(str, value))}
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{file}: {name} {value!r} is not of type {kind.__name__}")
        choices = get_args(hints[name])
        if choices and value not in choices:
            raise ValueError(f"{file}: {name} {value!r} is not one of {' '.join(choices)}")
    return replace(plain, **settings)


def model_defaults(path: str) -> dict:
    """What a model's defaults.json says; empty where it has none or cannot be had."""
    with contextlib.suppress(FileNotFoundError):
        return model.read_json(model.find_folder(path, ["defaults.json"]) / "defaults.json")
    return {}


def bring_defaults(path: str, out: str | Path) -> None:
    """Write the defaults.json of a model, if it has one, beside what was made of it unquantised."""
    own, file = model_defaults(path), Path(out) / "defaults.json"
    by_task = own.get("by_task", {}).values()
    for part in by_task:
        part.pop("lora_r", None)  # of an adapter, see `carry_on`
    for part in (own.get("settings", {}), *by_task):
        part.pop("quantize", None)  # or it would be rounded when it is read
    if own and not file.exists():
        file.write_text(json.dumps(own, indent=2) + "\n")


def carry_on(cfg: Config) -> dict:
    """The defaults.json of a checkpoint of this run: its model's, with the shape it trained in and
    how it was asked."""
    own = model_defaults(cfg.model)
    kept = "C T block order temperature cache quantize B G select minibatches prompt".split()
    kept += ["train_set", "weights", "lora_r"]
    kept += ["K"] * (cfg.select != "all")  # there it is T, of which another rule would take all
    by_task = own.get("by_task", {})
    task = by_task.get(cfg.task, {}) | {name: getattr(cfg, name) for name in kept}
    return own | {"task": cfg.task, "by_task": by_task | {cfg.task: task}}


def newest(path: str) -> str:
    """A run folder stands for its best checkpoint by validation accuracy, or else its latest;
    links are resolved now, because a run moves them."""
    for folder in (Path(path) / "checkpoints" / name for name in ("best", "latest")):
        if folder.exists():
            return str(folder.resolve())
    if (Path(path) / "events.jsonl").exists() and not model.holds_weights(path):
        raise ValueError(f"--model {path}: a run that has no checkpoint")
    return str(Path(path).resolve()) if Path(path).is_symlink() else path


def run_folder(task: str, path: str, mode: Mode) -> str:
    """Where a command without --out writes; an evaluation beside the weights."""
    if mode.eval_only and path != "tiny" and Path(path).is_dir():
        return path
    return f"runs/{task}-{model_name(path)}-{time.strftime('%Y%m%d-%H%M%S')}"


def model_name(path: str) -> str:
    """What to call a model: a checkpoint by its run."""
    folder = Path(model.unpinned(path))
    return folder.parents[1].name if folder.parent.name == "checkpoints" else folder.name


def restarted(out: Path) -> bool:
    """Has torchrun (--max-restarts) restarted the run in this folder after a failure?

    An agent counts only the failures of its own workers; on other nodes the job's id, which
    `run.describe` has left in the folder, tells.
    """
    job, file = os.environ.get("TORCHELASTIC_RUN_ID", "none"), out / "source" / "env.txt"
    if not file.exists() or job == "none":
        return file.exists() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return f"torchrun {job}" in file.read_text().splitlines()
