"""The demonstrators, the tokenizer, the objective, and the folder that they make."""

import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import config
import egspo
import model
import run as running
import sft
from data import TASKS, WORDED, Problem
from events import Log
from processes import REPO, Forked, events, run, train
from test_model import some_ids, with_adapter
from toy import END, autoregressive, byte_tokenizer, toy_model

TINY = REPO / "tiny"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(autouse=True)
def signals():
    """A training takes signals; the tests' own process takes them as before."""
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


# ---- demonstrators -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sft.DEMONSTRATORS)
def test_a_right_demonstration_earns_full_reward_and_the_others_seldom_do(name):
    rng, task = random.Random(0), TASKS[name]
    problems = task.load("train")[:100]
    solved = {}
    for kind in sft.SHARES:
        told = [sft.demonstrate(problem, lambda: kind, rng)[2] for problem in problems]
        solved[kind] = sum(reward.correct for reward in task.rewards(told, problems)) / 100
    assert solved["right"] == 1
    assert solved["lazy"] <= 0.3 and solved["guess"] <= 0.3


@pytest.mark.parametrize("name", sft.DEMONSTRATORS)
def test_the_mixture_has_its_shares_and_comes_after_the_right_ones(name):
    cfg, rng = sft.Recipe(out="out", task=(name,), steps=10, batch=400), random.Random(0)
    problems = TASKS[name].load("train")
    told = {
        kind: {sft.demonstrate(problem, lambda: kind, rng) for problem in problems}
        for kind in ("lazy", "right")
    }  # of these two every problem has one
    for step, rows in zip(range(10), sft.demonstrations(cfg)):
        shares = {kind: sum(row in known for row in rows) / 400 for kind, known in told.items()}
        if step < 10 * sft.RIGHT_ONLY:
            assert shares["right"] == 1
        elif name != "sudoku":  # a lazy answer may be right, and a guess either
            assert all(sft.SHARES[kind] - 0.1 < shares[kind] < 1 for kind in told)
            assert shares["lazy"] < sft.SHARES["lazy"] + 0.2


def test_the_kinds_of_sudoku_demonstrators_mix_cell_by_cell():
    cfg = sft.Recipe(out="out", task=("sudoku",), steps=10, batch=400)
    problems = {problem.prompt: problem.answer for problem in TASKS["sudoku"].load("train")}
    for rows in itertools.islice(sft.demonstrations(cfg), 7, 10):
        blank, right, cells = 0, 0, 0
        for _, prompt, completion in rows:
            answer, said = problems[prompt], completion[len("<answer>") :]
            for i, clue in enumerate(answer["puzzle"]):
                blank += clue == said[i] == "0"
                right += clue == "0" and said[i] == answer["solution"][i]
                cells += clue == "0"
                assert clue in ("0", said[i])
        assert abs(blank / cells - sft.SHARES["lazy"]) < 0.05
        assert abs(right / cells - sft.SHARES["right"] - sft.SHARES["guess"] / 4) < 0.05


# ---- the tokenizer -------------------------------------------------------------------------------


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", sft.DEMONSTRATORS)
def test_prompts_and_right_answers_are_short_for_the_embedded_tokenizer(name, tokenizer):
    rng = random.Random(0)
    for split in ("val", "test"):
        rows = [sft.demonstrate(problem, sft.right, rng) for problem in TASKS[name].load(split)]
        assert sft.longest(tokenizer, rows, C=24) <= 45
        _, prompt, completion = rows[0]
        for text in (prompt, completion):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_rows_that_share_no_phrase_are_learnt_in_more_than_letters():
    rng, words = random.Random(0), "river stone cloud apple green seven night water".split()
    text = lambda: " ".join(rng.choices(words, k=6))
    made = sft.make_tokenizer([("data", text(), text()) for _ in range(100)])
    assert len(made("river stone cloud")["input_ids"]) < 10


def test_each_digit_is_a_token_of_its_own(tokenizer):
    assert len(tokenizer("31415926535897932384")["input_ids"]) == 20


# ---- the objective -------------------------------------------------------------------------------


def test_a_completion_is_filled_with_end_tokens_and_a_prompt_is_padded_on_the_left(tokenizer):
    c = model.parse_config(json.loads((TINY / "config.json").read_text()))
    rows = [("sudoku", "ab", "12"), ("sudoku", "one two three", "4")]
    P = sft.longest(tokenizer, rows, C=5)
    ids_NL, real_NL = sft.encode(tokenizer, rows, P, 5, c)
    for (_, prompt, completion), ids, real in zip(rows, ids_NL.tolist(), real_NL.tolist()):
        pad = real.count(False)
        assert ids[:pad] == [c.pad_id] * pad and real == sorted(real)
        assert tokenizer.decode(ids[pad:P]) == prompt + "\n"
        ends = 5 - len(completion)
        assert tokenizer.decode(ids[P:-ends]) == completion and ids[-ends:] == [c.eos_id] * ends


def test_ratios_are_spread_over_the_batch_and_hide_that_share_of_the_tokens():
    torch.manual_seed(0)
    token_NC = torch.full((8, 4000), 5)
    shown_NC, hidden_NC, ratio_N1 = sft.hide(token_NC, mask_id=1)
    assert ((ratio_N1[:, 0] * 8).long() == torch.arange(8)).all()
    assert torch.allclose(hidden_NC.float().mean(1), ratio_N1[:, 0], atol=0.03)
    assert ((shown_NC == 1) == hidden_NC).all() and (shown_NC[~hidden_NC] == 5).all()


def test_the_loss_is_the_hidden_tokens_nll_over_their_ratio():
    torch.manual_seed(0)
    logits_NCV, token_NC = torch.randn(6, 4, 9), torch.randint(0, 9, (6, 4))
    nll_NC = -logits_NCV.log_softmax(-1).gather(2, token_NC[..., None])[..., 0]
    _, hidden_NC, ratio_N1 = sft.hide(token_NC, mask_id=9)
    want = 0.0
    for n in range(6):
        for c in range(4):
            if hidden_NC[n, c]:
                want += nll_NC[n, c].item() / ratio_N1[n].item() / 24
    got = sft.diffusion_loss(logits_NCV[hidden_NC], token_NC, hidden_NC, ratio_N1).item()
    assert got == pytest.approx(want)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def backwards(tmp_path) -> Path:
    """Rows that ask for words spelt backwards."""
    rows = [{"prompt": word, "completion": word[::-1]} for word in ("abc", "xyz", "mno", "tuv")]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows * 8)))
    return file


def test_a_given_model_learns_given_rows_and_is_a_model_again(tmp_path, toy, backwards, capsys):
    out = tmp_path / "out"
    words = (
        f"--model {toy} --data {backwards} --out {out} --steps 100 --batch 16 --C 6 --warmup 5 "
        "--lr 1e-2 --no-compile"
    )
    assert sft.main(words.split()) == 0
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith("step")]
    losses = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert losses[-1] < 0.3 < 2 < losses[0]
    assert "left" in lines[0] and (out / "training.log").read_text() == told

    net, tokenizer = model.load(out), AutoTokenizer.from_pretrained(out)
    c = net.config
    ids_NL, real_NL = sft.encode(tokenizer, [("data", "xyz", "zyx")], 4, 6, c)
    masked_NL = ids_NL.clone()
    masked_NL[:, 4:] = c.mask_id
    said_NC = net(masked_NL, real_NL)[:, 4:].argmax(-1)
    assert said_NC.tolist() == ids_NL[:, 4:].tolist()


def test_with_adapters_only_the_adapter_is_learnt_and_saved(tmp_path, toy, backwards):
    out = tmp_path / "out"
    words = f"--model {toy} --data {backwards} --out {out} --steps 3 --lora-r 2 --no-compile"
    assert sft.main(words.split()) == 0
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    before, after = model.load(toy).state_dict(), model.load(out).state_dict()
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    assert any(value.any() for name, value in after.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "words",
    ["--steps 0", "--task chess", "--task", "--lr nan", "--lr -1", "--steps many", "--bogus 1",
     "--data nowhere.jsonl", "--model nowhere/at/all", "--lora-r 8", "--batch 0", "--adapt",
     "--resume", "--micro 0", "--adapt --model nowhere/at/all",
     "--task sudoku --C 5"],
)  # fmt: skip
def test_a_bad_command_line_is_one_line_and_code_2(words, tmp_path, capsys):
    assert sft.main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("sft: ") and len(told.err.strip().splitlines()) == 1
    assert words.rsplit("--")[-1].split()[0] in told.err or "--model" in words


def test_a_row_without_a_completion_is_named_by_its_line_and_the_process_exits_with_2(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = run("--data", file, "--out", tmp_path / "out", script=REPO / "sft.py")
    assert done.returncode == 2 and "line 2" in done.stderr
    good = '{"prompt": "a", "question": "its other name", "completion": "b"}'
    for bad, why in (
        ('{"question": "2+2?", "answer": "4"}', "line 2: the answer does not end in"),
        ('{"prompt": "a", "completion": " "}', "line 2: the completion is empty"),
    ):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=why):
            sft.read_rows(str(file))
    file.write_text(f"{good}\n{good}\n")
    assert sft.read_rows(str(file)) == [("data", "a", "b")] * 2


def test_rows_hold_any_character_and_stand_in_any_file_of_rows(tmp_path):
    rows = '{"prompt": "a\u2028b", "completion": "c"}\n\n{"prompt": "d", "completion": "e"}\n'
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    read = sft.read_rows(str(tmp_path / "rows.jsonl.gz"))
    assert read == [("data", "a\u2028b", "c"), ("data", "d", "e")]


def test_rows_of_gsm8k_are_answered_as_its_task_wants_it(tmp_path):
    row = {"question": "How many?", "answer": "3*4=<<3*4=12>>12 each,\nso 1,012.\n#### 1,012"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    _, prompt, completion = sft.read_rows(str(tmp_path / "rows.jsonl"))[0]
    task = TASKS["gsm8k"]
    want, answer = task.build(row)
    assert prompt == want == WORDED + "How many?" and "3*4=12 each,\nso 1,012." in completion
    reward = task.reward(completion, Problem("gsm8k", prompt, answer, "0"))
    assert reward.correct and reward == sum(reward.parts.values()) > 1


def test_rows_of_a_backward_pass_change_nothing_but_rounding(tmp_path, toy, backwards):
    for micro in ("16", "5"):
        words = f"--model {toy} --data {backwards} --steps 2 --batch 16 --C 6 --no-compile"
        words = [*words.split(), "--micro", micro, "--out", str(tmp_path / micro)]
        assert sft.main(words) == 0
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("16", "5"))
    before = load_file(toy / "model.safetensors")
    assert all((one[name] - other[name]).abs().max() < 1e-6 for name in one)
    assert all((one[name] - before[name]).abs().max() > 1e-6 for name in one)


def test_numbers_that_are_not_finite_end_the_run_before_they_are_saved(
    tmp_path, toy, backwards, monkeypatch
):
    learn, nan = sft.learn, torch.tensor(math.nan)
    losses = itertools.chain([0, 0], itertools.repeat(nan))
    monkeypatch.setattr(sft, "learn", lambda *args: learn(*args) + next(losses))
    words = f"--model {toy} --data {backwards} --out {tmp_path / 'out'} --C 6 --no-compile"
    assert sft.main([*words.split(), "--save-every", "2"]) == 1
    state = torch.load(tmp_path / "out" / "checkpoint.pt")
    assert state["step"] == 2  # that of step 4 was not written


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["", "--lora-r 2"])
def test_a_run_that_was_stopped_and_goes_on_equals_one_that_was_not(tmp_path, toy, backwards, lora):
    words = (
        f"--model {toy} --data {backwards} --steps 80 --batch 8 --C 6 --no-compile --lr 1e-2 "
        f"--eval-every 10 {lora}"
    ).split()
    script, out = REPO / "sft.py", tmp_path / "out"
    assert run(*words, "--out", tmp_path / "whole", script=script).returncode == 0
    first = Forked(script, [*words, "--out", out])
    while not first.stdout.readline().startswith("step"):
        pass
    os.kill(first.pid, signal.SIGTERM)
    stopped = first.wait()
    assert stopped.returncode == 143 and "--resume" in stopped.stderr, stopped.stderr
    assert (out / "checkpoint.pt").exists() and not (out / "config.json").exists()

    afresh = run(*words, "--out", out, script=script)
    assert afresh.returncode == 2 and "unfinished run" in afresh.stderr
    other = run(*words, "--out", out, "--resume", "--seed", 1, script=script)
    assert other.returncode == 2 and "--seed 1: the run in --out" in other.stderr
    learnt = backwards.read_text()
    backwards.write_text(learnt.replace("b", "d"))
    other = run(*words, "--out", out, "--resume", script=script)
    assert other.returncode == 2 and "these are not the rows" in other.stderr
    backwards.write_text(learnt)
    done = run(*words, "--out", out, "--resume", script=script)
    assert done.returncode == 0, done.stderr
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    again = run(*words, "--out", out, "--resume", script=script)
    assert again.returncode == 2 and "nothing to go on with" in again.stderr
    again = run(*words, "--out", out, script=script)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    (out / "events.jsonl").rename(tmp_path / "aside")
    again = run(*words, "--out", out, script=script)
    assert again.returncode == 2 and "holds a model already" in again.stderr
    (tmp_path / "aside").rename(out / "events.jsonl")
    assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    assert not (out / "checkpoint.pt").exists()
    last = [[e["m"]["loss"] for e in events(folder) if e["e"] == "eval"][-1]
            for folder in (out, tmp_path / "whole")]  # fmt: skip
    assert last[0] == last[1]


def test_a_model_that_cannot_be_written_is_one_line_and_nothing_is_lost(tmp_path, toy, backwards):
    words = f"--model {toy} --data {backwards} --steps 3 --batch 8 --C 6 --no-compile".split()
    script, out = REPO / "sft.py", tmp_path / "out"
    assert run(*words, "--out", tmp_path / "whole", script=script).returncode == 0
    (out / "config.json").mkdir(parents=True)  # in the place of a full disk
    failed = run(*words, "--out", out, script=script)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert "config.json" in failed.stderr and "--resume" in failed.stderr
    (out / "config.json").rmdir()
    done = run(*words, "--out", out, "--resume", script=script)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_run_reads_one_state_of_a_hub_model(tmp_path, toy, backwards, monkeypatch):
    """The second state differs, and is what the hub gives when the run goes on."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    cached, first, second = tmp_path / "models--someone--toy", "1" * 40, "2" * 40
    toy_model(cached / "snapshots" / second, seed=5)
    shutil.copytree(toy, cached / "snapshots" / first)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(first)
    words = f"--model someone/toy --data {backwards} --steps 3 --batch 8 --C 6 --no-compile".split()
    words += ["--lora-r", "2", "--out"]
    assert sft.main([*words, str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    (out / "adapter_config.json").mkdir(parents=True)  # in the place of a full disk
    assert sft.main([*words, str(out)]) == 1
    (out / "adapter_config.json").rmdir()
    (cached / "refs" / "main").write_text(second)
    assert sft.main([*words, str(out), "--resume"]) == 0
    told = model.read_json(out / "adapter_config.json")
    assert (told["base_model_name_or_path"], told["revision"]) == ("someone/toy", first)
    whole = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == whole


# ---- from autoregressive to masked diffusion -----------------------------------------------------


@pytest.mark.parametrize("kind, lora", [(LlamaConfig, ""), (Qwen3Config, "--lora-r 8")])
def test_an_autoregressive_model_becomes_one_of_masked_diffusion(kind, lora, tmp_path, backwards):
    base, out = autoregressive(tmp_path / "base", kind), tmp_path / "out"
    with pytest.raises(ValueError, match="sft.py --adapt"):
        model.load(base)
    words = (
        f"--adapt --model {base} --data {backwards} --out {out} --steps 40 --batch 16 --C 6 "
        f"--lr 1e-2 --warmup 5 --eval-every 20 --no-compile {lora}"
    )
    assert sft.main(words.split()) == 0
    log = Log(out / "events.jsonl")
    log.poll()
    told = log.summary()
    assert (told["status"], told["done"], told["iters"]) == ("finished", 40, 40)
    held = [told["evals"][it]["loss"] for it in (1, 20, 40)]
    assert held[2] < held[1] < held[0] and 0 <= told["evals"][40]["accuracy"] <= 1

    raw = json.loads((out / "config.json").read_text())
    assert raw["mask_token_id"] == 257 and raw["shift_logits"] is True
    assert AutoTokenizer.from_pretrained(out).mask_token_id == 257
    assert (out / "generation_config.json").exists() and not (out / "adapter_config.json").exists()
    net, before = model.load(out), load_file(base / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    for name, p in theirs.named_parameters():
        assert name == "model.norm.weight" or name in before and p.shape == before[name].shape
    assert net.config.shifted and config.of_model(str(out)).C == 6
    train(out, tmp_path / "run", "--steps", 1, "--lora-r", 2)


def test_what_adapters_of_an_autoregressive_model_learnt_is_in_the_weights(tmp_path, backwards):
    base, out = autoregressive(tmp_path / "base"), tmp_path / "out"
    words = f"--adapt --model {base} --data {backwards} --out {out} --steps 1 --C 6 --no-compile"
    assert sft.main([*words.split(), "--lora-r", "2", "--warmup", "0"]) == 0
    before, after = (load_file(at / "model.safetensors") for at in (base, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    maps = {name for name in before if "_proj" in name}
    assert moved - {"model.embed_tokens.weight", "lm_head.weight"} == maps  # those: of the mask


MASKS = {  # special tokens beside END, a chat template: what hides others
    "reserved first": (["<|box|>", "<|reserved_0|>"], "", "<|reserved_0|>"),
    "the first idle one": (["<|box|>", "<|quad|>"], "", "<|box|>"),
    "not of the template": (["<|im_start|>", "<|box|>"], "<|im_start|>", "<|box|>"),
    "not an end of a turn": (["<|im_end|>", "<|box|>"], "", "<|box|>"),
    "a new one": (["<|im_end|>"], "", "<|mask|>"),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_is_an_idle_special_token_or_a_new_one(name, tmp_path):
    special, template, wanted = MASKS[name]
    base = autoregressive(tmp_path, idle=END)
    tokenizer = byte_tokenizer(mask=END, said=False)
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.chat_template = template + "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(base)
    net, tokenizer = sft.open_autoregressive(str(base), torch.device("cpu"), torch.float32)
    assert tokenizer.mask_token == wanted
    assert net.config.mask_id == tokenizer.mask_token_id == net.config.raw["mask_token_id"]
    assert net.never_V[net.config.mask_id] and len(net.embed.weight) == 264


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_mask_grows_the_vocabulary_and_changes_nothing_else(tied, tmp_path, backwards):
    tokens = len(byte_tokenizer(mask=END, said=False))
    sizes = dict(idle=END, vocab_size=tokens, tie_word_embeddings=tied)
    base, device = autoregressive(tmp_path / "base", **sizes), torch.device("cpu")
    net, tokenizer = sft.open_autoregressive(str(base), device, torch.float32)
    assert net.config.mask_id == tokens == len(net.embed.weight) - 1 == len(net.never_V) - 1
    assert torch.allclose(net.embed.weight[-1], net.embed.weight[:-1].mean(0), atol=1e-6)
    with torch.no_grad():
        before, after = (n(some_ids()) for n in (model.load(base, mask_id=0), net))
    assert torch.equal(before, after[..., :-1])
    words = f"--adapt --model {base} --data {backwards} --out {tmp_path / 'out'} --steps 1 --C 6"
    assert sft.main([*words.split(), "--no-compile"]) == 0
    assert model.load(tmp_path / "out").config.mask_id == tokens
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.vocab_size == tokens + 1


def test_what_is_of_masked_diffusion_already_is_not_adapted_again(tmp_path, toy, backwards, capsys):
    words = f"--adapt --model {toy} --data {backwards} --out {tmp_path / 'out'} --steps 1"
    assert sft.main(words.split()) == 2
    assert "masked diffusion already" in capsys.readouterr().err
    net = with_adapter(model.load(toy))
    model.save(net, tmp_path / "adapter")
    words = words.replace(str(toy), str(tmp_path / "adapter"))
    assert sft.main(words.split()) == 2
    assert "is an adapter: merge it" in capsys.readouterr().err


@pytest.mark.parametrize("C", [1, 6, 7, 24, 64, 100, 300])
def test_the_defaults_of_what_was_adapted_fit_its_completions(C):
    assert config.Config(model="any", minibatches=1, **sft.shape_of(C)).C == C


@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_a_model_is_used_at_the_length_that_it_learnt(tmp_path, task):
    sft.leave_defaults(sft.Recipe(C=24, out="any"), tmp_path)  # tiny's own: all of it stays
    assert config.model_defaults(str(tmp_path)) == config.model_defaults("tiny")
    (tmp_path / "defaults.json").unlink()
    sft.leave_defaults(sft.Recipe(C=100, out="any"), tmp_path)
    of = {path: config.of_model(str(path), task) for path in (tmp_path, "tiny")}
    assert (of[tmp_path].C, of[tmp_path].T, of[tmp_path].block) == (100, 50, 20)
    assert (of[tmp_path].steps, of[tmp_path].K) == (of["tiny"].steps, of["tiny"].K)
    # a task that was learnt at this length already keeps its steps
    long = dataclasses.replace(of[tmp_path], T=25, block=4, lora_r=4)
    (tmp_path / "defaults.json").write_text(json.dumps(config.carry_on(long)))
    (tmp_path / "next").mkdir()
    sft.leave_defaults(sft.Recipe(C=100, model=str(tmp_path), out="any"), tmp_path / "next")
    assert config.of_model(str(tmp_path / "next"), task).T == 25
    assert config.of_model(str(tmp_path / "next"), task).lora_r == 0


# ---- tiny/ ---------------------------------------------------------------------------------------


def test_the_embedded_model_is_small_and_says_how_it_was_made():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 6e6
    assert (TINY / "training.log").read_text().startswith("python sft.py --task")


@pytest.mark.parametrize("name", sft.DEMONSTRATORS)
def test_greedy_decoding_of_the_embedded_model_solves_little_but_sampling_earns_more(name):
    cfg = config.of_model("tiny", name)
    net, tokenizer = running.load_policy(cfg, "tiny", torch.device("cpu"))
    problems = TASKS[name].load("val")[:32]
    rows = model.chat_ids([problem.prompt for problem in problems], tokenizer)
    prompts = model.left_pad(rows, max(map(len, rows)), net.config.pad_id)

    def rewards(noise):
        roll = egspo.rollout(net, *prompts, cfg, noise)
        answers = model.texts(roll.token_NC, tokenizer, net.ends)
        return TASKS[name].rewards(answers, problems)

    greedy = rewards(None)
    assert sum(reward.correct for reward in greedy) <= 0.2 * 32
    noise = (running.uniform((cfg.T, 2, cfg.block), range(32), seed) for seed in range(3))
    best = torch.tensor([rewards(u) for u in noise]).amax(0)
    assert best.mean() > torch.tensor(greedy).mean() + 0.1  # of three samples
