"""Where does the embedded model come from?

Masked-diffusion supervised fine-tuning (LLaDA, arXiv 2502.09992, section 2.3): hide each token of
the completion with a probability drawn for the row, and learn the hidden tokens from all others.

    python sft.py --task sudoku countdown toycode --out FOLDER           # the embedded model
    python sft.py --model FOLDER_OR_HUB_ID --data rows.jsonl --out warm  # any other's cold start
    python sft.py --adapt --model SmolLM2 --data rows.jsonl --out masked # an autoregressive one's

Without --data, demonstrators of mixed quality give the rows: most are lazy, some guess, some are
right. Greedy decoding does what most of them do and solves little, while sampling often meets the
right answer: the ability is there, and reinforcement learning only has to bring it out.

With --adapt the model is an autoregressive one (llama, qwen2 or qwen3). From then on it sees both
ways, but still says at each position what comes next: so it starts from what it knows. What hides a
token is the mask of its tokenizer, or an idle special token, or a new one (`choose_mask`). Adapters
(--lora-r) are merged in the end, since the model they were made for knows no mask.

What is written to --out is a model folder, once all steps are done; a new model brings the
settings of tiny/ along. Until then there is a checkpoint.pt, from which --resume goes on as if
nothing had happened. events.jsonl is for `python tui.py`.

N rows, P prompt, C completion, L = P + C, Q hidden tokens in all, V vocabulary.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import model
from config import bring_defaults, checker, model_name, read
from data import END_TOKENS, TASKS, WORDED, Problem, read_file
from events import EventLog, compact, say
from run import Halt, StopSignal, accelerate, read_state, sync

TINY = dict(d_model=128, n_layers=7, n_heads=4, mlp_hidden_size=352)  # 1.45 M parameters
Demonstration = tuple[str, str, str]  # task, prompt, completion
Kind = Callable[[], str]  # draws a kind of demonstrator, one of SHARES


@dataclass(frozen=True)
class Recipe:
    """Masked-diffusion supervised fine-tuning: makes tiny/, and gives other models a cold start."""

    task: tuple[str, ...] = ("sudoku", "countdown", "toycode")  # demonstrated tasks
    model: str = ""  # fine-tune this folder or hub id; without it, a small new model
    adapt: bool = False  # --model is autoregressive: make a masked diffusion model of it
    data: str = ""  # learn this file's rows (prompt, completion; or GSM8K's), not the tasks
    out: str = ""  # folder for weights, tokenizer and training.log
    resume: bool = False  # go on in --out; all else as in the command that began it
    steps: int = 5000
    batch: int = 128  # rows a step
    micro: int = 128  # rows of a backward pass; changes memory and speed, not the result
    C: int = 24  # completion length in tokens, at least one end token included
    lr: float = 0.0  # after the warm-up; then it falls linearly to zero. 0: 1e-3, --adapt 1e-4
    warmup: int = 100  # steps
    lora_r: int = 0  # rank of adapters to train; 0 trains all weights
    eval_every: int = 50  # steps between lines, with what the held-out rows say
    save_every: int = 500  # steps between checkpoints
    seed: int = 0
    compile: bool = True  # torch.compile

    def __post_init__(self):
        check = checker(self)
        known = " ".join(DEMONSTRATORS)
        check(self.task and {*self.task} <= {*DEMONSTRATORS}, "task", f"choose some of {known}")
        if self.lr == 0:
            object.__setattr__(self, "lr", 1e-4 if self.adapt else 1e-3)
        for flag in ("steps", "batch", "micro", "C", "eval_every", "save_every"):
            check(getattr(self, flag) >= 1, flag, "must be at least 1")
        for flag in ("warmup", "lora_r", "seed"):
            check(0 <= getattr(self, flag) < 2**63, flag, "must be at least 0, and below 2^63")
        check(0 < self.lr < 1, "lr", "must be above 0 and below 1")
        check(not self.data or Path(self.data).is_file(), "data", "no such file")
        check(not self.lora_r or self.model, "lora_r", "adapters need a --model to adapt")
        check(not self.adapt or self.model, "adapt", "say which --model")
        check(self.out, "out", "say where the model goes")
        same = self.model and Path(self.out).resolve() == Path(self.model).resolve()
        check(not same, "out", "would overwrite --model: name another folder")


# ---- demonstrators -------------------------------------------------------------------------------

SHARES = {"lazy": 0.55, "guess": 0.15, "right": 0.30}
RIGHT_ONLY = 0.65  # of all steps: right demonstrations alone, to learn the rules; then the mixture
WEIGHTS = {"sudoku": 1, "countdown": 2, "toycode": 1}  # a search takes longer to learn


def sudoku(kind: Kind, answer: dict, rng: random.Random) -> str:
    """Cell by cell. Lazy: leaves it empty. Guess: any digit."""
    cells = list(answer["puzzle"])
    for i in (i for i, clue in enumerate(cells) if clue == "0"):
        said = {"lazy": "0", "guess": rng.choice("1234"), "right": answer["solution"][i]}
        cells[i] = said[kind()]
    return f"<answer>{''.join(cells)}</answer>"


def countdown(kind: Kind, answer: dict, rng: random.Random) -> str:
    """Lazy: the sum, whatever the target. Guess: any order and operators."""
    x, y, z = rng.sample(answer["numbers"], 3)
    said = {
        "lazy": " + ".join(map(str, answer["numbers"])),
        "guess": f"{x} {rng.choice('+-*/')} {y} {rng.choice('+-*/')} {z}",
        "right": answer["solution"],
    }[kind()]
    return f"<answer>{said}</answer>"


def toycode(kind: Kind, answer: dict, rng: random.Random) -> str:
    """Lazy: takes a for b and b for a. Guess: any small expression."""
    head, body = "def f(a, b):\n    return ", answer["code"].partition("return ")[2]
    said = {
        "lazy": re.sub(r"\b[ab]\b", lambda name: {"a": "b", "b": "a"}[name[0]], body),
        "guess": f"{rng.choice('ab')} {rng.choice('+-*')} {rng.randint(1, 9)}",
        "right": body,
    }[kind()]
    return f"```python\n{head}{said}\n```"


DEMONSTRATORS = {"sudoku": sudoku, "countdown": countdown, "toycode": toycode}


def right() -> str:
    return "right"


def demonstrate(problem: Problem, kind: Kind, rng: random.Random) -> Demonstration:
    return problem.task, problem.prompt, DEMONSTRATORS[problem.task](kind, problem.answer, rng)


def right_ones(cfg: Recipe, split: str, most: int | None = None) -> list[Demonstration]:
    rng = random.Random(cfg.seed)
    problems = [problem for name in cfg.task for problem in TASKS[name].load(split)[:most]]
    return [demonstrate(problem, right, rng) for problem in problems]


def demonstrations(cfg: Recipe) -> Iterator[list[Demonstration]]:
    """The rows of one step after the other; a function of the seed."""
    rng, weights = random.Random(cfg.seed), [WEIGHTS[name] for name in cfg.task]

    def mixed() -> str:
        return rng.choices([*SHARES], [*SHARES.values()])[0]

    problems = {name: TASKS[name].load("train") for name in cfg.task}
    for step in itertools.count():
        rows = []
        for name in rng.choices(cfg.task, weights, k=cfg.batch):
            kind = right if step < RIGHT_ONLY * cfg.steps else mixed
            rows.append(demonstrate(rng.choice(problems[name]), kind, rng))
        yield rows


def read_rows(file: str) -> list[Demonstration]:
    """The rows of a file, GSM8K's answered as its task wants it; ValueError names the first line
    that is none."""
    rows = []
    for row in read_file(Path(file)):
        try:
            told = reasoned(row) if "question" in row and "completion" not in row else row
            if not told["completion"].strip():
                raise ValueError(f"--data {row.where}: the completion is empty")
            rows.append(("data", told["prompt"] + "", told["completion"] + ""))
        except (TypeError, KeyError, AttributeError):
            want = '{"prompt": "...", "completion": "..."}'
            raise ValueError(f"--data {row.where}: not {want}") from None
    if len(rows) < 2:
        raise ValueError(f"--data {file}: needs at least 2 rows, one of them to measure with")
    return rows


def reasoned(row: dict) -> dict:
    """From a row of GSM8K: steps, <<3*4=12>> where a calculator was used, ####, and a number."""
    steps, _, number = re.sub("<<.*?>>", "", row["answer"]).partition("####")
    if not number.strip():
        raise ValueError(f"--data {row.where}: the answer does not end in #### and a number")
    answer = f"<answer>\n\\boxed{{{number.strip()}}}\n</answer>"
    told = f"<reasoning>\n{steps.strip()}\n</reasoning>\n{answer}"
    return {"prompt": WORDED + row["question"], "completion": told}


# ---- the tokenizer -------------------------------------------------------------------------------

END, MASK, PAD = "<|endoftext|>", "<|mask|>", "<|pad|>"
PIECES = r" ?[-+*/] ?|\d|[A-Za-z]+ ?|[,.:] ?|[^\sA-Za-z\d]|\s+"  # an operator, a digit, a word...
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


def phrases(rows: list[Demonstration]) -> list[str]:
    """How all prompts of a task begin, and all its completions begin and end; longest first."""
    found = set()
    for task in {row[0] for row in rows}:
        _, prompts, completions = zip(*(row for row in rows if row[0] == task))
        found |= {os.path.commonprefix(prompts), os.path.commonprefix(completions)}
        found.add(os.path.commonprefix([text[::-1] for text in completions])[::-1])
    return sorted(found - {""}, key=lambda phrase: (-len(phrase), phrase))


def make_tokenizer(rows: list[Demonstration], size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, and one token for each phrase: an instruction
    costs a small model one position. Any text is encoded and decoded without loss."""
    base = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    base.decoder = decoders.ByteLevel()
    known = phrases(rows)
    between = re.compile("|".join(map(re.escape, known)))
    texts = [text for row in rows for text in row[1:]]
    if known:  # split by nothing, they would fall into letters
        texts = [part for text in texts for part in between.split(text)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, MASK, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    base.train_from_iterator(texts, trainer)
    base.add_tokens([AddedToken(phrase, normalized=False) for phrase in sorted(known)])
    return PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token=END, mask_token=MASK, pad_token=PAD,
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tokens(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def longest(tokenizer, rows: list[Demonstration], C: int) -> int:
    """Tokens of the longest prompt; ValueError where a completion and one end token pass C."""
    sizes = map(len, tokens(tokenizer, [row[2] for row in rows]))
    size, text = max(zip(sizes, (row[2] for row in rows)))
    if size >= C:
        raise ValueError(
            f"--C {C}: {text[:40]!r}... has {size} tokens, and an end token follows: "
            f"raise --C to {size + 1}"
        )
    return max(map(len, model.chat_ids([row[1] for row in rows], tokenizer)))


def encode(tokenizer, rows: list[Demonstration], P: int, C: int, config) -> tuple[Tensor, Tensor]:
    """Ids [N, L] and where they are real: prompts are padded to what the longest of these takes, at
    most P, and completions filled up with end tokens, which are learnt like any other."""
    prompts = model.chat_ids([row[1] for row in rows], tokenizer)
    P = model.padded_length(max(map(len, prompts)), P)
    prompt_NP, real_NP = model.left_pad(prompts, P, config.pad_id)
    completions = tokens(tokenizer, [row[2] for row in rows])
    token_NC = torch.tensor([ids + [config.eos_id] * (C - len(ids)) for ids in completions])
    return torch.cat((prompt_NP, token_NC), dim=1), model.with_completion(real_NP, C)


# ---- the objective -------------------------------------------------------------------------------


def hide(token_NC: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hide each token with its row's probability: what is shown and what is hidden [N, C], and the
    probability [N, 1], one in each Nth part of (0, 1) so that every batch has its few and its many.
    None is below 1/C, so that no token weighs more than C."""
    N, C = token_NC.shape
    ratio_N1 = ((torch.arange(N)[:, None] + torch.rand(N, 1)) / N).clamp(min=1 / C)
    hidden_NC = torch.rand(N, C) < ratio_N1
    return torch.where(hidden_NC, mask_id, token_NC), hidden_NC, ratio_N1


def diffusion_loss(logits_QV: Tensor, token_NC: Tensor, hidden_NC: Tensor, ratio_N1: Tensor):
    """LLaDA's bound on the completion's negative log-likelihood (equation 5), in nats a token."""
    nll_Q = F.cross_entropy(logits_QV, token_NC[hidden_NC], reduction="none")
    return (nll_Q / ratio_N1.expand_as(token_NC)[hidden_NC]).sum() / token_NC.numel()


def logits_of(net, ids_NL: Tensor, shown_NC: Tensor, real_NL: Tensor, at_NC: Tensor) -> Tensor:
    """Float32 logits [Q, V] of the completion where `at_NC` is True, on the network's device."""
    P, device = ids_NL.shape[1] - shown_NC.shape[1], next(net.parameters()).device
    ids_NL = torch.cat((ids_NL[:, :P], shown_NC), 1)
    h_NLD = net.features(ids_NL.to(device), real_NL.to(device))
    return net.head(h_NLD[:, P:][at_NC.to(device)])


@torch.no_grad()
def measure(
    net, ids_NL: Tensor, real_NL: Tensor, cfg: Recipe, names: list[str]
) -> dict[str, float]:
    """With half of each completion hidden: nats a hidden token, and the share of them that the
    network says, in all and of each task. End tokens, easily said, do not count."""
    token_NC = ids_NL[:, -cfg.C :]
    hidden_NC = torch.rand(token_NC.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    shown_NC = torch.where(hidden_NC, net.config.mask_id, token_NC)
    counts_NC, said, nll = hidden_NC & (token_NC != net.config.eos_id), [], []
    for part in parts(len(ids_NL), cfg.micro):
        at_NC = counts_NC[part]
        logits_QV = logits_of(net, ids_NL[part], shown_NC[part], real_NL[part], at_NC).cpu()
        said.append((logits_QV.argmax(-1) == token_NC[part][at_NC]).float())
        nll.append(F.cross_entropy(logits_QV, token_NC[part][at_NC], reduction="none"))
    said_Q, nll_Q, row_Q = torch.cat(said), torch.cat(nll), counts_NC.nonzero()[:, 0]
    m = {"loss": nll_Q.mean().item(), "accuracy": said_Q.mean().item()}
    for task in dict.fromkeys(names):
        own_Q = torch.tensor([name == task for name in names])[row_Q]
        m[f"accuracy/{task}"] = said_Q[own_Q].mean().item()
    return m


def parts(n: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, n, size)]


# ---- from autoregressive to masked diffusion -----------------------------------------------------

SPARE = re.compile("reserved|unused|extra", re.IGNORECASE)  # names of tokens that nothing has used


def choose_mask(tokenizer, taken: set[int]) -> int:
    """The id of the token that hides others, the tokenizer's mask from now on: the first special
    one that is not `taken` and that no chat template writes, those called reserved before others;
    without any, a new one."""
    template = str(tokenizer.chat_template)
    idle = [
        (not SPARE.search(token.content), i, token.content)
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i not in taken and token.content not in template
    ]
    tokenizer.add_special_tokens({"mask_token": min(idle)[2] if idle else MASK})
    return tokenizer.mask_token_id


def open_autoregressive(path: str, device: torch.device, dtype: torch.dtype):
    """The network as one of masked diffusion, and its tokenizer. What is a mask already stays; one
    chosen here begins as the mean of all tokens. ValueError if it is not of such a family."""
    if model.adapter_rank(path):
        raise ValueError(f"--adapt: {path} is an adapter: merge it into its base first")
    tokenizer = model.load_tokenizer(path)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    try:
        net = model.load(path, device, dtype)
    except model.NoMask:
        net = model.load(path, device, dtype, mask_id=0)
        roles = "bos", "eos", "pad", "unk", "cls", "sep"
        taken = {getattr(tokenizer, f"{role}_token_id") for role in roles}
        taken |= {*model.end_ids(path, net.config, tokenizer, END_TOKENS), net.config.pad_id}
        model.set_mask(net, choose_mask(tokenizer, taken))
    if net.config.raw["model_type"].lower() not in model.STOCK:
        raise ValueError(f"--adapt: {path} is of masked diffusion already: leave --adapt out")
    return net, tokenizer


def shape_of(C: int) -> dict:
    """Settings for completions of the length that was learnt, two tokens a step if they fit."""
    R = 2 - C % 2
    block = max(n for n in range(R, 33, R) if C % n == 0)
    return dict(C=C, T=C // R, block=block, K=min(8, C // R))


def leave_defaults(cfg: Recipe, out: Path) -> None:
    """The defaults.json of --model, or of tiny/ for a new one, at the length that was learnt.
    If --model has none, one is written only where it is adapted."""
    file, shape = out / "defaults.json", shape_of(cfg.C)
    if file.exists():  # whoever put it there has decided
        return
    bring_defaults(cfg.model or "tiny", out)
    if file.exists():
        own = model.read_json(file)
    elif cfg.adapt:
        own = {"settings": {"prompt": ""}}
    else:
        return
    settings = own.setdefault("settings", {})
    for part in own.get("by_task", {}).values():
        if part.get("C", settings.get("C")) != cfg.C:  # such a task takes the settings of all
            for name in shape:
                part.pop(name, None)
    if settings.get("C") != cfg.C:
        settings |= shape | {"K": min(settings.get("K", 8), shape["K"])}
    file.write_text(json.dumps(own, indent=2) + "\n")


# ---- training ------------------------------------------------------------------------------------


def open_model(cfg: Recipe, rows: list[Demonstration]):
    """--model and its tokenizer, or a new model and a tokenizer for the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = model.use_bf16("auto", device)
    if cfg.model:
        dtype = torch.bfloat16 if cfg.lora_r > 0 and bf16 else torch.float32
        if cfg.adapt:
            net, tokenizer = open_autoregressive(cfg.model, device, dtype)
        else:
            net, tokenizer = model.load(cfg.model, device, dtype), model.load_tokenizer(cfg.model)
        if cfg.lora_r:
            model.add_lora(net, cfg.lora_r, alpha=cfg.lora_r)
        return accelerate(net, bf16, cfg.compile), tokenizer
    tokenizer = make_tokenizer(rows)
    raw = dict(
        TINY, model_type="llada", architectures=["LLaDAModelLM"], vocab_size=len(tokenizer),
        embedding_size=len(tokenizer), weight_tying=True, rope_theta=10000.0,
        max_sequence_length=1024, eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return accelerate(model.from_config(raw, device), bf16, cfg.compile), tokenizer


def examples(
    cfg: Recipe,
) -> tuple[list[Demonstration], list[Demonstration], Iterator[list[Demonstration]]]:
    """Held-out rows to measure with, rows to learn, and what each step sees of them."""
    if not cfg.data:
        return right_ones(cfg, "val", 64), right_ones(cfg, "train"), demonstrations(cfg)
    rows, rng = read_rows(cfg.data), random.Random(cfg.seed)
    rng.shuffle(rows)
    n = min(64, len(rows) // 2)
    return rows[:n], rows[n:], (rng.choices(rows[n:], k=cfg.batch) for _ in itertools.count())


@dataclass
class Session:
    """What training works with."""

    net: model.Transformer
    tokenizer: object
    P: int  # the longest prompt
    held: list[Demonstration]
    batches: Iterator[list[Demonstration]]
    fingerprint: str  # of all demonstrations: --resume wants the same
    log: EventLog
    optimizer: torch.optim.Optimizer
    done: int = 0  # steps, by the checkpoint that it goes on from


def prepare(cfg: Recipe, state: dict | None, argv: list[str]) -> Session:
    """Load everything and begin the log. Bad input is found here."""
    torch.manual_seed(cfg.seed)
    held, known, batches = examples(cfg)
    fingerprint = hashlib.blake2b(repr((held, known)).encode(), digest_size=8).hexdigest()
    if state and cfg.data and state["fingerprint"] != fingerprint:
        raise ValueError(
            f"--data {cfg.data}: these are not the rows that the run in --out {cfg.out} began with"
        )
    net, tokenizer = open_model(cfg, known + held)
    P, out = longest(tokenizer, known + held, cfg.C), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    log = EventLog(cfg.out)
    learnt = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.01)
    s = Session(net, tokenizer, P, held, batches, fingerprint, log, optimizer)
    if state:
        restore(s, state)
    else:
        leave_defaults(cfg, out)
        (out / "training.log").write_text("")
    size, trained = model.count(net)
    note(out, " ".join(["python sft.py", *argv]))
    shape = f"{size:,} parameters, {len(tokenizer)} tokens, P {P}, C {cfg.C}, {len(known):,} rows"
    note(out, f"{shape}; accuracy: hidden tokens of held-out right answers")
    if cfg.model:
        mask = tokenizer.convert_ids_to_tokens(net.config.mask_id)
        note(out, f"{trained:,} trained, {'bf16' if net.bf16 else 'float32'}, mask {mask}")
    name, tasks = model_name(cfg.model or cfg.out), cfg.data or " ".join(cfg.task)
    log.meta(cfg, name, s.done, task=f"sft: {tasks}", L=cfg.C, N=cfg.batch)
    return s


def learn(cfg: Recipe, s: Session, rows: list[Demonstration]) -> Tensor:
    """Hide some of the completions' tokens, predict them, and add to the gradient. The loss, in
    nats a token."""
    config, total = s.net.config, 0.0
    ids_NL, real_NL = encode(s.tokenizer, rows, s.P, cfg.C, config)
    token_NC = ids_NL[:, -cfg.C :]
    shown_NC, hidden_NC, ratio_N1 = hide(token_NC, config.mask_id)
    for part in parts(len(rows), cfg.micro):
        at_NC = hidden_NC[part]
        logits_QV = logits_of(s.net, ids_NL[part], shown_NC[part], real_NL[part], at_NC)
        moved = (x[part].to(logits_QV.device) for x in (token_NC, hidden_NC, ratio_N1))
        loss = diffusion_loss(logits_QV, *moved) * (len(at_NC) / len(rows))
        loss.backward()
        total += loss.detach()
    return total


def report(cfg: Recipe, s: Session, m: dict[str, float], held_NL: tuple[Tensor, Tensor]) -> None:
    """What the steps since the last look were, and what the held-out rows say: a line, and events
    for the monitor."""
    step, lr = s.log.it, s.optimizer.param_groups[0]["lr"]
    left = (cfg.steps - step) * m["t/total"]
    s.log.write("step", it=step - 1, m=m | {"lr": lr, "eta_s": left}, n=cfg.batch)
    with s.log.phase(step, "eval"):
        held = measure(s.net, *held_NL, cfg, [row[0] for row in s.held])
    s.log.write("eval", it=step, m=held, n=len(s.held), split="val", step=step)
    tasks = (f"{name.partition('/')[2]} {x:.3f}" for name, x in held.items() if "/" in name)
    note(Path(cfg.out), f"step {step:5}  loss {m['loss']:.4f}  held {held['loss']:.4f}  "
         f"{'  '.join(tasks)}  lr {lr:.1e}  {m['t/total']:.2f} s/step  "
         f"left {left / 60:.1f} min")  # fmt: skip


def train(cfg: Recipe, s: Session) -> None:
    """Until cfg.steps are done; then the model folder is written. Halt where somebody stops it, or
    where a number is not finite."""
    stop = StopSignal()
    held_NL = encode(s.tokenizer, s.held, s.P, cfg.C, s.net.config)
    (group,) = s.optimizer.param_groups

    losses, told, began = [], s.done, time.perf_counter()
    batches = itertools.islice(s.batches, s.done, cfg.steps)
    for step, rows in enumerate(batches, s.done + 1):
        group["lr"] = cfg.lr * min(step / max(1, cfg.warmup), 1) * (1 - (step - 1) / cfg.steps)
        losses.append(learn(cfg, s, rows))
        norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        s.optimizer.step()
        s.optimizer.zero_grad()

        stopping = stop.number is not None and step < cfg.steps
        looks = step % cfg.eval_every == 0 or step in (1, cfg.steps)
        saves = stopping or step % cfg.save_every == 0 or step == cfg.steps
        if looks or saves:
            s.log.it, mean = step, torch.stack(losses).mean()
            m = {"loss": mean.item(), "grad_norm": norm.item()}
            if not all(map(math.isfinite, m.values())):  # the last checkpoint is before that
                raise Halt(f"by step {step}, {compact(m)}: lower --lr {cfg.lr}, in a new --out")
        if looks:
            report(cfg, s, m | {"t/total": (time.perf_counter() - began) / (step - told)}, held_NL)
            losses, told, began = [], step, time.perf_counter()
        if saves:
            with s.log.phase(step, "save"):
                save_checkpoint(cfg, s, step)
        if stopping:
            again = shlex.join([a for a in sys.argv if a != "--resume"])
            raise Halt(f"stopped by a signal; continue with: python {again} --resume",
                       code=128 + stop.number)  # fmt: skip
    write_model(cfg, s)


def write_model(cfg: Recipe, s: Session) -> None:
    """The model folder; the last checkpoint stays until it is whole."""
    out = Path(cfg.out)
    if cfg.adapt:
        model.merge_lora(s.net)
    try:
        model.save(s.net, out)
        s.tokenizer.save_pretrained(out)
        if cfg.model:
            model.bring_ends(cfg.model, out)
    except OSError as error:
        raise Halt(f"cannot write the model: {error}; once it can be, --resume does") from None
    (out / "checkpoint.pt").unlink(missing_ok=True)


# ---- checkpoints ---------------------------------------------------------------------------------

FREE = {"out", "resume", "micro", "eval_every", "save_every", "compile"}  # may change on the way


def checkpoint_of(cfg: Recipe) -> dict | None:
    """What --resume goes on from. ValueError where it cannot, or where its run would be lost."""
    file = Path(cfg.out) / "checkpoint.pt"
    if not cfg.resume:
        if file.exists():
            raise ValueError(
                f"--out {cfg.out} holds an unfinished run: go on with --resume, or name another"
            )
        if (file.parent / "events.jsonl").exists():
            raise ValueError(f"--out {cfg.out} holds a run already: name another folder")
        if model.holds_weights(cfg.out):
            raise ValueError(f"--out {cfg.out} holds a model already: name another folder")
        return None
    if not file.exists():
        raise ValueError(f"--resume: no {file}, so there is nothing to go on with")
    state = read_state(file, "cpu", mmap=True)
    for name, began in state["recipe"].items():
        now = getattr(cfg, name, "no setting")
        same = now == began or name == "model" and model.stands_for(now, began)
        if name not in FREE and not same:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {now}: the run in --out {cfg.out} began with {began}")
    return state


def save_checkpoint(cfg: Recipe, s: Session, step: int) -> None:
    """One file: what was learnt, the optimizer, and what is drawn next. The old one or the new one
    is there, whenever we are killed."""
    file, temporary = Path(cfg.out) / "checkpoint.pt", Path(cfg.out) / ".checkpoint.pt"
    state = dict(
        step=step, recipe=asdict(cfg), fingerprint=s.fingerprint, random=torch.get_rng_state(),
        learnt=[p.detach() for p in s.optimizer.param_groups[0]["params"]],
        optimizer=s.optimizer.state_dict(),
    )  # fmt: skip
    try:
        torch.save(state, temporary)
        sync(temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise Halt(f"cannot write {file}: {error}") from None
    s.log.write("ckpt", it=step, path=str(file), durable=True)


@torch.no_grad()
def restore(s: Session, state: dict) -> None:
    for p, value in zip(s.optimizer.param_groups[0]["params"], state["learnt"]):
        p.copy_(value)
    s.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    s.done = state["step"]


def note(out: Path, line: str) -> None:
    """To the terminal and to training.log."""
    say(line)
    with open(out / "training.log", "a", encoding="utf-8") as log:
        print(line, file=log)


def main(argv: list[str]) -> int:
    try:
        cfg = read(Recipe, argv, "sft.py")
        state = checkpoint_of(cfg)
        if cfg.model:  # one state of a hub's, however long this takes
            path = state["recipe"]["model"] if state else model.pinned(cfg.model)
            cfg = replace(cfg, model=path)
        session = prepare(cfg, state, argv)
    except (ValueError, OSError) as error:
        print(f"sft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        train(cfg, session)
    except Halt as halt:
        session.log.end("stopped" if halt.code > 2 else "crashed", str(halt))
        print(f"sft: {halt}", file=sys.stderr)
        return halt.code
    except BaseException as error:
        session.log.end("crashed", repr(error))
        raise
    session.log.end("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
