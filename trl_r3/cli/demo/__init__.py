"""`trl-r3 demo`: GRPO on a small mixture of experts, without replay and with it, on a CPU in minutes."""

from __future__ import annotations

import warnings
from pathlib import Path

from rich.console import Console

LAYOUT = {
    "table.md": "the table above",
    "plot.png": "mismatch and reward by step",
    "log.json": "settings, versions, every measurement and everything TRL logged",
    "start/": "the model that both runs start from (try `trl-r3 verify` on it)",
}


def main(model: str, smoke: bool, output: Path) -> None:
    """
    Run the demo, print its table, and write it to a folder.

    Args:
        model (`str`):
            `"qwen3"` or `"mixtral"`.
        smoke (`bool`):
            Whether to do a few steps only, which shows that everything runs and trains nothing worth reading.
        output (`Path`):
            Folder, made if it does not exist.
    """
    from transformers.utils.logging import disable_progress_bar

    from . import low_precision, results, run, settings  # TRL takes seconds to import

    disable_progress_bar()  # ours is one bar for the whole run
    console = Console()
    size = settings.SMOKE if smoke else settings.FULL
    output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"Two GRPO runs of a small {model} mixture of experts that learns to add, on the CPU.", soft_wrap=True
    )
    console.print(f"{low_precision.GAP} Between the runs only `use_routing_replay` differs.", soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that TRL still uses
        result = run.run_demo(model, size, output, console)
    results.write(result, model, size, output)
    console.print(results.rich_table(result))
    console.print(
        f"{result.parameters / 1e6:.1f} M parameters, {size.grpo_steps} steps a run, {result.seconds:.0f} s in all; "
        f"mismatch: mean of every {size.measure_every} steps, taken before the update; one seed.",
        soft_wrap=True,
    )
    console.print(f"Written to {output.resolve()}:")
    for name, what in LAYOUT.items():
        if (output / name).exists():
            console.print(f"  {name:<10} {what}", markup=False)
