"""What the tests add to the worker of a vLLM server, which imports this module itself."""

from __future__ import annotations

from typing import Any

import cpu_engine
from safetensors.torch import load_file

if cpu_engine.SECOND_RUNNER:
    cpu_engine.cut_without_triton()


class ReloadFromFile:
    """Extension of the worker (`--worker-extension-cls`), called through `/collective_rpc`."""

    model_runner: Any

    def reload_from_file(self, path: str) -> None:
        cpu_engine.reload_weights(self.model_runner, load_file(path).items())
