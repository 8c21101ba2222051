"""Whether the log-probabilities of a rollout are those of the distribution that it was drawn from, as training scores.

Legend: B samples, C completion tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .findings import Finding
from .rollout import PROCESSED, VerifiedRollout
from .training import Scores

_NAME = "log-probabilities"
_CLEARLY = 0.5  # another candidate has to fit with at most this share of the error
_ERRORS = 5.0  # standard errors by which draws are told apart

_TEMPERATURE_REMEDY = "set the same temperature in the engine's sampling and in the trainer"
_RAW_REMEDY = 'start the engine with `--logprobs-mode processed_logprobs` (`LLM(logprobs_mode="processed_logprobs")`)'


def other_temperatures(temperature: float) -> tuple[float, ...]:
    """What wrong sides would score with: no temperature, or it twice."""
    return (1.0, temperature**2) if temperature != 1.0 else ()


def logprobs_finding(rollout: VerifiedRollout, scores: Scores, sampled: Tensor | None, mask: Tensor) -> Finding:
    """
    Hold the log-probabilities of a rollout against what training would say.

    Args:
        rollout ([`VerifiedRollout`]):
            The rollout.
        scores ([`Scores`]):
            Of a replayed forward.
        sampled (`torch.Tensor` of shape `(B, C)`, *optional*):
            Log-probabilities of the rollout.
        mask (`torch.BoolTensor` of shape `(B, C)`):
            Tokens that count.

    Returns:
        [`Finding`].
    """
    if sampled is None or bool(sampled[mask].isnan().all()):
        return Finding(
            _NAME,
            "wrong",
            "the engine returned none",
            "log-probabilities are not asked for, or are withheld",
            "start the server with `--max-logprobs -1 --logprobs-mode processed_logprobs`",
        )
    mask = mask & ~sampled.isnan()
    own = rollout.temperature
    errors = {each: _error(scores.by_temperature[each], sampled, mask) for each in scores.by_temperature}
    moved = _moved_error(scores.by_temperature[own], sampled, mask)
    drawn = _drawn_at(scores, own, mask)
    seen = f"mean distance {errors[own]:.1e} at temperature {own:g}, drawn at {_text(drawn)}"
    if rollout.logprobs_mode is not None:
        seen += f", the engine says {rollout.logprobs_mode}"
    best = min(errors, key=errors.__getitem__)
    if moved < _CLEARLY * errors[own] and moved < errors[best]:
        return Finding(
            _NAME,
            "wrong",
            f"{seen}; moved by one token the distance is {moved:.1e}",
            "log-probabilities are shifted by one token",
            "the value at position p is that of completion token p",
        )
    if best != own and errors[best] < _CLEARLY * errors[own]:
        seen += f"; at temperature {best:g} the distance is {errors[best]:.1e}"
        return Finding(_NAME, "wrong", seen, *_cause(best, own, drawn))
    if drawn is not None and drawn != own and rollout.untruncated:
        return Finding(
            _NAME,
            "wrong",
            seen,
            f"temperature on one side: tokens were drawn at {drawn:g}, but scored at {own:g}",
            _TEMPERATURE_REMEDY,
        )
    if rollout.logprobs_mode not in (None, PROCESSED):
        return Finding(_NAME, "wrong", seen, "raw log-probabilities: they do not know the temperature", _RAW_REMEDY)
    return Finding(_NAME, "right", seen)


def _cause(best: float, own: float, drawn: float | None) -> tuple[str, str]:
    if best != 1.0:
        return f"the temperature {own:g} was applied twice", _TEMPERATURE_REMEDY
    if drawn == own:
        return (
            f"raw log-probabilities: tokens were drawn at temperature {own:g}, but scored without it",
            _RAW_REMEDY,
        )
    if drawn == 1.0:
        return (
            f"temperature on one side: the engine drew and scored at 1, training scores at {own:g}",
            _TEMPERATURE_REMEDY,
        )
    return (
        f"raw log-probabilities, or temperature on one side: they are those of temperature 1 instead of {own:g}",
        f"{_RAW_REMEDY}; or {_TEMPERATURE_REMEDY}",
    )


def _error(train: Tensor, sampled: Tensor, mask: Tensor) -> float:
    return float((train - sampled)[mask].abs().mean())


def _moved_error(train: Tensor, sampled: Tensor, mask: Tensor) -> float:
    both = mask[:, 1:] & mask[:, :-1]
    later, earlier = _error(train[:, :-1], sampled[:, 1:], both), _error(train[:, 1:], sampled[:, :-1], both)
    return min(later, earlier)


def _drawn_at(scores: Scores, own: float, mask: Tensor) -> float | None:
    """The temperature that the tokens were drawn at, among those that were scored; `None` where they cannot tell."""
    observed, count = scores.by_temperature[own][mask].double(), int(mask.sum())
    fits, means = [], []
    for each, (mean, variance) in scores.surprise.items():
        error = variance[mask].double().sum().clamp_min(0).sqrt() / count
        expected = mean[mask].double().mean()
        means.append((expected, error))
        if abs(observed.mean() - expected) <= _ERRORS * error:
            fits.append(each)
    (expected, error), others = means[0], means[1:]
    tells = all(abs(other - expected) > _ERRORS * torch.maximum(error, spread) for other, spread in others)
    return fits[0] if tells and fits else None


def _text(drawn: float | None) -> str:
    return "a temperature that these tokens do not tell" if drawn is None else f"{drawn:g}"
