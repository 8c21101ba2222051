"""Asynchronous GRPO with replay: every trained row goes through the experts of the server, whatever its age."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines.fake_vllm import serving
from engines.model_server import CopiedWeights, ModelServer
from engines.script import ids_of, look
from engines.tiny_chat import VOCAB, make_tokenizer, tiny_qwen3_moe
from peft import LoraConfig
from trainers.async_runs import WatchedAsync, count_wrong, make_trainer, on_a_cpu
from trainers.runs import CHECKPOINTING
from transformers import TrainerCallback
from trl.experimental.async_grpo import AsyncGRPOTrainer, async_grpo_trainer, async_rollout_worker, packing
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from trl_r3 import MisalignedRecordError
from trl_r3.alarm.evidence import MIN_ROWS, Alarm
from trl_r3.engines.conversations import Conversation, ConversationRoutes
from trl_r3.trainers.async_queue import QueuedRoutes
from trl_r3.trainers.async_session import AsyncReplaySession

__all__ = ["on_a_cpu"]  # fixture

pytestmark = [pytest.mark.usefixtures("on_a_cpu"), pytest.mark.filterwarnings("ignore:.*raw_logprobs")]
MOE_LAYERS = [0, 2, 3]


@pytest.fixture(scope="module")
def server():
    with serving(ModelServer()) as fake:
        yield fake


@pytest.fixture
def run(server, tmp_path):
    """Trains with a server that begins with the same weights."""

    def train(behaviour=None, shape=None, build=None, transfer=CopiedWeights, **settings) -> WatchedAsync:
        model = tiny_qwen3_moe(**(shape or {}))
        model.save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        server.start(model, **(behaviour or {}))
        folders = tmp_path / "model", tmp_path / "out"
        trainer = (build or make_trainer)(server, *folders, transfer=transfer(server), **settings)
        trainer.train()
        return trainer

    return train


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if log.get(name) is not None]


NOISY = {"routing_replay_alarm": "off"}  # the noise of the server is no rounding


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (CHECKPOINTING["non_reentrant"] | {"max_staleness": 4, "max_steps": 4, "max_inflight_tasks": 16}, {}),
        (CHECKPOINTING["reentrant"] | {"max_staleness": 0}, {}),
        (CHECKPOINTING["none"] | {"max_staleness": 2, "max_steps": 3}, {}),
        ({"token_budget": 64, "weight_sync_steps": 2, "max_steps": 3}, {}),
        ({"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}, {}),
        ({}, {"num_experts": 300}),
    ],
    ids=["stale", "reentrant", "no checkpointing", "token budget", "lora", "300 experts"],
)
def test_every_row_is_that_of_the_server(run, server, settings, shape):
    trainer = run(shape=shape, **{"max_steps": 2, **NOISY, **settings})
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert (wrong, total > 150) == (0, True)
    assert max(logged(trainer, "routing_replay/staleness")) <= trainer.args.max_staleness + 1
    if trainer.args.max_inflight_tasks == 16:  # more than are trained: some are answered across an update
        across = [each for each in server.answers if each.updates[0] != each.updates[1]]
        assert len(across) > 4 and max(logged(trainer, "routing_replay/spanning_frac")) > 0
    assert logged(trainer, "routing_replay/replayed_frac") == [1.0] * trainer.args.max_steps
    assert logged(trainer, "routing_replay/missing_frac") == [0.0] * trainer.args.max_steps
    assert min(logged(trainer, "routing_replay/changed_router_frac")) > 0.5  # live routing would have been another
    calls = {len(each) for one in trainer.forwards for each in one.calls.values()}
    assert calls == {1 if settings.get("gradient_checkpointing") is False else 2}


def test_without_replay_it_is_the_trainer_of_trl(run, server):
    before = vars(async_grpo_trainer).copy(), vars(async_rollout_worker).copy()
    with pytest.warns(RuntimeWarning, match="nothing is replayed"):
        trainer = run(use_routing_replay=False, max_steps=2)
    assert (vars(async_grpo_trainer), vars(async_rollout_worker)) == before
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert wrong > 0.5 * total
    assert not [name for log in trainer.state.log_history for name in log if name.startswith("routing_replay")]
    assert abs(trainer.forwards[0].ratio - 1) > 1e-3


def test_at_equal_weights_the_ratio_is_1(run):
    """Where siblings share their prompt, as behind a cache of prefixes, its tokens have one row."""
    trainer = run({"request_noise": 0.0}, **NOISY, max_steps=1)
    assert all(abs(one.ratio - 1) < 1e-5 for one in trainer.forwards)
    assert logged(trainer, "kl")[0] < 1e-9
    assert logged(trainer, "routing_replay/shared_conflict_frac") == [0.0]
    assert logged(trainer, "routing_replay/staleness") == logged(trainer, "routing_replay/spanning_frac") == [0.0]
    fresh, all_rows = (logged(trainer, f"routing_replay/{each}changed_router_frac")[0] for each in ("fresh/", ""))
    assert fresh == all_rows > 0.5


def test_with_noise_in_each_request_the_ratio_is_1_where_no_row_is_shared(run):
    """Siblings differ in the routes of their prompt, whose tokens are forwarded for each of them, or some are off."""
    exact, first = (
        run(**NOISY, max_steps=1, routing_replay_shared_rows=kind, **CHECKPOINTING["none"])
        for kind in ("exact", "first")
    )
    assert all(abs(one.ratio - 1) < 1e-5 for one in exact.forwards)
    assert any(abs(one.ratio - 1) > 1e-4 for one in first.forwards)
    assert max(logged(exact, "routing_replay/shared_conflict_frac"), default=0.0) == 0.0
    assert logged(first, "routing_replay/shared_conflict_frac")[0] > 0.5


def calls_a_tool(words: str):
    """The first answer of a conversation, each with a first word of its own; what follows on the tool is sampled."""
    number = itertools.count()

    def script(prompt):
        if VOCAB["<tool>"] in prompt:
            return None
        return ids_of(words.format(f"t{20 + next(number) % 90}", *(f"t{random.randrange(40, 110)}" for _ in range(2))))

    return script


def make_agent(*args, **settings):
    """Its template repeats a call as it was made, so that an answer which ends with one is rendered as it was."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ call['function']['arguments'] }} ", "")
    return make_trainer(*args, processing_class=tokenizer, tools=[look], **settings)


@pytest.mark.parametrize(
    ("words", "threshold", "kind"),
    [
        ("{0} {1} <look> <eos>", 1024, "clean"),
        ("{0} {1} <look> {0} {2} <eos>", 1024, "realign"),  # said again as "{0} {2} <look>"
        ("{0} {1} <look> {0} {2} <eos>", 1, "fork"),
    ],
    ids=["clean", "realign", "fork"],
)
def test_turns_of_tools(run, server, words, threshold, kind):
    settings = {"fork_threshold_tokens": threshold, "max_completion_length": 8, "max_steps": 2}
    trainer = run({"script": calls_a_tool(words)}, build=make_agent, **NOISY, **settings)
    fractions = {name: logged(trainer, f"rollout/{name}_frac")[0] for name in ("fork", "realign")}
    assert fractions == {name: float(name == kind) for name in fractions}
    later = [each for each in server.answers if VOCAB["<tool>"] in each.prompt]
    assert len(later) > 8 and {len(each.completion) for each in later}
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert (wrong, total > 300) == (0, True)
    assert logged(trainer, "routing_replay/replayed_frac") == [1.0, 1.0]


def last_turn_wins(self, matched, turn):
    return turn


def a_realigned_tail_keeps_its_rows(self, matched, turn):
    return ConversationRoutes((*self._cut(0, len(self)), *turn._cut(len(self), len(turn))), self.fault)


def rows_of_the_next_token(self, path, *args):
    return own_path(self, np.roll(path, -1), *args)


own_path = QueuedRoutes.on_path


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (ConversationRoutes, "go_on", last_turn_wins),
        (ConversationRoutes, "go_on", a_realigned_tail_keeps_its_rows),
        (QueuedRoutes, "on_path", rows_of_the_next_token),
    ],
    ids=["last turn", "realigned tail", "next token"],
)
def test_wrong_variants_are_seen(run, server, monkeypatch, owner, name, wrong):
    """As the count of wrong rows is 0 above, it has to be able to be another."""
    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(Conversation, "known_rows", lambda self, prompt: 0)  # each turn has all of its rows
    settings = {"max_completion_length": 8, "max_steps": 1, **CHECKPOINTING["none"]}
    script = calls_a_tool("{0} {1} <look> {0} {2} <eos>")
    trainer = run({"script": script, "leaves_out": False}, build=make_agent, **NOISY, **settings)
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert wrong > 0.03 * total


def test_requests_across_an_update_can_go_live(run, server):
    trainer = run(**NOISY, max_inflight_tasks=16, routing_replay_in_flight="live", **CHECKPOINTING["none"])
    spanning, missing, replayed = (
        logged(trainer, f"routing_replay/{name}") for name in ("spanning_frac", "missing_frac", "replayed_frac")
    )
    assert max(spanning) > 0
    assert all((s > 0) == (m > 0) for s, m in zip(spanning, missing, strict=True))
    assert all(m + r == pytest.approx(1) for m, r in zip(missing, replayed, strict=True))
    steady = [each for each in server.answers if each.updates[0] == each.updates[1]]
    assert len(steady) < len(server.answers)
    # what went through none of the experts of a steady request was live, in the share that was logged
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert 0 < wrong < total


class Lingering(CopiedWeights):
    """A transfer whose server has answered what was in flight before TRL has counted the update."""

    def resume(self) -> None:
        answered = len(self.server.answers)
        super().resume()
        give_up = time.monotonic() + 5
        while len(self.server.answers) < answered + 3 and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.2)  # for the answers to arrive


def test_what_is_answered_before_trl_counts_an_update_spans_it(run, server, monkeypatch):
    told, add = [], Conversation.add

    def add_noting(self, prompt, completion, rows, versions, *args):
        told.append((tuple(prompt) + tuple(completion), versions[0] != versions[1]))
        return add(self, prompt, completion, rows, versions, *args)

    monkeypatch.setattr(Conversation, "add", add_noting)
    run(**NOISY, max_inflight_tasks=16, max_steps=3, transfer=Lingering, **CHECKPOINTING["none"])
    across = {tuple(each.tokens) for each in server.answers if each.updates[0] != each.updates[1]}
    across -= {tuple(each.tokens) for each in server.answers if each.updates[0] == each.updates[1]}
    assert len(across) > 4
    assert not [tokens for tokens, spans in told if tokens in across and not spans]


def roll_tokens(rows):
    return np.roll(rows, 1, 0)


def repeat_an_expert(rows):
    rows = rows.copy()
    rows[:, 2, 1] = rows[:, 2, 0]
    return rows


def leave_out_a_row(rows):
    return rows[:-1]


EXACT = {"noise": 0.0, "request_noise": 0.0}
# enough rows that are recorded at the very weights, for the alarm to judge
JUDGED = {"max_steps": 1, "learning_rate": 0.0, "max_completion_length": 20, "per_device_train_batch_size": 8}
JUDGED |= {"max_staleness": 0, "num_generations": 2, "max_inflight_tasks": 16}


@pytest.mark.parametrize(
    ("behaviour", "error", "words"),
    [
        ({"returns_routes": False}, RuntimeError, "have no record, but `routing_replay_max_missing` allows 0.00%"),
        ({"spoil": repeat_an_expert}, ValueError, "decoder layer 2 .* appears 2 times among 4 ids"),
        ({"spoil": leave_out_a_row}, ValueError, r"returned \d+ rows of routes for \d+ tokens, expected"),
        ({"spoil": roll_tokens}, MisalignedRecordError, "moved by one token"),
    ],
    ids=["no routes", "an expert twice", "a row too few", "moved rows"],
)
def test_wrong_records_end_the_run_with_their_words(run, server, behaviour, error, words):
    names = (async_grpo_trainer, async_rollout_worker)
    before = [vars(module).copy() for module in names]
    trainers = []

    def build(*args, **settings):
        trainers.append(make_trainer(*args, **settings))
        return trainers[0]

    with pytest.raises(error, match=words):
        run({**EXACT, **behaviour}, build=build, **(JUDGED if error is MisalignedRecordError else {"max_steps": 1}))
    assert [vars(module) for module in names] == before
    assert_given_back(trainers[0])


def assert_given_back(trainer):
    worker = trainer.rollout_worker
    assert "_loop_cls" not in vars(worker) and "stop" not in vars(worker)
    forwards = [name for name, module in trainer.model.named_modules() if "forward" in vars(module)]
    assert forwards == [""]  # TRL's head, which scores
    assert trainer.model.config._attn_implementation == packing.TREE_ATTENTION
    session = trainer._r3
    assert session.waiting is None and trainer._rollout_dataset._waiting._rows == {}
    with pytest.raises(RuntimeError, match="only while `train"):
        session.attachment.replay  # noqa: B018


def test_right_records_pass_the_alarm(run, monkeypatch):
    """At equal weights and without noise, live routing is that of the server, and judged."""
    judged = []
    own = Alarm.judge
    monkeypatch.setattr(Alarm, "judge", lambda self: judged.append(self.evidence.rows) or own(self))
    trainer = run(EXACT, **JUDGED)
    assert max(judged) >= MIN_ROWS
    assert min(logged(trainer, "routing_replay/agreement")) > 0.9
    assert min(logged(trainer, "routing_replay/contrast")) > 0
    assert max(logged(trainer, "routing_replay/fresh/changed_router_frac")) < 0.01
    assert_given_back(trainer)


def test_a_loss_that_goes_past_the_record_is_refused(run, monkeypatch):
    monkeypatch.setattr(AsyncReplaySession, "replays", lambda self, number: nullcontext())
    with pytest.raises(RuntimeError, match="builds a graph in a training step, but replays nothing"):
        run(**NOISY, max_steps=1)


class Interrupts(TrainerCallback):
    """What ends a training behind its first step, or stops it there."""

    def __init__(self, error: Exception | None):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, KeyError("interrupted")], ids=["stopped", "interrupted"])
def test_a_trainer_trains_once(run, monkeypatch, error):
    """What TRL 1.16 leaves in the queue would be trained, though no server follows, and then none would come."""
    trainers = []

    def build(*args, **settings):
        trainers.append(make_trainer(*args, callbacks=[Interrupts(error)], **settings))
        return trainers[0]

    with pytest.raises(KeyError, match="interrupted") if error is not None else nullcontext():
        run(build=build, **NOISY)
    (trainer,) = trainers
    assert trainer.state.global_step == 1
    assert_given_back(trainer)
    trained = len(trainer.forwards)
    # without the refusal nobody would answer for as long as `heartbeat_stale_after_s`
    monkeypatch.setattr(AsyncGRPOTrainer, "train", lambda self, *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="begun to train before, .* 1 rollout process .* Construct another trainer"):
        trainer.train()
    assert len(trainer.forwards) == trained


def test_a_training_that_did_not_begin_does_not_count(run, monkeypatch):
    def build(*args, **settings):
        trainer = make_trainer(*args, **settings)
        with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
            trainer.train(resume_from_checkpoint="no such checkpoint")
        return trainer

    trainer = run(build=build, **NOISY, max_steps=1)
    assert trainer.state.global_step == 1


@pytest.fixture
def spawned(monkeypatch):
    """TRL's own worker, in a process of its own."""
    monkeypatch.setattr(async_grpo_trainer, "AsyncRolloutWorker", AsyncRolloutWorker)


@pytest.mark.usefixtures("spawned")
def test_a_rollout_process_of_its_own(run, server):
    trainer = run(**NOISY, max_steps=2)
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert (wrong, total > 100) == (0, True)
    assert logged(trainer, "routing_replay/replayed_frac") == [1.0, 1.0]
    assert_given_back(trainer)


def no_reward(completions, **kwargs):
    raise KeyError("no reward for this")


@pytest.mark.usefixtures("spawned")
def test_a_rollout_process_that_dies_ends_the_run(run):
    """TRL 1.16 waits for ever to stop a process that is no more."""
    with pytest.raises(RuntimeError, match="Rollout worker child has failed") as raised:
        run(**NOISY, reward=no_reward)
    assert "no reward for this" in str(raised.value.__cause__)


def test_a_run_that_resumes(run, server, tmp_path):
    """Versions go on counting, experts of the checkpoint are there, and rows are those of the server."""
    first = run(**NOISY, max_steps=1, save_strategy="steps", save_steps=1)
    saved = {name: weight.clone() for name, weight in first.model.state_dict().items()}
    begun = []

    def resuming(*args, **settings):
        trainer = make_trainer(*args, **settings)
        own = trainer._sync_weight
        trainer._sync_weight = lambda: begun.append(copy.deepcopy(trainer.model.state_dict())) or own()
        return Resumed(
            trainer, functools.partial(trainer.train, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        )

    trainer = run(build=resuming, **NOISY, max_steps=3).trainer
    assert all(torch.equal(saved[name], weight) for name, weight in begun[0].items())
    assert [one.step for one in trainer.forwards] == [1, 1, 2, 2]
    wrong, total = count_wrong(trainer.forwards, server.answers, MOE_LAYERS)
    assert (wrong, total > 100) == (0, True)
    assert logged(trainer, "routing_replay/staleness")[-2] == 0  # the weights were sent before anything was rolled out


@dataclass
class Resumed:
    trainer: WatchedAsync
    train: Callable


class SendsNothing(CopiedWeights):
    """As where a worker of one's own takes care of the weights."""

    def send_weights(self, iterator):
        self.sent += 1


@pytest.mark.parametrize("transfer", [CopiedWeights, SendsNothing])
def test_the_base_of_an_adapter_keeps_its_bits(run, server, transfer):
    """TRL merges into it and takes the adapter out again, which bfloat16 rounds."""
    before, sent = {}, []

    def build(*args, **settings):
        sent.append(transfer(server))
        trainer = make_trainer(*args, **{**settings, "transfer": sent[0]})
        layers = {name: each for name, each in trainer.model.named_modules() if name.endswith("base_layer")}
        before.update({name: each.weight.detach().clone() for name, each in layers.items()})
        return trainer

    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    settings = {"dtype": "bfloat16", "max_steps": 2, "peft_config": adapters}
    trainer = run(build=build, **NOISY, **settings)
    assert sent[0].sent == 3 and len(before) == 8
    assert all(torch.equal(trainer.model.get_submodule(name).weight, bits) for name, bits in before.items())
    assert "send_weights" not in vars(sent[0])


@pytest.fixture
def construct(run):
    """Stops before anything is rolled out."""

    def build(behaviour=None, **settings):
        made = []

        def untrained(*args, **own):
            made.append(make_trainer(*args, **own))
            return SimpleNamespace(train=lambda: None)

        run(behaviour, build=untrained, **settings)
        return made[0]

    return build


def test_construction_refuses_what_brings_no_routes(construct):
    with pytest.raises(TypeError, match="is a SimpleNamespace, whose samples carry no routes"):
        construct(rollout_worker=SimpleNamespace(rollout_buffer=None))
    with pytest.raises(ValueError, match="does not return routed experts. Start it with:"):
        construct({"info": {"model_config": {}}})
    with pytest.raises(ValueError, match="`torch_compile=True` runs past routing replay"):
        construct(torch_compile=True)
    with pytest.raises(ValueError, match="which asynchronous GRPO cannot do"):
        construct(routing_replay_mode="R2")


def test_settings_that_are_changed_are_checked_when_training_begins(construct):
    trainer = construct()
    for name, value in (("routing_replay_shared_rows", "last"), ("routing_replay_mode", "R2")):
        right = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=f"`{name}` is '{value}', "):
            trainer.train()
        setattr(trainer.args, name, right)


def test_a_constructed_trainer_says_what_it_found(construct):
    with pytest.warns(RuntimeWarning, match="top_k=5 changes the distribution"):
        trainer = construct(top_k=5)
    assert trainer.routing_replay.layout.moe_layers == (0, 2, 3)
    assert trainer.model.config._attn_implementation == packing.TREE_ATTENTION
    with pytest.warns(RuntimeWarning, match="nothing is replayed"):
        plain = construct(use_routing_replay=False)
    with pytest.raises(RuntimeError, match="does not replay routes"):
        plain.routing_replay  # noqa: B018
