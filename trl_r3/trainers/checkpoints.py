"""The weights of a checkpoint that `Trainer` leaves out when it loads one into the model that trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .._compat import swapped


@contextmanager
def whole_checkpoint(trainer: Any, folder: Callable[[], str]) -> Iterator[None]:
    """
    Load a checkpoint as `from_pretrained` does where the trainer inside leaves weights of it out.

    Transformers saves experts one by one and trains them as one tensor. `from_pretrained` joins them; `Trainer`, when
    it resumes or loads its best checkpoint, warns of missing names and goes on with the experts that were there. What
    it loads by itself, such as adapters and checkpoints of a sharded run, is left to it.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        folder (`Callable`):
            Says which checkpoint it has loaded.

    Raises:
        `RuntimeError`: If `from_pretrained` does not find the weights in the checkpoint, either.
    """
    warn = trainer._issue_warnings_after_load
    results: list[Any] = []
    with swapped(trainer, "_issue_warnings_after_load", results.append):
        yield
    for result in results:
        model = trainer.accelerator.unwrap_model(trainer.model)
        left_out = _left_out(model, set(result.missing_keys)) if isinstance(model, PreTrainedModel) else []
        if not left_out:
            warn(result)
            continue
        _load(model, folder(), left_out)


def _left_out(model: PreTrainedModel, missing: Collection[str]) -> list[str]:
    """What has not been loaded by any of its names."""
    state = model.state_dict()
    loaded = {value.data_ptr() for name, value in state.items() if name not in missing}
    return [name for name, value in state.items() if name in missing and value.data_ptr() not in loaded]


def _load(model: PreTrainedModel, folder: str, left_out: list[str]) -> None:
    state = model.state_dict()
    floats = [state[name].dtype for name in left_out if state[name].is_floating_point()]
    widest = max(floats, key=lambda dtype: dtype.itemsize, default=None)  # of several, what is wider is rounded later
    loaded: Any = type(model).from_pretrained(folder, config=model.config, dtype=widest, output_loading_info=True)
    saved, about = loaded
    lost = [name for name in left_out if name in set(about["missing_keys"])]
    if lost:
        raise RuntimeError(
            f"{len(lost)} weights of the model are not in the checkpoint {folder}, the first is {lost[0]}: training "
            "would go on with those that are there now. Load a checkpoint of this model, or construct the trainer "
            "with the model that you mean and leave `resume_from_checkpoint` and `load_best_model_at_end` out."
        )
    weights = saved.state_dict()
    model.load_state_dict({name: weights[name] for name in left_out}, strict=False)
