"""A training as users write it, for `accelerate launch`, whose updates are watched from outside.

Prompts, completions and routes are told by arithmetic, so that any number of processes makes the same global batch;
the routes are nobody's, so that live routing cannot pass for replay. With `--rollouts mock` a server answers by the
same arithmetic, with `own` and `batching` the policy generates and is recorded, `colocate` and `server` are vLLMs.

Legend: B batch, T tokens of a padded sequence, N = B * T, L MoE layers, K experts per token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from engines.fake_vllm import completion_of, routes_of
from engines.tiny_chat import make_tokenizer
from peft import LoraConfig
from trl.generation import vllm_client, vllm_generation

from trl_r3 import R3GRPOConfig, R3GRPOTrainer, SamplingMask, UnsupportedRouterError
from trl_r3.cli.experts import experts_of, watched_experts
from trl_r3.routers import discovery
from trl_r3.trainers import construction

MOE_LAYERS = [0, 2, 3]
GENERATIONS = 2
Put = Callable[[Any, str, Any], None]  # sets an attribute until the training is over
ROLLOUTS = ["told", "mock", "own", "batching", "colocate", "server"]


def play(prompts: list[str], trainer) -> dict[str, list]:
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    completion_ids = [completion_of(ids, index % GENERATIONS) for index, ids in enumerate(prompt_ids)]
    routes = [
        torch.from_numpy(routes_of([*prompt, *completion])).long()
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]
    logprobs = [[-1.0] * len(ids) for ids in completion_ids]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": logprobs,
        "routed_experts": routes,
        "sampling_masks": [SamplingMask.of([kept_of(token) for token in ids]) for ids in completion_ids],
    }


def kept_of(token: int) -> list[int]:
    """What sampling is told to have kept beside a token, told by it; after every fifth nothing was cut."""
    return [] if token % 5 == 0 else sorted({token, *range(token % 11, 128, 7 + token % 4)})


def reward(completion_ids, **kwargs) -> list[float]:
    return [float(sum(ids) % 7 + len(ids)) for ids in completion_ids]


class Watched(R3GRPOTrainer):
    """Compares the ids that reach the experts in each pass of an update, recomputes included, with their record."""

    def __init__(self, *args, own_rollouts: bool = False, **kwargs):
        self.own_rollouts, self.fed = own_rollouts, {}  # rows of own rollouts, by tokens
        self.batch = None
        self.wrong, self.compared, self.calls, self.skipped = 0, 0, 0, 0
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self):
        let_accelerate_read_fsdp()
        super().create_accelerator_and_postprocess()

    def _note(self, layer: int, ids_NK: torch.Tensor) -> None:
        if self.batch is None:
            return
        self.calls += 1
        input_ids, mask = self.batch
        if len(ids_NK) != input_ids.numel():  # real tokens only
            real, self.skipped = mask.flatten().bool(), self.skipped + input_ids.numel() - len(ids_NK)
            ids_NK = ids_NK.new_zeros(input_ids.numel(), ids_NK.shape[1]).masked_scatter(real[:, None], ids_NK)
        for tokens, real, executed in zip(input_ids, mask.bool(), ids_NK.unflatten(0, input_ids.shape), strict=True):
            sequence = tuple(tokens[real].tolist())
            expected = self._expected(sequence)[:, MOE_LAYERS.index(layer)]
            got = executed[real][:-1].sort(-1).values
            self.wrong += int((got != expected.sort(-1).values).any(-1).sum())
            self.compared += len(got)

    def _expected(self, sequence: tuple[int, ...]) -> torch.Tensor:
        if not self.own_rollouts:
            return torch.from_numpy(routes_of(list(sequence))[:, MOE_LAYERS]).long()
        record = next(s.record for s in self.rollout_samples if tuple(s.tokens.tolist()) == sequence)
        return record.long()

    def training_step(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model)
        assert sorted(experts_of(model)) == MOE_LAYERS
        with watched_experts(model, self._note):
            try:
                return super().training_step(*args, **kwargs)
            finally:
                self.batch = None

    def _generate(self, *args, **kwargs):
        self.batch = None
        return super()._generate(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        self.batch = input_ids.clone(), attention_mask.clone()  # until the backward of this pass is over
        return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)


def let_accelerate_read_fsdp() -> None:
    """It reads settings of FSDP beside GPUs only. Called between a config and its trainer, which make both states."""
    state = PartialState()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def parse(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--experts", action="store_true", help="With adapters on the experts, too.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--bf16", action="store_true", help="Of Accelerate, without which DeepSpeed trains in float32."
    )
    parser.add_argument("--rollouts", choices=ROLLOUTS, default="told")
    parser.add_argument("--url", help="Of the server, mock or not.")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="Processes that share a colocated engine.")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--gating", default="intercept")
    parser.add_argument("--padding", default="keep")
    parser.add_argument("--checkpointing", choices=["none", "reentrant", "non-reentrant"], default="none")
    parser.add_argument("--optim", default="sgd")  # AdamW makes large steps of gradients that are rounding only
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--fails-on", type=int, help="Rank whose check of a router fails.")
    parser.add_argument("--dense", action="store_true")
    return parser.parse_args(options)


def without_nccl(put: Put) -> list[dict[str, list[int]]]:
    """Let TRL gather weights and send them to nobody: the way needs GPUs. Names and shapes of each synchronisation."""
    sent = []

    def update(client, metadata, params):
        sent.append({name: list(param.shape) for name, param in params})

    for module in (vllm_client, vllm_generation, construction):
        put(module, "is_vllm_available", lambda *args, **kwargs: True)
    for name in ("init_communicator", "close_communicator"):
        put(vllm_client.VLLMClient, name, lambda *args, **kwargs: None)
    put(vllm_client.VLLMClient, "update_named_params", update)
    return sent


def on_a_cpu(put: Put) -> None:
    """Let TRL colocate engines of a CPU, and send weights to a server without NCCL."""
    import cpu_engine  # of the tests with a real vLLM
    import cpu_weights

    put(vllm_generation, "LLM", cpu_engine.cpu_llm)
    cpu_weights.let_the_client_send(put)


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a config says of who makes the rollouts."""
    if options.rollouts == "batching":
        config = {"num_blocks": 64, "max_batch_tokens": 256}
        return {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": config}
    if options.rollouts == "colocate":
        sizes = {"vllm_max_model_length": 64, "vllm_tensor_parallel_size": options.tensor_parallel}
        return {"use_vllm": True, "vllm_mode": "colocate", **sizes}
    if options.url is None:
        return {}
    told: dict[str, Any] = {"vllm_importance_sampling_correction": False}  # nobody's log-probs
    if options.rollouts == "server":
        from cpu_engine import free_port

        told = {"vllm_group_port": free_port()}
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": options.url, **told}


def fail_on(rank: int, put: Put) -> None:
    """Let the check of the last router fail on one process, as weights that broke while they were loaded would."""
    check_router = discovery.check_router

    def check(router, *args, **kwargs):
        if PartialState().process_index == rank and router.layer == MOE_LAYERS[-1]:
            raise UnsupportedRouterError("the check failed here")
        return check_router(router, *args, **kwargs)

    put(discovery, "check_router", check)


def adapters(options: argparse.Namespace) -> LoraConfig:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if options.experts else None
    modules = ["q_proj", "v_proj"]
    return LoraConfig(r=4, target_modules=modules, target_parameters=parameters, init_lora_weights=False)


def make_trainer(folder: Path, name: str, options: argparse.Namespace) -> Watched:
    own = options.rollouts not in ("told", "mock")
    return Watched(
        model=str(folder / ("dense" if options.dense else "model")),
        args=R3GRPOConfig(
            str(folder / name),
            use_routing_replay=True,
            use_sampling_mask_replay=options.masks,
            top_p=0.8 if options.masks else 1.0,
            routing_replay_alarm="error" if own else "off",  # nobody's routes fit no tokens
            routing_replay_gating=options.gating,
            routing_replay_padding=options.padding,
            use_cpu=True,
            bf16=options.bf16,
            optim=options.optim,
            learning_rate=0.5 if options.optim == "sgd" else 0.01,
            lr_scheduler_type="constant",
            router_aux_loss_coef=0.0,  # one over a global batch is not the mean of those of its parts
            model_init_kwargs={"dtype": options.dtype},
            gradient_checkpointing=options.checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": options.checkpointing == "reentrant"},
            per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            num_generations=GENERATIONS,
            num_iterations=2,
            max_completion_length=12,
            max_steps=4,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            report_to="none",
            disable_tqdm=True,
            **engine_settings(options),
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [f"t{30 + i}" + f" t{50 + i}" * (i % 3) for i in range(16)]}),
        processing_class=make_tokenizer(),
        peft_config=adapters(options) if options.lora else None,
        rollout_func=play if options.rollouts == "told" else None,
        own_rollouts=own,
    )


def train(folder: Path, name: str, options: argparse.Namespace, put: Put) -> dict[str, Any]:
    if options.fails_on is not None:
        fail_on(options.fails_on, put)
    sent = without_nccl(put) if options.rollouts == "mock" else []
    if options.rollouts in ("colocate", "server"):
        on_a_cpu(put)
    try:
        trainer = make_trainer(folder, name, options)
        trainer.train(resume_from_checkpoint=None if options.resume is None else str(options.resume))
        if options.twice:
            trainer.train()
    except UnsupportedRouterError as error:
        return {"refused": str(error)}
    trainer.save_model(str(folder / name / "trained"))
    trainer.accelerator.wait_for_everyone()
    report = {
        "processes": trainer.accelerator.num_processes,
        "kind": trainer.accelerator.distributed_type.value,
        "wrong": trainer.wrong,
        "compared": trainer.compared,
        "calls": trainer.calls,
        "skipped": trainer.skipped,
        "sent": sent,
        "log": [log for log in trainer.state.log_history if "loss" in log],
    }
    trainer.accelerator.free_memory()  # an engine of DeepSpeed ends when it is told to
    return report


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """What a rank reports of a training that ends, or what refused it."""
    with pytest.MonkeyPatch.context() as patch:
        return train(folder, name, parse(options), patch.setattr)
