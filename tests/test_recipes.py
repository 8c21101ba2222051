"""The recipes: each is run narrow, each fits as it says, and each number in its comments is that of the plan."""

import importlib.util
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from trl import ModelConfig

from trl_r3 import R3GRPOConfig
from trl_r3.cli import command as cli
from trl_r3.cli.plan import planning
from trl_r3.cli.plan.job import Job
from trl_r3.cli.plan.memory import estimate
from trl_r3.cli.plan.sizes import read_model, with_adapters

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
EXPERTS = {"qwen3-30b-a3b": (128, 8), "mixtral-8x7b": (8, 2), "qwen3.6-35b-a3b": (256, 8)}
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("recipe_train", ROOT / "examples" / "recipes" / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@cache
def facts(model_config, **job):
    """Sizes of a model; several recipes share one."""
    return read_model(str(ROOT / "examples" / "recipes" / "configs" / model_config), Job(prompts=1, **job))


def comment(recipe):
    """The text at the top, with continued lines joined."""
    lines = [line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#")]
    return "\n".join(lines).replace("\\\n", "")


def command(recipe, program):
    (line,) = [line for line in comment(recipe).splitlines() if line.startswith(program)]
    return shlex.split(line)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@each_recipe
def test_dry_run(train, recipe):
    trainer = train.main(["--config", str(recipe), "--dry_run"])
    assert trainer.state.global_step == 2
    assert logged(trainer, "routing_replay/replayed_frac") == [1.0, 1.0]
    assert logged(trainer, "routing_replay/missing_frac") == [0.0, 0.0]
    settings = yaml.safe_load(recipe.read_text())
    text = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config()
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (2, 64, 256)
    assert (text.num_experts, text.num_experts_per_tok) == EXPERTS[settings["model_config"]]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora" in name for name in trained) is bool(settings.get("use_peft"))
    assert bool(trained)
    updates = settings.get("steps_per_generation", 1) // settings["gradient_accumulation_steps"]
    assert (trainer.args.steps_per_generation == 2) is (updates > 1)


def test_the_dry_run_can_tell(train):
    """Without the switch nothing is replayed, and the test above would fail."""
    trainer = train.main(["--config", str(RECIPES[0]), "--dry_run", "--use_routing_replay", "false"])
    assert logged(trainer, "routing_replay/replayed_frac") == []


@each_recipe
def test_launch_line(recipe):
    line = command(recipe, "accelerate launch")
    assert line[-1] == str(recipe.relative_to(ROOT))
    assert all((ROOT / part).is_file() for part in line if part.startswith("examples/"))
    assert sum(part.startswith("examples/") for part in line) == 3
    settings = yaml.safe_load(recipe.read_text())
    assert ("vllm serve " + settings["model_name_or_path"] in comment(recipe)) is bool(settings.get("use_vllm"))


@each_recipe
def test_it_fits_as_planned(recipe, monkeypatch, capsys):
    """By its own line, and not in one process without adapters."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        planning, "read_model", lambda name, job: with_adapters(facts(Path(name).name, strategy="lora"), job)
    )
    line = command(recipe, "trl-r3 plan")[1:]
    settings = yaml.safe_load(recipe.read_text())
    assert ("lora" in line or "--lora-rank" in line) is bool(settings.get("use_peft"))
    assert cli.main(line) == 0
    alone = {"--gpus": "1", "--strategy": "ddp", "--lora-rank": "0"}
    assert cli.main([*line, *(part for option in alone.items() for part in option)]) == 1
    capsys.readouterr()


@each_recipe
def test_gigabytes_of_the_comments(recipe):
    """Each figure in GB is one that the plan gives, or the memory of a GPU."""
    settings = yaml.safe_load(recipe.read_text())
    lora = facts(settings["model_config"], strategy="lora")
    in_4bit = estimate(lora, Job(prompts=1, strategy="lora", load_in_4bit=True)).weights
    adapters = 4 * lora.trainable  # beside the weights, which the comments leave out
    sizes = (in_4bit - adapters, 2 * lora.parameters, 16 * lora.parameters / 8)
    known = {f"{size / 1e9:.1f}" for size in sizes}
    assert set(re.findall(r"(\d+\.\d) GB", comment(recipe))) <= known


@each_recipe
def test_every_setting_is_known(train, recipe):
    recipe_, args, model = train.parse(["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"])
    assert isinstance(args, R3GRPOConfig) and isinstance(model, ModelConfig)
    assert args.use_routing_replay and not recipe_.dry_run


@pytest.mark.parametrize("name", ["gspo", "grpo_tis"])
def test_hyperparameters_of_the_paper(name):
    settings = yaml.safe_load((ROOT / "examples" / "recipes" / f"{name}.yaml").read_text())
    processes = 8
    completions = processes * settings["per_device_train_batch_size"] * settings["steps_per_generation"]
    assert completions == 256 * settings["num_generations"] == 256 * 8
    updates = settings["steps_per_generation"] // settings["gradient_accumulation_steps"]
    assert (updates, settings["learning_rate"]) == {"gspo": (8, 1e-6), "grpo_tis": (1, 3e-6)}[name]


def test_missing_files_are_named(train, tmp_path):
    with pytest.raises(SystemExit, match=r"none\.yaml is missing.*grpo_tis\.yaml"):
        train.main(["--config", str(tmp_path / "none.yaml")])
    recipe = tmp_path / "recipe.yaml"
    for settings, says in (("use_routing_replay: true", "`model_config` is missing"), ("model_config: no", "no/con")):
        recipe.write_text(settings.replace(": no", ": 'no'"))
        with pytest.raises(SystemExit, match=says):
            train.main(["--config", str(recipe), "--dry_run"])


@pytest.mark.parametrize("name", ["grpo_qwen3_moe", "grpo_mixtral"])
def test_four_bits_reach_the_trainer(name, monkeypatch):
    """Of the other examples, too: parsed and dropped, it would train in 16 bits without a word."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    given = {}

    class Watched:
        def __init__(self, **kwargs):
            given.update(kwargs)
            raise StopIteration

    monkeypatch.setattr(example, "R3GRPOTrainer", Watched)
    data = {"train": type("Data", (list,), {"column_names": ["prompt", "answer"]})()}
    monkeypatch.setattr(example, "load_dataset", lambda *args, **kwargs: data)
    line = "--model_name_or_path m --dataset_name d --load_in_4bit true --use_cpu true --bf16 false --dtype float32"
    types = (example.ScriptArguments, example.R3GRPOConfig, example.ModelConfig)
    with pytest.raises(StopIteration):
        example.main(*example.TrlParser(types).parse_args_and_config(line.split()))
    assert given["quantization_config"].load_in_4bit
    assert given["quantization_config"].bnb_4bit_compute_dtype == torch.float32
