"""`trl-r3 check`: load a model, attach, and try replay on it.

Legend: B batch, T tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..records.metrics import changed_layers
from ..routers.router_replay import RouterReplay
from ..routers.self_check import UnsupportedRouterError
from .arguments import parse_device, parse_dtype
from .models import LoadedModel, adapter_base, load_config, load_model, refuse_dense_model
from .quantization import quantization_note
from .twin import HIDDEN_SIZE, VOCABULARY, narrow_twin, one_thread

TOKENS = (8, 4)  # batch, length of what is scored; short, for a collapsed router may repeat itself


def main(name: str, dtype: str, device: str, as_json: bool, trust_remote_code: bool = False) -> int:
    """
    Check a model and print what was found.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, a local folder, or that of a LoRA adapter. Its weights are used where they are
            on this machine, else a narrow twin of its config.
        dtype (`str`):
            `"auto"`, or the name of a torch dtype.
        device (`str`):
            Device to load it on.
        as_json (`bool`):
            Whether to print JSON instead of a table.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the checkpoint is run.

    Returns:
        `int`: Exit status: 0 if replay works, 1 if it does not.

    Raises:
        [`BadInput`]: If there is no such model, or if it is dense.
    """
    with redirect_stdout(sys.stderr):  # libraries talk; JSON stays alone
        loaded = load_weights(name, dtype, device, trust_remote_code)
        if loaded is not None:
            checked = _try_replay(loaded)
        else:
            with one_thread():
                checked = _try_replay(load_twin(name, dtype, device, trust_remote_code))
    if checked is None:
        return 1
    if as_json:
        print(json.dumps(checked.as_dict(), indent=1))
    else:
        _show(checked)
    if checked.failed:
        print(f"replay of {' and '.join(checked.failed)} does not do what it should, see above.", file=sys.stderr)
    return 1 if checked.failed else 0


@dataclass
class Checked:
    """
    What a check found.

    Args:
        architecture, origin (`str`):
            Of which class the model is, and which weights.
        facts (`dict[str, Any]`):
            About its routing, by the names of the table.
        findings (`dict[str, tuple[bool, str]]`):
            Of each record that was replayed: whether it passed, and what was seen.
        quantization (`str`, *optional*):
            How its weights are stored.
    """

    architecture: str
    origin: str
    facts: dict[str, Any]
    findings: dict[str, tuple[bool, str]]
    quantization: str | None

    @property
    def failed(self) -> list[str]:
        """The records whose replay does not do what it should."""
        return [what for what, (passed, _) in self.findings.items() if not passed]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [{"what": what, "passed": passed, "seen": seen} for what, (passed, seen) in self.findings.items()]
        own = {name: value for name, value in vars(self).items() if name not in ("facts", "findings")}
        return {"passed": not self.failed, **own, **self.facts, "findings": findings}


def _try_replay(loaded: LoadedModel) -> Checked | None:
    """Attach and replay; nothing where the model cannot be attached to or does not run, which is told."""
    model = loaded.model
    try:
        replay = RouterReplay(model, padding="auto")
    except (UnsupportedRouterError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return None
    try:
        findings = {"own record": check_own(model, replay), "foreign record": check_foreign(model, replay)}
        facts = _facts(replay)
    except RuntimeError as error:  # of a dtype that its kernels lack, or of a device that is full
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return None
    finally:
        replay.remove()
    return Checked(type(model).__name__, loaded.origin, facts, findings, loaded.quantization)


def load_weights(name: str, dtype: str, device: str, trust_remote_code: bool) -> LoadedModel | None:
    """The model with its weights, where they are on this machine."""
    folder = Path(name)
    if folder.exists() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return None
    base = adapter_base(name) if folder.exists() else None
    is_here = folder.exists() and (base is None or Path(base).exists())  # what is not, is not downloaded
    try:
        return load_model(name, dtype, device, downloads=is_here, trust_remote_code=trust_remote_code)
    except OSError:  # an id whose weights were not downloaded
        return None


def load_twin(name: str, dtype: str, device: str, trust_remote_code: bool) -> LoadedModel:
    """A narrow twin of the config of a model."""
    config = load_config(adapter_base(name) or name, trust_remote_code)
    twin = narrow_twin(config, name, trust_remote_code)
    refuse_dense_model(twin)
    twin = twin.to(parse_device(device), dtype=None if dtype == "auto" else parse_dtype(dtype))
    widths = f"hidden size {HIDDEN_SIZE}, vocabulary {VOCABULARY}, random weights"
    note = quantization_note(config)
    origin = f"a narrow twin of the config of {name} ({widths}): its weights are not on this machine"
    return LoadedModel(twin, origin, quantization=note)


def check_own(model: Any, replay: RouterReplay) -> tuple[bool, str]:
    """Whether replaying a forward's own record gives its logits, bit for bit."""
    ids = _tokens(model)
    with torch.no_grad():
        with replay.record() as recorded:
            logits = model(input_ids=ids, use_cache=False).logits
        with replay.replay(recorded.routed_experts):
            replayed = model(input_ids=ids, use_cache=False).logits
    differing = int((logits != replayed).sum())
    return differing == 0, f"{differing} of {logits.numel()} logits differ"


def check_foreign(model: Any, replay: RouterReplay) -> tuple[bool, str]:
    """Whether a record that the model would not have selected changes its logits, and is not its live selection."""
    ids = _tokens(model)
    with torch.no_grad():
        with replay.record() as recorded:
            logits = model(input_ids=ids, use_cache=False).logits
        own_BTLK = recorded.routed_experts
        foreign_BTLK = (own_BTLK.long() + 1) % replay.num_experts
        with replay.replay(foreign_BTLK) as stats:
            replayed = model(input_ids=ids, use_cache=False).logits
    expected = int(changed_layers(own_BTLK[:, :, :1], foreign_BTLK[:, :, :1]).sum())
    changed = int((logits != replayed).any(-1).sum())
    return (
        changed == ids.numel() and int(stats.changed_routers) >= expected,
        f"{changed} of {ids.numel()} tokens get other logits",
    )


def _tokens(model: Any) -> Tensor:
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, TOKENS, generator=generator)
    return ids.to(embedding.weight.device)


def _facts(replay: RouterReplay) -> dict[str, Any]:
    layout = replay.layout
    return {
        "routers": sorted({type(router.module).__name__ for router in replay.routers}),
        "decoder_layers": replay.num_decoder_layers,
        "moe_layers": list(replay.moe_layers),
        "num_experts": replay.num_experts,
        "top_k": replay.top_k,
        "bytes_per_token": len(replay.moe_layers) * replay.top_k * layout.storage_dtype.itemsize,
        "padding": str(replay.padding),
    }


def _show(checked: Checked) -> None:
    """Print the table, and what it means."""
    facts, moe_layers = checked.facts, checked.facts["moe_layers"]
    dense = sorted(set(range(facts["decoder_layers"])) - set(moe_layers))
    table = Table(title=checked.architecture, show_header=False)
    table.add_row("routers", ", ".join(facts["routers"]))
    table.add_row("decoder layers", str(facts["decoder_layers"]))
    table.add_row("MoE layers", f"{len(moe_layers)}: {_ranges(moe_layers)}")
    table.add_row("dense layers", f"{len(dense)}: {_ranges(dense)}" if dense else "0")
    table.add_row("experts (E)", str(facts["num_experts"]))
    table.add_row("experts a token (K)", str(facts["top_k"]))
    table.add_row("stored bytes a token", str(facts["bytes_per_token"]))
    table.add_row("padding, if it may be skipped", facts["padding"])
    for what, (passed, seen) in checked.findings.items():
        table.add_row(what, f"{'passes' if passed else 'FAILS'}: {seen}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"Checked on {checked.origin}.", markup=False)
    if checked.quantization is not None:
        console.print(checked.quantization, markup=False)
    if not checked.failed:
        console.print("Routing replay works on this model.")


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> '1-3, 5'."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)
