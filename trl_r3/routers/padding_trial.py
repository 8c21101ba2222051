"""What skips padding is held against a padded batch first: logits and gradients of the very model.

Legend: B batch, T tokens of a padded sequence, N real tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._compat import forget_forwards, only_its_engine_goes_back, shard_again
from .discovery import is_experts
from .probe import embedding_of, input_device
from .self_check import evaluating

if TYPE_CHECKING:
    from .router_replay import RouterReplay
    from .watchers import Watchers

_LENGTHS = ((3, 4, 6), (0, 11, 2), (1, 8, 4))  # padding, real tokens, padding: no column in front is one of padding
_MASK = tuple((0,) * before + (1,) * real + (0,) * after for before, real, after in _LENGTHS)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest; coarser types round at 2^-8
_COARSE = 5e-2

Values = dict[str, list[Tensor | None]]  # by what they are of; one scale each


class PaddingTrial:
    """
    Sequences of unequal length, padded on both sides, through experts of nobody: what a forward and a backward give,
    padded and then otherwise.

    Compared are the logits of real tokens, and the gradients of the hidden states that enter the first layer, of the
    first weights that are trained, and of the experts of the first MoE layer. Under ZeRO-3 only logits are.

    Args:
        model (`torch.nn.Module`):
            The model, attached.
        replay ([`RouterReplay`]):
            Its handle.
        watchers ([`Watchers`]):
            Of its decoder: some come with a forward and go with it.
    """

    def __init__(self, model: nn.Module, replay: RouterReplay, watchers: Watchers):
        self.model, self.replay, self.watchers = model, replay, watchers
        layout, device = replay.layout, input_device(model)
        self._mask_BT = torch.tensor(_MASK, device=device)
        vocab = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        self._ids_BT = (torch.arange(self._mask_BT.numel(), device=device).view_as(self._mask_BT) * 7 + 3) % vocab
        generator = torch.Generator().manual_seed(0)  # the global one belongs to the user
        size = (*self._mask_BT.shape, len(layout.moe_layers), layout.num_experts)
        scores = torch.rand(size, generator=generator, device="cpu")
        self._record_BTLK = scores.argsort(-1)[..., : layout.top_k]
        self._expected: Values = {}
        self._tolerance = 0.0
        self._watched_by: str | None = None

    def pad(self) -> str | None:
        """Run it padded. The error that it raised, or the hook that watched it, if any."""
        found = self._try("padded")
        if isinstance(found, str):
            return found
        self._expected = found
        return self._watched_by

    def differs(self) -> str | None:
        """Run it as the model is by then. What was raised, or differs from the padded run by more than rounding."""
        found = self._try("packed")
        if isinstance(found, str):
            return found
        for name, expected in self._expected.items():
            difference, allowed = _distance(found.get(name, []), expected), self._tolerance * _largest(expected)
            if not difference <= allowed:
                return f"packed and padded {name} differ (by {difference:.2g}, where {allowed:.2g} is rounding)"
        if _reaches_first(found) and not _reaches_first(self._expected):
            return "tokens of a packed sequence reach the logits of another"
        return None

    def _try(self, how: str) -> Values | str:
        try:
            return self._run()
        except Exception as error:  # noqa: BLE001
            # whatever it is, a padded forward does without
            return f"a {how} forward or backward raises {type(error).__name__} ({str(error)[:200]})"
        finally:
            shard_again(self.model)
            forget_forwards(self.model)

    def _run(self) -> Values:
        goes_back = not only_its_engine_goes_back(self.model)
        with evaluating(self.model), torch.set_grad_enabled(goes_back), self._leaves() as leaves:
            with self.replay.replay(self._record_BTLK):
                logits = self.model(input_ids=self._ids_BT, attention_mask=self._mask_BT, use_cache=False).logits
            logits_NV = logits[self._mask_BT.bool().to(logits.device)]
            values: Values = {"logits": [logits_NV.detach()]}
            return values | self._gradients(logits_NV, leaves) if goes_back else values

    def _gradients(self, logits_NV: Tensor, leaves: dict[str, list[Tensor]]) -> Values:
        """Of a loss that every logit counts in, but for those of the first sequence."""
        weights = torch.arange(logits_NV.numel(), device=logits_NV.device).view_as(logits_NV) % 7 - 3
        weights[: _LENGTHS[0][1]] = 0
        loss = (logits_NV.float() * weights).sum() / weights.numel() ** 0.5
        tensors = [tensor for each in leaves.values() for tensor in each]
        gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
        values: Values = {f"gradients of {name}": [next(gradients) for _ in each] for name, each in leaves.items()}
        hidden = values[f"gradients of {_HIDDEN}"]
        hidden[:] = [None if grad is None else self._of_real_tokens(grad.flatten(0, 1)) for grad in hidden]
        return values

    def _of_real_tokens(self, rows: Tensor) -> Tensor:
        real_BT = self._mask_BT.bool()
        if len(rows) == int(real_BT.sum()):
            return rows
        width = len(rows) // len(real_BT)  # columns are cut off behind
        return rows[real_BT[:, :width].flatten().to(rows.device)]

    @contextmanager
    def _leaves(self) -> Iterator[dict[str, list[Tensor]]]:
        """What gradients are asked of. Weights are those that a module has in its forward, whoever gathers them."""
        leaves: dict[str, list[Tensor]] = {_HIDDEN: []}

        def lead(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            on, dtype = output.device.type, output.dtype
            if torch.is_autocast_enabled(on):
                dtype = torch.get_autocast_dtype(on)
            self._tolerance = _TOLERANCE.get(dtype, _COARSE)
            self._watched_by = self.watchers.find()
            leaves[_HIDDEN].append(output.detach().requires_grad_())
            return leaves[_HIDDEN][-1].clone()  # some models scale it in place

        def enter(name: str) -> Callable:
            def hook(module: nn.Module, args: Any) -> None:
                known = {id(leaf) for each in leaves.values() for leaf in each}
                found: list[Tensor] = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
                if found:  # adapters of experts run none of the modules that hold their weights
                    leaves[name] = found

            return hook

        embedding = embedding_of(self.model)
        handles = [embedding.register_forward_hook(lead)]
        handles += [module.register_forward_pre_hook(enter(name)) for name, module in self._watched(embedding)]
        try:
            yield leaves
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self, embedding: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The first module that has weights to train, and those of the experts of the first MoE layer."""
        modules = dict(self.replay.stack.named_modules())
        trained = {
            name: module
            for name, module in modules.items()
            if module is not embedding and any(p.requires_grad for p in module.parameters(recurse=False))
        }
        experts = next((name for name in modules if is_experts(name)), "experts")
        inside = [name for name in modules if f"{name}.".startswith(f"{experts}.")]
        outside = [name for name in trained if name not in inside]
        for name in [*outside[:1], *inside]:
            yield name, modules[name]


_HIDDEN = "the first hidden states"


def _reaches_first(values: Values) -> bool:
    """
    Whether the loss, of other sequences, has a gradient at the tokens of the first: what one tells another may be less
    than rounding while weights are new, and more once they learn, but without a way it is exactly 0 in any dtype.
    """
    of_hidden = values.get(f"gradients of {_HIDDEN}", [])
    return any(grad is not None and bool(grad[: _LENGTHS[0][1]].any()) for grad in of_hidden)


def _largest(values: list[Tensor | None]) -> float:
    ends = [torch.stack(torch.aminmax(value)) for value in values if value is not None]  # in one pass each
    return float(torch.cat([each.double().cpu() for each in ends]).abs().max()) if ends else 0.0


def _distance(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest difference; of what has no gradient, infinite unless both have none."""
    if [value is None for value in found] != [value is None for value in expected]:
        return float("inf")
    return _largest([a - b for a, b in zip(found, expected, strict=True) if a is not None and b is not None])
