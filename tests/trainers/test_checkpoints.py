"""What a trainer resumes from, and what it calls its best model, are the checkpoint's weights, experts included."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from model_zoo import MOE_MODEL_TYPES, MULTIMODAL_MOE_MODEL_TYPES, build_tiny
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments

from trl_r3.trainers.checkpoints import whole_checkpoint

RUN = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
# Transformers reads the config of a checkpoint as one of no family, which refuses the layers of this one by name
UNREADABLE = {"deepseek_v4"}
PINNED = re.search(r"^transformers==(.*)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)[
    1
]


def readable(folder):
    """Whether Transformers reads the config there as one of no family, as Trainer does first."""
    try:
        PreTrainedConfig.from_json_file(folder / "config.json")
    except StrictDataclassClassValidationError:
        return False
    return True


def differing(model, saved):
    weights = saved.state_dict()
    return [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]


def loader(model, folder):
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, bf16=False, report_to=[]))


@pytest.mark.parametrize("family", [*MOE_MODEL_TYPES, *MULTIMODAL_MOE_MODEL_TYPES])
def test_every_family_is_restored(family, tmp_path):
    try:
        saved, model = build_tiny(family), build_tiny(family, seed=1)
    except StrictDataclassClassValidationError as error:
        assert transformers.__version__ != PINNED
        pytest.skip(f"Transformers {transformers.__version__} has other layers for this type: {error}")
    assert differing(model, saved)
    saved.save_pretrained(tmp_path)
    trainer = loader(model, tmp_path)
    if not readable(tmp_path):
        assert transformers.__version__ != PINNED or family in UNREADABLE
        with pytest.raises(StrictDataclassClassValidationError):
            trainer._load_from_checkpoint(str(tmp_path))
        return
    with whole_checkpoint(trainer, lambda: str(tmp_path)):
        trainer._load_from_checkpoint(str(tmp_path))
    assert not differing(model, saved)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_transformers_restores_no_expert(family, tmp_path):
    saved, model = build_tiny(family), build_tiny(family, seed=1)
    saved.save_pretrained(tmp_path)
    loader(model, tmp_path)._load_from_checkpoint(str(tmp_path))
    lost = differing(model, saved)
    assert lost and all("experts" in name or "gate" in name for name in lost)


def test_in_several_files_and_several_dtypes(tmp_path):
    saved, model = (build_tiny("deepseek_v3", seed=seed).bfloat16() for seed in (0, 1))
    for each in (saved, model):
        for layer in each.model.layers[1:]:
            layer.mlp.experts.down_proj.data = layer.mlp.experts.down_proj.data.float() + 2**-20
            layer.mlp.gate.float()
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    trainer = loader(model, tmp_path)
    with whole_checkpoint(trainer, lambda: str(tmp_path)):
        trainer._load_from_checkpoint(str(tmp_path))
    assert not differing(model, saved)


def test_a_checkpoint_without_an_expert_is_refused(qwen3, build, tmp_path):
    qwen3().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if ".2.mlp.experts." not in name}
    save_file(weights, file, {"format": "pt"})
    trainer = build(qwen3(seed=1))
    with pytest.raises(RuntimeError, match=r"2 weights of the model are not in the checkpoint .*layers\.2\.mlp\.exp"):
        trainer._load_from_checkpoint(str(tmp_path))


class Begun(TrainerCallback):
    """The weights that training begins with."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


ON_EXPERTS = {
    "r": 4,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "lora_dropout": 0.0,
}


@pytest.mark.parametrize("adapter", [None, {"r": 4, "target_modules": ["q_proj"]}, ON_EXPERTS], ids=str)
@pytest.mark.parametrize("replays", [True, False])
def test_resumed_and_best_weights_are_those_of_the_checkpoint(qwen3, build, adapter, replays):
    run = {"use_routing_replay": replays, "peft_config": adapter and LoraConfig(**adapter), **RUN}
    straight = build(qwen3(), max_steps=2, **run)
    at_step = {}

    class Noted(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            at_step[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    straight.add_callback(Noted())
    straight.train()

    begun = Begun()
    resumed = build(qwen3(), max_steps=3, callbacks=[begun], **run)
    resumed.train(resume_from_checkpoint=str(Path(straight.args.output_dir) / "checkpoint-2"))
    assert all(torch.equal(value, at_step[2][name]) for name, value in begun.weights.items())

    best = build(
        qwen3(),
        max_steps=3,
        eval_dataset=straight.train_dataset.select(range(2)),
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_num_tokens",  # the first has the fewest
        greater_is_better=False,
        callbacks=[Noted()],
        **run,
    )
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-1")
    assert any(not torch.equal(value, at_step[3][name]) for name, value in best.model.state_dict().items())
    assert all(torch.equal(value, at_step[1][name]) for name, value in best.model.state_dict().items())
