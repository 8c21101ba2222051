"""`trl-r3 verify`: right rollouts of real engines pass, and each way to spoil one is named with its cause."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from engines.fake_vllm import fake_vllm, npy_base64
from misrouted import engine_of
from model_zoo import build_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from trl.generation import vllm_client

from trl_r3 import RouterReplay
from trl_r3.cli import command as cli
from trl_r3.cli.demo.policy import qwen3_config
from trl_r3.cli.models import LoadedModel
from trl_r3.cli.verify import sample, samplers, training, verify
from trl_r3.cli.verify.launch import Launch
from trl_r3.cli.verify.samplers import continuous_rollout, transformers_rollout
from trl_r3.cli.verify.sampling import TEMPERATURE, Sampling, generated_prompts
from trl_r3.routers import router_replay
from trl_r3.routers.router import Router

ROWS = 16 * (16 + 32 - 1) + 2 * sum(range(1, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model of the demo, with four of its layers."""
    path = tmp_path_factory.mktemp("model")
    model_of(seed=0).save_pretrained(path)
    return path


def model_of(seed):
    torch.manual_seed(seed)
    config = qwen3_config()
    config.num_hidden_layers, config.layer_types = 4, None
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def loaded(folder):
    return LoadedModel(AutoModelForCausalLM.from_pretrained(folder).eval(), "the weights of the demo")


@pytest.fixture(scope="module")
def engine(loaded):
    """A rollout in bfloat16, as engines run."""
    return rollout_of(engine_of(loaded.model, "bf16"))


def rollout_of(model, temperature=TEMPERATURE):
    torch.manual_seed(0)
    with RouterReplay(model) as replay:
        sampling = Sampling(generated_prompts(model), temperature=temperature)
        return transformers_rollout(model, replay, sampling)


def report_of(loaded, rollout):
    with RouterReplay(loaded.model) as replay:
        return verify(loaded, replay, rollout)


def by_name(report):
    return {finding.what: finding for finding in report.findings}


def wrong(report):
    """What is wrong, with all that is said about it."""
    return {
        finding.what: f"{finding.seen} | {finding.cause} | {finding.remedy}"
        for finding in report.findings
        if finding.status == "wrong"
    }


def k3(report, which):
    return float(by_name(report)[f"mismatch, {which}"].seen.split()[1].rstrip(","))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_right_rollout_passes(loaded, precision):
    rollout = rollout_of(engine_of(loaded.model, precision))
    report = report_of(loaded, rollout)
    assert wrong(report) == {} and report.passed
    assert by_name(report)["gradients with checkpointing"].status == "right"
    assert by_name(report)["rows"].seen == f"{ROWS} expected: {ROWS} present, 0 missing, 0 invalid"
    assert by_name(report)["executed ids"].seen.startswith(f"0 of {ROWS * 3} (row, layer) pairs")
    assert by_name(report)["live routing"].seen != "0.00% of routers would select another set"
    assert k3(report, "replayed") < k3(report, "live")
    assert [layer.layer for layer in report.layers] == [1, 2, 3]
    assert all(layer.other_ids == 0 and layer.agreement > 0.5 for layer in report.layers)
    experts = loaded.model.config.num_experts
    for slot, layer in enumerate(report.layers):
        ids = torch.cat([torch.as_tensor(rows)[:, slot].flatten().long() for rows in rollout.routes])
        load = torch.tensor([int((ids == expert).sum()) for expert in range(experts)])
        assert (layer.max_over_mean, layer.dead_experts) == (
            pytest.approx(load.max() / load.double().mean()),
            int((load == 0).sum()),
        )
        assert 0 < layer.entropy < 1


@contextmanager
def that_ends_early(model):
    """The end of a text is its likeliest token, as of a model that has learned to stop."""

    def raise_the_end(module, args, logits):
        logits = logits.clone()
        logits[..., model.config.eos_token_id] += 2.0
        return logits

    handle = model.get_output_embeddings().register_forward_hook(raise_the_end)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("generate", [transformers_rollout, continuous_rollout])
def test_a_model_that_ends_its_texts(loaded, generate):
    with RouterReplay(loaded.model) as replay, that_ends_early(loaded.model):
        rollout = generate(loaded.model, replay, Sampling(generated_prompts(loaded.model)))
        report = verify(loaded, replay, rollout)
    assert [len(ids) for ids in rollout.completion_ids] == [32] * 16  # it goes on behind an end
    assert sum(ids.count(loaded.model.config.eos_token_id) for ids in rollout.completion_ids) > 100
    assert wrong(report) == {}
    assert "drawn at 0.7" in by_name(report)["log-probabilities"].seen


@pytest.mark.parametrize(
    "setting", [{"min_p": 0.2}, {"typical_p": 0.5}, {"no_repeat_ngram_size": 1}, {"epsilon_cutoff": 0.05}]
)
def test_a_model_whose_own_settings_cut(loaded, monkeypatch, setting):
    """It is verified by the whole distribution."""
    monkeypatch.setattr(loaded.model, "generation_config", GenerationConfig(**setting))
    assert wrong(report_of(loaded, rollout_of(loaded.model))) == {}


def test_ends_that_were_forbidden(loaded, monkeypatch):
    """The wrong variant: those tokens come from a cut distribution."""
    forbid = partial(GenerationConfig, min_new_tokens=32)
    monkeypatch.setattr(samplers, "GenerationConfig", lambda **kwargs: forbid(**{**kwargs, "eos_token_id": 0}))
    with that_ends_early(loaded.model):
        found = wrong(report_of(loaded, rollout_of(loaded.model)))
    assert "or the engine truncates the distribution" in found["log-probabilities"]


def test_the_model_is_left_as_it_was(loaded, engine):
    before = {name: (p.requires_grad, p.grad, p.clone()) for name, p in loaded.model.named_parameters()}
    report_of(loaded, engine)
    for name, parameter in loaded.model.named_parameters():
        required, grad, value = before[name]
        assert parameter.requires_grad == required and parameter.grad is grad and torch.equal(parameter, value)
    assert not loaded.model.training and not loaded.model.is_gradient_checkpointing


def changed(routes, change):
    return [change(ids.clone()) for ids in routes]


def rows_set(first, last, value):
    def change(ids):
        ids[first:last] = value
        return ids

    return change


def layer_set(layer, value):
    def change(ids):
        ids[:, layer] = value
        return ids

    return change


# By what was done to the routes: the finding that is wrong, and what is said of its cause.
SPOILT = {
    "layers shifted": (lambda r: changed(r, lambda ids: ids.roll(1, 1)), "agreement", "layers are shifted"),
    "one layer twice": (lambda r: changed(r, lambda ids: ids[:, [0, 1, 0]]), "agreement", "are shifted"),
    "one token later": (lambda r: changed(r, lambda ids: ids.roll(1, 0)), "agreement", "shifted by one token"),
    "one token earlier": (lambda r: changed(r, lambda ids: ids.roll(-1, 0)), "agreement", "shifted by one token"),
    "other samples": (lambda r: r[1:] + r[:1], None, None),
    "all zero": (lambda r: changed(r, torch.zeros_like), "rows", "all-zero capture"),
    "one layer zero": (lambda r: changed(r, layer_set(1, 0)), "rows", "all-zero capture"),
    "no flag": (lambda r: [None] * len(r), "rows", "a missing flag"),
    "prefix cache": (lambda r: changed(r, rows_set(0, 16, -1)), "rows", "a prefix cache served"),
    "cut": (lambda r: [ids[:-4] for ids in r], "rows", "shorter than their tokens"),
    "holes": (lambda r: changed(r, rows_set(20, 22, -1)), "rows", "inside of samples"),
    "other experts": (lambda r: changed(r, lambda ids: ids + 20), "rows", "experts that the model does not have"),
    "two slots more": (lambda r: [torch.cat([ids, ids[:, :2]], 1) for ids in r], "rows", "of another shape"),
    "too long": (lambda r: [torch.cat([ids, ids]) for ids in r], "rows", "no router can have selected"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_routes_are_named_with_their_cause(loaded, engine, how):
    spoil, what, cause = SPOILT[how]
    report = report_of(loaded, replace(engine, routes=spoil(engine.routes)))
    found = wrong(report)
    assert not report.passed
    if how == "other samples":  # which are as long, or not: then rows are missing, too
        assert "routes of other tokens or samples" in found["agreement"] or "samples" in found["agreement"]
        return
    assert cause in found[what], found
    assert "executed ids" not in found, "what is recorded is executed all the same"


def logprobs_at(loaded, rollout, temperature):
    """What a Transformers forward says of each sampled token, sample by sample."""
    scored = []
    for prompt, completion in zip(rollout.prompt_ids, rollout.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = loaded.model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        scored.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return scored


def test_raw_log_probabilities(loaded, engine):
    """Drawn at the temperature, scored without it: vLLM's default."""
    spoilt = replace(engine, logprobs=logprobs_at(loaded, engine, 1.0))
    found = wrong(report_of(loaded, spoilt))["log-probabilities"]
    assert "raw log-probabilities" in found and "--logprobs-mode processed_logprobs" in found


def test_the_mode_of_the_engine_is_told(loaded, engine):
    found = wrong(report_of(loaded, replace(engine, logprobs_mode="raw_logprobs")))
    assert "the engine says raw_logprobs" in found["log-probabilities"]
    assert wrong(report_of(loaded, replace(engine, logprobs_mode="processed_logprobs"))) == {}


def test_temperature_on_one_side(loaded):
    """The engine never got it: draws and scores are those of 1."""
    rollout = replace(rollout_of(loaded.model, temperature=1.0), temperature=TEMPERATURE)
    found = wrong(report_of(loaded, rollout))["log-probabilities"]
    assert "temperature on one side: the engine drew and scored at 1" in found


def test_temperature_in_the_scores_only(loaded):
    rollout = rollout_of(loaded.model, temperature=1.0)
    rollout = replace(rollout, temperature=TEMPERATURE, logprobs=logprobs_at(loaded, rollout, TEMPERATURE))
    found = wrong(report_of(loaded, rollout))["log-probabilities"]
    assert "temperature on one side: tokens were drawn at 1, but scored at 0.7" in found


def test_temperature_twice(loaded, engine):
    found = wrong(report_of(loaded, replace(engine, logprobs=logprobs_at(loaded, engine, TEMPERATURE**2))))
    assert "was applied twice" in found["log-probabilities"]


def test_log_probabilities_of_the_next_token(loaded, engine):
    found = wrong(report_of(loaded, replace(engine, logprobs=[each.roll(1) for each in engine.logprobs])))
    assert "log-probabilities are shifted by one token" in found["log-probabilities"]


def test_no_log_probabilities(loaded, engine):
    found = wrong(report_of(loaded, replace(engine, logprobs=None)))
    assert "--max-logprobs -1" in found["log-probabilities"]


def test_other_weights(loaded):
    found = wrong(report_of(loaded, rollout_of(model_of(seed=1))))
    assert "the engine serves the weights that score" in found["agreement"]
    assert "routing does not explain it" in found["mismatch, replayed"]


def test_a_training_forward_that_gives_no_numbers(loaded, engine):
    head = loaded.model.get_output_embeddings().weight
    kept = head.detach().clone()
    try:
        head.data[7] = float("nan")
        found = by_name(report_of(loaded, engine))
    finally:
        head.data.copy_(kept)
    assert found["mismatch, replayed"].status == "wrong" and found["log-probabilities"].status == "not judged"
    assert "training scores 512 of 512 tokens as NaN" in found["mismatch, replayed"].seen


def test_layers_without_a_cache_of_continuous_batching(tmp_path, capsys):
    build_tiny("qwen3_5_moe_text").save_pretrained(tmp_path)
    assert cli.main(["verify", str(tmp_path), "--engine", "continuous"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "continuous batching cannot serve a Qwen3_5MoeForCausalLM: Invalid layer type: linear_attention" in said


def test_experts_that_run_otherwise(loaded, engine, monkeypatch):
    """The watch stands at the experts, so it does not believe what replay believes."""

    def bypassed(self, forward, args, kwargs, *more, **settings):
        routed = own(self, forward, args, kwargs, *more, **settings)
        logits, weights, ids = routed.output
        return routed._replace(output=(logits, weights, (ids + 1) % 32)) if self.layer == 2 else routed

    own = Router.replay
    with RouterReplay(loaded.model) as replay:
        monkeypatch.setattr(Router, "replay", bypassed)  # once it has passed its own checks
        report = verify(loaded, replay, engine)
    assert "executed other ids than recorded, in layers 2 |" in wrong(report)["executed ids"]
    assert [layer.layer for layer in report.layers if layer.other_ids] == [2]


def test_ids_that_skip_the_experts():
    """Zaya's last choice is no expert; its block passes another id for it, with the weight 0."""
    model = build_tiny("zaya")
    rollout = rollout_of(model)
    assert any(bool((ids == 8).any()) for ids in rollout.routes)
    assert "executed ids" not in wrong(report_of(LoadedModel(model, "zaya"), rollout))


@pytest.mark.parametrize("name", ["deepseek_v4", "minimax_m3_vl_text"])
def test_a_forward_that_depends_on_padding(name):
    """Both compress blocks of tokens, counted from the padding; without it they score what they sampled."""
    model = build_tiny(name)
    loaded = LoadedModel(model, name)
    ((what, text),) = wrong(report_of(loaded, rollout_of(model))).items()
    assert what == "mismatch, replayed"
    assert "depends on padding" in text and "prompts of one length" in text
    torch.manual_seed(0)
    with RouterReplay(model) as replay:
        prompts = [prompt[:17] for prompt in generated_prompts(model)]
        report = verify(loaded, replay, transformers_rollout(model, replay, Sampling(prompts)))
    assert "mismatch, replayed" not in wrong(report) and k3(report, "replayed") < 1e-8


def test_gradients_that_never_arrive_are_no_proof(loaded, engine, monkeypatch):
    monkeypatch.setattr(training, "_routers_and_embedding", lambda *args: {})
    monkeypatch.setattr(training, "_gradients_of_inputs", lambda *args: nullcontext([]))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args: None)  # nothing requires a gradient
    assert by_name(report_of(loaded, engine))["gradients with checkpointing"].status == "not judged"


def test_a_recompute_that_goes_live(loaded, engine, monkeypatch):
    """As where the record is gone before backward: an error, or other rows."""
    monkeypatch.setattr(router_replay, "bound_checkpoints", lambda *args: nullcontext())
    found = wrong(report_of(loaded, engine))["gradients with checkpointing"]
    assert "non-reentrant" in found and "reentrant" in found
    monkeypatch.setattr(router_replay, "in_backward", lambda: False)
    found = wrong(report_of(loaded, engine))["gradients with checkpointing"]
    assert "reentrant: largest difference" in found and "rows recomputed otherwise" in found


@pytest.mark.parametrize("name", ["transformers", "continuous"])
def test_the_command(folder, name, capsys):
    assert cli.main(["verify", str(folder), "--engine", name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["model"] == f"the weights of {folder}"
    assert {each["what"]: each["status"] for each in report["findings"]}["agreement"] == "right"
    assert len(report["layers"]) == 3


def test_the_command_prints_a_table(folder, capsys, monkeypatch):
    from trl_r3.cli import verify as command

    def spoilt(*args):
        rollout = sample(*args)
        return replace(rollout, routes=[torch.zeros_like(ids) for ids in rollout.routes])

    monkeypatch.setattr(command, "sample", spoilt)
    assert cli.main(["verify", str(folder)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "rows: all-zero capture" in printed and "What to do: use vLLM 0.28" in printed
    assert "Something is wrong" in printed and "busiest" in printed


def test_an_adapter(folder, tmp_path, capsys):
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]}
    policy = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(policy, LoraConfig(r=2, init_lora_weights=False, **targets)).save_pretrained(tmp_path)
    assert cli.main(["verify", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == f"{folder} with the adapter {tmp_path}" and report["architecture"].startswith("Peft")
    assert all(layer["other_ids"] == 0 for layer in report["layers"])


@contextmanager
def server_of(loaded, rollout):
    """A server that answers with a rollout of a real engine, one slot per decoder layer as vLLM has it."""
    by_prompt = {tuple(prompt): i for i, prompt in enumerate(rollout.prompt_ids)}
    with fake_vllm() as fake:

        def complete(body):
            assert body["temperature"] == TEMPERATURE and body["ignore_eos"] is True
            (prompt,) = body["prompt"]
            i = by_prompt[tuple(prompt)]
            tokens, values = rollout.completion_ids[i], rollout.logprobs[i].tolist()
            named = [f"token_id:{token}" for token in tokens]
            dense = torch.zeros_like(rollout.routes[i][:, :1])
            ids = torch.cat([dense, rollout.routes[i]], 1).numpy().astype("uint8")
            routes = npy_base64(ids) if fake.returns_routes else None
            top = [{name: value} for name, value in zip(named, values, strict=True)]
            logprobs = {"tokens": named, "token_logprobs": values, "top_logprobs": top}
            choice = {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs, "routed_experts": routes}
            return {"choices": [choice]}

        fake.complete = complete
        yield fake


@pytest.fixture
def client(monkeypatch):
    pytest.importorskip("requests", reason="TRL's client of a vLLM server needs `pip install requests`")
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)


def test_a_server(loaded, folder, engine, client, capsys):
    with server_of(loaded, engine) as fake:
        assert cli.main(["verify", str(folder), "--engine", "server", "--url", fake.base_url, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["rollout"] == f"vLLM 0.30.0 at {fake.base_url}"
        fake.returns_routes = False
        assert cli.main(["verify", str(folder), "--engine", "server", "--url", fake.base_url, "--json"]) == 1
        (rows, *_) = json.loads(capsys.readouterr().out)["findings"]
        assert "a missing flag" in rows["cause"] and "--enable-return-routed-experts" in rows["remedy"]


def test_servers_that_cannot_be_verified(folder, client, capsys):
    arguments = ["verify", str(folder), "--engine", "server"]
    with fake_vllm(version="0.21.0") as fake:
        assert cli.main([*arguments, "--url", fake.base_url]) == 2
        assert "routing replay needs 0.22 or later" in capsys.readouterr().err
    with fake_vllm(info={"model_config": {}}) as fake:
        assert cli.main([*arguments, "--url", fake.base_url]) == 2
        assert "does not return routed experts" in capsys.readouterr().err
    with fake_vllm() as fake:
        fake.failures = [400]
        assert cli.main([*arguments, "--url", fake.base_url]) == 2
        assert "Request failed: 400" in capsys.readouterr().err
    assert cli.main([*arguments, "--url", fake.base_url]) == 2  # it is down
    printed = capsys.readouterr()
    assert "can't be reached" in printed.err and "Traceback" not in printed.err and printed.out == ""
    assert cli.main(arguments) == 2
    assert "`--engine server` and `--url URL` belong together" in capsys.readouterr().err


def test_vllm_that_is_not_installed(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    assert cli.main(["verify", str(folder), "--engine", "vllm"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("engine", [["vllm"], ["server", "--url", "http://127.0.0.1:9"]], ids=lambda engine: engine[0])
def test_an_engine_that_is_not_here_is_told_before_the_model_is_loaded(engine, monkeypatch, client, capsys):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.setattr(Launch, "load", lambda *args: pytest.fail("the model is loaded"))
    assert cli.main(["verify", "org/a-model-of-minutes", "--engine", *engine]) == 2
    printed = capsys.readouterr()
    assert "vLLM is not installed" in printed.err or "no server to verify at http://127.0.0.1:9: " in printed.err
    assert printed.out == ""


def test_an_engine_that_gives_up(folder, monkeypatch, capsys):
    from trl_r3.cli import verify as command

    def failed(*args):
        raise RuntimeError("continuous batching returned 3 of 16 requests.")

    monkeypatch.setattr(command, "sample", failed)
    assert cli.main(["verify", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "3 of 16 requests" in printed.err and "Traceback" not in printed.err


def test_a_dense_model(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=32)).save_pretrained(tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "is a dense model" in capsys.readouterr().err
