"""What the tests change in the worker of a vLLM server, which imports this module before it loads a model."""

from __future__ import annotations

import cpu_engine
import cpu_weights

cpu_weights.compute_from_parameters()
cpu_weights.carry_weights_by_a_store(setattr)
if cpu_engine.SECOND_RUNNER:
    cpu_engine.cut_without_triton()


class OnACPU:
    """Extension of the worker (`--worker-extension-cls`): importing it is what is wanted."""
