"""A training step with replay can be read in few files."""

from benchmarks.files import files_of_a_step

MOST = 20


def test_a_training_step_runs_in_few_files():
    by_generate, by_vllm = files_of_a_step(by_vllm=False), files_of_a_step(by_vllm=True)
    assert {"trainers/lifecycle.py", "trainers/mixin.py", "engines/generate.py", "routers/router.py"} <= by_generate
    assert {"trainers/session.py", "engines/vllm_colocate.py", "records/record.py"} <= by_vllm
    for of_a_step in (by_generate, by_vllm):
        assert len(of_a_step) <= MOST, sorted(of_a_step)
