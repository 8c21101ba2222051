"""`python -m benchmarks` at sizes that say nothing about speed."""

import json
from contextlib import contextmanager

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import costs, fidelity, overhead
from benchmarks import gating as gating_bench
from benchmarks.overhead import main
from benchmarks.setup import SMOKE, Finding
from trl_r3 import RouterReplay


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "deep" / "bench.json"
    assert command.main(["--smoke", "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_log(log):
    findings = {entry["what"]: entry for entry in log["findings"]}
    assert log["settings"]["num_experts"] == 8
    assert {"torch", "transformers"} <= set(log["versions"])
    assert [entry["target"] for what, entry in findings.items() if what.endswith("with over without")] == [
        1.02,
        1.03,
        1.03,
    ]
    assert findings["bytes of masks over bound, 4 ids a token"]["value"] <= 1
    assert findings["stored bytes a token and MoE layer"]["value"] == 2
    assert findings["k3_kl with replay over without"]["target"] == 0.15
    for entry in findings.values():
        assert entry["met"] is (None if entry["target"] is None else entry["value"] <= entry["target"])


def test_replay_keeps_what_it_should(log):
    findings = {entry["what"]: entry["value"] for entry in log["findings"]}
    assert findings["rows whose live selection differs, replay on"] > 0
    (other,) = [value for what, value in findings.items() if "execute other ids" in what]
    assert other == 0
    own = [value for what, value in findings.items() if what.startswith("own record replayed")]
    assert own == [0] * 6
    assert findings["k3_kl at top_p 0.8 in float32, with masks"] <= 1e-10
    assert findings["k3_kl at top_p 0.8 in float32, without"] >= 1e-3
    assert 0 < findings["k3_kl with replay"] < 0.5 * findings["k3_kl without replay"]


def test_the_spy_sees_what_runs(monkeypatch):
    def shifted(self, record):
        return real(self, torch.where(record < 0, record, (record + 1) % 32))

    real = RouterReplay.replay
    monkeypatch.setattr(RouterReplay, "replay", shifted)
    (finding,) = [finding for finding in fidelity.mismatch(SMOKE) if "execute other ids" in finding.what]
    assert finding.what == f"rows of {finding.value} that execute other ids than recorded"
    assert not finding.met


def test_differing_bits_are_seen(monkeypatch):
    real = fidelity.record_of
    monkeypatch.setattr(fidelity, "record_of", lambda *args: (real(*args) + 1) % 32)
    assert all(finding.value > 0 and not finding.met for finding in fidelity.own_record(SMOKE))


def test_pairs_take_turns():
    order = []

    @contextmanager
    def prepare(with_replay):
        yield lambda: order.append(with_replay)

    costs.paired(prepare, pairs=4)
    assert order.count(True) == order.count(False) == 5
    assert order[:4] == [True, False, False, True]


def test_a_target_is_an_upper_bound():
    assert Finding("", 1.0, 1.0).met
    assert Finding("", 1.01, 1.0).met is False
    assert Finding("", 1.0).met is None


def test_threads_come_back(monkeypatch):
    def part(settings):
        return [Finding("threads", torch.get_num_threads())]

    monkeypatch.setattr(overhead, "PARTS", (part,))
    torch.set_num_threads(2)
    assert main(None, SMOKE) == [Finding("threads", 1)]
    assert torch.get_num_threads() == 2


def test_gating_is_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(gating_bench, "run", lambda smoke, device: seen.append((smoke, device)) or 2)
    assert command.main(["gating", "--dry"]) == 2
    assert command.main(["gating", "--device", "cpu"]) == 2
    assert seen == [(True, None), (False, "cpu")]


@pytest.mark.parametrize("value, status", [(0.5, 0), (2.0, 1), (None, 0)])
def test_a_target_that_is_missed(value, status, monkeypatch):
    findings = [Finding("a time", 3.0), Finding("a share", value or 0.0, 1.0 if value else None)]
    monkeypatch.setattr(overhead, "main", lambda output: findings)
    assert command.main([]) == status


def test_a_place_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--output", str(tmp_path / "file" / "deeper" / "log.json")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
