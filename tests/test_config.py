"""Settings: where they come from, and how a bad file is told."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import config

SHAPE = ("C", "T", "block", "B", "G", "K")


def write(folder: Path, **files: dict) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_a_flag_is_spelt_with_hyphens_or_underscores():
    words = ["--model", "tiny", "--out", "x", "--lengths", "24"]
    with_hyphens = config.parse([*words, "--eval-only", "--eval-n", "8"])
    assert config.parse([*words, "--eval_only", "--eval_n", "8"]) == with_hyphens
    cfg, mode = with_hyphens
    assert mode.eval_only and cfg.eval_n == 8


def test_settings_are_constant():
    cfg, mode = config.parse(["--model", "tiny", "--out", "x"])
    for settings in (cfg, mode):
        for field in dataclasses.fields(settings):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(settings, field.name, getattr(settings, field.name))


# ---- a model's defaults --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 4096])
def test_a_model_without_defaults_takes_those_of_config_whatever_its_width(tmp_path, width):
    path = write(tmp_path, config={"model_type": "llada", "d_model": width})
    large = config.Config(model=path, **config.LARGE["sudoku"])
    assert config.of_model(path) == large
    assert config.of_model(path, "math") == config.Config(model=path, task="math")
    cfg, _ = config.parse(["--model", path, "--out", "x"])
    assert cfg == dataclasses.replace(large, out="x")


def test_a_models_own_defaults_are_of_its_task_and_flags_come_before_them(tmp_path):
    path = write(
        tmp_path,
        defaults={
            "task": "countdown",
            "settings": {"lr": 0.5, "C": 64, "T": 64, "prompt": "", "train_set": ""},
            "by_task": {"countdown": {"C": 32, "T": 8}, "math": {"B": 3}},
        },
    )
    made = config.Config(model=path, task="countdown", lr=0.5, C=32, T=8)
    assert config.of_model(path) == made
    assert config.of_model(path, "math") == config.Config(
        model=path, task="math", lr=0.5, C=64, T=64, B=3
    )
    cfg, _ = config.parse(["--model", path, "--out", "x", "--lr", "0.25", "--T", "16"])
    assert cfg == dataclasses.replace(made, out="x", lr=0.25, T=16)


def test_a_checkpoint_carries_on_with_its_task_and_shape_and_knows_the_other_tasks(tmp_path):
    changes = dict(C=16, T=4, block=8, B=3, G=5, K=2, select="uniform", temperature=0.5)
    trained = dataclasses.replace(config.of_model("tiny", "countdown"), **changes)
    assert all(getattr(trained, name) != getattr(config.Config(), name) for name in SHAPE)
    path = write(tmp_path / "first", defaults=config.carry_on(trained))
    assert config.of_model(path) == dataclasses.replace(trained, model=path)
    others = {task: config.of_model("tiny", task) for task in ("sudoku", "math")}
    for task, cfg in others.items():
        assert config.of_model(path, task) == dataclasses.replace(cfg, model=path)
    # and so on, from checkpoint to checkpoint
    again = dataclasses.replace(config.of_model(path, "sudoku"), G=9)
    path = write(tmp_path / "second", defaults=config.carry_on(again))
    assert config.of_model(path) == dataclasses.replace(again, model=path)
    assert config.of_model(path, "countdown") == dataclasses.replace(trained, model=path)


def test_full_weights_are_not_rounded_again_by_the_defaults_they_bring(tmp_path):
    trained = dataclasses.replace(config.of_model("tiny"), quantize="nf4", lora_r=4)
    path = write(tmp_path / "adapter", defaults=config.carry_on(trained))
    assert config.of_model(path) == dataclasses.replace(trained, model=path)
    (tmp_path / "merged").mkdir()
    config.bring_defaults(path, tmp_path / "merged")
    merged = config.of_model(str(tmp_path / "merged"))
    assert (merged.quantize, merged.lora_r) == ("none", config.of_model("tiny").lora_r)


def test_weights_that_were_trained_whole_get_no_adapters_by_their_defaults(tmp_path):
    plain = write(tmp_path / "plain")
    trained = dataclasses.replace(config.of_model(plain, "sudoku"), lora_r=0)
    path = write(tmp_path / "whole", defaults=config.carry_on(trained))
    assert config.of_model(plain, "sudoku").lora_r > config.of_model(path, "sudoku").lora_r == 0


def test_restarts_need_a_folder_to_go_on_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--out: name a folder"):
        config.parse(["--model", "tiny"])
    assert config.parse(["--model", "tiny", "--out", str(tmp_path / "x")])[0].out
    assert config.parse(["--model", "tiny", "--eval-only"])


def test_a_run_goes_on_with_the_state_of_a_hub_model_that_it_began_with(tmp_path):
    began = f"someone/model@{'0a' * 20}"
    out = write(tmp_path / "run", config={"task": "sudoku", "model": began})
    for asked in ([], ["--model", "someone/model"], ["--model", "someone/model@v1"]):
        assert config.parse([*asked, "--out", out, "--resume"])[0].model == began
    assert config.model_name(began) == "model"
    with pytest.raises(ValueError, match="--model someone/other: the run in .* began with"):
        config.parse(["--model", "someone/other", "--out", out, "--resume"])


def test_what_a_checkpoint_was_trained_by_binds_no_other_rule_or_method(tmp_path):
    """All steps are not K of another rule, and diffu_grpo has neither minibatches nor a cache."""
    every = dataclasses.replace(config.of_model("tiny", "sudoku"), select="all")
    path = write(tmp_path / "all", defaults=config.carry_on(every))
    assert config.of_model(path) == dataclasses.replace(every, model=path)
    by_entropy, _ = config.parse(["--model", path, "--out", "x", "--select", "entropy"])
    assert by_entropy.K == config.of_model("tiny", "sudoku").K < by_entropy.T
    cached = dataclasses.replace(config.of_model("tiny"), minibatches=4, cache="block")
    path = write(tmp_path / "cached", defaults=config.carry_on(cached))
    d1, _ = config.parse(["--model", path, "--out", "x", "--method", "diffu_grpo"])
    assert (d1.minibatches, d1.cache) == (1, "none")
    with pytest.raises(ValueError, match="--minibatches 2: diffu_grpo"):
        config.parse(["--model", path, "--out", "x", "--method=diffu_grpo", "--minibatches=2"])


@pytest.mark.parametrize("name", ["colour", "stepwise", "configure"])
def test_an_unknown_setting_in_a_file_is_one_line_that_names_both(tmp_path, name):
    model = write(tmp_path / "model", defaults={"settings": {"lr": 0.5, name: 1}})
    by_task = write(tmp_path / "by_task", defaults={"by_task": {"sudoku": {name: 1}}})
    run = write(tmp_path / "run", config={"lr": 0.5, name: 1})
    for words, file in (
        (["--model", model], f"{model}/defaults.json"),
        (["--model", by_task], f"{by_task}/defaults.json"),
        (["--out", run, "--resume"], f"{run}/config.json"),
    ):
        with pytest.raises(ValueError) as caught:
            config.parse(words)
        message = str(caught.value)
        assert file in message and name in message and "\n" not in message


def test_a_bad_value_in_a_models_defaults_is_told_like_that_of_a_flag(tmp_path):
    path = write(tmp_path, defaults={"settings": {"K": 999}})
    with pytest.raises(ValueError, match="--K 999: cannot select more steps than --T 128"):
        config.parse(["--model", path, "--out", "x"])
    cfg, _ = config.parse(["--model", path, "--out", "x", "--K", "4"])  # a flag mends it
    assert cfg.K == 4


def test_modes_exclude_each_other_and_none_writes_over_a_run(tmp_path):
    """--resume names the model that the run began with; evaluated, that would pass for the run."""
    (tmp_path / "config.json").write_text('{"task": "sudoku", "model": "tiny"}')
    (tmp_path / "events.jsonl").write_text("{}\n")
    for other in ("--eval-only", "--merge", "--dry-run"):
        with pytest.raises(ValueError, match="only one mode"):
            config.parse(["--out", str(tmp_path), "--resume", other])
    with pytest.raises(ValueError, match="holds a run"):
        config.parse(["--model", "tiny", "--out", str(tmp_path), "--merge"])
    with pytest.raises(ValueError, match="a run that has no checkpoint"):
        config.parse(["--model", str(tmp_path), "--out", "x"])


def test_no_run_is_written_over_a_model(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    for path in (str(tmp_path), str(config.model.find_folder("tiny"))):
        with pytest.raises(ValueError, match="holds a model"):
            config.parse(["--model", "tiny", "--out", path])


def test_every_flag_says_what_it_does():
    """By the comment behind it, which a formatter may move out of tyro's sight."""
    source = Path(config.__file__).read_text()
    for flag in (*dataclasses.fields(config.Config), *dataclasses.fields(config.Mode)):
        (line,) = re.findall(rf"^    {flag.name}: .* = .*", source, re.M)
        assert re.search(r"  # \w", line), line


def test_a_default_of_another_kind_is_one_line(tmp_path):
    path = write(tmp_path / "model", defaults={"by_task": []})
    with pytest.raises(ValueError, match="settings, and those of a task, must be an object"):
        config.parse(["--model", path])


def test_all_steps_may_be_fewer_than_k():
    assert config.Config(task="sudoku", K=8, C=8, T=4, block=4, select="all").K == 4
