"""`trl-r3 report`: what it draws is what the traces and the log say, and a browser shows it."""

import base64
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_traces import make_trace

from trl_r3 import extreme_token_frac, k3_kl
from trl_r3.cli import command as cli
from trl_r3.cli.report.pictures import pictures
from trl_r3.cli.report.run_data import TAUS, TRAINING, gather
from trl_r3.records.metrics import SHARES
from trl_r3.traces.trace import Trace
from trl_r3.traces.trace_file import save_trace

NAMES = ["mismatch", "changed_routers", "expert_load", "load_over_steps", "delta_logprob", "agreement", "missing_rows"]


def a_trace(step, rank=0, **changes):
    """A trace whose numbers differ from step to step and between processes, with two tokens that do not count."""
    trace = make_trace(samples=4, step=step, rank=rank, seed=10 * step + rank, completion=10)
    masks = trace.masks.clone()
    masks[:2] = 1
    rollout = trace.rollout_logprobs.clone()
    rollout[5] = float("nan")  # the engine could not score it
    changed = torch.tensor([step % 3, 1 + rank], dtype=torch.int32)
    return Trace(**{**vars(trace), "masks": masks, "rollout_logprobs": rollout, "changed": changed, **changes})


def write_log(folder, steps, names=SHARES):
    entries = [
        {"step": step, **dict.fromkeys(TRAINING, 0.1), **dict.fromkeys(names, 0.01 * step + 0.1)} for step in steps
    ]
    entries.append({"step": 1, "train_runtime": 2.0, "sampling/k3_kl": None})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


@pytest.fixture
def run(tmp_path):
    """A run of two processes with traces and a log, the log of another checkpoint included."""
    (tmp_path / "traces").mkdir()
    for step in range(4):
        for rank in range(2):
            save_trace(a_trace(step, rank), tmp_path / "traces")
    for checkpoint, steps in (("checkpoint-9", [1]), ("checkpoint-10", [1, 2, 3, 4, 5])):
        (tmp_path / checkpoint).mkdir()
        write_log(tmp_path / checkpoint, steps)
    return tmp_path


def test_traces_of_all_processes_are_one(run):
    """Against the metrics of the package, over the tokens that count."""
    data = gather(run / "traces")
    assert [step.step for step in data.steps] == [0, 1, 2, 3]
    for step in data.steps:
        both = [a_trace(step.step, rank) for rank in range(2)]
        train, rollout, live, mask = (
            torch.cat([getattr(trace, name) for trace in both])[None]
            for name in ("train_logprobs", "rollout_logprobs", "live_logprobs", "counted")
        )
        at = step.step + 1
        assert data.curve("sampling/k3_kl")[at] == pytest.approx(float(k3_kl(train, rollout, mask)))
        assert data.curve("sampling/live/k3_kl")[at] == pytest.approx(float(k3_kl(live, rollout, mask)))
        assert data.curve("sampling/extreme_token_frac")[at] == float(extreme_token_frac(train, rollout, mask))
        for tau in TAUS:
            assert data.extreme("live", tau)[at] == pytest.approx(float(extreme_token_frac(live, rollout, mask, tau)))
        assert step.replayed.tokens == 2 * (40 - 2 - 1)
        changed = (2 * (step.step % 3) + 1 + 2) / 2 / sum(trace.facts.compared_rows for trace in both)
        assert data.curve("routing_replay/changed_router_frac")[at] == pytest.approx(changed)
        assert torch.equal(step.load_live, sum(trace.load_live.long() for trace in both))
        largest = (train - rollout).abs()[mask & ~rollout.isnan()].max()
        assert torch.cat(step.replayed.points)[:, 1].max() == pytest.approx(float(largest))


def test_pictures_show_the_numbers(run):
    drawn = {picture.name: picture.figure for picture in pictures(gather(run))}
    assert list(drawn) == NAMES
    data = gather(run)
    curves, heat, *_ = drawn["changed_routers"].axes
    assert curves.lines[0].get_xydata().tolist() == [
        list(each) for each in data.curve("routing_replay/changed_router_frac").items()
    ]
    (image,) = heat.images
    expected = np.array([[(2 * (s % 3)) for s in range(4)], [3] * 4]) / (2 * a_trace(0).facts.compared_rows)
    assert np.allclose(image.get_array(), expected)
    recorded, live, *_ = drawn["expert_load"].axes
    for panel, name in ((recorded, "load_recorded"), (live, "load_live")):
        load = sum(getattr(step, name) for step in data.steps).double()
        assert np.allclose(panel.images[0].get_array(), load / load.sum(1, keepdim=True) * 16)
    replayed, _ = drawn["delta_logprob"].axes
    assert len(replayed.collections[0].get_offsets()) == sum(len(p) for s in data.steps for p in s.replayed.points)


def test_the_page_is_whole_without_a_network(run, capsys):
    assert cli.main(["report", str(run), "--output", str(run / "deep" / "out")]) == 1
    page = (run / "deep" / "out" / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    pngs = [run / "deep" / "out" / f"{name}.png" for name in NAMES]
    assert [base64.b64decode(image) for image in images] == [path.read_bytes() for path in pngs]
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page and "http" not in page
    assert page.count("Look for") == len(NAMES)
    assert "What is not here" not in page and "Not drawn" not in capsys.readouterr().out


def test_a_run_without_traces_names_them(tmp_path, capsys):
    write_log(tmp_path, range(1, 6))
    assert cli.main(["report", str(tmp_path)]) == 1
    page = (tmp_path / "routing_report" / "report.html").read_text()
    names = [path.stem for path in (tmp_path / "routing_report").glob("*.png")]
    assert sorted(names) == sorted(set(NAMES) - {"expert_load", "load_over_steps", "delta_logprob"})
    assert "There are no traces" in page and "routing_replay_trace_dir" in page
    assert "Not drawn: There are no traces" in capsys.readouterr().out


def test_the_load_of_a_log_alone_is_drawn(tmp_path):
    layers = {f"routing_replay/load/layer_{layer}/max_over_mean": 1.0 + layer for layer in (0, 2, 3)}
    entries = [{"step": step, "routing_replay/missing_frac": 0.0, **layers} for step in (2, 4)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    data = gather(tmp_path)
    assert data.max_over_mean() == ([0, 2, 3], {2: [1.0, 3.0, 4.0], 4: [1.0, 3.0, 4.0]})
    (picture,) = [each for each in pictures(data) if each.name == "load_over_steps"]
    (image,) = picture.figure.axes[0].images
    assert image.get_array().tolist() == [[1.0, 1.0], [3.0, 3.0], [4.0, 4.0]]


def test_traces_without_a_log_or_live_routing_name_them(tmp_path):
    save_trace(a_trace(3, live_logprobs=None), tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 1
    page = (tmp_path / "routing_report" / "report.html").read_text()
    assert "There is no log" in page and "Set <code>routing_replay_compare_every</code>" in page


def test_traces_without_rollout_logprobs_are_drawn(tmp_path):
    save_trace(a_trace(3, live_logprobs=None, rollout_logprobs=None), tmp_path)
    data = gather(tmp_path)
    assert any("There are no log-probabilities of the rollout" in each for each in data.lacking)
    assert {picture.name for picture in pictures(data)} == set(NAMES) - {"mismatch", "delta_logprob"}


def test_a_damaged_trace_is_named_and_the_others_drawn(run):
    damaged = run / "traces" / "step-00000002-rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:500])
    data = gather(run)
    assert [step.step for step in data.steps] == [0, 1, 2, 3]
    assert "step-00000002-rank-00001.safetensors (500 bytes) cannot be read" in data.lacking[0]


def another_model(tmp_path):
    for step, digest in enumerate("01"):
        trace = a_trace(step)
        save_trace(replace(trace, facts=replace(trace.facts, config_digest=digest * 64)), tmp_path)


def nothing(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")


def log_of_others(tmp_path):
    write_log(tmp_path, range(3), names=["reward"])


BAD = {
    "no folder": (shutil.rmtree, "is no folder. Pass the `output_dir` of a run"),
    "nothing": (nothing, "holds neither traces"),
    "log without replay": (log_of_others, "holds neither traces"),
    "two models": (another_model, "the traces are of two models: step 0 of a qwen3_moe with config 00000000"),
    "only damaged": (lambda path: (path / "step-1-rank-0.safetensors").write_bytes(b"x"), "cannot be read as a trace"),
    "no log at all": (lambda path: (path / "trainer_state.json").write_text("[1]"), "is no log of a trainer"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, what):
    make, says = BAD[what]
    make(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and "Traceback" not in told.err and told.out == ""


PROBE = """
<script>
const errors = []; window.onerror = message => { errors.push(message); };
window.onload = () => {
    const images = [...document.images].map(image => image.complete && image.naturalWidth > 100);
    const fetched = performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:"));
    document.title = "PROBE " + JSON.stringify({images, errors, fetched: fetched.map(each => each.name)});
};
</script>
"""


def shown(page: Path, html: str) -> dict:
    """What a browser made of a page: images that are there, errors of scripts, what it fetched."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser is installed: `apt-get install chromium`")
    probed = page.with_name("probed.html")
    probed.write_text(html.replace("<head>", f"<head>{PROBE}", 1))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [f"--user-data-dir={page.parent / 'browser'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    ran = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=100)
    (found,) = re.findall(r"<title>PROBE (.*?)</title>", ran.stdout)
    return json.loads(found.replace("&quot;", '"').replace("&amp;", "&"))


def test_a_browser_shows_the_page(run):
    assert cli.main(["report", str(run)]) == 1
    page = run / "routing_report" / "report.html"
    html = page.read_text()
    assert shown(page, html) == {"images": [True] * len(NAMES), "errors": [], "fetched": []}
    image = re.search(r'src="data:image/png;base64,[^"]*"', html)[0]
    broken = html.replace(image, 'src="data:image/png;base64,AAAA"').replace(
        "</body>", "<script>gone()</script></body>"
    )
    seen = shown(page, broken)
    assert seen["images"] == [False] + [True] * (len(NAMES) - 1) and "gone is not defined" in seen["errors"][0]


def test_a_hundred_steps_are_drawn(tmp_path):
    """Within the 20 seconds that a user would wait; they are measured, not asserted."""
    for step in range(100):
        save_trace(make_trace(samples=8, completion=200, layers=12, experts=64, top_k=4, step=step), tmp_path)
    begin = time.perf_counter()
    drawn = pictures(gather(tmp_path))
    print(f"{time.perf_counter() - begin:.1f} s")
    assert [picture.name for picture in drawn] == NAMES
