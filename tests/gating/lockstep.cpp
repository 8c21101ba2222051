// Runs the row programs of the CUDA kernels on the host. Every lane is a fiber that runs until it meets the others at an
// exchange or a sync; lanes that meet at different places, or of which some have ended, have diverged, which on a GPU
// would hang. The order of lanes changes from stretch to stretch, so that a missing sync shows as a wrong number.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "gate_row16.h"
#include "gate_row_backward.h"

namespace {

using namespace gating;

constexpr size_t kStack = 256 * 1024;
enum Place : int { kNone, kShuffle, kShuffleXor, kMax, kMin, kSum, kAny, kSync, kEnd };

class Group {
 public:
  Group(int size, unsigned seed) : fibers_(size), order_(size), random_(seed) {
    std::iota(order_.begin(), order_.end(), 0);
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  // Whether all lanes took the same way through `program`.
  bool run(const std::function<void(int)>& program) {
    program_ = &program;
    for (size_t lane = 0; lane < fibers_.size(); ++lane) {
      Fiber& fiber = fibers_[lane];
      fiber.place = kNone;
      fiber.meetings = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Group::enter), 2, int(lane), 0);
    }
    Group* const outer = current_;
    current_ = this;
    bool together = true;
    do {
      std::shuffle(order_.begin(), order_.end(), random_);
      for (int lane : order_) swapcontext(&scheduler_, &fibers_[lane].context);
      for (const Fiber& fiber : fibers_) together = together && fiber.place == fibers_[0].place;
    } while (together && fibers_[0].place != kEnd);
    current_ = outer;
    return together;
  }

  // Leaves a value, waits for all lanes, and returns what each of them left. Two boards in turn: a lane that is ahead
  // by one meeting must not overwrite what another has yet to read.
  const uint64_t* meet(int lane, Place place, uint64_t value) {
    Fiber& fiber = fibers_[lane];
    uint64_t* const board = board_[fiber.meetings++ % 2];
    board[lane] = value;
    fiber.place = place;
    swapcontext(&fiber.context, &scheduler_);
    return board;
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Place place;
    int meetings;
  };

  static void enter(int lane, int) {
    Group* const group = current_;
    (*group->program_)(lane);
    group->fibers_[lane].place = kEnd;
  }

  static Group* current_;
  std::vector<Fiber> fibers_;
  std::vector<int> order_;
  std::minstd_rand random_;
  ucontext_t scheduler_;
  const std::function<void(int)>* program_ = nullptr;
  uint64_t board_[2][32];
};

Group* Group::current_ = nullptr;

template <class T>
uint64_t pack(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <int Size>
struct Lane {
  static constexpr int size = Size;
  Group* group;
  int lane;

  int id() const { return lane; }
  template <class T>
  T shfl(T x, int from) const {
    return unpack<T>(group->meet(lane, kShuffle, pack(x))[from]);
  }
  template <class T>
  T shfl_xor(T x, int lanes) const {
    return unpack<T>(group->meet(lane, kShuffleXor, pack(x))[lane ^ lanes]);
  }
  template <class T, class Join>
  T all(T x, Place place, Join join) const {
    const uint64_t* board = group->meet(lane, place, pack(x));
    T result = unpack<T>(board[0]);
    for (int i = 1; i < Size; ++i) result = join(result, unpack<T>(board[i]));
    return result;
  }
  template <class T>
  T max(T x) const {
    return all(x, kMax, [](T a, T b) { return std::max(a, b); });
  }
  template <class T>
  T min(T x) const {
    return all(x, kMin, [](T a, T b) { return std::min(a, b); });
  }
  template <class T>
  T sum(T x) const {
    return all(x, kSum, [](T a, T b) { return a + b; });
  }
  bool any(bool x) const {
    return all(x, kAny, [](bool a, bool b) { return a || b; });
  }
  void sync() const { group->meet(lane, kSync, 0); }
  template <class T>
  void zero(T* row, int count) const {
    for (int i = lane; i < count; i += Size) row[i] = T{};
  }
};

struct Problem {
  int64_t num_tokens;
  int32_t logit_type, weights_type, id_type, score, renormalize;
  float eps, scale;
  int32_t num_experts, top_k, n_group, topk_group, group_max, compare_live;
  const void* logits;
  const void* recorded;
  const float* bias;
  void* weights;  // in the backward the incoming gradient
  int64_t* expert_ids;
  uint8_t* status;
  void* grad_logits;

  Formula<float> formula() const { return {Score(score), renormalize != 0, eps, scale}; }
};

template <class Logit>
bool forward(const Problem& p, bool fast) {
  const Selection select{p.num_experts, p.top_k, p.n_group, p.topk_group, p.group_max != 0, p.compare_live != 0};
  const Real type = Real(p.weights_type);
  const Id id_type = Id(p.id_type);
  for (int64_t row = 0; row < p.num_tokens; ++row) {
    const Logit* x = static_cast<const Logit*>(p.logits) + row * p.num_experts;
    std::vector<int32_t> key(select.num_experts, 7), group(select.n_group, 7), id(select.top_k, 7);
    std::vector<float> value(select.top_k, 7.0f);
    const Scratch<float> scratch{key.data(), group.data(), value.data(), id.data()};
    RowStatus status[32];
    Group lanes(fast ? 4 : 32, unsigned(row) + 1);
    const bool together = lanes.run([&](int lane) {
      if constexpr (sizeof(Logit) == 2) {
        const Lane<4> quad{&lanes, lane};
        if (fast && p.top_k <= 8) {
          status[lane] = gate_row16<8>(quad, row, x, p.recorded, id_type, p.formula(), select, p.weights, type,
                                       p.expert_ids);
        } else if (fast) {
          status[lane] = gate_row16<16>(quad, row, x, p.recorded, id_type, p.formula(), select, p.weights, type,
                                        p.expert_ids);
        }
      }
      if (fast) return;
      status[lane] = gate_row(Lane<32>{&lanes, lane}, row, x, p.recorded, id_type, p.bias, p.formula(), select,
                              scratch, p.weights, type, p.expert_ids);
    });
    if (!together) return false;
    for (int lane = 1; lane < (fast ? 4 : 32); ++lane) {
      if (status[lane] != status[0]) return false;
    }
    p.status[row] = status[0];
  }
  return true;
}

template <class Logit>
bool backward(const Problem& p) {
  for (int64_t row = 0; row < p.num_tokens; ++row) {
    const int64_t offset = row * p.num_experts;
    std::vector<float> value(p.top_k, 7.0f);
    std::vector<Logit> stage(p.num_experts);
    Group lanes(8, unsigned(row) + 1);
    const bool together = lanes.run([&](int lane) {
      gate_row_backward(Lane<8>{&lanes, lane}, row, static_cast<const Logit*>(p.logits) + offset, p.expert_ids,
                        p.weights, Real(p.weights_type), p.formula(), p.num_experts, p.top_k, value.data(),
                        stage.data());
      // As the kernel does, a lane copies what other lanes wrote.
      const int share = (p.num_experts + 7) / 8;
      for (int e = lane * share; e < std::min((lane + 1) * share, p.num_experts); ++e) {
        static_cast<Logit*>(p.grad_logits)[offset + e] = stage[e];
      }
    });
    if (!together) return false;
  }
  return true;
}

}  // namespace

extern "C" int lockstep_forward(const Problem* p, int fast) {
  if (Real(p->logit_type) == Real::bf16) return forward<Bf16>(*p, fast != 0);
  return Real(p->logit_type) == Real::fp16 ? forward<Fp16>(*p, fast != 0) : forward<float>(*p, false);
}

extern "C" int lockstep_backward(const Problem* p) {
  if (Real(p->logit_type) == Real::bf16) return backward<Bf16>(*p);
  return Real(p->logit_type) == Real::fp16 ? backward<Fp16>(*p) : backward<float>(*p);
}

extern "C" int lockstep_notices_divergence() {
  Group lanes(4, 1);
  return !lanes.run([&](int lane) {
    if (lane < 3) Lane<4>{&lanes, lane}.sync();
  });
}
