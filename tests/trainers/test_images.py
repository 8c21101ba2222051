"""Rollouts with images: their placeholder tokens route and replay like any other.

The processor is that of Qwen3-VL, over a small vocabulary and with images that are read without torchvision.

Legend: B batch, T tokens of a padded sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import pytest
from datasets import Dataset
from engines.tiny_chat import WatchedGRPO
from engines.watch import assert_nothing_missing, assert_replayed
from model_zoo import build_tiny
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from trl_r3 import R3GRPOConfig

TYPES = ["qwen3_vl_moe", "qwen3_5_moe"]
TOKENS = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %} <|vision_start|> <|image_pad|> <|vision_end|>
{%- else %} {{ part['text'] }}{% endif -%}
{%- endfor -%}{%- endif %} {% endfor -%}"""


class ImagesOnly(Qwen3VLProcessor):
    """Videos would need torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return None if argument is None else super().check_argument_for_proper_class(name, argument)


def make_processor(config):
    """A vocabulary of words in which the special tokens have the ids of the model's config."""
    size = config.get_text_config().vocab_size
    vocab = {**dict(zip(SPECIAL, TOKENS.values(), strict=True)), "<pad>": 0, "<eos>": 1, "<unk>": 2}
    free = [i for i in range(size) if i not in vocab.values()]
    vocab |= {f"t{i}": i for i in free}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("<|image_pad|>", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    vision = config.vision_config
    images = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size, min_pixels=1, max_pixels=64 * vision.patch_size**2,
    )  # fmt: skip
    return ImagesOnly(images, tokenizer, None, chat_template=TEMPLATE)


def picture(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.putdata([(7 * i % 256, 13 * i % 256, 29 * i % 256) for i in range(width * height)])
    return image


def make_trainer(model, folder, **changes):
    side = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    sizes = [(2 * side, side), (side, 3 * side)]
    prompts = [[{"role": "user", "content": f"t{20 + i} t{30 + i}"}] for i in range(4)]
    images = [[picture(*sizes[i % 2])] for i in range(4)]
    processor = make_processor(model.config)
    return WatchedGRPO(
        model=model,
        args=R3GRPOConfig(
            str(folder), use_routing_replay=True, use_cpu=True, bf16=False, learning_rate=1e-2, max_steps=2,
            per_device_train_batch_size=4, num_generations=2, num_iterations=2, max_completion_length=6,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, router_aux_loss_coef=0.0,
            generation_kwargs={"suppress_tokens": [0, 1, *(processor.tokenizer.convert_tokens_to_ids(SPECIAL))]},
            **changes,
        ),
        reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids) % 7) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": prompts, "images": images}),
        processing_class=processor,
    )  # fmt: skip


def make_model(model_type):
    model = build_tiny(model_type, with_images=True)
    for name, token in TOKENS.items():
        setattr(model.config, name, token)
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_of_images_replay_like_any_other(tmp_path, model_type):
    trainer = make_trainer(make_model(model_type), tmp_path)
    trainer.train()
    (turn,) = trainer.turns
    image = trainer.model.config.image_token_id
    counts = {ids.count(image) for ids in turn.prompt_ids}
    assert counts == {2, 3}, "placeholders were not expanded by the size of their image"
    expected = [
        ([*prompt, *completion], turn.rows(i))
        for i, (prompt, completion) in enumerate(zip(turn.prompt_ids, turn.completion_ids, strict=True))
    ]
    assert_replayed(trainer, {turn.step: expected})
    assert_nothing_missing(trainer, steps=2)
    drifted = trainer.state.log_history[1]["routing_replay/changed_router_frac"]
    assert drifted > 0, "live routing had not changed after an update, so that it could pass for replay"


@pytest.mark.parametrize("model_type", TYPES)
def test_live_routing_is_compared_with_the_images(tmp_path, model_type):
    """At the weights of the rollout live routing selects what it did, so that nothing is left to tell apart."""
    trainer = make_trainer(make_model(model_type), tmp_path, routing_replay_compare_every=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["routing_replay/changed_router_frac"] == 0
    assert first["sampling/k3_kl"] < 1e-9 and first["sampling/live/k3_kl"] < 1e-9
