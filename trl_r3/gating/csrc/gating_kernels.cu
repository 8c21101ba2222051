// CUDA kernels of masked top-k gating: the row programs with 4, 8 or 32 lanes of a warp, and the choice among them.
#include <algorithm>

#include "cuda_launch.h"
#include "gate_row16.h"
#include "gate_row_backward.h"

namespace gating {
namespace {

constexpr int kWarp = 32;
constexpr int kFastThreads = 256;
constexpr int kWarpThreads = 128;
constexpr int kBackwardThreads = 64;
// Blocks a multiprocessor should hold: enough to hide latency, few enough that nothing is spilled.
constexpr int kFastBlocks = 4;
constexpr int kWarpBlocks = 6;
constexpr int kBackwardBlocks = 12;
constexpr int kBackwardLanes = 8;

// Size neighbouring lanes of a warp. Groups of one warp may take different branches, so each names its own lanes.
template <int Size>
struct Lanes {
  static constexpr int size = Size;

  __device__ __forceinline__ int id() const { return threadIdx.x % Size; }
  __device__ __forceinline__ unsigned mask() const {
    constexpr unsigned group = 0xffffffffu >> (kWarp - Size);
    return group << (threadIdx.x % kWarp / Size * Size);
  }
  template <class T>
  __device__ __forceinline__ T shfl(T x, int lane) const {
    return __shfl_sync(mask(), x, lane, Size);
  }
  template <class T>
  __device__ __forceinline__ T shfl_xor(T x, int lanes) const {
    return __shfl_xor_sync(mask(), x, lanes, Size);
  }
  template <class T>
  __device__ __forceinline__ T max(T x) const {
    if constexpr (Size == kWarp) {
      return __reduce_max_sync(mask(), x);
    } else {
      for (int step = 1; step < Size; step *= 2) x = ::max(x, shfl_xor(x, step));
      return x;
    }
  }
  template <class T>
  __device__ __forceinline__ T min(T x) const {
    if constexpr (Size == kWarp) {
      return __reduce_min_sync(mask(), x);
    } else {
      for (int step = 1; step < Size; step *= 2) x = ::min(x, shfl_xor(x, step));
      return x;
    }
  }
  template <class T>
  __device__ __forceinline__ T sum(T x) const {
    for (int step = 1; step < Size; step *= 2) x += shfl_xor(x, step);
    return x;
  }
  __device__ __forceinline__ bool any(bool x) const { return __any_sync(mask(), x) != 0; }
  __device__ __forceinline__ void sync() const { __syncwarp(mask()); }
  template <class T>
  __device__ __forceinline__ void zero(T* row, int count) const {
    const int chunks = int(count * sizeof(T) / sizeof(Chunk));
    for (int i = id(); i < chunks; i += Size) reinterpret_cast<Chunk*>(row)[i] = Chunk{};
    for (int i = chunks * int(sizeof(Chunk) / sizeof(T)) + id(); i < count; i += Size) row[i] = T{};
  }
};

template <class Logit, int KP>
__global__ void __launch_bounds__(kFastThreads, kFastBlocks) forward_fast(const ForwardLaunch call) {
  const Lanes<kQuad> lane;
  const int64_t rows_at_once = int64_t(gridDim.x) * (kFastThreads / kQuad);
  for (int64_t row = int64_t(blockIdx.x) * (kFastThreads / kQuad) + threadIdx.x / kQuad; row < call.num_tokens;
       row += rows_at_once) {
    const Logit* x = static_cast<const Logit*>(call.logits) + row * call.select.num_experts;
    const RowStatus status = gate_row16<KP>(lane, row, x, call.recorded, call.id_type, call.formula, call.select,
                                            call.weights, call.weights_type, call.expert_ids);
    if (lane.id() == 0) call.status[row] = status;
  }
}

__host__ __device__ inline int warp_scratch(const Selection& select) {
  return select.num_experts + select.n_group + 2 * select.top_k;  // words
}

template <class Logit>
__global__ void __launch_bounds__(kWarpThreads, kWarpBlocks) forward_warp(const ForwardLaunch call) {
  extern __shared__ int32_t words[];
  const Lanes<kWarp> lane;
  constexpr int kWarps = kWarpThreads / kWarp;
  const int warp = threadIdx.x / kWarp;
  int32_t* mine = words + warp * warp_scratch(call.select);
  int32_t* const group = mine + call.select.num_experts;
  int32_t* const value = group + call.select.n_group;
  const Scratch<float> scratch{mine, group, reinterpret_cast<float*>(value), value + call.select.top_k};
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < call.num_tokens; row += int64_t(gridDim.x) * kWarps) {
    const Logit* x = static_cast<const Logit*>(call.logits) + row * call.select.num_experts;
    const RowStatus status = gate_row(lane, row, x, call.recorded, call.id_type, call.bias, call.formula, call.select,
                                      scratch, call.weights, call.weights_type, call.expert_ids);
    if (lane.id() == 0) call.status[row] = status;
    lane.sync();
  }
}

// Words of a staged row, a multiple of 16 bytes so that every row starts aligned.
template <class Logit>
__host__ __device__ inline int stage_words(int num_experts) {
  return int((num_experts * sizeof(Logit) + 15) / 16 * 4);
}

template <class Logit>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks) backward_rows(const BackwardLaunch call) {
  extern __shared__ __align__(16) uint32_t staged[];
  constexpr int kRows = kBackwardThreads / kBackwardLanes;
  const Lanes<kBackwardLanes> lane;
  const int group = threadIdx.x / kBackwardLanes;
  Logit* const stage = reinterpret_cast<Logit*>(staged + group * stage_words<Logit>(call.num_experts));
  float* const value = reinterpret_cast<float*>(staged + kRows * stage_words<Logit>(call.num_experts)) +
                       group * call.top_k;
  const int row_bytes = call.num_experts * int(sizeof(Logit));
  const bool chunked = row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(call.grad_logits) % 16 == 0;
  for (int64_t row = int64_t(blockIdx.x) * kRows + group; row < call.num_tokens; row += int64_t(gridDim.x) * kRows) {
    const int64_t offset = row * call.num_experts;
    gate_row_backward(lane, row, static_cast<const Logit*>(call.logits) + offset, call.expert_ids, call.grad_weights,
                      call.grad_type, call.formula, call.num_experts, call.top_k, value, stage);
    Logit* const out = static_cast<Logit*>(call.grad_logits) + offset;
    if (chunked) {
      for (int i = lane.id(); i < row_bytes / 16; i += kBackwardLanes) {
        reinterpret_cast<Chunk*>(out)[i] = reinterpret_cast<const Chunk*>(stage)[i];
      }
    } else {
      for (int e = lane.id(); e < call.num_experts; e += kBackwardLanes) out[e] = stage[e];
    }
    lane.sync();
  }
}

// Blocks for so many rows, and no more than fill the device: further rows come round in the kernel's loop.
cudaError_t count_blocks(int64_t num_rows, int rows_per_block, int threads_per_block, unsigned* blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t needed = (num_rows + rows_per_block - 1) / rows_per_block;
  *blocks = unsigned(std::min<int64_t>(needed, int64_t(processors) * (2048 / threads_per_block)));
  return error;
}

template <class Logit>
cudaError_t launch_fast(const ForwardLaunch& call, cudaStream_t stream) {
  unsigned blocks = 0;
  const cudaError_t error = count_blocks(call.num_tokens, kFastThreads / kQuad, kFastThreads, &blocks);
  if (error != cudaSuccess) return error;
  if (call.select.top_k <= 8) {
    forward_fast<Logit, 8><<<blocks, kFastThreads, 0, stream>>>(call);
  } else {
    forward_fast<Logit, 16><<<blocks, kFastThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

template <class Logit>
cudaError_t launch_warp(const ForwardLaunch& call, cudaStream_t stream) {
  unsigned blocks = 0;
  const cudaError_t error = count_blocks(call.num_tokens, kWarpThreads / kWarp, kWarpThreads, &blocks);
  if (error != cudaSuccess) return error;
  const size_t shared = kWarpThreads / kWarp * warp_scratch(call.select) * sizeof(int32_t);
  forward_warp<Logit><<<blocks, kWarpThreads, shared, stream>>>(call);
  return cudaGetLastError();
}

bool takes_fast_path(const ForwardLaunch& call) {
  return call.logit_type != Real::fp32 && call.bias == nullptr && call.select.n_group == 1 &&
         call.select.num_experts % (kQuad * kChunk) == 0 && call.select.top_k <= 16 &&
         reinterpret_cast<uintptr_t>(call.logits) % sizeof(Chunk) == 0;
}

template <class Logit>
cudaError_t launch_backward_rows(const BackwardLaunch& call, cudaStream_t stream) {
  constexpr int kRows = kBackwardThreads / kBackwardLanes;
  unsigned blocks = 0;
  const cudaError_t error = count_blocks(call.num_tokens, kRows, kBackwardThreads, &blocks);
  if (error != cudaSuccess) return error;
  const size_t shared = kRows * (stage_words<Logit>(call.num_experts) + call.top_k) * sizeof(uint32_t);
  backward_rows<Logit><<<blocks, kBackwardThreads, shared, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_forward(const ForwardLaunch& call, cudaStream_t stream) {
  if (call.num_tokens == 0) return cudaSuccess;
  if (takes_fast_path(call)) {
    return call.logit_type == Real::bf16 ? launch_fast<Bf16>(call, stream) : launch_fast<Fp16>(call, stream);
  }
  if (call.logit_type == Real::bf16) return launch_warp<Bf16>(call, stream);
  return call.logit_type == Real::fp16 ? launch_warp<Fp16>(call, stream) : launch_warp<float>(call, stream);
}

cudaError_t launch_backward(const BackwardLaunch& call, cudaStream_t stream) {
  if (call.num_tokens == 0) return cudaSuccess;
  if (call.logit_type == Real::bf16) return launch_backward_rows<Bf16>(call, stream);
  return call.logit_type == Real::fp16 ? launch_backward_rows<Fp16>(call, stream)
                                       : launch_backward_rows<float>(call, stream);
}

}  // namespace gating
