"""The heat map in the trackers that are installed, read back with their own readers."""

import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_traces import make_trace
from PIL import Image

from trl_r3 import RoutingReportCallback
from trl_r3.traces.report_callback import TAG, TAG_OF_LOAD
from trl_r3.traces.trace_file import save_trace


@pytest.fixture
def report(qwen3, train, gap, tmp_path):
    """Trains three steps with the callback, reporting to a tracker."""

    def run(tracker, **changes):
        return train(
            qwen3(),
            while_generating=gap["rounded"],
            callbacks=[RoutingReportCallback(every=2)],
            routing_replay_trace_dir=str(tmp_path / "traces"),
            report_to=[tracker],
            max_steps=3,
            **changes,
        )

    return run


def is_a_heat_map(image):
    """Whether there are many colours of it, and not one."""
    assert image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) > 200
    return len(np.unique(image.reshape(-1, 3), axis=0)) > 100


def test_tensorboard(report, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report("tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "runs" / "routing_replay"), size_guidance={"images": 0})
    events.Reload()
    for tag in (TAG, TAG_OF_LOAD):
        images = events.Images(tag)
        assert [image.step for image in images] == [2, 3]
        assert is_a_heat_map(np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB")))


def test_wandb(report, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    report("wandb")
    pngs = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert len(pngs) == 4
    assert is_a_heat_map(np.asarray(Image.open(pngs[-1]).convert("RGB")))


def test_trackio(report, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    import trackio

    for module in (trackio.utils, trackio.sqlite_storage, trackio.media.utils):
        for name, folder in (("TRACKIO_DIR", "trackio"), ("MEDIA_DIR", "trackio/media")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / folder)
    report("trackio", trackio_space_id=None, project="test")
    pngs = sorted((tmp_path / "trackio").rglob("*.png"))
    assert len(pngs) == 4
    assert is_a_heat_map(np.asarray(Image.open(pngs[-1]).convert("RGB")))


def test_an_image_shows_every_step_so_far(report, monkeypatch, tmp_path):
    """Without a tracker: what is drawn, as it would be logged."""
    from trl_r3.traces import report_callback

    drawn = []

    def note(args, tag, image, step):
        if tag == TAG:
            drawn.append((step, image))
        else:
            assert tag == TAG_OF_LOAD and is_a_heat_map(image)

    monkeypatch.setitem(report_callback._TRACKERS, "nowhere", note)
    callback = RoutingReportCallback(every=2)
    args = type("Args", (), {"routing_replay_trace_dir": str(tmp_path / "traces"), "report_to": ["nowhere"]})
    report("none")
    state = type("State", (), {"is_world_process_zero": True, "max_steps": 3})
    for step in range(4):
        state.global_step = step
        callback.on_step_end(args, state, None)
    assert [step for step, _ in drawn] == [2, 3]
    assert all(is_a_heat_map(image) for _, image in drawn)
    assert not np.array_equal(drawn[0][1], drawn[1][1])
    (tmp_path / "traces" / "step-00000001-rank-00001.safetensors").write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="left out of the pictures of routers: .* cannot be read"):
        callback.on_step_end(args, state, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_step_end(args, state, None)  # told once
    assert np.array_equal(drawn[1][1], drawn[-1][1])


def test_a_run_without_traces_is_refused(qwen3, train):
    with pytest.raises(ValueError, match="draws the traces of the run, but it writes none. Set `routing_replay_trace"):
        train(qwen3(), callbacks=[RoutingReportCallback()])
    with pytest.raises(ValueError, match="`every` is 0, but it counts steps"):
        RoutingReportCallback(every=0)


def test_what_a_resumed_run_writes_again_is_read_again(tmp_path):
    """The run that it resumes had come further, and left a trace of a step that is not reached yet."""
    callback, trace = RoutingReportCallback(), make_trace()
    rows = trace.facts.compared_rows
    for step, share in ((0, 0), (40, 1)):
        changed = torch.full_like(trace.changed, share * rows)
        save_trace(replace(trace, facts=replace(trace.facts, step=step), changed=changed), tmp_path)
    callback._images(tmp_path, 10)
    save_trace(replace(trace, facts=replace(trace.facts, step=40), changed=torch.zeros_like(trace.changed)), tmp_path)
    resumed, fresh = callback._images(tmp_path, 50), RoutingReportCallback()._images(tmp_path, 50)
    assert np.array_equal(resumed[TAG], fresh[TAG])
