"""Scores of a prediction over kept tokens, by a softmax over -inf, and kept sets that nobody sampled."""

import torch

VOCAB, HIDDEN = 97, 24


def oracle(logits, token, kept):
    """Log-probability and entropy of one prediction: -inf outside the kept set, in the dtype of `logits`."""
    allowed = torch.full_like(logits, -torch.inf)
    allowed[list(kept) or slice(None)] = 0.0
    p = (logits + allowed).softmax(0)
    among = p[list(kept) or slice(None)]
    return p[token].log(), -(among * among.log()).sum()


def random_rows(generator, targets, vocabulary):
    """A kept set a prediction, from one id to all but one; every seventh is unrestricted."""
    rows = []
    for i, token in enumerate(targets.tolist()):
        size = int(torch.randint(1, vocabulary, (), generator=generator))
        others = [v for v in torch.randperm(vocabulary, generator=generator).tolist() if v != token]
        rows.append([] if i % 7 == 0 else sorted([token, *others[: size - 1]]))
    return rows
