"""What the tests of trainers share beside `runs.py`; what is watched is in `watching.py`."""

import pytest
import torch
from datasets import Dataset
from trainers.masking import TOP_P, Noting, dense
from trainers.runs import SHORT, build, check, gap, qwen3, settings, traced, train
from trainers.watching import EOS, PAD, VOCAB, distinct_characters, make_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer

from trl_r3 import R3GRPOConfig, R3GRPOTrainer

__all__ = ["build", "check", "gap", "qwen3", "settings", "traced", "train"]  # fixtures


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for small matrices
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mixtral():
    """Builds a Mixtral."""

    def build(seed=0, **settings):
        torch.manual_seed(seed)
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        return MixtralForCausalLM(MixtralConfig(**{**shape, **settings}))

    return build


@pytest.fixture
def make_masked(tmp_path):
    """Builds a watched trainer that scores over what sampling kept."""

    def build(model=None, kind=(R3GRPOConfig, R3GRPOTrainer, GRPOTrainer), saved=False, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            **SHORT,
            "num_generations": 2,
            "learning_rate": 1e-2,
            "top_p": TOP_P,
            "use_sampling_mask_replay": True,
        }
        config, trainer, parent = kind
        passed = {name: changes.pop(name) for name in ("rollout_func", "eval_dataset") if name in changes}
        model = model or dense()
        if saved:  # TRL loads the reference policy from there
            model.save_pretrained(tmp_path / "model")
            model = type(model).from_pretrained(tmp_path / "model")
        noting = type("Noted", (Noting, parent), {})
        return type("Watched", (trainer, noting), {})(
            model=model,
            args=config(**{**settings, **changes}),
            reward_funcs=distinct_characters,
            train_dataset=Dataset.from_dict({"prompt": ["1+2=", "abcdefg", "x", "hello you"] * 4}),
            processing_class=make_tokenizer(),
            **passed,
        )

    return build
