"""What of a forward's arguments speaks against packing it."""

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


def test_embeddings_are_a_batch():
    kwargs = {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 4), "attention_mask": MASK}
    assert why_padded((), kwargs) is None
