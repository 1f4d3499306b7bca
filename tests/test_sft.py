"""The demonstrators, the tokenizer, the objective, and the folder that they make."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import config
import egspo
import model
import run as running
import sft
from data import TASKS
from processes import REPO, run
from toy import toy_model

TINY = REPO / "tiny"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


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
     "--data nowhere.jsonl", "--model nowhere/at/all", "--lora-r 8", "--batch 0",
     "--task sudoku --C 5"],
)  # fmt: skip
def test_a_bad_command_line_is_one_line_and_code_2(words, tmp_path, capsys):
    assert sft.main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("sft: ") and len(told.err.strip().splitlines()) == 1
    assert words.rsplit("--")[-1].split()[0] in told.err or words.startswith("--model")


def test_a_row_without_a_completion_is_named_by_its_line_and_the_process_exits_with_2(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = run("--data", file, "--out", tmp_path / "out", script=REPO / "sft.py")
    assert done.returncode == 2 and "line 2" in done.stderr


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
