"""What the configuration accepts, and what it refuses before anything is built."""

import re

import numpy as np
import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from trl_r3 import R3GRPOConfig

FIELDS = {
    "use_routing_replay": False,
    "routing_replay_mode": "R3",
    "routing_replay_max_missing": 0.0,
    "routing_replay_compare_every": 0,
    "routing_replay_load_every": 0,
    "routing_replay_gating": "auto",
    "routing_replay_padding": "auto",
    "routing_replay_alarm": "error",
    "routing_replay_trace_dir": None,
    "routing_replay_trace_every": 1,
    "use_sampling_mask_replay": False,
    "routing_replay_spill_dir": None,
    "routing_replay_shift_weight": False,
}


def test_fields_are_these_and_off_by_default(tmp_path):
    added = set(R3GRPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert added == set(FIELDS)
    config = R3GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    for name in FIELDS:
        assert R3GRPOConfig.__dataclass_fields__[name].metadata["help"]


def test_fields_are_read_from_the_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --bf16 False --use_routing_replay true --routing_replay_mode R2"
    line += " --num_iterations 2 --routing_replay_max_missing 0.25 --routing_replay_compare_every 3"
    line += " --routing_replay_load_every 4"
    line += " --routing_replay_gating intercept --routing_replay_padding keep --routing_replay_alarm warn"
    line += " --use_sampling_mask_replay true"
    line += f" --routing_replay_spill_dir {tmp_path} --routing_replay_trace_dir {tmp_path}"
    (config,) = HfArgumentParser(R3GRPOConfig).parse_args_into_dataclasses(line.split())
    expected = [True, "R2", 0.25, 3, 4, "intercept", "keep", "warn", str(tmp_path), 1, True, str(tmp_path), False]
    assert [getattr(config, name) for name in FIELDS] == expected


def test_command_line_offers_the_modes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(R3GRPOConfig).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--routing_replay_mode", "R4"]
        )
    assert "R3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("routing_replay_mode", "r3"),
        ("routing_replay_mode", "R1"),
        ("routing_replay_max_missing", -0.1),
        ("routing_replay_max_missing", 1.5),
        ("routing_replay_max_missing", float("nan")),
        ("routing_replay_compare_every", -1),
    ],
)
def test_bad_values_are_named(settings, field, value):
    with pytest.raises(ValueError, match=field) as raised:
        settings(**{field: value})
    assert str(value) in str(raised.value)
    assert "Set " in str(raised.value)


OF_ANOTHER_TYPE = {
    "use_routing_replay": (None, "false", "true", 1, 0),
    "routing_replay_mode": (None, 3, ["R3"]),
    "routing_replay_max_missing": (None, "0.1", True),
    "routing_replay_compare_every": (None, "3", True, 1.5),
    "routing_replay_load_every": (None, "3", True, 1.5),
    "routing_replay_gating": (None, True),
    "routing_replay_padding": (None, True),
    "routing_replay_alarm": (None, True, "on"),
    "routing_replay_trace_dir": (3, False),
    "routing_replay_trace_every": (None, "2", False),
    "use_sampling_mask_replay": (None, "false", 1),
    "routing_replay_spill_dir": (3, True),
    "routing_replay_shift_weight": (None, "false", 1),
}


def test_values_of_another_type_are_named(settings):
    assert set(OF_ANOTHER_TYPE) == set(FIELDS)
    for name, values in OF_ANOTHER_TYPE.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^`{name}` is {re.escape(repr(value))}, expected .*leave it out"):
                settings(**{name: value})


def test_paths_and_numbers_of_numpy_are_taken(settings, tmp_path):
    config = settings(
        routing_replay_trace_dir=tmp_path / "traces",
        routing_replay_spill_dir=tmp_path,
        routing_replay_compare_every=np.int64(2),
        routing_replay_max_missing=np.float32(0.5),
    )
    assert config.routing_replay_trace_dir == str(tmp_path / "traces")
    assert config.routing_replay_spill_dir == str(tmp_path)


@pytest.mark.parametrize("written", ["error", "warn", "off", "'off'"])
def test_the_alarm_is_read_from_yaml_as_it_is_written(written, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: out\nuse_cpu: true\nbf16: false\nrouting_replay_alarm: {written}\n")
    (config,) = TrlParser(R3GRPOConfig).parse_args_and_config(["--config", str(file)])
    assert config.routing_replay_alarm == written.strip("'")  # `off` is a boolean in YAML


ALIGNED = [
    {},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 4, "num_iterations": 2},
    {"gradient_accumulation_steps": 6, "steps_per_generation": 3},
]
NAMES = ("gradient_accumulation_steps", "steps_per_generation", "num_iterations")


@pytest.mark.parametrize("aligned", ALIGNED)
def test_r2_without_an_old_policy_names_the_settings(settings, aligned):
    aligned = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, **aligned}
    with pytest.raises(ValueError, match="R2") as raised:
        settings(routing_replay_mode="R2", **aligned)
    for name in NAMES:
        assert f"{name}={aligned.get(name, 1)}" in str(raised.value)
    settings(routing_replay_mode="R2", use_routing_replay=False, **aligned)  # it would not be used


@pytest.mark.parametrize("aligned", ALIGNED)
@pytest.mark.parametrize("change", [{"num_iterations": 5}, {"steps_per_generation": 8}])
def test_r2_with_the_remedy_is_accepted(settings, aligned, change):
    changes = {**aligned, **change}
    if changes == {"gradient_accumulation_steps": 6, "steps_per_generation": 8}:
        changes["steps_per_generation"] = 4
    settings(routing_replay_mode="R2", **changes)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_r2_is_refused_exactly_where_trl_has_no_old_policy(settings, qwen3, train, steps, iterations, accumulation):
    changes = {
        "steps_per_generation": steps,
        "num_iterations": iterations,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = train(qwen3(), use_routing_replay=False, max_steps=1, **changes)
    has_old_policy = any(one.name == "old policy" for one in trainer.passes)
    try:
        settings(routing_replay_mode="R2", **changes)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == has_old_policy


def test_model_card_names_r3_and_cites_its_paper(build, qwen3, tmp_path):
    trainer = build(qwen3(), output_dir=str(tmp_path))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "arXiv:2510.11370" in card and "huggingface.co/papers/2510.11370" in card
    assert "- r3\n" in card and "Rollout Routing Replay (R3)" in card


def test_gating_reaches_the_handle(build, qwen3):
    seen = []
    trainer = build(qwen3(), max_steps=1, routing_replay_gating="op")
    trainer.reward_funcs[0] = lambda completions, **kwargs: (
        seen.append(repr(trainer.routing_replay)) or [0.0] * len(completions)
    )
    trainer.train()
    assert seen and all("gating='op'" in each for each in seen)


def test_unknown_gating_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`routing_replay_gating` is 'fast'"):
        R3GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, routing_replay_gating="fast")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"routing_replay_trace_every": 0}, "`routing_replay_trace_every` is 0, but it counts steps"),
        ({"routing_replay_trace_dir": "x", "use_routing_replay": False}, "without replay there are no records"),
    ],
)
def test_bad_settings(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        R3GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{"use_routing_replay": True, **settings})


def test_a_folder_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in ("", str(tmp_path / "file"), str(tmp_path / "file" / "deeper")):
        with pytest.raises(ValueError, match=r"`routing_replay_spill_dir` is .*, which is no folder"):
            settings(routing_replay_spill_dir=wrong)
    assert settings(routing_replay_spill_dir=str(tmp_path / "a" / "b")).routing_replay_spill_dir
    assert not (tmp_path / "a").exists()  # a config writes nothing
