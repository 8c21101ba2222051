"""
Sleep mode, with routes on, in vLLM's own engine core.

vLLM refuses the mode on a CPU when an engine is configured, and its CPU worker frees nothing. Only the refusal is
taken out here: what pauses the scheduler, empties the caches and keeps count of who sleeps is vLLM's.
"""

from __future__ import annotations

from typing import Any

import cpu_engine
import pytest
from test_vllm_engine import start, tokens
from vllm_training import make, train_and_check

from trl_r3.engines._compat_engines import pause_in_mode_keep

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def sleep_is_available(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)


def is_asleep(llm: Any) -> bool:
    return llm.llm_engine.model_executor.is_sleeping


def test_a_trainer_whose_engine_sleeps(tmp_path, model_folder, engines, colocate):
    """It sleeps from the construction on but for each rollout, whose routes are taken before."""
    trainer = make(tmp_path, model_folder, max_steps=3, vllm_enable_sleep_mode=True, **colocate())
    llm = trainer.vllm_generation.llm
    assert engines.captures and is_asleep(llm)
    awake, own_generate = [], llm.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        awake.append(not is_asleep(llm))
        return own_generate(*args, **kwargs)

    llm.generate = generate
    train_and_check(trainer, engines.records, steps=3)
    assert awake == [True] * 3 and is_asleep(llm)
    logs = [log for log in trainer.state.log_history if "sampling/k3_kl" in log]
    assert len(logs) == 3 and all(log["sampling/k3_kl"] < 1e-9 for log in logs)


@pytest.fixture
def llm(model_folder):
    llm = start(model_folder, enable_sleep_mode=True)
    yield llm
    cpu_engine.close(llm)


def cached_after_sleep(llm: Any) -> tuple[int, int]:
    """Tokens of a prompt that the cache served before the engine slept and woke as TRL lets it, and after."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    ask = [{"prompt_token_ids": tokens(100, 1)}]
    llm.generate(ask, sampling, use_tqdm=False)
    (before,) = llm.generate(ask, sampling, use_tqdm=False)
    llm.sleep(level=2)
    assert is_asleep(llm)
    llm.wake_up(tags=["weights"])
    llm.wake_up(tags=["kv_cache"])
    (after,) = llm.generate(ask, sampling, use_tqdm=False)
    return before.num_cached_tokens, after.num_cached_tokens


def test_nothing_that_slept_is_served_from_the_cache(llm):
    from vllm import __version__

    if __version__.startswith("0.31."):
        pause_in_mode_keep(llm)
    before, after = cached_after_sleep(llm)
    assert before > 0 and after == 0


def test_what_vllm_alone_does(llm):
    """Why 0.31 is given a mode, and the others are not: the day that one raises or 0.31 does not, this fails."""
    from vllm import __version__

    if __version__.startswith("0.31."):
        with pytest.raises(RuntimeError, match=r"only supports resetting running requests after pause\(mode='keep'\)"):
            cached_after_sleep(llm)
    else:
        assert cached_after_sleep(llm)[1] == 0
