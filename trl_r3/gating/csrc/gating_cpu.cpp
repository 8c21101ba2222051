// CPU kernels of masked top-k gating: the row programs with one lane, rows shared out among the threads of PyTorch.
#include <vector>

#include "gate_row_backward.h"
#include "host.h"

// One binary carries the hot loops for the vector units of several generations and picks at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GATING_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GATING_CLONES
#endif

// Read in the file by native.py, which loads no kernels of another version. OPS_VERSION there is the same number.
extern "C" __attribute__((used, visibility("default"))) const char trl_r3_gating_version[] =
    "trl_r3 gating ops, version 1;";

namespace gating {
namespace {

constexpr int64_t kGrain = 64;  // rows a thread takes at least

struct Alone {
  static constexpr int size = 1;
  GATING_FN int id() const { return 0; }
  template <class T>
  GATING_FN T max(T x) const {
    return x;
  }
  template <class T>
  GATING_FN T min(T x) const {
    return x;
  }
  template <class T>
  GATING_FN T sum(T x) const {
    return x;
  }
  GATING_FN bool any(bool x) const { return x; }
  GATING_FN void sync() const {}
  template <class T>
  GATING_FN void zero(T* row, int count) const {
    std::memset(row, 0, sizeof(T) * count);
  }
};

// K = 0 takes any number of slots.
template <class Logit, int K>
GATING_FN void forward_rows(const Forward& call, int64_t begin, int64_t end) {
  using T = typename Compute<Logit>::type;
  Selection select = call.select;
  if constexpr (K > 0) select.top_k = K;
  const Formula<T> formula = call.formula<T>();
  std::vector<typename Key<T>::type> key(select.num_experts), group(select.n_group);
  std::vector<T> value(select.top_k);
  std::vector<int32_t> id(select.top_k);
  const Scratch<T> scratch{key.data(), group.data(), value.data(), id.data()};
  void* weights = call.weights.mutable_data_ptr();
  auto* expert_ids = static_cast<int64_t*>(call.expert_ids.mutable_data_ptr());
  auto* status = static_cast<uint8_t*>(call.status.mutable_data_ptr());
  for (int64_t row = begin; row < end; ++row) {
    const Logit* x = static_cast<const Logit*>(call.logits) + row * select.num_experts;
    status[row] = gate_row(Alone{}, row, x, call.recorded, call.id_type, static_cast<const T*>(call.bias), formula,
                           select, scratch, weights, call.weights_type, expert_ids);
  }
}

template <class Logit>
GATING_FN void backward_rows(const Backward& call, int64_t begin, int64_t end) {
  using T = typename Compute<Logit>::type;
  const Formula<T> formula = call.formula<T>();
  std::vector<T> value(call.top_k);
  auto* grad_logits = static_cast<Logit*>(call.grad_logits.mutable_data_ptr());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * call.num_experts;
    gate_row_backward(Alone{}, row, static_cast<const Logit*>(call.logits) + offset, call.expert_ids,
                      call.grad_weights, call.grad_type, formula, call.num_experts, call.top_k, value.data(),
                      grad_logits + offset);
  }
}

// Clones need functions that are no templates.
#define GATING_ROWS(Logit)                                                                \
  GATING_CLONES void forward_##Logit(const Forward& call, int64_t begin, int64_t end) {   \
    if (call.select.top_k == 8) forward_rows<Logit, 8>(call, begin, end);                 \
    else forward_rows<Logit, 0>(call, begin, end);                                        \
  }                                                                                       \
  GATING_CLONES void backward_##Logit(const Backward& call, int64_t begin, int64_t end) { \
    backward_rows<Logit>(call, begin, end);                                               \
  }
GATING_ROWS(Bf16)
GATING_ROWS(Fp16)
GATING_ROWS(float)
GATING_ROWS(double)
#undef GATING_ROWS

std::tuple<Tensor, Tensor, Tensor> forward_cpu(Tensor logits, int64_t top_k, std::optional<Tensor> recorded,
                                               std::optional<Tensor> bias, int64_t score, bool renormalize,
                                               int64_t n_group, int64_t topk_group, bool group_max, double eps,
                                               double scale, ScalarType weights_dtype, bool compare_live) {
  Forward call = prepare_forward(logits, top_k, recorded, bias, score, renormalize, n_group, topk_group, group_max,
                                 eps, scale, weights_dtype, compare_live);
  auto* const run = call.logit_type == Real::bf16   ? forward_Bf16
                    : call.logit_type == Real::fp16 ? forward_Fp16
                    : call.logit_type == Real::fp32 ? forward_float
                                                    : forward_double;
  torch::stable::parallel_for(0, call.num_tokens, kGrain,
                              [&](int64_t begin, int64_t end) { run(call, begin, end); });
  return {call.weights, call.expert_ids, call.status};
}

Tensor backward_cpu(Tensor grad_weights, Tensor logits, Tensor expert_ids, int64_t score, bool renormalize,
                    double eps, double scale) {
  Backward call = prepare_backward(grad_weights, logits, expert_ids, score, renormalize, eps, scale);
  const auto num_experts = static_cast<uint64_t>(call.num_experts);
  bool sound = true;
  for (int64_t i = 0; i < call.num_tokens * call.top_k; ++i) sound &= uint64_t(call.expert_ids[i]) < num_experts;
  STD_TORCH_CHECK(sound, "expert_ids holds an id outside [0, ", call.num_experts, ")");
  auto* const run = call.logit_type == Real::bf16   ? backward_Bf16
                    : call.logit_type == Real::fp16 ? backward_Fp16
                    : call.logit_type == Real::fp32 ? backward_float
                                                    : backward_double;
  torch::stable::parallel_for(0, call.num_tokens, kGrain,
                              [&](int64_t begin, int64_t end) { run(call, begin, end); });
  return call.grad_logits;
}

}  // namespace
}  // namespace gating

STABLE_TORCH_LIBRARY_IMPL(trl_r3, CPU, m) {
  m.impl("gating_forward", TORCH_BOX(&gating::forward_cpu));
  m.impl("gating_backward", TORCH_BOX(&gating::backward_cpu));
}
