"""`trl-r3 verify`: a few prompts through the engine, then the training forward, and whether every row is right.

Legend: B samples, C completion tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import torch
from torch import Tensor

from ...alarm.evidence import RoutingEvidence
from ...records.expert_load import ExpertLoad
from ...routers.probe import input_device
from ...routers.router_replay import RouterReplay
from ...routers.self_check import UnsupportedRouterError
from ..arguments import check_engine_url
from ..bad_input import BadInput
from ..models import LoadedModel
from . import findings
from .findings import Finding
from .launch import Launch
from .logprobs import candidates, logprobs_finding
from .rows import check_rollout_rows
from .samplers import check_engine, continuous_rollout, server_rollout, transformers_rollout, vllm_rollout
from .sampling import Sampling, VerifiedRollout, generated_prompts
from .table import Layer, Report, print_report
from .training import CHECKPOINTING, Batch, padding_k3, replayed_gradients, score, score_replayed

ENGINES = ("transformers", "continuous", "vllm", "server")
_OF_ONE_PROCESS = ("continuous", "vllm")


def main(
    name: str,
    engine: str,
    url: str | None,
    dtype: str,
    device: str | None,
    as_json: bool,
    trust_remote_code: bool = False,
) -> int:
    """
    Verify a model with an engine, and print what was found.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, a local folder, or that of a LoRA adapter.
        engine (`str`):
            One of `ENGINES`.
        url (`str`, *optional*):
            Of the server, with `engine="server"`.
        dtype (`str`):
            `"auto"`, or the name of a torch dtype, of the training forward.
        device (`str`, *optional*):
            Device of the training forward: the CPU by default, that of each process in a launch of several.
        as_json (`bool`):
            Whether to print JSON instead of a table.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the checkpoint is run.

    Returns:
        `int`: Exit status: 0 if everything that could be judged is right, 1 if something is wrong.

    Raises:
        [`BadInput`]: If there is nothing to verify.
    """
    check_engine_url(engine, url)
    with redirect_stdout(sys.stderr):  # engines talk; JSON stays alone
        launch = Launch.of_this_process()
        if launch.accelerator is not None and engine in _OF_ONE_PROCESS:
            raise BadInput(
                f"`--engine {engine}` runs in one process, this launch has {launch.accelerator.num_processes}. Pass "
                "`--engine transformers`, or serve the model and pass `--engine server`."
            )
        check_engine(engine, url)  # before minutes of loading
        loaded = launch.load(name, dtype, device, trust_remote_code)
        try:
            with RouterReplay(loaded.model) as replay:
                rollout = sample(loaded, name, replay, engine, url, launch.process, trust_remote_code)
                report = launch.report_of_all(verify(loaded, replay, rollout))
        except (UnsupportedRouterError, RuntimeError) as error:  # what an engine or replay refuses to go on with
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    launch.end()
    if launch.process > 0:
        return 0 if report.passed else 1  # the first one prints
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print_report(report)
    return 0 if report.passed else 1


def sample(
    loaded: LoadedModel,
    name: str,
    replay: RouterReplay,
    engine: str,
    url: str | None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> VerifiedRollout:
    """A few prompts through an engine."""
    sampling = Sampling(generated_prompts(loaded.model, seed))
    torch.manual_seed(seed)
    if engine == "server":
        assert url is not None  # main() has refused that
        return server_rollout(url, sampling)
    if engine == "vllm":
        return vllm_rollout(loaded.model, name, sampling, trust_remote_code)
    if engine == "continuous":
        return continuous_rollout(loaded.model, replay, sampling)
    return transformers_rollout(loaded.model, replay, sampling)


def verify(loaded: LoadedModel, replay: RouterReplay, rollout: VerifiedRollout) -> Report:
    """
    Hold a rollout, wherever it comes from, against the training forward.

    Args:
        loaded ([`LoadedModel`]):
            The model, with the weights that the rollout was made with.
        replay ([`RouterReplay`]):
            Its handle.
        rollout ([`VerifiedRollout`]):
            The rollout.

    Returns:
        [`Report`].
    """
    model = loaded.model
    rows = check_rollout_rows(rollout, replay.layout)
    batch = Batch.of(rollout, rows.records, input_device(model) or torch.device("cpu"))
    record = batch.record(replay)
    sampled = _padded(rollout.logprobs, batch.completion_mask)
    temperatures = candidates(rollout.temperature)
    live = score(loaded, batch, temperatures)
    of_padding = padding_k3(loaded, batch, live[rollout.temperature], rollout.temperature)
    replayed = score_replayed(loaded, replay, batch, temperatures)
    evidence = RoutingEvidence(replay.layout)
    for observation in replayed.observations:
        evidence.add(observation)
    statistics = evidence.statistics() if evidence.rows else None
    gradients = {kind: replayed_gradients(loaded, replay, batch, kind) for kind in CHECKPOINTING}
    found = [
        findings.rows_finding(rows, rollout),
        findings.executed_finding(replayed.executed, record, replay),
        findings.agreement_finding(statistics, evidence.verdict() if statistics else None, evidence.rows),
        findings.changed_finding(replayed.changed, replayed.compared),
        *_mismatch(live, replayed.scores, rollout, sampled, batch.completion_mask, of_padding),
        logprobs_finding(rollout, replayed.scores, sampled, batch.completion_mask),
        findings.gradients_finding(gradients, record, replay),
    ]
    other = replayed.executed.other_rows(record, replay.moe_layers)
    load = ExpertLoad.of(record, replay.num_experts)
    layers = [
        Layer(
            layer,
            other.get(layer),
            None if statistics is None else float(statistics.agreement_L[slot]),
            None if statistics is None else float(statistics.contrast_L[slot]),
            float(load.max_over_mean[slot]),
            int(load.dead_experts[slot]),
            float(load.entropy[slot]),
        )
        for slot, layer in enumerate(replay.moe_layers)
    ]
    return Report(loaded.origin, type(model).__name__, rollout.source, rollout.temperature, found, layers)


def _padded(values: Sequence[Tensor] | None, mask: Tensor) -> Tensor | None:
    """(B, C), NaN where there is no token."""
    if values is None:
        return None
    padded = torch.full(mask.shape, float("nan"))
    for row, each in enumerate(values):
        padded[row, : len(each)] = each
    return padded


def _mismatch(
    live: dict[float, Tensor],
    replayed: dict[float, Tensor],
    rollout: VerifiedRollout,
    sampled: Tensor | None,
    mask: Tensor,
    of_padding: float,
) -> list[Finding]:
    if sampled is None:
        return []
    both = (("mismatch, live", live, None), ("mismatch, replayed", replayed, findings.MAX_K3))
    return [
        findings.mismatch_finding(what, scores[rollout.temperature], sampled, mask, bound, of_padding)
        for what, scores, bound in both
    ]
