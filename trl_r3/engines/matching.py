"""Which sample an entry of a turn continues, told by tokens alone: tool loops and rollout functions reorder them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..records.samples import BYTES_OF_TOKEN


def match_samples(
    prompts: Sequence[bytes],
    samples: Sequence[bytes],
    faults: Callable[[int, int], tuple[bool, ...]],
    in_order: bool,
) -> list[int]:
    """
    The sample that each entry of a turn continues, no two the same: the whole turn at the lowest price.

    Whatever begins with the prompt of an entry may be continued by it, and so may a sample that was cut before, which
    the prompt begins with. What speaks against a pair is weighed, the gravest first; in a turn of all samples, that
    the indices differ weighs least. Of what is still equal, the first entry takes the first sample.

    Args:
        prompts (sequence of `bytes`):
            Of the entries, by [`token_bytes`].
        samples (sequence of `bytes`):
            All tokens of each sample, likewise.
        faults (`Callable`):
            Given entry and sample, what speaks against the pair.
        in_order (`bool`):
            Whether the turn has all samples.

    Returns:
        list of `int`: By entry.

    Raises:
        `ValueError`: If an entry continues no sample that is left.
    """
    entries = len(prompts)
    shortest = min(map(len, prompts), default=0)
    alike: dict[bytes, list[int]] = {}  # samples by their beginning, so that not each is compared with each
    for sample, tokens in enumerate(samples):
        alike.setdefault(tokens[:shortest], []).append(sample)
    cut = [sample for sample, tokens in enumerate(samples) if len(tokens) < shortest]
    prices: list[dict[int, int]] = []  # by entry: sample, price
    for entry, prompt in enumerate(prompts):
        price: dict[int, int] = {}
        for sample in (*alike.get(prompt[:shortest], ()), *cut):
            if samples[sample].startswith(prompt) or prompt.startswith(samples[sample]):
                price[sample] = 0
                # no sum over the entries of what comes later outweighs one of what comes before
                for fault in (*faults(entry, sample), in_order and sample != entry):
                    price[sample] = price[sample] * (entries + 1) + fault
        prices.append(price)
    chosen = _cheapest(prices)
    for entry in range(entries):
        if entry not in chosen:
            others = f", but for {len(prices[entry])} that its other entries continue" if prices[entry] else ""
            length = len(prompts[entry]) // BYTES_OF_TOKEN
            raise ValueError(
                f"a turn was given a prompt of {length} tokens that is the beginning of none of "
                f"the {len(samples)} sequences{others}, so its routes belong to no sample. Do not re-tokenize between "
                "turns."
            )
    return [chosen[entry] for entry in range(entries)]


def _cheapest(prices: Sequence[dict[int, int]]) -> dict[int, int]:
    """
    Match as many entries as can be to different samples, at the lowest sum of prices.

    Entry by entry, along the cheapest path on which entries before it move on to another sample.
    """
    chosen: dict[int, int] = {}
    owner: dict[int, int] = {}
    for entry in range(len(prices)):
        paid: dict[int, int] = {}  # by sample that a path reaches
        via: dict[int, int] = {}  # the entry that would take it
        lowest = min(prices[entry].values(), default=0)
        paths = [(entry, 0)]
        for at, so_far in paths:  # grows
            for sample, price in prices[at].items():
                if sample not in paid or so_far + price < paid[sample]:
                    paid[sample], via[sample] = so_far + price, at
                    if sample in owner:
                        paths.append((owner[sample], paid[sample] - prices[owner[sample]][sample]))
            free = [sample for sample in paid if sample not in owner]
            if any(paid[sample] == lowest for sample in free):  # no path is cheaper than the entry alone
                break
        taken = min(free, key=lambda sample: (paid[sample], sample)) if free else None
        while taken is not None:
            mover = via[taken]
            left = chosen.get(mover)
            chosen[mover], owner[taken] = taken, mover
            taken = left
    return chosen
