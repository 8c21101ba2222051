"""`trl-r3 bench gating`: what the op costs beside eager PyTorch, torch.compile and a plain copy.

Shape legend: T tokens, E experts, K experts per token.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from trl_r3.gating.contract import RowStatus
from trl_r3.gating.masked_topk import masked_topk_gating
from trl_r3.gating.native import native_kernels
from trl_r3.gating.reference import masked_topk_gating_ref
from trl_r3.records.record import MISSING

SOFTMAX = 0  # index in contract.SCORES
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Shape:
    """One gate of a model and the number of tokens it sees."""

    num_tokens: int
    num_experts: int
    top_k: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"T={self.num_tokens:,} E={self.num_experts} k={self.top_k} {str(self.dtype)[6:]}"


SHAPES = (
    Shape(65_536, 128, 8, torch.bfloat16),
    Shape(2_048, 128, 8, torch.bfloat16),
    Shape(65_536, 256, 8, torch.float32),
    Shape(65_536, 512, 10, torch.bfloat16),
    Shape(65_536, 8, 2, torch.bfloat16),
)


@dataclass(frozen=True)
class Inputs:
    """One set of tensors: logits (T, E), recorded (T, K) int16, the same as int64, incoming gradient (T, K)."""

    logits: torch.Tensor
    recorded: torch.Tensor
    ids: torch.Tensor
    grad: torch.Tensor


@dataclass
class Row:
    """One line of the table; times are microseconds a call."""

    shape: Shape
    name: str
    op: float
    necessary_bytes: int
    eager: float = math.nan
    compiled: float = math.nan
    copy_bandwidth: float = math.nan  # GB/s

    def __str__(self) -> str:
        bandwidth = self.necessary_bytes / self.op * 1e-3  # GB/s
        cells = [str(self.shape), self.name, f"{self.op:.1f}", f"{bandwidth:.1f}"]
        cells += [f"{bandwidth / self.copy_bandwidth:.2f}", f"{self.eager:.1f}", f"{self.eager / self.op:.1f}x"]
        cells += (
            ["-", "-"] if math.isnan(self.compiled) else [f"{self.compiled:.1f}", f"{self.compiled / self.op:.1f}x"]
        )
        return "| " + " | ".join(cells) + " |"


HEADER = (
    "| shape | call | us | GB/s | of copy | eager us | eager / op | compiled us | compiled / op |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """A record that differs from the live selection in a few rows, as that of another engine does."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.num_tokens, shape.num_experts)
    logits = torch.randn(size, device=device, generator=generator)
    noise = torch.randn(size, device=device, generator=generator)
    ids = (logits + 0.01 * noise).topk(shape.top_k, dim=-1).indices
    grad = torch.randn(shape.num_tokens, shape.top_k, device=device, generator=generator)
    return Inputs(logits.to(shape.dtype), ids.to(torch.int16), ids, grad.to(shape.dtype))


def op_forward(x: Inputs, replay: bool, compare_live: bool, renormalize: bool = True) -> torch.Tensor:
    """The raw op: the public function adds host time, which is measured apart."""
    recorded = x.recorded if replay else None
    return torch.ops.trl_r3.gating_forward(
        x.logits, x.grad.shape[1], recorded, None, SOFTMAX, renormalize, 1, 1, False, 0.0, 1.0, x.logits.dtype,
        compare_live,
    )  # fmt: skip


def op_backward(x: Inputs, renormalize: bool) -> torch.Tensor:
    """Gradient of the logits by the raw op."""
    return torch.ops.trl_r3.gating_backward(x.grad, x.logits, x.ids, SOFTMAX, renormalize, 0.0, 1.0)


def eager_live(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What Transformers computes for Qwen3-MoE."""
    weights, ids = torch.softmax(x.logits, -1, dtype=torch.float32).topk(x.grad.shape[1], dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(x.logits.dtype), ids


def eager_weights(logits: torch.Tensor, ids: torch.Tensor, renormalize: bool) -> torch.Tensor:
    """The same with the ids given, unchecked."""
    weights = torch.softmax(logits, -1, dtype=torch.float32).gather(1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights).to(logits.dtype)


def eager_agreement(x: Inputs) -> tuple[torch.Tensor, ...]:
    """Replay with the status of the op: range, duplicates, missing rows, and the live set beside it."""
    ordered = x.ids.sort(-1).values
    sound = ((ordered >= 0) & (ordered < x.logits.shape[1])).all(-1) & (ordered[:, 1:] != ordered[:, :-1]).all(-1)
    missing = (x.ids == MISSING).any(-1)
    differs = (x.logits.topk(x.grad.shape[1], dim=-1).indices.sort(-1).values != ordered).any(-1)
    unsound = torch.where(missing, RowStatus.MISSING, RowStatus.INVALID)
    return eager_weights(x.logits, x.ids, True), torch.where(sound, differs, unsound).to(torch.uint8)


def both_ways(x: Inputs, renormalize: bool, weights_of: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Forward and backward by autograd."""
    logits = x.logits.detach().requires_grad_()
    return torch.autograd.grad(weights_of(logits, x.ids, renormalize), logits, x.grad)[0]


def necessary_bytes(shape: Shape, name: str) -> int:
    """Bytes that have to move: logits, weights or their gradient, int16 record, int64 ids."""
    size = shape.dtype.itemsize
    matrix, slots = shape.num_tokens * shape.num_experts * size, shape.num_tokens * shape.top_k
    weights_and_ids = slots * (size + 8)
    if name == "live":
        return matrix + weights_and_ids
    if name == "backward":
        return matrix + weights_and_ids + slots * size
    return 2 * matrix + weights_and_ids if name == "backward, dense" else matrix + weights_and_ids + 2 * slots


def time_on_cpu(call: Callable[[Inputs], object], sets: list[Inputs], repeats: int) -> float:
    """Median microseconds a call."""
    call(sets[0])
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(sets[i % len(sets)])
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def time_on_cuda(call: Callable[[Inputs], object], sets: list[Inputs], repeats: int) -> float:
    """Median microseconds a call inside a CUDA graph that goes round all input sets, so that launches cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in [*sets, sets[0]]:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in sets:
            call(x)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times)


def check(shape: Shape, x: Inputs) -> None:
    """Raise `AssertionError` where the op is not the float64 reference on the first rows of `x`."""
    rows = min(512, shape.num_tokens)
    head = Inputs(x.logits[:rows], x.recorded[:rows], x.ids[:rows], x.grad[:rows])
    for recorded in (head.recorded, None):
        weights, ids, status = op_forward(head, recorded is not None, True)
        given = None if recorded is None else recorded.cpu()
        exact = masked_topk_gating_ref(head.logits.double().cpu(), shape.top_k, given)
        assert torch.equal(ids.cpu(), exact.expert_ids), f"{shape}: ids differ from the float64 reference"
        assert torch.equal(status.cpu(), exact.status), f"{shape}: status differs from the float64 reference"
        torch.testing.assert_close(weights.double().cpu(), exact.weights, rtol=TOLERANCE[shape.dtype], atol=1e-7)
    for renormalize in (True, False):
        logits = head.logits.double().cpu().requires_grad_()
        exact_weights = masked_topk_gating_ref(logits, shape.top_k, head.ids.cpu(), renormalize=renormalize).weights
        (exact_grad,) = torch.autograd.grad(exact_weights, logits, head.grad.double().cpu())
        tolerance = TOLERANCE[shape.dtype]
        got = op_backward(head, renormalize).double().cpu()
        torch.testing.assert_close(got, exact_grad, rtol=tolerance, atol=tolerance)


def measure_copy(device: torch.device, timer: Callable, repeats: int, megabytes: int) -> float:
    """GB/s of a copy on the device, bytes read and bytes written counted."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    microseconds = timer(lambda _: target.copy_(source), [None], repeats)
    return 2 * source.numel() / microseconds * 1e-3


def measure_shape(shape: Shape, sets: list[Inputs], timed: Callable[..., float], compile_too: bool) -> list[Row]:
    """Rows of one shape. A backward of eager or compiled code is what both ways take beyond the forward."""
    eager: dict[str, Callable[[Inputs], object]] = {
        "live": eager_live,
        "replay": lambda x: eager_weights(x.logits, x.ids, True),
        "replay, agreement": eager_agreement,
        "replay, dense": lambda x: eager_weights(x.logits, x.ids, False),
    }
    op: dict[str, Callable[[Inputs], object]] = {
        "live": lambda x: op_forward(x, False, False),
        "replay": lambda x: op_forward(x, True, False),
        "replay, agreement": lambda x: op_forward(x, True, True),
        "replay, dense": lambda x: op_forward(x, True, False, False),
        "backward": lambda x: op_backward(x, True),
        "backward, dense": lambda x: op_backward(x, False),
    }
    rows = {name: Row(shape, name, timed(call, sets), necessary_bytes(shape, name)) for name, call in op.items()}
    for name, call in eager.items():
        rows[name].eager = timed(call, sets)
    compiled_weights = torch.compile(eager_weights, dynamic=False) if compile_too else None
    if compile_too:
        for name, call in eager.items():
            rows[name].compiled = timed(torch.compile(call, dynamic=False), sets)
    for name, forward, renormalize in (("backward", "replay", True), ("backward, dense", "replay, dense", False)):
        both = timed(lambda x, flag=renormalize: both_ways(x, flag, eager_weights), sets)
        rows[name].eager = both - rows[forward].eager
        if compiled_weights is not None:
            both = timed(lambda x, flag=renormalize: both_ways(x, flag, compiled_weights), sets)
            rows[name].compiled = both - rows[forward].compiled
    return list(rows.values())


def measure_host(device: torch.device, calls: int) -> float:
    """Microseconds of host time for one call of the public function on 16 tokens, gradient wanted."""
    logits = torch.randn(16, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    recorded = masked_topk_gating(logits, 8).expert_ids.to(torch.int16)
    start = time.perf_counter()
    for _ in range(calls):
        masked_topk_gating(logits, 8, recorded)
    return (time.perf_counter() - start) / calls * 1e6


def run(smoke: bool = False, device: str | None = None) -> int:
    """
    Check the op against float64, measure it, and print a Markdown table.

    Args:
        smoke (`bool`, *optional*, defaults to `False`):
            Few tokens and repeats: shows that everything works, its times mean nothing.
        device (`str`, *optional*, defaults to `"cuda"`, with `smoke` to `"cpu"` where there is no GPU):
            Device to measure.

    Returns:
        `int`: exit status, 2 where there is no GPU to measure.
    """
    if device is None:
        device = "cpu" if smoke and not torch.cuda.is_available() else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("It measures a GPU and finds none. Use --smoke, or --device cpu.")
        return 2
    on_cuda, place = device == "cuda", torch.device(device)
    timer, repeats = (time_on_cuda if on_cuda else time_on_cpu), (3 if smoke else 30)
    cache = torch.cuda.get_device_properties(place).L2_cache_size if on_cuda else 32 << 20
    kernels = "compiled" if device in native_kernels() else "PyTorch"
    name = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {kernels} kernels{', SMOKE: times mean nothing' if smoke else ''}")
    bandwidth = measure_copy(place, timer, repeats, 16 if smoke else 1024 if on_cuda else 256)
    print(f"copy on the device: {bandwidth:.1f} GB/s\n\n{HEADER}")
    for index, shape in enumerate(SHAPES):
        shape = replace(shape, num_tokens=256) if smoke else shape
        matrix = shape.num_tokens * shape.num_experts * shape.dtype.itemsize
        count = 2 if smoke else min(64, math.ceil(3 * cache / matrix))
        sets = [make_inputs(shape, place, seed) for seed in range(count)]
        check(shape, sets[0])
        for row in measure_shape(shape, sets, partial(timer, repeats=repeats), index == 0 and not smoke):
            row.copy_bandwidth = bandwidth
            print(row, flush=True)
    print(f"\nhost time of one call: {measure_host(place, 10 if smoke else 1000):.1f} us")
    return 0
