"""Make the model that `trl-r3 demo` starts from: `python -m benchmarks.decides.demo_start`."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from trl_r3.cli.demo.noisy_runs import START

from .cells import Sizes
from .grid import DECIDED
from .run import FOLDER
from .training import start


def main() -> None:
    """Warm up the first seed and write its weights in half precision."""
    torch.set_num_threads(1)
    model = start(DECIDED, Sizes(), 0, FOLDER / "starts")
    save_file({name: weights.half() for name, weights in model.state_dict().items()}, START)
    print(f"{START}: {START.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
