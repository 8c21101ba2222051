"""Each row of a pass is that of its token, as routers of the rollout spell it; misaligned records are told apart."""

from dataclasses import replace

import pytest
import torch
from trainers.watching import same_sets

from trl_r3 import R3GRPOTrainer


def oracle(model):
    """
    Lets the routers of a rollout spell its tokens: token t is routed to experts t % 8 and 8 + t // 8 of layer 0, and
    to three further back with every layer. Those that train choose three further back still.
    """
    with torch.no_grad():
        codes = torch.arange(96)
        embedding = model.model.embed_tokens.weight.normal_()
        embedding[:, :16] = 0
        embedding[codes, codes % 8] = 8.0
        embedding[codes, 8 + codes // 8 % 8] = 8.0
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()  # so that nothing but the token reaches a router
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.down_proj.zero_()
                router = torch.zeros_like(layer.mlp.gate.weight)
                router[torch.arange(16), (torch.arange(16) + 3 * number) % 16] = 1.0
                layer.mlp.gate.weight.copy_(router.roll(-3, 0))
            else:
                layer.mlp.down_proj.weight.zero_()
    return model


def spelt(input_ids):
    """(B, T, L, K) of what an oracle routes tokens to."""
    codes = torch.stack([input_ids % 8, 8 + input_ids // 8 % 8], dim=-1)
    return torch.stack([(codes - 3 * layer) % 16 for layer in (0, 2, 3)], dim=2)


ORACLE = {
    "learning_rate": 0.0,  # or the embedding would unlearn its code
    "num_iterations": 2,
    "steps_per_generation": 3,
    "max_steps": 12,
}
LETTERS = {"suppress_tokens": [0, *range(64, 96)]}  # that the code can tell apart
UNEQUAL = ["1+2=", "*#A", "X", "HELLO YOU", "Q?", "(1,2)", "4", "7*8"]
EQUAL = ["1+2=", "*#AB", "X-YZ", "HI U", "WHY?", "(12)", "4&56", "7*8="]  # whose records fit each other's places


def spells_its_tokens(one, same_sets):
    """Whether every row that was fed went through the experts that spell its own token."""
    return same_sets(one.executed[one.fed], spelt(one.input_ids)[one.fed])


@pytest.mark.parametrize(
    "setting", [{}, {"pad_to_multiple_of": 8}, {"per_device_train_batch_size": 2}, {"shuffle_dataset": False}]
)
@pytest.mark.parametrize("end", [0.0, 3.0])
def test_every_row_is_that_of_its_token(qwen3, train, gap, setting, end):
    """Through padding left and right, chunks, shuffling and splitting."""
    trainer = train(
        oracle(qwen3(num_experts_per_tok=2)),
        prompts=UNEQUAL,
        while_generating=gap["scrambled"],
        generation_kwargs={**LETTERS, "sequence_bias": [[[1], end]]},
        **{**ORACLE, **setting},
    )
    updates = trainer.of("update")
    assert len(updates) == 12
    for one in trainer.of("old policy") + updates + trainer.of("recompute"):
        assert spells_its_tokens(one, same_sets)
    for one in updates:
        live, spelling = trainer.live_routes(one)[one.fed], spelt(one.input_ids)[one.fed]
        assert (live.sort(-1).values != spelling.sort(-1).values).any(-1).all()  # in every row and layer


class Misaligned(R3GRPOTrainer):
    """Wrong variants: they change the records that travel with a batch."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.generated, self.served = [sample.record for sample in self.rollout_samples], 0
        return batch

    def _compute_loss(self, model, inputs):
        own = self._r3.rollout.samples
        chosen = self._r3.rollouts.get_samples(inputs["rollout_samples"].tolist())
        others = self.instead([sample.record for sample in chosen])
        by_identity = {sample.identity: other for sample, other in zip(chosen, others, strict=True)}
        self._r3.rollout.samples = [replace(each, record=by_identity.get(each.identity, each.record)) for each in own]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._r3.rollout.samples = own


class OneLate(Misaligned):
    def instead(self, own):
        return [record.roll(1, 0) for record in own]


class OneEarly(Misaligned):
    def instead(self, own):
        return [record.roll(-1, 0) for record in own]


class OfTheNeighbour(Misaligned):
    def instead(self, own):
        return own[1:] + own[:1]


class InOrderOfGeneration(Misaligned):
    def instead(self, own):
        start = self.served % len(self.generated)
        self.served += len(own)
        return self.generated[start : start + len(own)]


class NextLayer(Misaligned):
    def instead(self, own):
        return [record.roll(1, 1) for record in own]


class LastRowOfZeros(Misaligned):
    def instead(self, own):
        return [torch.cat([record[:-1], torch.zeros_like(record[-1:])]) for record in own]


@pytest.mark.parametrize(
    "variant", [OneLate, OneEarly, OfTheNeighbour, InOrderOfGeneration, NextLayer, LastRowOfZeros]
)
def test_misaligned_rows_are_told_apart(qwen3, train, gap, variant):
    trainer = train(
        oracle(qwen3(num_experts_per_tok=2)),
        trainer_class=variant,
        prompts=EQUAL,
        while_generating=gap["scrambled"],
        generation_kwargs={"suppress_tokens": [*LETTERS["suppress_tokens"], 1]},
        **ORACLE,
    )
    for one in trainer.of("old policy"):
        assert spells_its_tokens(one, same_sets)
    for one in trainer.of("update"):
        assert not spells_its_tokens(one, same_sets)
