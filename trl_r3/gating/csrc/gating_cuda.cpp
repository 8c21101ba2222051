// CUDA kernels of masked top-k gating, registered with torch. The kernels themselves are in gating_kernels.cu.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda_launch.h"
#include "host.h"

namespace gating {
namespace {

// The stream that torch is on. The function that tells it is in the CUDA library of torch, which a build against a CPU
// torch cannot link and which is loaded already wherever a tensor is on a GPU.
cudaStream_t current_stream(const Tensor& tensor) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA streams: aoti_torch_get_current_cuda_stream is absent");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "the gating kernel could not be launched: ", cudaGetErrorString(error));
}

void check_size(int64_t num_experts, int64_t top_k, Real logit_type) {
  STD_TORCH_CHECK(logit_type != Real::fp64 && num_experts <= kMaxExperts && top_k <= kMaxTopK,
                  "the CUDA kernels take 16- and 32-bit logits of at most ", kMaxExperts, " experts and top_k ",
                  kMaxTopK, ", got ", num_experts, " and ", top_k, ": call masked_topk_gating, which covers the rest");
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(Tensor logits, int64_t top_k, std::optional<Tensor> recorded,
                                                std::optional<Tensor> bias, int64_t score, bool renormalize,
                                                int64_t n_group, int64_t topk_group, bool group_max, double eps,
                                                double scale, ScalarType weights_dtype, bool compare_live) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Forward call = prepare_forward(logits, top_k, recorded, bias, score, renormalize, n_group, topk_group, group_max,
                                 eps, scale, weights_dtype, compare_live);
  check_size(call.select.num_experts, top_k, call.logit_type);
  STD_TORCH_CHECK(n_group <= kMaxGroups, "the CUDA kernels take at most ", kMaxGroups, " groups, got ", n_group);
  const ForwardLaunch launch{call.num_tokens,
                             call.logit_type,
                             call.weights_type,
                             call.id_type,
                             call.formula<float>(),
                             call.select,
                             call.logits,
                             call.recorded,
                             static_cast<const float*>(call.bias),
                             call.weights.mutable_data_ptr(),
                             static_cast<int64_t*>(call.expert_ids.mutable_data_ptr()),
                             static_cast<uint8_t*>(call.status.mutable_data_ptr())};
  check_launch(launch_forward(launch, current_stream(logits)));
  return {call.weights, call.expert_ids, call.status};
}

Tensor backward_cuda(Tensor grad_weights, Tensor logits, Tensor expert_ids, int64_t score, bool renormalize,
                     double eps, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Backward call = prepare_backward(grad_weights, logits, expert_ids, score, renormalize, eps, scale);
  check_size(call.num_experts, call.top_k, call.logit_type);
  const BackwardLaunch launch{call.num_tokens,   call.num_experts, call.top_k,
                              call.logit_type,   call.grad_type,   call.formula<float>(),
                              call.grad_weights, call.logits,      call.expert_ids,
                              call.grad_logits.mutable_data_ptr()};
  check_launch(launch_backward(launch, current_stream(logits)));
  return call.grad_logits;
}

}  // namespace
}  // namespace gating

STABLE_TORCH_LIBRARY_IMPL(trl_r3, CUDA, m) {
  m.impl("gating_forward", TORCH_BOX(&gating::forward_cuda));
  m.impl("gating_backward", TORCH_BOX(&gating::backward_cuda));
}
