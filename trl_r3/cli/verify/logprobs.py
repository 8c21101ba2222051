"""Whether the log-probabilities of a rollout are those of the distribution that it was drawn from, as training scores.

Legend: B samples, C completion tokens.
"""

from __future__ import annotations

from torch import Tensor

from .findings import Finding
from .sampling import PROCESSED, VerifiedRollout

_NAME = "log-probabilities"
_CLEARLY = 0.5  # another candidate has to fit with at most this share of the error
_LIKELIER = 7.0  # by so much (in nats) the draws have to be at one temperature: mistaken once in e^7 = 1,100 times

_TEMPERATURE_REMEDY = "set the same temperature in the engine's sampling and in the trainer"
_RAW_REMEDY = 'start the engine with `--logprobs-mode processed_logprobs` (`LLM(logprobs_mode="processed_logprobs")`)'


def candidates(temperature: float) -> tuple[float, ...]:
    """The temperature of a rollout, and what a wrong side would score with: none, or it twice."""
    return (temperature, 1.0, temperature**2) if temperature != 1.0 else (1.0,)


def logprobs_finding(
    rollout: VerifiedRollout, scores: dict[float, Tensor], sampled: Tensor | None, mask: Tensor
) -> Finding:
    """
    Hold the log-probabilities of a rollout against what training would say.

    Args:
        rollout ([`VerifiedRollout`]):
            The rollout.
        scores (`dict[float, torch.Tensor]` of shape `(B, C)` each):
            Of a replayed forward, at each of [`candidates`].
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
    mask, own = mask & ~sampled.isnan(), rollout.temperature
    errors = {each: _error(values, sampled, mask) for each, values in scores.items()}
    moved = _moved_error(scores[own], sampled, mask)
    drawn = _drawn_at(scores, mask)
    seen = f"mean distance {errors[own]:.1e} at temperature {own:g}, drawn at {_text(drawn)}"
    if rollout.logprobs_mode is not None:
        seen += f", the engine says {rollout.logprobs_mode}"
    if errors[own] != errors[own]:
        return Finding(_NAME, "not judged", f"{seen}: the training forward gives no numbers")
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
            f"temperature on one side: tokens were drawn at {drawn:g}, but scored at {own:g}; or the engine truncates "
            "the distribution",
            f"{_TEMPERATURE_REMEDY}, and neither top-p, top-k nor min-p",
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


def _drawn_at(scores: dict[float, Tensor], mask: Tensor) -> float | None:
    """The temperature that the tokens were drawn at, among those that were scored; `None` where they cannot tell."""
    likelihoods = {each: float(values[mask].double().sum()) for each, values in scores.items()}
    best = max(likelihoods, key=likelihoods.__getitem__)
    others = [value for each, value in likelihoods.items() if each != best]
    return best if others and likelihoods[best] - max(others) >= _LIKELIER else None


def _text(drawn: float | None) -> str:
    return "a temperature that these tokens do not tell" if drawn is None else f"{drawn:g}"
