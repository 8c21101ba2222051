"""`python -m benchmarks scale` at sizes that say nothing about speed."""

import json
import time

import pytest

from benchmarks import __main__ as command
from benchmarks import scale


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("scale") / "deep" / "scale.json"
    assert command.main(["--output", str(path), "scale", "--smoke"]) == 0
    return json.loads(path.read_text())


def test_log(log):
    findings = {entry["what"]: entry for entry in log["findings"]}
    assert log["settings"]["lengths"] == [32, 64]
    assert {"torch", "transformers"} <= set(log["versions"])
    for stage in ("records", "alignment", "transfer"):
        for what in ("ns", "bytes"):
            values = [findings[f"{stage}: {what} a token, {length} tokens"]["value"] for length in (32, 64)]
            spread = findings[f"{stage}: {what} a token, largest over smallest"]
            assert spread["value"] == pytest.approx(max(values) / min(values))
            assert spread["target"] == 1.1


def test_bytes_are_those_of_a_record(log):
    """48 layers, 8 of 128 experts: 384 bytes a token, and the last token has no row."""
    findings = {entry["what"]: entry["value"] for entry in log["findings"]}
    assert findings["records: bytes a token, 64 tokens"] == 384 * 63 / 64
    assert findings["alignment: bytes a token, 64 tokens"] == 384
    assert findings["transfer: bytes a token, 64 tokens"] == 384


def test_memory_that_is_held_in_secret_counts(monkeypatch):
    """A view of something larger is no small record."""
    real = scale.to_record

    def view(ids, layout, sample):
        record = real(ids, layout, sample)
        return record.new_empty(2, *record.shape).copy_(record.expand(2, *record.shape))[0]

    monkeypatch.setattr(scale, "to_record", view)
    findings = {finding.what: finding.value for finding in scale.scale(scale.SMOKE)}
    assert findings["records: bytes a token, 64 tokens"] == 2 * 384 * 63 / 64


def test_what_grows_with_the_length_is_seen(monkeypatch):
    real = scale.stitch

    def slow(turns, prompts, completions, layout):
        end = time.process_time() + 2e-8 * len(prompts) * (len(prompts[0]) + len(completions[0])) ** 2
        while time.process_time() < end:
            pass
        return real(turns, prompts, completions, layout)

    monkeypatch.setattr(scale, "stitch", slow)
    settings = scale.ScaleSettings(lengths=(256, 2048), tokens=4096, repeats=2)
    findings = {finding.what: finding for finding in scale.scale(settings)}
    assert findings["records: ns a token, largest over smallest"].value > 1.1
    assert not findings["records: ns a token, largest over smallest"].met
