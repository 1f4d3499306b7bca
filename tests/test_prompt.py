"""What a model is asked, what of its answer is judged, and what the parts of a reward weigh."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import config
import data
import egspo
import letters  # noqa: F401  the task of the runs
import model
import run as running
from processes import REPO, SMALL, events, run, train
from toy import byte_tokenizer, toy_model

TEMPLATE = (
    "[system]\nBe brief.\n\n[user]\nThe task: {prompt}\nGo.\n\n[answer]\n~~~~~~~~~~~~~~~~~~~~\n"
)
ROLES = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Its chat template knows the roles."""
    folder = toy_model(tmp_path_factory.mktemp("model") / "toy")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ROLES
    tokenizer.save_pretrained(folder)
    defaults = json.loads((folder / "defaults.json").read_text())
    defaults["settings"]["minibatches"] = 1
    (folder / "defaults.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """What a model's folder may be: one without settings."""
    return tmp_path_factory.mktemp("large")


def example(name: str) -> data.Problem:
    rows = {
        "gsm8k": {"question": "How much is 2 + 2?", "answer": "4"},
        "math": {"problem": "What is half of 1?", "answer": "\\frac{1}{2}"},
        "humaneval": {
            "prompt": "def one():\n    pass\n", "entry_point": "one",
            "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n",
        },
        "mbpp": {"text": "Return 1.", "code": "def one(): return 1", "test_list": ["assert one()"]},
    }  # fmt: skip
    task = data.TASKS[name]
    return task.problem(rows[name]) if name in rows else task.load("val")[0]


OURS = "sudoku countdown toycode gsm8k math humaneval mbpp".split()


# ---- templates -----------------------------------------------------------------------------------


def test_a_template_has_three_parts_and_braces_of_the_text_stay():
    template = config.parse_template(TEMPLATE)
    assert template.system == "Be brief." and template.answer == "~" * 20
    problem = data.Problem("letters", "x {question} \\boxed{}", None, "0")
    assert template.asked(problem, "").prompt == "The task: x {question} \\boxed{}\nGo."
    assert config.parse_template("").asked(problem, "") == problem


@pytest.mark.parametrize("name", OURS)
def test_a_question_is_the_prompt_without_our_instructions(name):
    problem, task = example(name), data.TASKS[name]
    question = config.Template(user="{question}").asked(problem, task.asks).prompt
    assert problem.prompt == task.asks + question and 0 < len(question) < len(problem.prompt)


def test_the_message_the_system_text_and_the_opening_stand_where_they_belong(toy):
    tokenizer, template = model.load_tokenizer(toy), config.parse_template(TEMPLATE)
    cfg = config.Config(task="letters", prompt=TEMPLATE)
    asked = [template.asked(data.Problem("letters", "a 1", "a", "0"), "")]
    (ids,) = running.prompt_ids(cfg, asked, tokenizer)
    text = "<system>Be brief.<user>The task: a 1\nGo.<assistant>" + "~" * 20
    assert tokenizer.decode(ids) == text
    plain = running.prompt_ids(replace(cfg, prompt=""), asked, tokenizer)
    assert plain == model.chat_ids([asked[0].prompt], tokenizer)


BAD = [
    (None, "no such file"),
    ("[user]\nWhat is it?\n", "[user] must hold {prompt}"),
    ("[answer]\n<reasoning>\n", "[user] must hold {prompt}"),
    ("\ufeff[user]\nAs Windows begins a file\n", "[user] must hold {prompt}"),
    ("[user]\n{prompt}\n[opening]\n<reasoning>\n", "found '[user] [opening]'"),
    ("[user]\n{prompt}\n[user]\n{prompt}\n", "found '[user] [user]'"),
    ("{prompt}\n", "found '{prompt}'"),
    ("[user]\n{prompt}\n[answer]\n{question}\n", "stand in [user] only"),
    (b"[user]\n{prompt}\n\xff", "utf-8"),
]


@pytest.mark.parametrize("text, named", BAD)
def test_a_bad_template_is_one_line_and_exit_code_2(
    toy, tmp_path, monkeypatch, capsys, text, named
):
    file = tmp_path / "prompt.txt"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    words = ["--model", str(toy), *SMALL, "--out", str(tmp_path / "run"), "--prompt", str(file)]
    monkeypatch.setattr(sys, "argv", ["egspo.py", *words])
    assert egspo.main() == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and f"--prompt {file}: " in stderr and named in stderr, stderr
    assert not (tmp_path / "run").exists()


def test_what_is_judged_begins_with_the_opening():
    problem = data.TASKS["gsm8k"].problem({"question": "?", "answer": "4"})
    cfg = config.Config(task="gsm8k", prompt="[user]\n{prompt}\n[answer]\n<answer>\\boxed{\n")
    for opened, parts in ((cfg, {"correct": 1, "format": 0.1}),
                          (replace(cfg, prompt=""), {"correct": 1, "format": 0})):  # fmt: skip
        (reward,) = running.judged(opened, ["4}</answer>"], [problem])
        assert reward.parts == parts


# ---- in a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(toy, tmp_path_factory) -> Path:
    """A run whose template is gone afterwards, in a folder that has moved."""
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "prompt.txt"
    file.write_text(TEMPLATE)
    train(toy, folder / "there", "--steps", 2, "--prompt", file)
    file.unlink()
    return shutil.move(folder / "there", folder / "asked")


def test_training_and_evaluation_ask_alike_and_judge_the_opening(asked, toy, tmp_path):
    cfg, log = json.loads((asked / "config.json").read_text()), events(asked)
    assert cfg["prompt"] == TEMPLATE
    longest = "<system>Be brief.<user>The task: t 19\nGo.<assistant>" + "~" * 20
    assert cfg["P"] == len(longest)  # a token is a byte
    sample = next(event for event in log if event["e"] == "sample")
    assert sample["prompt"].startswith("The task: ") and sample["prompt"].endswith("\nGo.")
    assert min(sample["srw"]) > 0.6 and sample["rw"]["late"] > 0.6  # 20 of 32 letters are given
    assert all(event["m"]["reward"] > 0.6 for event in log if event["e"] == "eval")
    train(toy, tmp_path / "plain", "--steps", 1)
    plain = [event["m"]["reward"] for event in events(tmp_path / "plain") if event["e"] == "eval"]
    assert plain[0] < 0.6


def test_a_checkpoint_and_a_resumed_run_ask_as_the_run_did(asked, tmp_path):
    for words in (["--model", asked, "--eval-only"], ["--out", asked, "--resume"]):
        assert config.parse([*map(str, words)])[0].prompt == TEMPLATE
    assert config.parse(["--model", str(asked), "--eval-only", "--prompt", ""])[0].prompt == ""
    done = run("--model", asked, *SMALL, "--eval-only", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    last = [event["m"]["reward"] for event in events(asked) if event["e"] == "eval"][-1]
    found = json.loads((tmp_path / "test-letters.json").read_text())[-1]["reward"]
    assert found == pytest.approx(last, abs=1e-3)
    done = run("--out", asked, "--resume", "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads((asked / "config.json").read_text())["prompt"] == TEMPLATE


# ---- defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_large_model_is_asked_to_reason_and_the_embedded_one_is_not(name, large):
    problem, asks = example(name), data.TASKS[name].asks
    cfg = config.of_model(str(large), name)
    assert "Reason step by step between <reasoning>" in cfg.template.asked(problem, asks).prompt
    tiny = config.of_model(str(REPO / "tiny"), name)
    assert asdict(tiny)["prompt"] == "" and tiny.template.asked(problem, asks) == problem


def test_countdown_learns_from_the_common_set_unless_the_model_is_the_embedded_one(large):
    assert config.of_model(str(large), "countdown").train_set == "published"
    assert config.of_model(str(REPO / "tiny"), "countdown").train_set == "generated"
    carried = config.carry_on(config.of_model(str(large), "countdown"))
    assert carried["by_task"]["countdown"]["train_set"] == "published"


def test_the_documented_command_has_the_published_settings(large, monkeypatch):
    monkeypatch.chdir(REPO)
    readme = (REPO / "README.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in readme.splitlines() if "--prompt examples/prompt.txt" in line]
    words = line.partition("egspo.py")[2].replace("GSAI-ML/LLaDA-8B-Instruct", str(large)).split()
    cfg = config.parse(words)[0]
    published = dict(
        task="gsm8k", C=256, T=128, block=32, temperature=0.9, G=8, K=8, lam=0.5, eps_low=0.2,
        eps_high=0.5, beta=0.04, lr=3e-5, weight_decay=0.1, max_grad_norm=0.2, lora_r=128,
        lora_alpha=64, minibatches=4, mu=1, warmup=0, quantize="nf4", order="low_confidence",
        select="entropy", likelihood="tokens", normalise=False, cache="none", seed=42,
    )  # fmt: skip
    assert published.items() <= asdict(cfg).items()
    ranks = int(line.partition("--nproc-per-node ")[2].split()[0])
    assert ranks * cfg.B == 6  # prompts a rollout in all
    (reward,) = running.judged(cfg, ["</reasoning><answer>\\boxed{4}</answer>"], [example("gsm8k")])
    assert reward == 4 and reward.parts == {"correct": 2, "format": 2}
    assert cfg.template.answer == "<reasoning>"
    asked = cfg.template.asked(example("gsm8k"), data.TASKS["gsm8k"].asks)
    assert "How much is 2 + 2?" in asked.prompt and data.WORDED not in asked.prompt


def test_the_documented_command_of_just_grpo_is_autoregressive_and_exact(large, monkeypatch):
    monkeypatch.chdir(REPO)
    readme = (REPO / "README.md").read_text().replace("\\\n", " ")
    (line,) = [
        line for line in readme.splitlines() if line.startswith("python") and "--normalise" in line
    ]
    words = line.partition("egspo.py")[2].replace("GSAI-ML/LLaDA-8B-Instruct", str(large)).split()
    cfg = config.parse(words)[0]
    assert cfg.T == cfg.C == cfg.K == 256 and cfg.block == 1  # one token a step, in order
    assert (cfg.select, cfg.lam, cfg.beta, cfg.temperature) == ("all", 0, 0, 1)
    assert cfg.normalise and cfg.updates_a_pass == cfg.repeats == 1


# ---- weights -------------------------------------------------------------------------------------


def test_weights_change_what_is_trained_on_and_not_what_is_correct():
    reward = data.Reward(1.1, True, tests=1.0, format=0.1)
    heavy = reward.weighted({"tests": 0, "format": 5.0})
    assert heavy == 0.5 and heavy.correct and heavy.parts == {"tests": 0, "format": 0.5}
    assert reward.weighted({}) is reward


def test_a_run_logs_the_weighted_rewards_and_its_guesses_weigh_the_same(toy, tmp_path):
    logs = []
    for name, words in (("one", []), ("two", ["--weights", "late=2"])):
        train(toy, tmp_path / name, "--steps", 1, *words)
        log = events(tmp_path / name)
        step = next(event["m"] for event in log if event["e"] == "step")
        sample = next(event for event in log if event["e"] == "sample")
        first = next(event["m"] for event in log if event["e"] == "eval")
        assert step["reward/late"] == step["reward/mean"]
        logs.append([step["reward/mean"], first["reward"], *sample["srw"]])
        logs.append([step["correct"], first["accuracy"]])
    assert logs[2] == pytest.approx([2 * x for x in logs[0]], abs=2e-3)
    assert max(logs[0][2:]) > 0
    assert logs[3] == logs[1]
    assert config.parse(["--model", str(tmp_path / "two")])[0].weights == "late=2"


@pytest.mark.parametrize(
    "weights, named",
    [("colour=2,late=1", "no colour; a reward of letters has late"), ("late", "name=number"),
     ("late=-1", "name=number"), ("late=nan", "name=number"), ("late=1,", "name=number")],
)  # fmt: skip
def test_bad_weights_are_one_line(toy, tmp_path, monkeypatch, capsys, weights, named):
    words = ["--model", str(toy), *SMALL, "--out", str(tmp_path / "run"), "--weights", weights]
    monkeypatch.setattr(sys, "argv", ["egspo.py", *words])
    assert egspo.main() == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and f"--weights {weights}: " in stderr and named in stderr
    assert not (tmp_path / "run").exists()
