// What the CPU and the CUDA kernels share on the host: checked arguments and allocated results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "gate_row.h"

namespace gating {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Real real_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::BFloat16: return Real::bf16;
    case ScalarType::Half: return Real::fp16;
    case ScalarType::Float: return Real::fp32;
    case ScalarType::Double: return Real::fp64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be bfloat16, float16, float32 or float64");
  return Real::fp32;
}

inline Id id_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return Id::u8;
    case ScalarType::Short: return Id::i16;
    case ScalarType::Int: return Id::i32;
    case ScalarType::Long: return Id::i64;
    default: break;
  }
  STD_TORCH_CHECK(false, "recorded must be uint8, int16, int32 or int64");
  return Id::i64;
}

inline void check_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(),
                  name, " must be a contiguous (", rows, ", ", columns, ") tensor");
}

// Uninitialised memory beside `like`. The C function is several times faster than a call through the dispatcher.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const int64_t rows = *sizes.begin(), columns = sizes.size() == 2 ? sizes.begin()[1] : 1;
  const int64_t shape[2] = {rows, columns}, strides[2] = {sizes.size() == 2 ? columns : 1, 1};
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), shape, strides, dtype, device_type,
                                                         device_index, &handle));
  return Tensor(handle);
}

// A forward call, checked, with its results allocated.
struct Forward {
  int64_t num_tokens;
  Real logit_type, weights_type;
  Id id_type = Id::i64;
  Score score;
  bool renormalize;
  double eps, scale;
  Selection select;
  const void* logits;
  const void* recorded = nullptr;
  const void* bias = nullptr;
  Tensor weights, expert_ids, status;

  template <class T>
  Formula<T> formula() const {
    return {score, renormalize, T(eps), T(scale)};
  }
};

inline Forward prepare_forward(const Tensor& logits, int64_t top_k, const std::optional<Tensor>& recorded,
                               const std::optional<Tensor>& bias, int64_t score, bool renormalize, int64_t n_group,
                               int64_t topk_group, bool group_max, double eps, double scale,
                               ScalarType weights_dtype, bool compare_live) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous (T, E) tensor");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  STD_TORCH_CHECK(num_experts <= std::numeric_limits<int32_t>::max() && top_k >= 1 && top_k <= num_experts,
                  "top_k is ", top_k, ", but there are ", num_experts, " experts");
  STD_TORCH_CHECK(score >= 0 && score <= 3, "score is ", score, ", expected 0 to 3");
  STD_TORCH_CHECK(n_group >= 1 && num_experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group &&
                      topk_group * (num_experts / n_group) >= top_k,
                  "n_group=", n_group, " and topk_group=", topk_group, " do not fit ", num_experts,
                  " experts and top_k=", top_k);
  Forward call;
  call.num_tokens = num_tokens;
  call.logit_type = real_of(logits.scalar_type(), "logits");
  call.weights_type = real_of(weights_dtype, "weights");
  call.score = static_cast<Score>(score);
  call.renormalize = renormalize;
  call.eps = eps;
  call.scale = scale;
  call.select = {int(num_experts), int(top_k), int(n_group), int(topk_group), group_max, compare_live};
  call.logits = logits.const_data_ptr();
  if (recorded.has_value()) {
    check_matrix(*recorded, num_tokens, top_k, "recorded");
    call.id_type = id_of(recorded->scalar_type());
    STD_TORCH_CHECK(call.id_type != Id::u8 || num_experts <= 255, "uint8 ids hold at most 255 experts, but there are ",
                    num_experts);
    call.recorded = recorded->const_data_ptr();
  }
  if (bias.has_value()) {
    const ScalarType wanted = call.logit_type == Real::fp64 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == num_experts && bias->is_contiguous() &&
                        bias->scalar_type() == wanted,
                    "bias must be a contiguous (", num_experts, ",) tensor in the dtype of the arithmetic");
    call.bias = bias->const_data_ptr();
  }
  call.weights = allocate(logits, {num_tokens, top_k}, weights_dtype);
  call.expert_ids = allocate(logits, {num_tokens, top_k}, ScalarType::Long);
  call.status = allocate(logits, {num_tokens}, ScalarType::Byte);
  return call;
}

// A backward call, checked, with its result allocated.
struct Backward {
  int64_t num_tokens;
  int num_experts, top_k;
  Real logit_type, grad_type;
  Score score;
  bool renormalize;
  double eps, scale;
  const void* grad_weights;
  const void* logits;
  const int64_t* expert_ids;
  Tensor grad_logits;

  template <class T>
  Formula<T> formula() const {
    return {score, renormalize, T(eps), T(scale)};
  }
};

inline Backward prepare_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                                 int64_t score, bool renormalize, double eps, double scale) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous (T, E) tensor");
  STD_TORCH_CHECK(expert_ids.dim() == 2 && expert_ids.scalar_type() == ScalarType::Long, "expert_ids must be int64");
  STD_TORCH_CHECK(score >= 0 && score <= 3, "score is ", score, ", expected 0 to 3");
  const int64_t num_tokens = logits.size(0), top_k = expert_ids.size(1);
  check_matrix(expert_ids, num_tokens, top_k, "expert_ids");
  check_matrix(grad_weights, num_tokens, top_k, "grad_weights");
  Backward call;
  call.num_tokens = num_tokens;
  call.num_experts = int(logits.size(1));
  call.top_k = int(top_k);
  call.logit_type = real_of(logits.scalar_type(), "logits");
  call.grad_type = real_of(grad_weights.scalar_type(), "grad_weights");
  call.score = static_cast<Score>(score);
  call.renormalize = renormalize;
  call.eps = eps;
  call.scale = scale;
  call.grad_weights = grad_weights.const_data_ptr();
  call.logits = logits.const_data_ptr();
  call.expert_ids = static_cast<const int64_t*>(expert_ids.const_data_ptr());
  call.grad_logits = allocate(logits, {num_tokens, logits.size(1)}, logits.scalar_type());
  return call;
}

}  // namespace gating
