"""A model that a trace is not of, or that computes in another way, is refused by what differs."""

import pytest

from trl_r3 import load_trace
from trl_r3.traces.trace_replay import verify_trace


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "the trace is of a qwen3_moe with config"),
        ({"num_experts": 8}, "Pass the model that was trained, with the weights of step 0"),
    ],
)
def test_another_model_is_refused(qwen3, traced, change, says):
    _, paths, _ = traced(qwen3(), max_steps=1)
    with pytest.raises(ValueError, match=says):
        verify_trace(qwen3(**change), load_trace(paths[0]))


def test_another_dtype_or_attention_is_refused(qwen3, traced):
    _, paths, _ = traced(qwen3(), max_steps=1)
    trace = load_trace(paths[0])
    with pytest.raises(ValueError, match=r"dtype float32, this model has float64. Load the model in this dtype"):
        verify_trace(qwen3().double(), trace)
    model = qwen3()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attention sdpa, this model has eager\. Load the model with `attn_impl"):
        verify_trace(model, trace)
