"""What of a forward's arguments speaks against packing it."""

from types import SimpleNamespace

import pytest
import torch

from trl_r3.routers.why_padded import why_padded

IDS = torch.zeros(2, 6, dtype=torch.int64)
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_mask": None}, "attention mask is not one of"),
        ({"attention_mask": MASK[:, :5]}, "attention mask is not one of"),
        ({"input_ids": None}, "not given `input_ids` or `inputs_embeds`"),
        ({"inputs_embeds": torch.zeros(2, 6)}, "not given `input_ids` or `inputs_embeds`"),
        ({"inputs_embeds": torch.zeros(2, 5, 4)}, "attention mask is not one of"),
        ({"position_ids": torch.zeros(3, 2, 6)}, "position ids are not those"),
        ({"output_attentions": True}, "asked for output_attentions"),
        ({"return_dict": False}, "asked for a tuple"),
        ({"visual_pos_masks": MASK.bool()}, "is given visual_pos_masks of"),
        ({"past_key_values": object()}, "asked for a cache"),
        ({"cache": object()}, "asked for a cache"),
    ],
)
def test_arguments_that_speak_against_it(changes, text):
    kwargs = {"input_ids": IDS, "attention_mask": MASK}
    assert why_padded((), kwargs) is None
    assert text in why_padded((), {**kwargs, **changes})
    assert why_padded((IDS,), kwargs) is not None


def test_a_config_asks_where_arguments_say_nothing():
    kwargs = {"input_ids": IDS, "attention_mask": MASK}
    usual = {"output_hidden_states": False, "return_dict": True, "use_cache": True}
    for own, given, text in [
        ({}, {}, None),
        ({"output_hidden_states": True}, {"output_hidden_states": None}, "asked for output_hidden_states"),
        ({"output_hidden_states": True}, {"output_hidden_states": False}, None),
        ({"return_dict": False}, {}, "asked for a tuple"),
        ({"return_dict": False}, {"return_dict": True}, None),
    ]:
        found = why_padded((), {**kwargs, **given}, SimpleNamespace(**{**usual, **own}))
        assert found is None if text is None else text in found


def test_embeddings_are_a_batch():
    kwargs = {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 4), "attention_mask": MASK}
    assert why_padded((), kwargs) is None
