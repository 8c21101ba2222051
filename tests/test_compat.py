"""Quirks of third parties: what is swapped is given back, and what they tell by private names is told rightly."""

from __future__ import annotations

import inspect
import re
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_zoo import build_tiny
from torch import nn

import trl_r3
from trl_r3._compat import (
    checkpoint_functions,
    drops_out,
    edits,
    in_backward,
    set_checkpointing,
    swapped,
    warn,
)


def test_warnings_are_at_the_line_of_the_user():
    """Whatever lies between; and none of the package goes another way."""
    between = types.ModuleType("transformers.between")
    exec("def call(function, *args):\n    function(*args)", vars(between))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):  # as Python does for a line, it is said once
            between.call(between.call, warn, "look here")
    (told,) = caught
    here = inspect.getsourcelines(test_warnings_are_at_the_line_of_the_user)[1]
    assert (told.filename, told.category) == (__file__, RuntimeWarning) and here < told.lineno < here + 10
    package = Path(trl_r3.__file__).parent
    others = [path.name for path in package.rglob("*.py") if re.search(r"warnings\.warn\b", path.read_text())]
    assert others == ["_compat.py"]


class Owner:
    value = "of the class"


@pytest.mark.parametrize("own", [{}, {"value": "of the instance"}], ids=["class", "instance"])
@pytest.mark.parametrize("fails", [False, True])
def test_swapped_attributes_are_given_back(own, fails):
    """One of the class is seen again, and not copied to the instance."""
    owner = Owner()
    vars(owner).update(own)
    before = owner.value

    def run():
        with swapped(owner, "value", "inside"):
            assert owner.value == "inside"
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError, match="stop"):
            run()
    else:
        run()
    assert vars(owner) == own and owner.value == before


def test_swapped_names_of_a_class_and_of_a_module_are_given_back():
    for place in (Owner, SimpleNamespace(value=1)):
        before = place.value
        with swapped(place, "value", 2):
            assert place.value == 2
        assert place.value == before


def test_backward_is_told_apart():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(in_backward()))
    assert not in_backward()
    y.sum().backward()
    assert seen == [True] and not in_backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_on_and_off(ids, use_reentrant):
    """By how often a layer runs: once more in backward while it is on."""
    model, runs = build_tiny("mixtral").train(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: runs.append(in_backward()))
    for kwargs, expected in (({"use_reentrant": use_reentrant}, [False, True]), (None, [False])):
        set_checkpointing(model, kwargs)
        if kwargs is not None:
            bound = [function for _, _, function in checkpoint_functions(model.modules())]
            assert bound and all(function.keywords == kwargs for function in bound)
        runs.clear()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert runs == expected


def test_changes_in_place_are_counted():
    whole = torch.zeros(3, 4)
    part, before = whole[1:], edits(whole)
    assert edits(part) == before
    part[0, 0] = 1
    assert edits(whole) == edits(part) > before
    assert edits(whole.clone()) == 0


def test_dropouts_of_any_dimension():
    assert all(drops_out(each()) for each in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout))
    assert not drops_out(nn.Identity())
