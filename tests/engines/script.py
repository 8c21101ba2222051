"""A conversation that a model is made to follow by the bias of its tokens, and the tools that it calls."""

from __future__ import annotations

from engines.tiny_chat import VOCAB

# What the model says after what, one token after another. A prompt ends in "<word> <eos> <assistant>".
SCRIPT = [
    "stop <eos> <assistant> t40 t41 <eos>",
    "once <eos> <assistant> t42 <look> <eos>",
    "twice <eos> <assistant> <again> <eos>",
    "wait <eos> <assistant> t45 <look> <eos>",
    "moon <eos> <assistant> t43 t44 <eos>",
    "cut <eos> <assistant> t46 <deep> <eos>",
    "down <eos> <assistant> t47 t47",  # and t47 again, until there is no room
    "full <eos> <assistant> t60 t61 t62 t63 t64 t65 t66 t67 t68 t69 <deep> <eos>",
    "back <eos> <assistant> t48 t49 t50 t51 <big> <eos>",
]
SAID = {  # the completions that follow, tool results included
    "stop": "t40 t41 <eos>",
    "once": "t42 <look> <eos> <tool> sun moon <eos> <assistant> t43 t44 <eos>",
    "twice": "<again> <eos> <tool> wait <eos> <assistant> t45 <look> <eos> <tool> sun moon <eos> <assistant> t43 t44",
    "cut": "t46 <deep> <eos> <tool> down <eos> <assistant>" + " t47" * 9,
    "full": "t60 t61 t62 t63 t64 t65 t66 t67 t68 t69 <deep> <eos> <tool> down <eos> <assistant>",  # and no token more
    "back": "t48 t49 t50 t51 <big> <eos>",  # the result of the tool is rolled back
}


def look() -> str:
    """Look up."""
    return "sun moon"


def again() -> str:
    """Look again."""
    return "wait"


def deep() -> str:
    """Look down."""
    return "down"


def big() -> str:
    """Look at everything."""
    return "sun " * 30


def ids_of(text: str) -> list[int]:
    return [VOCAB[word] for word in text.split()]


def scripted() -> dict:
    """`generation_kwargs` that make the model follow the script."""
    bias = {}
    for line in SCRIPT:
        ids = ids_of(line)
        context = 3  # tokens that tell where in the script we are
        for i in range(context, len(ids)):
            start = 0 if i == context else i - 1
            bias[tuple(ids[start : i + 1])] = 1e4 if i > context else 1e6
    return {"sequence_bias": [[list(tokens), value] for tokens, value in bias.items()]}
