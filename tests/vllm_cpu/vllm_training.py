"""
Trainers on engines in this process: started once, watched, and held against their own record.

Legend: P prompt tokens, C completion tokens, T = P + C, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cpu_engine
import numpy as np
import torch
from datasets import Dataset
from engines.tiny_chat import WatchedGRPO, make_tokenizer, make_trainer
from engines.watch import assert_nothing_missing, assert_replayed, wrong_rows

PROMPTS = Dataset.from_dict({"prompt": ["t30 t31 t32", "t40", "t50 t51 t52 t53 t54", "t60 t61"]})
Record = tuple[tuple[int, ...], np.ndarray]  # prompt and completion, rows (T - 1, D, K)


class Engines:
    """Engines by folder, dtype and whether they sleep, started once: a trainer gives its weights to its own."""

    def __init__(self) -> None:
        self.running: dict[tuple, Any] = {}
        self.records: list[Record] = []  # of all calls since it was last emptied
        self.captures = False  # whether the last trainer asked for routes

    def starter(self, dtype: str, checkpoint_names: Callable | None = None) -> Callable:
        def start(model: str, **kwargs: Any) -> Any:
            self.captures = kwargs.pop("enable_return_routed_experts", False)
            key = (model, dtype, kwargs["enable_sleep_mode"])
            if key not in self.running:
                llm = cpu_engine.cpu_llm(model, dtype=dtype, enable_return_routed_experts=True, **kwargs)
                if checkpoint_names is not None:
                    rename_weights(llm, checkpoint_names)
                own_generate = llm.generate

                def generate(*args: Any, **kwargs: Any) -> Any:
                    outputs = own_generate(*args, **kwargs)
                    for output in outputs:
                        for each in output.outputs:
                            tokens = (*output.prompt_token_ids, *each.token_ids)
                            rows = np.full((len(tokens) - 1, *each.routed_experts.shape[1:]), 255, dtype=np.uint8)
                            rows[-len(each.routed_experts) :] = each.routed_experts  # the others were not asked for
                            self.records.append((tokens, rows))
                    return outputs

                llm.generate = generate
                self.running[key] = llm
            return self.running[key]

        return start

    def close(self) -> None:
        for llm in self.running.values():
            cpu_engine.close(llm)


def rename_weights(llm: Any, checkpoint_names: Callable) -> None:
    """Pass the weights that the trainer sends on under other names."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    own = model.load_weights
    model.load_weights = lambda weights: own(checkpoint_names(weights))


def mixtral_checkpoint_names(weights: Any) -> Any:
    """vLLM's Mixtral knows the names of the checkpoint only, TRL sends those that Transformers 5 gives the modules."""
    for name, tensor in weights:
        before, _, after = name.partition(".mlp.")
        if after == "gate.weight":
            yield f"{before}.block_sparse_moe.{after}", tensor
        elif after == "experts.gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                for part, half in zip(("w1", "w3"), gate_up.chunk(2), strict=True):
                    yield f"{before}.block_sparse_moe.experts.{expert}.{part}.weight", half
        elif after == "experts.down_proj":
            for expert, down in enumerate(tensor):
                yield f"{before}.block_sparse_moe.experts.{expert}.w2.weight", down
        else:
            yield name, tensor


def make(tmp_path, folder, dataset: Dataset = PROMPTS, **settings: Any) -> WatchedGRPO:
    settings = {"model_init_kwargs": {"dtype": "float32"}, "processing_class": make_tokenizer(), **settings}
    defaults = {"max_completion_length": 16, "per_device_train_batch_size": 8, "num_generations": 2}
    return make_trainer(tmp_path, dataset, model=str(folder), **{**defaults, **settings})


def moe_rows(ids: np.ndarray, dense: Sequence[int] = (1,)) -> torch.Tensor:
    """(T - 1, L, K) of the engine's (T - 1, D, K)."""
    return torch.from_numpy(np.delete(ids.astype(np.int64), list(dense), axis=1))


def by_step(trainer: WatchedGRPO, records: list[Record], dense: Sequence[int] = (1,)) -> dict[int, list]:
    """The engine's records, by step of the rollout: it was called once for each turn that was watched."""
    expected: dict[int, list] = {}
    records = list(records)
    for turn in trainer.turns:
        count = len(turn.prompt_ids)
        mine, records = records[:count], records[count:]
        sampled = {(*p, *c) for p, c in zip(turn.prompt_ids, turn.completion_ids, strict=True)}
        assert {tokens for tokens, _ in mine} == sampled
        expected.setdefault(turn.step, []).extend((tokens, moe_rows(ids, dense)) for tokens, ids in mine)
    assert not records
    return expected


def assert_rows_are_those_of_a_forward(trainer: WatchedGRPO) -> None:
    wrong = pairs = 0
    for one in trainer.updates:
        turn = max((turn for turn in trainer.turns if turn.step <= one.step), key=lambda turn: turn.step)
        for tokens, rows in one.samples():
            wrong += wrong_rows(rows, trainer.live_rows(tokens, turn.weights))
            pairs += rows[..., 0].numel()
    assert wrong == 0, f"{wrong} of {pairs} pairs of row and layer differ from a Transformers forward"


def train_and_check(trainer: WatchedGRPO, records: list[Record], steps: int = 2, dense: Sequence[int] = (1,)) -> None:
    before = trainer._weights()
    trainer.train()
    assert any(not torch.equal(before[name], now) for name, now in trainer._weights().items()), "no weight moved"
    masked = trainer.args.mask_truncated_completions
    assert_replayed(trainer, by_step(trainer, records, dense), truncated_are_masked=masked)
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps)
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
