"""Columns behind all sequences are cut off where packing is not provable, and come back padded."""

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from oracles import CHECKPOINTING, foreign_record, gradients, use_checkpointing

from trl_r3 import RouterReplay
from trl_r3.cli.experts import experts_of
from trl_r3.records.sources import WholeBatch
from trl_r3.routers.trimming import TrimmedBatch

MASK = torch.tensor([[0, 0] + [1] * 6 + [0] * 4, [0] + [1] * 4 + [0] * 7])
IDS = (torch.arange(24).reshape(2, 12) * 7 + 3) % 100 + 10
LEFT = 8


def test_what_is_cut_comes_back_as_zeros():
    batch = TrimmedBatch.of(MASK.bool(), by_experts=True)
    assert batch.left == LEFT and batch.rows.size == (2, LEFT)
    assert TrimmedBatch.of(MASK.bool(), by_experts=False).rows is None
    values = torch.arange(24)
    kept = batch.take(values)
    assert torch.equal(kept.view(2, LEFT), values.view(2, 12)[:, :LEFT])
    real = MASK.flatten().nonzero()[:, 0]
    assert torch.equal(kept[batch.place(real)], values[real])
    for mask in (torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([[1, 0, 0], [0, 0, 1]])):
        assert TrimmedBatch.of(mask.bool(), by_experts=True) is None


class Observing(WholeBatch):
    """Asks for the live selection of real rows."""

    observed = MASK.flatten().nonzero()[:, 0]

    def observe(self, live_MLK):
        self.live = live_MLK


def updated(padding, checkpointing="none", given=None, **kwargs):
    model, rows = tiny_qwen3_moe(), set()
    model.config._attn_implementation = "eager"
    use_checkpointing(model, checkpointing)
    labels = IDS.masked_fill((MASK & MASK.roll(1, 1)) == 0, -100)
    given = {"input_ids": IDS} if given is None else given(model)
    with RouterReplay(model, padding=padding) as replay:
        source = Observing.of(foreign_record(replay, *IDS.shape), replay.layout)
        for experts in experts_of(model).values():
            experts.register_forward_pre_hook(_of_a_library(rows))
        with replay.replay_from(source) as stats:
            output = model(**given, attention_mask=MASK, labels=labels, output_router_logits=True, **kwargs)
        output.loss.backward()
    return output, gradients(model), rows, source.live, {name: float(v) for name, v in _counts(stats).items()}


def _counts(stats):
    return {name: getattr(stats, name) for name in ("changed_routers", "compared_tokens")}


def _of_a_library(rows):
    """Which watches nobody, and sees what arrives before padding is taken out."""
    scope = {"__name__": "torch.of_a_test", "rows": rows}
    exec("def hook(module, args): rows.add(len(args[0]))", scope)
    return scope["hook"]


GIVEN = {
    "ids": None,
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(IDS).detach()},
    "positions": lambda model: {"input_ids": IDS, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)},
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_an_update_is_that_of_the_whole_batch(given, checkpointing):
    if given is not None and checkpointing != "none":
        pytest.skip("as with ids")
    padded, expected, all_rows, live, counted = updated("keep", checkpointing, given, use_cache=False)
    output, found, rows, seen, counts = updated("auto", checkpointing, given, use_cache=False)
    assert all_rows == {24} and rows == {2 * LEFT}
    assert output.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)
    assert output.aux_loss.item() == pytest.approx(padded.aux_loss.item(), rel=1e-6)
    assert output.logits.shape == padded.logits.shape and counts == counted
    torch.testing.assert_close(output.logits[MASK.bool()], padded.logits[MASK.bool()], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen.sort(-1).values, live.sort(-1).values)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_is_whole():
    output, _, rows, *_ = updated("auto", output_hidden_states=True, use_cache=False)
    assert rows == {24} and output.hidden_states[1].shape[:2] == (2, 12)


@pytest.mark.parametrize("wrong", ["take", "forward"])
def test_a_wrong_cut_is_found_when_a_handle_attaches(wrong, monkeypatch):
    """Records of other columns; or output that is padded on the other side."""
    own = getattr(TrimmedBatch, wrong)

    def shifted(self, *args):
        output = own(self, *args)
        if wrong == "take":
            return output.roll(1, 0)
        output.last_hidden_state = output.last_hidden_state.roll(1, 1)
        return output

    monkeypatch.setattr(TrimmedBatch, wrong, shifted)
    model = tiny_qwen3_moe()
    model.config._attn_implementation = "eager"
    with RouterReplay(model, padding="auto") as replay:
        text = "(columns behind all sequences are kept: packed and padded logits differ (by"
        assert text in str(replay.padding) and replay.padding.used == "experts"


def test_positions_that_follow_the_length_of_a_batch():
    """Those of a batch that ends with its last real token would be others, in longer batches than that of a trial."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    found = {}
    for length in (8, 12):
        model = tiny_qwen3_moe(rope_parameters=rope, max_position_embeddings=9)
        with torch.no_grad():
            found[length] = model(IDS[:, :length], attention_mask=MASK[:, :length]).logits[MASK[:, :length].bool()]
    assert not torch.allclose(found[8], found[12], atol=1e-3)
    with RouterReplay(model, padding="auto") as replay:
        assert str(replay.padding).startswith("skipped by experts only: its positions are scaled by the length")
        assert "sequences are kept: its positions" in str(replay.padding) and replay.padding.used == "experts"
