"""Let each rollout engine sample, and take what it returns as it comes.

Legend: P prompt tokens, C completion tokens, T tokens of a padded sequence, K experts per token.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ...engines.continuous_batching import recordable_config, recorded_steps
from ...engines.generate import generate_with_routes
from ...engines.vllm_colocate import decode_vllm_output
from ...engines.vllm_versions import check_vllm_version, vllm_engine_kwargs
from ...records.record import lay_out, slice_samples, unpack
from ...routers.probe import input_device
from ...routers.router_replay import RouterReplay
from ..bad_input import BadInput, first_line
from .sampling import PROCESSED, Sampling, VerifiedRollout

_SHARE_OF_GPU = 0.3  # of its memory, for vLLM: TRL's default beside a model that trains
# of continuous batching: what is left out is solved for, and takes most of the memory that the machine has
_CACHE_BLOCKS = 64
_BATCH_TOKENS = 1024


def transformers_rollout(model: Any, replay: RouterReplay, sampling: Sampling) -> VerifiedRollout:
    """By `generate()`, with the routes of its routers."""
    device = input_device(model) or torch.device("cpu")
    width = max(map(len, sampling.prompt_ids))
    ids, mask = torch.empty(2, len(sampling.prompt_ids), width, dtype=torch.int64)
    prompts = [torch.tensor(prompt) for prompt in sampling.prompt_ids]
    lengths = list(map(len, prompts))
    lay_out(prompts, lengths, width, ids, 0)
    lay_out(list(map(torch.ones_like, prompts)), lengths, width, mask, 0)
    config = _generation_config(model, sampling)
    kwargs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "generation_config": config}
    rollout = generate_with_routes(model, replay, model.generate, (), kwargs, temperature=sampling.temperature)
    assert rollout.logprobs is not None and rollout.records is not None  # a temperature and a handle were given
    completions = rollout.sequences[:, width:].cpu()
    routes = slice_samples(
        unpack(rollout.records.cpu(), replay.layout), width, lengths, [completions.shape[1]] * len(prompts)
    )
    return VerifiedRollout(
        "transformers", sampling.prompt_ids, completions.tolist(), routes, list(rollout.logprobs.cpu())
    )


def continuous_rollout(model: Any, replay: RouterReplay, sampling: Sampling) -> VerifiedRollout:
    """By continuous batching, with the routes of its packed steps."""
    config = ContinuousBatchingConfig(num_blocks=_CACHE_BLOCKS, max_batch_tokens=_BATCH_TOKENS)
    recordable_config(config)
    with torch.no_grad(), recorded_steps(replay, sampling.temperature) as recorded:
        try:
            outputs = model.generate_batch(
                sampling.prompt_ids,
                generation_config=_generation_config(model, sampling),
                continuous_batching_config=config,
                progress_bar=False,
            )
        except ValueError as error:  # it has no cache for some kinds of layers
            raise BadInput(
                f"Transformers' continuous batching cannot serve a {type(model).__name__}: {first_line(error)}. Pass "
                "another `--engine`."
            ) from error
    recorded.check(sampling.prompt_ids, outputs)
    return VerifiedRollout(
        "transformers, continuous batching",
        sampling.prompt_ids,
        [list(output.generated_tokens) for output in outputs.values()],
        [unpack(recorded.rows(request), replay.layout) for request in outputs],
        [recorded.logprobs(request, output) for request, output in outputs.items()],
    )


def _generation_config(model: Any, sampling: Sampling) -> GenerationConfig:
    """
    From the whole vocabulary, and on behind an end of text, as vLLM does with `ignore_eos`.

    `min_new_tokens` would forbid the end: what it draws comes from a cut distribution, and training scores the whole
    one. What is left `None` is filled in from the model's own configuration.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=sampling.new_tokens,
        pad_token_id=0,
        eos_token_id=model.config.get_text_config().vocab_size,  # an id that no token has
    )


def check_engine(engine: str, url: str | None) -> None:
    """
    Refuse an engine that is not here.

    Args:
        engine (`str`):
            One of `ENGINES` of the command.
        url (`str`, *optional*):
            Of the server, with `engine="server"`.

    Raises:
        [`BadInput`]: If vLLM is not installed, or no server answers that returns routes.
    """
    if engine == "vllm":
        _import_vllm()
    if engine == "server":
        from ...engines.vllm_server import RecordingVLLMClient

        try:
            RecordingVLLMClient(base_url=url, routes=True)
        except Exception as error:  # TRL raises plain ones for what the server answers
            raise _no_server(url, error) from error


def _import_vllm() -> Any:
    """vLLM, of a version that can be used."""
    try:
        import vllm
    except ImportError as error:
        raise BadInput(
            "vLLM is not installed. Install it with `pip install 'trl[vllm]'`, or pass another `--engine`."
        ) from error
    try:
        check_vllm_version(vllm.__version__)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return vllm


def vllm_rollout(model: Any, name: str, sampling: Sampling, trust_remote_code: bool = False) -> VerifiedRollout:
    """By a vLLM in this process, which loads the weights of `name` itself, or those of an adapter merged into them."""
    vllm = _import_vllm()
    try:
        with _plain_weights(model, name) as folder:
            llm = vllm.LLM(
                folder,
                **vllm_engine_kwargs(vllm.__version__),
                dtype=str(model.dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                trust_remote_code=trust_remote_code,
                enforce_eager=True,
                gpu_memory_utilization=_SHARE_OF_GPU,
                max_model_len=sampling.longest,
                logprobs_mode=PROCESSED,
                seed=0,
            )
    except Exception as error:  # it knows the model, the device and the memory, and has many ways to say no
        raise BadInput(f"vLLM {vllm.__version__} cannot serve {name}: {first_line(error)}.") from error
    try:
        return vllm_answer(llm, sampling, vllm.__version__)
    finally:
        llm.llm_engine.engine_core.shutdown()


def vllm_answer(llm: Any, sampling: Sampling, version: str) -> VerifiedRollout:
    """What a running `vllm.LLM` returns."""
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=sampling.temperature,
        logprobs=0,
        max_tokens=sampling.new_tokens,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = []
    for part in sampling.parts:
        outputs += llm.generate([{"prompt_token_ids": prompt} for prompt in part], settings, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    notes: list[str] = []
    return VerifiedRollout(
        f"vLLM {version}",
        sampling.prompt_ids,
        [list(each.token_ids) for each in completions],
        [_decoded(decode_vllm_output, each, notes) for each in completions],
        [
            torch.tensor([step[token].logprob for step, token in zip(each.logprobs, each.token_ids, strict=True)])
            for each in completions
        ],
        logprobs_mode=str(llm.llm_engine.model_config.logprobs_mode),
        version=version,
        notes=notes,
    )


def _decoded(decode: Callable[[Any], Any], answer: Any, notes: list[str]) -> Any:
    try:
        return decode(answer)
    except ValueError as error:
        notes.append(str(error))
        return None


def _no_server(url: str | None, error: Exception) -> BadInput:
    return BadInput(f"no server to verify at {url}: {first_line(error)}.")


@contextmanager
def _plain_weights(model: Any, name: str) -> Iterator[str]:
    """A folder or an id that vLLM can load: that of the model, or one with its adapter merged into a copy."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
        yield folder


def server_rollout(url: str, sampling: Sampling) -> VerifiedRollout:
    """By a vLLM server that runs already, through the client that training uses."""
    from ...engines.vllm_server import RecordingVLLMClient  # TRL takes seconds to import

    notes: list[str] = []

    class Client(RecordingVLLMClient):
        """One that goes on where a choice has no routes, to say so beside the rest."""

        def decode(self, payload: str | None) -> Any:
            routes = _decoded(super().decode, payload, notes)
            return np.empty((0, 0, 0)) if routes is None else routes

    prompts, completions, routes, logprobs = [], [], [], []
    try:
        client = Client(base_url=url, routes=True)
        info, version = client.get_server_info(), client.version
        for part in sampling.parts:
            answer = client.generate(
                part,
                temperature=sampling.temperature,
                max_tokens=sampling.new_tokens,
                generation_kwargs={"ignore_eos": True},
            )
            prompts += answer["prompt_ids"]
            completions += answer["completion_ids"]
            routes += [ids if len(ids) else None for ids in client.take_routes()]
            logprobs += _sampled(answer)
    except Exception as error:  # TRL raises plain ones for what the server answers
        raise _no_server(url, error) from error
    return VerifiedRollout(
        f"vLLM {version} at {url}",
        prompts,
        completions,
        routes,
        logprobs if len(logprobs) == len(completions) else None,
        logprobs_mode=(info.get("model_config") or {}).get("logprobs_mode"),
        version=version,
        notes=notes,
    )


def _sampled(answer: dict[str, Any]) -> list[torch.Tensor]:
    """(C,) of each completion: of the token that was sampled, among those that were scored."""
    if answer["logprobs"] is None:
        return []
    found = []
    for tokens, ids, values in zip(
        answer["completion_ids"], answer["logprob_token_ids"], answer["logprobs"], strict=True
    ):
        steps = [
            value[named.index(token)] if token in named else None
            for token, named, value in zip(tokens, ids, values, strict=True)
        ]
        found.append(torch.tensor([float("nan") if value is None else value for value in steps]))
    return found
