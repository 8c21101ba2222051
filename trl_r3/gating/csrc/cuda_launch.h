// The seam between the registration, which knows torch, and the kernels, which know CUDA: plain arguments.
#pragma once

#include <cuda_runtime_api.h>

#include "gate_row.h"

namespace gating {

constexpr int kMaxExperts = 1024;  // one row fits the shared memory of a block
constexpr int kMaxTopK = 32;
constexpr int kMaxGroups = 32;

struct ForwardLaunch {
  int64_t num_tokens;
  Real logit_type, weights_type;
  Id id_type;
  Formula<float> formula;
  Selection select;
  const void* logits;
  const void* recorded;
  const float* bias;
  void* weights;
  int64_t* expert_ids;
  uint8_t* status;
};

struct BackwardLaunch {
  int64_t num_tokens;
  int num_experts, top_k;
  Real logit_type, grad_type;
  Formula<float> formula;
  const void* grad_weights;
  const void* logits;
  const int64_t* expert_ids;
  void* grad_logits;
};

// Both put their work on the stream and return at once. Logits are bfloat16, float16 or float32.
cudaError_t launch_forward(const ForwardLaunch& call, cudaStream_t stream);
cudaError_t launch_backward(const BackwardLaunch& call, cudaStream_t stream);

}  // namespace gating
