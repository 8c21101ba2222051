"""`trl-r3 demo`: GRPO on a small mixture of experts, without replay and with it, on a CPU in minutes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

LAYOUT = {
    "table.md": "the table above",
    "plot.png": "reward and mismatch by step",
    "log.json": "settings, versions, every measurement and everything TRL logged",
    "start/": "the model that all runs start from",
    "traces/": "rollouts of a run with replay",
}


def main(mismatch: str, model: str, smoke: bool, output: Path) -> None:
    """
    Run the demo, print its table, and write it to a folder.

    Args:
        mismatch (`str`):
            What the rollout differs in: `"noise"` on its router logits, or `"bf16"`.
        model (`str`):
            `"qwen3"`, or `"mixtral"` with `"bf16"`.
        smoke (`bool`):
            Whether to do a few steps only, which shows that everything runs and trains nothing worth reading.
        output (`Path`):
            Folder, made if it does not exist.
    """
    from transformers.utils.logging import disable_progress_bar  # seconds to import

    disable_progress_bar()  # ours is one bar for the whole run
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    _forget(output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that TRL still uses
        run = _noisy if mismatch == "noise" else _rounded
        run(model, smoke, output, console)
    console.print(f"Written to {output.resolve()}:")
    for name, what in LAYOUT.items():
        if (output / name).exists():
            console.print(f"  {name:<10} {what}", markup=False)
    trace = next(iter(sorted((output / "traces").glob("step-*"))), None)
    if trace is not None:
        console.print(f"Next: trl-r3 report {output}", soft_wrap=True)
        console.print(f"      trl-r3 verify {output / 'start'} --trace {trace}", soft_wrap=True)
        console.print(f"      trl-r3 verify {output / 'start'}", soft_wrap=True)


def _forget(output: Path) -> None:
    """Remove what another demo left that this one may not overwrite: traces of other steps or of another model."""
    from ...traces.trace_file import find_traces

    traces = output / "traces"
    if not (output / "log.json").is_file():  # of no demo
        return
    for path in (output / "trainer_state.json", *(find_traces(traces) if traces.is_dir() else ())):
        path.unlink(missing_ok=True)
    if traces.is_dir() and not any(traces.iterdir()):
        traces.rmdir()


def _noisy(model: str, smoke: bool, output: Path, console: Console) -> None:
    from . import noisy_results, noisy_runs

    settings = noisy_runs.SMOKE if smoke else noisy_runs.NoisySettings()
    console.print(
        f"A small mixture of experts learns to sort {noisy_runs.LENGTH} letters by GRPO, on the CPU: live and with "
        f"replay, {settings.seeds} run{'s' * (settings.seeds > 1)} of {settings.steps} steps each. Its rollouts "
        "select experts with noise; only `use_routing_replay` differs.",
        soft_wrap=True,
    )
    result = noisy_runs.run_noisy_demo(settings, output, console)
    noisy_results.write_noisy(result, settings, output)
    console.print(noisy_results.noisy_table(result))
    console.print(noisy_results.how_large(result, settings), soft_wrap=True)
    console.print(noisy_results.what_it_cost(result), f"{result.seconds:.0f} s in all.", soft_wrap=True)


def _rounded(model: str, smoke: bool, output: Path, console: Console) -> None:
    from . import low_precision, results, run, settings

    size = settings.SMOKE if smoke else settings.FULL
    console.print(
        f"Two GRPO runs of a small {model} mixture of experts that learns to add, on the CPU.", soft_wrap=True
    )
    console.print(f"{low_precision.GAP} Between the runs only `use_routing_replay` differs.", soft_wrap=True)
    result: Any = run.run_demo(model, size, output, console)
    results.write(result, model, size, output)
    console.print(results.rich_table(result))
    console.print(
        f"{result.parameters / 1e6:.1f} M parameters, {size.grpo_steps} steps a run, {result.seconds:.0f} s in all; "
        f"mismatch: mean of every {size.measure_every} steps, taken before the update; one seed, "
        f"so that rewards a few points apart say nothing. {results.what_steps_took(result)}",
        soft_wrap=True,
    )
