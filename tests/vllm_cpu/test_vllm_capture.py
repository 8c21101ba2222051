"""`python -m benchmarks vllm` at sizes that say nothing about speed."""

from __future__ import annotations

import json

import cpu_engine
import pytest

from benchmarks import vllm_capture

pytestmark = pytest.mark.vllm


def test_one_engine_returns_routes_and_the_other_does_not(tmp_path, monkeypatch):
    returned: dict[bool, set[bool]] = {}
    own_start = vllm_capture.start

    def start(folder, routes, settings):
        llm = own_start(folder, routes, settings)
        own_generate = llm.generate

        def generate(*args, **kwargs):
            outputs = own_generate(*args, **kwargs)
            returned.setdefault(routes, set()).update(
                output.outputs[0].routed_experts is not None for output in outputs
            )
            return outputs

        llm.generate = generate
        engines.append(llm)
        return llm

    engines: list = []
    monkeypatch.setattr(vllm_capture, "start", start)
    if cpu_engine.SECOND_RUNNER:
        cpu_engine.cut_without_triton()
    try:
        vllm_capture.run(tmp_path / "capture.json", vllm_capture.SMOKE)
    finally:
        for llm in engines:
            cpu_engine.close(llm)
    assert returned == {False: {False}, True: {True}}
    log = json.loads((tmp_path / "capture.json").read_text())
    findings = {entry["what"]: entry["value"] for entry in log["findings"]}
    for length in vllm_capture.SMOKE.prompt_lengths:
        with_routes, without = (findings[f"prompts of {length}: seconds {how}"] for how in ("with routes", "without"))
        assert findings[f"prompts of {length}: throughput with routes over without"] == without / with_routes
