"""`trl-r3 plan`: figures against real models, real allocations and real command lines."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from trl_r3.cli import command as cli
from trl_r3.cli.plan import planning
from trl_r3.cli.plan.job import Job, PlanError
from trl_r3.cli.plan.memory import estimate
from trl_r3.cli.plan.remedies import remedies
from trl_r3.cli.plan.sizes import read_model, with_adapters

CONFIGS = Path(__file__).parents[2] / "examples" / "recipes" / "configs"
QWEN = str(CONFIGS / "qwen3-30b-a3b")
SMALL = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 300,
    "num_experts_per_tok": 3,
    "mlp_only_layers": [0, 3],
}


@pytest.fixture(scope="module")
def qwen():
    return read_model(QWEN, Job(prompts=256))


def plan(capsys, *options, model=QWEN):
    status = cli.main(["plan", "--model", str(model), "--prompts", "256", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_sizes_of_qwen3_30b(qwen):
    """30.5 billion parameters, 48 layers, 8 of 128 experts: what the model card says."""
    assert qwen.parameters == pytest.approx(30.5e9, rel=2e-3)
    assert qwen.layout.moe_layers == tuple(range(48))
    assert (qwen.layout.num_experts, qwen.layout.top_k) == (128, 8)
    job = Job(prompts=256, generations=8, tokens=32768)
    assert estimate(qwen, job).records == 2048 * 32768 * 48 * 8  # 25.8 GB
    assert estimate(qwen, job).records == pytest.approx(25.8e9, rel=2e-3)


def test_one_process_needs_what_adam_needs(qwen):
    in_bfloat16, in_float32 = (estimate(qwen, Job(prompts=1, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    for planned, expected in ((in_bfloat16, 244e9), (in_float32, 488e9)):
        assert planned.weights + planned.gradients + planned.optimizer == pytest.approx(expected, rel=2e-3)


def test_counts_are_those_of_the_built_model(tmp_path):
    """Two bytes an id beyond 255 experts, dense layers left out, every parameter and adapter counted."""
    config = Qwen3MoeConfig(**SMALL)
    config.save_pretrained(tmp_path)
    facts = read_model(str(tmp_path), Job(prompts=1, lora_rank=4))
    model = AutoModelForCausalLM.from_config(config)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.expert_parameters == 3 * 300 * 3 * 96 * 32
    assert facts.layout.moe_layers == (1, 2, 4)
    assert estimate(facts, Job(prompts=1)).record_a_token == 3 * 3 * 2
    adapters = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    assert facts.trainable == get_peft_model(model, adapters).get_nb_trainable_parameters()[0]
    whole = with_adapters(facts, Job(prompts=1))
    assert whole == read_model(str(tmp_path), Job(prompts=1)) != facts
    assert with_adapters(whole, Job(prompts=1, lora_rank=4)) == facts


MEASURE = """
    import resource, sys
    import numpy as np
    from trl_r3.records.record import to_record
    from trl_r3.engines.turns import Turn, stitch
    from trl_r3.records.record import RoutingLayout
    from trl_r3.trainers.rollout import Rollout

    layout = RoutingLayout(tuple(range(48)), 48, num_experts=128, top_k=8)
    row = np.random.default_rng(0).permutation(128)[:384].astype(np.uint8)
    one_row = np.stack([np.roll(row, 5 * layer)[:8] for layer in range(48)])

    def rollout(tokens):
        rows = np.broadcast_to(one_row, (tokens - 1, 48, 8)).copy()
        prompts, completions = [[5] * 9], [[7] * (tokens - 9)]
        record = stitch([Turn(prompts, completions, [to_record(rows, layout, 0)])], prompts, completions, layout)
        made = Rollout.of(record, prompts, completions, first=0, step=0)
        if {wide}:
            made.samples[0].record = made.samples[0].record.short()
        return made

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    rollout(2048)
    kept, sizes = [], []
    for _ in range(3):
        sizes.append(resident())
        kept += [rollout(2048) for _ in range(40)]
    sizes.append(resident())
    print((sizes[3] - sizes[1]) / (80 * 2048))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("wide", [False, True])
def test_host_memory_is_what_a_process_allocates(qwen, wide):
    """Bytes a token of real rollouts, kept as a trainer keeps them; twice as wide ids must not pass."""
    code = textwrap.dedent(MEASURE).replace("{wide}", str(wide))
    measured = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    one, other = (estimate(qwen, Job(prompts=1, generations=1, tokens=tokens)).host for tokens in (1000, 2000))
    assert (measured == pytest.approx((other - one) / 1000, rel=0.02)) is not wide


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_gpus_share_what_the_strategy_shards(qwen, strategy):
    eight, sixteen = (estimate(qwen, Job(prompts=1, gpus=gpus, strategy=strategy)) for gpus in (8, 16))
    shared = {name for name in ("weights", "gradients", "optimizer") if getattr(sixteen, name) < getattr(eight, name)}
    sharded = {"ddp": set(), "zero2": {"gradients", "optimizer"}}
    assert shared == sharded.get(strategy, {"weights", "gradients", "optimizer"})


def test_four_bits_leave_the_experts():
    job = Job(prompts=1, strategy="lora", load_in_4bit=True)
    facts = read_model(QWEN, job)
    assert facts.quantizable < 0.04 * facts.parameters
    whole, packed = estimate(facts, Job(prompts=1, strategy="lora")), estimate(facts, job)
    assert 0.95 < packed.weights / whole.weights < 0.98


def test_exit_status_says_whether_it_fits(capsys):
    status, found = plan(capsys, "--tokens", "32768", "--gpus", "8", "--strategy", "fsdp2")
    assert (status, found["fits"], found["changes"]) == (0, True, [])
    status, found = plan(capsys, "--tokens", "32768")
    assert (status, found["fits"]) == (1, False)
    assert found["plan"]["gpu_missing"] == pytest.approx(244.3e9 - 68e9, rel=1e-2)


def test_what_is_to_be_changed_makes_it_fit(qwen, capsys):
    """And one GPU fewer does not."""
    job = Job(prompts=256, strategy="zero3", gpus=2)
    (more, adapters) = remedies(qwen, job)
    assert "`--gpus 8 --strategy zero3`" in more.change
    assert estimate(qwen, Job(prompts=256, strategy="zero3", gpus=8)).fits
    assert not estimate(qwen, Job(prompts=256, strategy="zero3", gpus=7)).fits
    assert "--lora-rank" in adapters.change
    assert cli.main(["plan", "--model", QWEN, "--prompts", "9", "--strategy", "zero3", "--gpus", "2"]) == 1
    printed = capsys.readouterr().out
    assert "GB too little" in printed
    assert "First: raise `--gpus` from 2 to 8" in printed


def test_records_that_no_host_holds(qwen):
    settings = {"tokens": 32768, "gpus": 8, "strategy": "fsdp2", "host_memory": 8}
    (fewer,) = remedies(qwen, Job(prompts=256, **settings))
    assert fewer.change == "lower `--prompts` from 256 to 77"
    assert estimate(qwen, Job(prompts=77, **settings)).fits
    assert not estimate(qwen, Job(prompts=79, **settings)).fits


def test_files_relieve_the_host_in_training(qwen):
    """Not while the rollout is made: then the engine has returned all of it."""
    memory, files = (estimate(qwen, Job(prompts=256, tokens=32768, spill=spill)) for spill in (False, True))
    assert memory.host == memory.host_training == files.host
    assert files.host_training == 2048 * 32768 * 8


def test_a_colocated_engine_has_its_own_weights(qwen):
    job = Job(prompts=1, strategy="lora", engine_share=0.3, gpu_memory=141)
    assert not estimate(qwen, job).engine_fits
    plan = estimate(qwen, Job(prompts=1, engine_share=0.5, gpu_memory=141))
    assert plan.engine_fits and plan.engine_left == pytest.approx(0.5 * 141e9 - 2 * qwen.parameters)
    assert estimate(qwen, Job(prompts=1)).engine_left == 0


def test_an_engine_on_each_gpu_holds_all_of_them(qwen):
    """More GPUs give it no room; tensor parallelism does."""
    settings = {"prompts": 8, "gpus": 8, "strategy": "fsdp2", "engine_share": 0.3}
    assert not estimate(qwen, Job(**settings)).engine_fits  # 61 GB in 24 GB
    assert not estimate(qwen, Job(**settings, engine_tensor_parallel=2)).engine_fits
    assert estimate(qwen, Job(**settings, engine_tensor_parallel=4)).engine_fits


def test_an_engine_that_is_split_is_a_remedy(qwen):
    job = Job(prompts=8, gpus=8, strategy="fsdp2", lora_rank=16, engine_share=0.3)
    assert [remedy.change for remedy in remedies(read_model(qwen.name, job), job)] == [
        "split vLLM's weights over 4 GPUs (`--engine-tensor-parallel 4`)",
        "split vLLM's weights over 8 GPUs (`--engine-tensor-parallel 8`)",
        "serve vLLM on other GPUs (`--engine-share 0`)",
    ]


def test_any_number_of_gpus_has_remedies(qwen):
    """Those that a split engine does not divide are tried with a server."""
    for gpus in (2, 4, 6, 12):
        job = Job(prompts=8, gpus=gpus, strategy="fsdp2", engine_share=0.3, engine_tensor_parallel=2)
        assert not estimate(qwen, job).fits
        found = remedies(qwen, job)
        assert any(remedy.plan.fits for remedy in found)
        assert not any("--engine-tensor-parallel 8" in remedy.change for remedy in found), "it divides none of these"


def test_remedies_of_a_served_engine_name_the_server(qwen):
    job = Job(prompts=8, gpus=4, strategy="fsdp2", engine_share=0.3)
    assert [remedy.change for remedy in remedies(qwen, job)] == [
        "serve vLLM on other GPUs (`--engine-share 0`) and raise `--gpus` from 4 to 8 (`--gpus 8 --strategy fsdp2`)",
        "serve vLLM on other GPUs (`--engine-share 0`) and train adapters (`--strategy fsdp2 --lora-rank 16`)",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokens", "-1"], "`--tokens` is -1"),
        (["--gpus", "0"], "`--gpus` is 0"),
        (["--lora-rank", "-4"], "`--lora-rank` is -4"),
        (["--strategy", "zero4"], "`--strategy` is 'zero4'"),
        (["--gpu-memory", "-80"], "`--gpu-memory` is -80"),
        (["--beta", "-1"], "`--beta` is -1"),
        (["--bandwidth", "nan"], "`--bandwidth` is nan"),
        (["--reserve", "1.5"], "`--reserve` is 1.5"),
        (["--load-in-4bit"], "needs LoRA"),
        (
            ["--gpus", "8", "--engine-share", "0.3", "--engine-tensor-parallel", "3"],
            "`--engine-tensor-parallel` is 3, but it has to divide all 8",
        ),
        (
            ["--gpus", "12", "--engine-share", "0.3", "--engine-tensor-parallel", "8"],
            "has to divide all 12 GPUs and the 8 of a host",
        ),
        (["--gpus", "4", "--engine-tensor-parallel", "4"], "`--engine-share` is 0, so no engine"),
        (["--strategy", "lora", "--lora-target-modules", "w_42"], "`--lora-target-modules` does not fit"),
    ],
)
def test_bad_settings(options, says, capsys):
    assert cli.main(["plan", "--model", QWEN, "--prompts", "2", *options]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_bad_models(tmp_path, capsys):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    LoraConfig(base_model_name_or_path="somebody/a-mixture").save_pretrained(tmp_path / "adapter")
    for name, says in (
        (tmp_path / "adapter", "is an adapter of somebody/a-mixture. Pass that model, and `--lora-rank`"),
        (tmp_path / "dense", "dense model"),
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "no config that can be read"),
    ):
        assert cli.main(["plan", "--model", str(name), "--prompts", "2"]) == 2
        printed = capsys.readouterr().err
        assert says in printed
        assert printed.count("\n") == 1


def test_unreachable_hub(monkeypatch, capsys):
    def unreachable(name, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    assert cli.main(["plan", "--model", "somebody/a-mixture", "--prompts", "2"]) == 2
    printed = capsys.readouterr().err
    assert "couldn't connect" in printed
    assert "pass a folder with a config.json" in printed
    assert printed.count("\n") == 1


def test_json_stays_alone(monkeypatch, capsys):
    """DeepSpeed prints when something imports it, which counting adapters does."""
    monkeypatch.setattr(planning, "read_model", lambda *args: print("[WARNING] talk") or read_model(*args))
    status, figures = plan(capsys, "--gpus", "8", "--strategy", "fsdp2")
    assert status == 0 and figures["fits"]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3.6-35b-a3b"])
def test_configs_of_the_recipes(name):
    facts = read_model(str(CONFIGS / name), Job(prompts=1))
    expected = {"mixtral-8x7b": (46.7e9, 32, 8, 2), "qwen3.6-35b-a3b": (35.1e9, 40, 256, 8)}[name]
    assert facts.parameters == pytest.approx(expected[0], rel=5e-3)
    assert (len(facts.layout.moe_layers), facts.layout.num_experts, facts.layout.top_k) == expected[1:]
    assert "Not the file of" in json.loads((CONFIGS / name / "config.json").read_text())["_source"]


@pytest.mark.parametrize(
    ("config", "moe_layers", "experts"),
    [
        (DeepseekV3Config(num_hidden_layers=5), (3, 4), (256, 8)),  # the first three are dense
        (Qwen3VLMoeConfig(), tuple(range(24)), (60, 4)),  # only behind a tower for images
        (GptOssConfig(num_hidden_layers=3), (0, 1, 2), (128, 4)),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_families(tmp_path, config, moe_layers, experts):
    config.save_pretrained(tmp_path)
    facts = read_model(str(tmp_path), Job(prompts=1))
    assert facts.layout.moe_layers == moe_layers
    assert (facts.layout.num_experts, facts.layout.top_k) == experts
    with torch.device("meta"):
        built = getattr(transformers, facts.architecture)(config)
    assert facts.parameters == sum(parameter.numel() for parameter in built.parameters())


def test_heads_that_vary_by_layer():
    """Gemma 4 has fewer heads of keys where it attends to all tokens, and its config refuses to name one number."""
    layout = read_model(str(CONFIGS / "gemma-4-26b-a4b"), Job(prompts=1)).layout
    assert (len(layout.moe_layers), layout.num_experts, layout.top_k) == (30, 128, 8)


def test_nothing_is_left_behind():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(PlanError):
        read_model(str(CONFIGS), Job(prompts=1))
    read_model(QWEN, Job(prompts=1))
    assert torch.equal(before, torch.get_rng_state())


def test_the_queue_of_asynchronous_grpo(capsys):
    """What waits there is counted once, on the first host, and lowered first."""
    options = ["--prompts", "8", "--tokens", "30000", "--gpus", "8", "--strategy", "fsdp2"]
    without, with_queue = (plan(capsys, *options, *more)[1]["plan"] for more in ([], ["--queue", "1024"]))
    assert (without["queue"], with_queue["queue"]) == (0, 1024 * 30000 * (48 * 8 + 20))
    assert with_queue["queue"] == pytest.approx(12.4e9, rel=1e-2)
    assert with_queue["host"] - without["host"] == with_queue["queue"]
    status, answer = plan(capsys, *options, "--queue", "1024", "--host-memory", "10")
    (change,) = [each["change"] for each in answer["changes"]]
    lowered = int(change.split("--queue ")[1].split("`")[0])
    assert (status, lowered < 1024) == (1, True) and change.startswith("lower `queue_maxsize`")
    assert plan(capsys, *options, "--queue", str(lowered), "--host-memory", "10")[0] == 0
    assert plan(capsys, *options, "--queue", str(lowered + 2), "--host-memory", "10")[0] == 1
