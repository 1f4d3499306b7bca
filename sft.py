"""Where does the embedded model come from?

Masked-diffusion supervised fine-tuning (LLaDA, arXiv 2502.09992, section 2.3): hide each token of
the completion with a probability drawn for the row, and learn the hidden tokens from all others.

    python sft.py --task sudoku countdown toycode --out tiny             # the embedded model
    python sft.py --model FOLDER_OR_HUB_ID --data rows.jsonl --out warm  # any other's cold start

Without --data, demonstrators of mixed quality give the rows: most are lazy, some guess, some are
right. Greedy decoding does what most of them do and solves little, while sampling often meets the
right answer: the ability is there, and reinforcement learning only has to bring it out.

What is written to --out is a model folder; a new model brings the settings of tiny/ along.

N rows, P prompt, C completion, L = P + C, V vocabulary.
"""

import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import model
from config import bring_defaults, checker, read
from data import TASKS, Problem
from events import say
from run import accelerate, use_bf16

TINY = dict(d_model=128, n_layers=7, n_heads=4, mlp_hidden_size=352)  # 1.45 M parameters
Demonstration = tuple[str, str, str]  # task, prompt, completion
Kind = Callable[[], str]  # draws a kind of demonstrator, one of SHARES


@dataclass(frozen=True)
class Recipe:
    """Masked-diffusion supervised fine-tuning: makes tiny/, and gives other models a cold start."""

    task: tuple[str, ...] = ("sudoku", "countdown", "toycode")  # demonstrated tasks
    model: str = ""  # fine-tune this folder or hub id; without it, a small new model
    data: str = ""  # learn the rows of this .jsonl file (prompt, completion), not the tasks
    out: str = ""  # folder for weights, tokenizer and training.log
    steps: int = 5000
    batch: int = 128  # rows a step
    C: int = 24  # completion length in tokens, at least one end token included
    lr: float = 1e-3  # after the warm-up; from there it falls linearly to zero
    warmup: int = 100  # steps
    lora_r: int = 0  # rank of adapters to train; 0 trains all weights
    save_every: int = 500  # steps between copies of the weights in --out
    seed: int = 0
    compile: bool = True  # torch.compile

    def __post_init__(self):
        check = checker(self)
        known = " ".join(DEMONSTRATORS)
        check(self.task and {*self.task} <= {*DEMONSTRATORS}, "task", f"choose some of {known}")
        for flag in ("steps", "batch", "C", "save_every"):
            check(getattr(self, flag) >= 1, flag, "must be at least 1")
        for flag in ("warmup", "lora_r", "seed"):
            check(getattr(self, flag) >= 0, flag, "must be at least 0")
        check(0 < self.lr < 1, "lr", "must be above 0 and below 1")
        check(not self.data or Path(self.data).is_file(), "data", "no such file")
        check(not self.lora_r or self.model, "lora_r", "adapters need a --model to adapt")
        check(self.out, "out", "say where the model goes (the embedded one: --out tiny)")
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
    """The rows of a JSON Lines file; ValueError names the first line that is not one."""
    rows = []
    for i, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(("data", row["prompt"] + "", row["completion"] + ""))
        except (ValueError, TypeError, KeyError):
            want = '{"prompt": "...", "completion": "..."}'
            raise ValueError(f"--data {file}: line {i} is not {want}") from None
    if len(rows) < 2:
        raise ValueError(f"--data {file}: needs at least 2 rows, one of them to measure with")
    return rows


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
    texts = [part for row in rows for text in row[1:] for part in between.split(text)]
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
    """Ids [N, P + C] and where they are real: completions are filled up with end tokens, which are
    learnt like any other."""
    prompts = model.chat_ids([row[1] for row in rows], tokenizer)
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


def diffusion_loss(logits_NCV: Tensor, token_NC: Tensor, hidden_NC: Tensor, ratio_N1: Tensor):
    """LLaDA's bound on the completion's negative log-likelihood (equation 5), in nats a token."""
    nll_NC = F.cross_entropy(logits_NCV.transpose(1, 2), token_NC, reduction="none")
    return (nll_NC * hidden_NC / ratio_N1).mean()


def logits_of(net, prompt_NP: Tensor, shown_NC: Tensor, real_NL: Tensor) -> Tensor:
    """Float32 logits of the completion [N, C, V], on the CPU or GPU that holds the network."""
    ids_NL, device = torch.cat((prompt_NP, shown_NC), 1), next(net.parameters()).device
    at_NC = torch.arange(prompt_NP.shape[1], ids_NL.shape[1]).expand(len(ids_NL), -1)
    return net(ids_NL.to(device), real_NL.to(device), at_NC.to(device))


@torch.no_grad()
def accuracy(net, ids_NL: Tensor, real_NL: Tensor, C: int, names: list[str]) -> dict[str, float]:
    """Per task, the share of hidden tokens that the network says, half of each completion hidden.
    End tokens, easily said, do not count."""
    prompt_NP, token_NC = ids_NL[:, :-C], ids_NL[:, -C:]
    hidden_NC = torch.rand(token_NC.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    shown_NC = torch.where(hidden_NC, net.config.mask_id, token_NC)
    said_NC = logits_of(net, prompt_NP, shown_NC, real_NL).argmax(-1).cpu()
    counts_NC = hidden_NC & (token_NC != net.config.eos_id)
    shares = {}
    for task in dict.fromkeys(names):
        counts = counts_NC & torch.tensor([name == task for name in names])[:, None]
        shares[task] = (said_NC == token_NC)[counts].float().mean().item()
    return shares


# ---- training ------------------------------------------------------------------------------------


def open_model(cfg: Recipe, rows: list[Demonstration]):
    """--model and its tokenizer, or a new model and a tokenizer for the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = use_bf16("auto", device)
    if cfg.model:
        frozen = cfg.lora_r > 0 and bf16
        net = model.load(cfg.model, device, torch.bfloat16 if frozen else torch.float32)
        if cfg.lora_r:
            model.add_lora(net, cfg.lora_r, alpha=cfg.lora_r)
        return accelerate(net, bf16, cfg.compile), model.load_tokenizer(cfg.model)
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


def prepare(cfg: Recipe, argv: list[str]) -> tuple:
    """Load everything and begin the log; what `train` takes. Bad input is found here."""
    torch.manual_seed(cfg.seed)
    held, known, batches = examples(cfg)
    net, tokenizer = open_model(cfg, known + held)
    P, out = longest(tokenizer, known + held, cfg.C), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    bring_defaults(cfg.model or "tiny", out)
    (out / "training.log").write_text("")
    size, _ = model.count(net)
    note(out, " ".join(["python sft.py", *argv]))
    shape = f"{size:,} parameters, {len(tokenizer)} tokens, P {P}, C {cfg.C}, {len(known):,} rows"
    note(out, f"{shape}; accuracy: hidden tokens of held-out right answers")
    return net, tokenizer, P, held, batches


def train(cfg: Recipe, net, tokenizer, P: int, held: list, batches: Iterator[list]) -> None:
    C, out = cfg.C, Path(cfg.out)
    held_ids_NL, held_real_NL = encode(tokenizer, held, P, C, net.config)
    learnt = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.01)

    losses, told, began = [], 0, time.perf_counter()
    for step, rows in enumerate(itertools.islice(batches, cfg.steps), 1):
        lr = cfg.lr * min(step / max(1, cfg.warmup), 1) * (1 - (step - 1) / cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids_NL, real_NL = encode(tokenizer, rows, P, C, net.config)
        shown_NC, hidden_NC, ratio_N1 = hide(ids_NL[:, P:], net.config.mask_id)
        logits_NCV = logits_of(net, ids_NL[:, :P], shown_NC, real_NL)
        moved = (x.to(logits_NCV.device) for x in (ids_NL[:, P:], hidden_NC, ratio_N1))
        loss = diffusion_loss(logits_NCV, *moved)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 50 == 0 or step in (1, cfg.steps):
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise SystemExit(f"sft: the loss is {mean} by step {step}: lower --lr {cfg.lr}")
            losses = []
            shares = accuracy(net, held_ids_NL, held_real_NL, C, [row[0] for row in held])
            each = (time.perf_counter() - began) / (step - told)
            told, began = step, time.perf_counter()
            scores = "  ".join(f"{task} {share:.3f}" for task, share in shares.items())
            left = (cfg.steps - step) * each / 60
            note(out, f"step {step:5}  loss {mean:.4f}  {scores}  lr {lr:.1e}  {each:.2f} s/step  "
                     f"left {left:.1f} min")  # fmt: skip
        if step % cfg.save_every == 0 or step == cfg.steps:
            model.save(net, out)
            tokenizer.save_pretrained(out)


def note(out: Path, line: str) -> None:
    """To the terminal and to training.log."""
    say(line)
    with open(out / "training.log", "a", encoding="utf-8") as log:
        print(line, file=log)


def main(argv: list[str]) -> int:
    try:
        cfg = read(Recipe, argv, "sft.py")
        prepared = prepare(cfg, argv)
    except (ValueError, OSError) as error:
        print(f"sft: {error}", file=sys.stderr)
        return 2
    train(cfg, *prepared)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
