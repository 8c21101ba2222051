"""Sampling masks of a vLLM server, against one that runs in this process and answers in vLLM's format.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import pytest
import torch
from engines.fake_vllm import CAPTURES, MASKS, MASKS_PATH, completion_of, fake_vllm, kept_of, routes_of
from engines.tiny_chat import WatchedGRPO
from engines.watch import assert_replayed
from oracles import kept_rows

from trl_r3.engines.known_routes import KnownRoutes
from trl_r3.engines.vllm_server import RecordingVLLMClient

PROMPTS = [[20 + i] * (1 + i % 4) for i in range(24)]
INFO = {False: {"model_config": dict(MASKS)}, True: {"model_config": {**CAPTURES, **MASKS}}}


@pytest.mark.parametrize(("routes", "version"), [(False, "0.30.0"), (True, "0.30.0"), (True, "0.32.0")])
def test_masks_in_order(installed, routes, version):
    with fake_vllm(longest_delay=0.1, info=INFO[routes], version=version) as fake:
        client = RecordingVLLMClient(base_url=fake.base_url, routes=routes, masks=True)
        answer = client.generate(PROMPTS, n=3, max_tokens=8, temperature=0.7, top_k=20, generation_kwargs={"seed": 5})
    completions = [completion_of(prompt, index) for prompt in PROMPTS for index in range(3)]
    assert {path for path in fake.paths if "generate" in path or "completions" in path} == {MASKS_PATH}
    assert {request["sampling_params"]["seed"] for request in fake.requests} == {5}
    assert sorted(request["token_ids"] for request in fake.requests) == PROMPTS
    assert (answer["prompt_ids"], answer["completion_ids"]) == (PROMPTS, completions)
    assert answer["logprobs"] == [[[-0.5 - 0.01 * token] for token in tokens] for tokens in completions]
    assert [kept_rows(mask) for mask in client.take_masks()] == [kept_of(tokens) for tokens in completions]
    assert client.take_masks() == [], "masks are handed over once"
    sequences = [prompt + completion_of(prompt, index) for prompt in PROMPTS for index in range(3)]
    assert [ids.tolist() for ids in client.take_routes()] == [routes_of(s).tolist() for s in sequences if routes]


def test_only_missing_routes_are_asked_for(installed):
    with fake_vllm(info=INFO[True]) as fake:
        client = RecordingVLLMClient(base_url=fake.base_url, routes=True, masks=True)
        client.known_routes = KnownRoutes()
        client.generate([[30, 31]], top_k=20)
        longer = [30, 31, *completion_of([30, 31], 0), 50, 51]
        client.generate([longer], top_k=20)
    assert "routed_experts_prompt_start" not in fake.requests[0]["sampling_params"]
    assert fake.requests[1]["sampling_params"]["routed_experts_prompt_start"] > 0
    assert client.take_routes()[0].shape[0] == len(longer) + len(completion_of(longer, 0)) - 1


class Scored(WatchedGRPO):
    """Holds what a pass over tokens without replay returns against a naive one, over what the server kept."""

    compared = 0

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        scored = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.double() / self.temperature
        start = input_ids.shape[1] - logits_to_keep
        for row, tokens in enumerate(input_ids[:, start:].tolist()):
            completion = [t for t, real in zip(tokens, attention_mask[row, start:].tolist(), strict=True) if real]
            for at, (token, kept) in enumerate(zip(completion, kept_of(completion), strict=True)):
                logprobs = logits[row, start + at - 1, kept].log_softmax(-1)
                expected = logprobs[kept.index(token)].item(), -(logprobs.exp() * logprobs).sum().item()
                assert scored[0][row, at].item() == pytest.approx(expected[0], abs=1e-5)
                assert scored[1] is None or scored[1][row, at].item() == pytest.approx(expected[1], abs=1e-5)
                Scored.compared += len(kept) > 1
        return scored


def test_training_is_over_what_the_server_kept(server_trainer):
    Scored.compared = 0
    settings = {"use_routing_replay": False, "use_sampling_mask_replay": True, "top_k": 20}
    with fake_vllm(info=INFO[False]) as fake:
        server_trainer(fake, trainer_class=Scored, **settings).train()
    assert Scored.compared > 10
    assert {request["sampling_params"]["top_k"] for request in fake.requests} == {20}


def test_masks_beside_routes(server_trainer):
    with fake_vllm(info=INFO[True]) as fake:
        trainer = server_trainer(fake, use_sampling_mask_replay=True, top_k=20)
        trainer.train()
    sequences = [
        [*r["token_ids"], *completion_of(r["token_ids"], i)]
        for r in fake.requests
        for i in range(r["sampling_params"]["n"])
    ]
    expected = [(s, torch.from_numpy(routes_of(s)[:, [0, 2, 3]].astype("int64"))) for s in sequences]
    assert_replayed(trainer, {0: expected})
    entropies = [log["entropy"] for log in trainer.state.log_history if "entropy" in log]
    assert len(entropies) == 2 and max(entropies) < torch.tensor(5.0).log()  # five tokens are kept at most


def test_masks_tell_nothing_of_penalties(server_trainer):
    with fake_vllm(info=INFO[True]) as fake, pytest.warns(RuntimeWarning, match="^repetition_penalty=1.3 changes"):
        trainer = server_trainer(fake, use_sampling_mask_replay=True, top_k=20, repetition_penalty=1.3)
        trainer.train()
    assert not any(name.startswith("sampling/k3") for entry in trainer.state.log_history for name in entry)


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ({"info": {"model_config": CAPTURES}}, "does not return sampling masks. Start it with: "),
        (
            {"info": INFO[True], "scale_out": False},
            f"does not serve `{MASKS_PATH}`. Start it with: ",
        ),
        ({"info": INFO[True], "version": "0.27.1"}, "sampling masks are known from 0.28 to 0.33"),
    ],
)
def test_a_server_without_masks_is_refused_at_construction(server_trainer, behaviour, text):
    with fake_vllm(**behaviour) as fake, pytest.raises(ValueError, match=text) as error:
        server_trainer(fake, use_sampling_mask_replay=True, top_k=20)
    if "Start it" in text:
        for flag in (
            "--return-sampling-mask --enable-scale-out",
            "--enable-return-routed-experts",
            "V2_MODEL_RUNNER=1",
        ):
            assert flag in str(error.value)


def test_a_server_that_sends_no_masks(installed):
    with fake_vllm(info=INFO[False], returns_masks=False) as fake:
        client = RecordingVLLMClient(base_url=fake.base_url, masks=True)
        with pytest.raises(ValueError, match="sample 0: `sampling_mask` of the completion is None"):
            client.generate(PROMPTS[:1])
