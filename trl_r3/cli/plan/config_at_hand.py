"""The configs that come with the package, for when the Hub does not answer: Transformers tries for 40 seconds."""

from __future__ import annotations

import json
from pathlib import Path

from ..configs import is_cached

SHIPPED = Path(__file__).parent / "checkpoints"
TIMEOUT = 3.0  # seconds


def config_at_hand(name: str) -> str:
    """
    Where to read a config.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder.

    Returns:
        `str`: `name`, or a folder of the package that has the sizes of this checkpoint, where the Hub gives no config.
    """
    shipped = _shipped(name)
    return name if shipped is None or is_cached(name) or _is_given(name) else str(shipped)


def _shipped(name: str) -> Path | None:
    """The folder whose config says that its sizes are those of a checkpoint."""
    for path in sorted(SHIPPED.glob("*/config.json")):
        if json.loads(path.read_text())["_source"].startswith(f"Not the file of {name}, but "):
            return path.parent
    return None


def _is_given(name: str) -> bool:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT)  # without retries
    except Exception:  # noqa: BLE001
        return False  # no network, no access, or whatever else its client raises
    return True
