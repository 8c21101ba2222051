"""Small models and batches that many tests share."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from model_zoo import build_tiny

sys.path.append(str(Path(__file__).parents[1]))  # `benchmarks`, last: the package is tested as it was installed
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints what it chose itself, wherever it is first imported
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)  # Accelerate reads two a dozen times a run
transformers.logging.set_verbosity_error()


def pytest_collection_finish():
    """
    Leave what has been imported out of later collections: each training ends with one (Accelerate's `free_memory`),
    and looking through two million objects of libraries took a quarter of its time.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Tell what came of the model types that the page of model types does not list for the installed Transformers."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    found = sorted(text for report in calls for name, text in report.user_properties if name == "model type")
    if found:
        terminalreporter.section(f"model types of Transformers {transformers.__version__} that are tried only")
        for text in found:
            terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def qwen():
    """Qwen3-MoE with four layers, of which 0 and 2 are dense: 2 of 8 experts."""
    return build_tiny("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 2], norm_topk_prob=True)


@pytest.fixture
def mixtral():
    """Mixtral with three layers, all with experts: 2 of 8."""
    return build_tiny("mixtral")


@pytest.fixture(params=["qwen", "mixtral"])
def model(request):
    """Either of them."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def ids():
    """(2, 12) token ids without padding."""
    return torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def padded():
    """(3, 14) token ids and their mask, padded on the left by 0, 4 and 7."""
    ids = torch.randint(1, 128, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for sample, width in enumerate((0, 4, 7)):
        ids[sample, :width] = mask[sample, :width] = 0
    return ids, mask
