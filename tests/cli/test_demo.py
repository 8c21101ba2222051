"""`trl-r3 demo --smoke`, run as a user runs it, and the parts that its figures rest on."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_r3.cli import command as cli
from trl_r3.cli.demo.policy import CONFIGS, Sum, accuracy, build_tokenizer, encode_sums, make_sums
from trl_r3.cli.demo.rounding import in_bfloat16

ROWS = (
    "sums right, greedy, before",
    "sums right, greedy, after",
    "reward, first tenth of the steps",
    "reward, last tenth of the steps",
    "k3 (how far training is from the rollout), scored live",
    "k3 (how far training is from the rollout), same rollouts with their experts",
    "tokens more than twice as likely to one of the two, scored live",
    "tokens more than twice as likely to one of the two, same rollouts with their experts",
    "tokens more than 1.1 times as likely to one, scored live",
    "tokens more than 1.1 times as likely to one, same rollouts with their experts",
    "routers where live routing chooses other experts",
    "tokens with such a router",
)


@pytest.fixture(scope="module", params=list(CONFIGS))
def demo(request, tmp_path_factory):
    """The folder of a smoke run and its log."""
    folder = tmp_path_factory.mktemp(request.param)
    assert cli.main(["demo", "--mismatch", "bf16", "--smoke", "--model", request.param, "--output", str(folder)]) == 0
    return folder, json.loads((folder / "log.json").read_text())


def test_files(demo):
    folder, log = demo
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert tuple(log["table"]) == ROWS
    table = (folder / "table.md").read_text()
    assert all(f"| {row} |" in table for row in ROWS)
    assert "bfloat16" in table
    assert (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "start").parameters())
        == (log["parameters"])
    )


def test_both_runs_train_from_the_same_weights(demo):
    _, log = demo
    plain, replayed = log["runs"]["without replay"], log["runs"]["with replay"]
    assert plain["accuracy_before"] == replayed["accuracy_before"]
    assert plain["log"][0]["reward"] == replayed["log"][0]["reward"]  # the first rollouts are the same
    for run in (plain, replayed):
        assert len(run["log"]) == log["settings"]["grpo_steps"]
        assert run["seconds_per_step"] > 0
    assert "routing_replay/replayed_frac" not in plain["log"][0]
    assert {entry["routing_replay/replayed_frac"] for entry in replayed["log"]} == {1.0}


def test_replay_closes_most_of_the_gap(demo):
    _, log = demo
    for run in log["runs"].values():
        for entry in run["measured"]:
            assert entry["live/changed_router_frac"] > 0
            assert entry["live/changed_token_frac"] >= entry["live/changed_router_frac"]
        live, replayed = (sum(e[f"{way}/k3_kl"] for e in run["measured"]) for way in ("live", "replay"))
        assert 0 < replayed < 0.7 * live


def test_the_first_rollout_is_measured_alike_in_both_runs(demo):
    """Weights and rollouts are still the same there, so the two ways to a record must agree."""
    _, log = demo
    plain, replayed = (run["measured"][0] for run in log["runs"].values())
    assert plain == pytest.approx(replayed, rel=1e-3)


def test_measurement_agrees_with_the_metrics_of_the_trainer(demo):
    _, log = demo
    run = log["runs"]["with replay"]
    logged = {entry["step"] - 1: entry for entry in run["log"]}
    for entry in run["measured"]:
        step = logged[entry["step"]]
        assert step["sampling/k3_kl"] == pytest.approx(entry["replay/k3_kl"], rel=1e-3)
        assert step["routing_replay/changed_router_frac"] == pytest.approx(entry["replay/changed_router_frac"])
        assert step["routing_replay/changed_token_frac"] == pytest.approx(entry["replay/changed_token_frac"])


def test_table_scores_the_rollouts_of_each_run_both_ways(demo):
    _, log = demo
    for run, values in log["runs"].items():
        for row, way in zip(ROWS[4:6], ("live", "replay"), strict=True):
            mean = sum(entry[f"{way}/k3_kl"] for entry in values["measured"]) / len(values["measured"])
            assert log["table"][row][run] == pytest.approx(mean)


def test_weights_are_rounded_for_the_rollout_and_come_back(qwen):
    before = {name: parameter.clone() for name, parameter in qwen.named_parameters()}
    with pytest.raises(KeyboardInterrupt), in_bfloat16(qwen):
        assert {parameter.dtype for parameter in qwen.parameters()} == {torch.bfloat16}
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], parameter) for name, parameter in qwen.named_parameters())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in before.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes(name):
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config)
    assert config.num_hidden_layers >= 8
    assert 3.3e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6
    dense = [layer for layer in model.model.layers if not hasattr(layer.mlp, "experts")]
    assert len(dense) == (1 if name == "qwen3" else 0)


def test_labels_score_the_answer_and_its_end():
    tokenizer = build_tokenizer()
    batch = encode_sums(tokenizer, [Sum("1+2=", "3"), Sum("30+41=", "71")])
    scored = [ids[labels != -100] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert [re.sub(" ", "", tokenizer.decode(ids)) for ids in scored] == ["3<end>", "71<end>"]
    assert batch["attention_mask"].sum(1).tolist() == [6, 9]


def test_accuracy_is_the_share_of_right_answers():
    class Adder:
        """Answers with the digits after the operands: 1+1=, 2, end."""

        training = False

        def eval(self):
            pass

        def train(self, mode):
            pass

        def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
            answer = tokenizer("2<end>", return_tensors="pt")["input_ids"]
            return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)

    tokenizer = build_tokenizer()
    sums = make_sums(2)  # 0+2, 1+1 and 2+0 of nine
    assert accuracy(Adder(), tokenizer, sums, batch_size=4) == pytest.approx(3 / 9)
