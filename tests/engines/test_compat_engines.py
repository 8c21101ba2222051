"""Quirks of engines: a pause that keeps caches whole, and tokens that are named as TRL reads them."""

from __future__ import annotations

from types import SimpleNamespace

from trl_r3.engines._compat_engines import name_tokens, pause_in_mode_keep


def test_an_engine_pauses_in_mode_keep_unless_told_otherwise():
    """By keyword, as TRL calls it, and by position, as vLLM lets users call it."""
    calls = []
    engine = SimpleNamespace(sleep=lambda level=1, mode="abort": calls.append((level, mode)))
    pause_in_mode_keep(engine)
    engine.sleep(level=2)
    engine.sleep()
    engine.sleep(1, "abort")
    engine.sleep(2, mode="wait")
    assert calls == [(2, "keep"), (1, "keep"), (1, "abort"), (2, "wait")]


def test_tokens_are_named_once():
    """vLLM 0.32 tells ids, 0.30 names, and a chat no log-probabilities."""
    later = {"logprobs": {"content": [{"token_id": 7, "top_logprobs": [{"token_id": 8, "logprob": -1.0}]}]}}
    earlier = {"logprobs": {"content": [{"token": "token_id:5", "top_logprobs": None}]}}
    both = {"logprobs": {"content": [{"token": "kept", "token_id": 9}]}}
    name_tokens([later, earlier, both, {"logprobs": None}, {}])
    (entry,) = later["logprobs"]["content"]
    assert entry["token"] == "token_id:7" and entry["top_logprobs"][0]["token"] == "token_id:8"
    assert earlier["logprobs"]["content"] == [{"token": "token_id:5", "top_logprobs": None}]
    assert both["logprobs"]["content"][0]["token"] == "kept"
