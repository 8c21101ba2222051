// Fast path for one row of 16-bit logits without bias and groups, as a program for four lanes that run in step.
//
// A logit and its expert make one 32-bit key, the value in the upper half and 0xffff - id in the lower, so that one
// comparison ranks by value and then by lowest id. Each lane reads 16 bytes at a time, sorts those eight keys with a
// network and merges them into its sorted list of the best KP; two exchanges merge the lists of the four lanes.
// Everything stays in registers: loops over arrays are unrolled, and the number of experts is free.
// Names: E experts, K experts per token, KP the list's length (K rounded up to 8 or 16).
#pragma once

#include "gate_row.h"

#ifdef __CUDACC__
#define GATING_UNROLL _Pragma("unroll")
#else
#define GATING_UNROLL
#endif

namespace gating {

constexpr int kQuad = 4;
constexpr int kChunk = 8;  // logits in 16 bytes

struct alignas(16) Chunk {
  uint32_t word[4];
};

template <class Logit>
struct InfinityBits;
template <>
struct InfinityBits<Bf16> {
  static constexpr uint32_t value = 0x7f80;
};
template <>
struct InfinityBits<Fp16> {
  static constexpr uint32_t value = 0x7c00;
};

template <class Logit>
GATING_FN uint32_t packed_key(uint32_t bits, int id) {
  const uint32_t magnitude = bits & 0x7fffu;
  uint32_t order = (bits & 0x8000u) != 0 ? 0x8000u - magnitude : 0x8000u + magnitude;  // both zeros are 0x8000
  order = magnitude > InfinityBits<Logit>::value ? 0xffffu : order;
  return (order << 16) | (0xffffu - uint32_t(id));
}

template <class Logit>
GATING_FN float packed_value(uint32_t key) {
  const uint32_t order = key >> 16;
  const uint32_t bits = order >= 0x8000u ? order - 0x8000u : (0x8000u - order) | 0x8000u;
  return widen(Logit{uint16_t(bits)});
}

GATING_FN int packed_id(uint32_t key) { return int(0xffffu - (key & 0xffffu)); }

GATING_FN uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
GATING_FN uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

GATING_FN void order_pair(uint32_t& low, uint32_t& high) {
  const uint32_t a = low, b = high;
  low = smaller(a, b);
  high = larger(a, b);
}

// Ascending order of eight keys: Batcher's odd-even merge sort, 19 exchanges.
GATING_FN void sort_eight(uint32_t (&k)[kChunk]) {
  order_pair(k[0], k[1]), order_pair(k[2], k[3]), order_pair(k[4], k[5]), order_pair(k[6], k[7]);
  order_pair(k[0], k[2]), order_pair(k[1], k[3]), order_pair(k[4], k[6]), order_pair(k[5], k[7]);
  order_pair(k[1], k[2]), order_pair(k[5], k[6]);
  order_pair(k[0], k[4]), order_pair(k[1], k[5]), order_pair(k[2], k[6]), order_pair(k[3], k[7]);
  order_pair(k[2], k[4]), order_pair(k[3], k[5]);
  order_pair(k[1], k[2]), order_pair(k[3], k[4]), order_pair(k[5], k[6]);
}

// Descending order of a bitonic list.
template <int KP>
GATING_FN void sort_bitonic(uint32_t (&list)[KP]) {
  GATING_UNROLL
  for (int stride = KP / 2; stride > 0; stride /= 2) {
    GATING_UNROLL
    for (int i = 0; i < KP; ++i) {
      if ((i & stride) == 0) order_pair(list[i + stride], list[i]);
    }
  }
}

// The row's eight logits from `e` on.
template <class Logit>
GATING_FN void load_keys(const Logit* x, int e, uint32_t (&key)[kChunk]) {
  const Chunk chunk = *reinterpret_cast<const Chunk*>(x + e);
  GATING_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    key[i] = packed_key<Logit>((chunk.word[i / 2] >> (16 * (i % 2))) & 0xffffu, e + i);
  }
}

// The KP best of the row, descending, in every lane.
template <int KP, class Lane, class Logit>
GATING_FN void best_of_row(Lane lane, const Logit* x, int num_experts, uint32_t (&best)[KP]) {
  GATING_UNROLL
  for (int i = 0; i < KP; ++i) best[i] = 0;
  for (int e = lane.id() * kChunk; e < num_experts; e += kQuad * kChunk) {
    uint32_t key[kChunk];
    load_keys(x, e, key);
    sort_eight(key);
    GATING_UNROLL
    for (int i = 0; i < kChunk; ++i) best[KP - kChunk + i] = larger(best[KP - kChunk + i], key[i]);
    sort_bitonic(best);
  }
  GATING_UNROLL
  for (int step = 1; step < kQuad; step *= 2) {
    uint32_t other[KP];
    GATING_UNROLL
    for (int i = 0; i < KP; ++i) other[i] = lane.shfl_xor(best[KP - 1 - i], step);
    GATING_UNROLL
    for (int i = 0; i < KP; ++i) best[i] = larger(best[i], other[i]);
    sort_bitonic(best);
  }
}

// A lane owns the slots lane, lane + 4, ...: neighbours write side by side.
template <int KP>
struct Slots {
  static constexpr int count = KP / kQuad;
  uint32_t key[count];
};

// Reads a recorded row into keys and says what it is.
template <int KP, class Lane, class Logit>
GATING_FN RowStatus read_record16(Lane lane, const Logit* x, const void* recorded, Id type, int64_t row,
                                const Selection& select, Slots<KP>& slots) {
  int id[Slots<KP>::count];
  bool missing = false, unsound = false;
  with_ids(recorded, type, [&](const auto* given) {
    using Storage = std::decay_t<decltype(*given)>;
    const WideId<Storage> mark = static_cast<Storage>(-1);  // 255 in uint8
    GATING_UNROLL
    for (int i = 0; i < Slots<KP>::count; ++i) {
      const int s = i * kQuad + lane.id();
      id[i] = -1;
      if (s >= select.top_k) continue;
      const WideId<Storage> one = given[row * select.top_k + s];
      const bool fits = one >= 0 && one < select.num_experts;
      missing |= one == mark;
      unsound |= !fits;
      if (fits) id[i] = int(one);
    }
  });
  GATING_UNROLL
  for (int i = 0; i < Slots<KP>::count; ++i) {
    GATING_UNROLL
    for (int owner = 0; owner < kQuad; ++owner) {
      const int other = lane.shfl(id[i], owner);
      GATING_UNROLL
      for (int own = i; own < Slots<KP>::count; ++own) {
        unsound |= other >= 0 && id[own] == other && i * kQuad + owner < own * kQuad + lane.id();
      }
    }
  }
  missing = lane.any(missing);
  unsound = lane.any(unsound);
  GATING_UNROLL
  for (int i = 0; i < Slots<KP>::count; ++i) {
    slots.key[i] = id[i] < 0 ? 0 : packed_key<Logit>(x[id[i]].bits, id[i]);
  }
  return missing ? kMissing : (unsound ? kInvalid : kAsRecorded);
}

// Whether the live selection is another set: it is not if just the K - 1 others rank before the set's last.
template <int KP, class Lane, class Logit>
GATING_FN bool differs_from_live16(Lane lane, const Logit* x, const Selection& select, const Slots<KP>& slots) {
  uint32_t last = 0xffffffffu;
  GATING_UNROLL
  for (int i = 0; i < Slots<KP>::count; ++i) {
    if (i * kQuad + lane.id() < select.top_k) last = smaller(last, slots.key[i]);
  }
  last = lane.min(last);
  int ahead = 0;
  for (int e = lane.id() * kChunk; e < select.num_experts; e += kQuad * kChunk) {
    uint32_t key[kChunk];
    load_keys(x, e, key);
    GATING_UNROLL
    for (int i = 0; i < kChunk; ++i) ahead += key[i] > last;
  }
  return lane.sum(ahead) != select.top_k - 1;
}

template <class Lane, class Logit>
GATING_FN Normalizer<float> normalizer16(Lane lane, const Logit* x, int num_experts) {
  uint32_t best = 0;
  uint32_t key[kChunk];
  for (int e = lane.id() * kChunk; e < num_experts; e += kQuad * kChunk) {
    load_keys(x, e, key);
    GATING_UNROLL
    for (int i = 0; i < kChunk; ++i) best = larger(best, key[i]);
  }
  const float top = packed_value<Logit>(lane.max(best));
  float total = 0;
  for (int e = lane.id() * kChunk; e < num_experts; e += kQuad * kChunk) {
    load_keys(x, e, key);
    GATING_UNROLL
    for (int i = 0; i < kChunk; ++i) total += exponential(packed_value<Logit>(key[i]) - top);
  }
  return {top, 1.0f / lane.sum(total)};
}

template <int KP, class Logit, class Lane>
GATING_FN void write_slots16(Lane lane, const Logit* x, const Formula<float>& formula, const Selection& select,
                             const Slots<KP>& slots, void* weights, Real weights_type, int64_t* expert_ids,
                             int64_t row) {
  Normalizer<float> over{0.0f, 1.0f};
  const bool over_chosen = formula.over_chosen();
  if (over_chosen) {
    uint32_t best = 0;
    GATING_UNROLL
    for (int i = 0; i < Slots<KP>::count; ++i) best = larger(best, slots.key[i]);
    over.top = packed_value<Logit>(lane.max(best));
  } else if (formula.score == Score::softmax) {
    over = normalizer16(lane, x, select.num_experts);
  }
  const bool lone = !over_chosen && formula.score != Score::softmax;
  float value[Slots<KP>::count];
  float total = 0.0f;
  GATING_UNROLL
  for (int i = 0; i < Slots<KP>::count; ++i) {
    const float logit = packed_value<Logit>(slots.key[i]);
    value[i] = lone ? lone_score(formula.score, logit) : over.probability(logit);
    if (i * kQuad + lane.id() < select.top_k) total += value[i];
  }
  total = lane.sum(total);
  float divisor = formula.renormalize ? total + formula.eps : 1.0f;
  if (over_chosen) divisor = formula.renormalize ? total * (1.0f + formula.eps) : total;
  with_reals(weights, weights_type, [&](auto* out) {
    using Weight = std::decay_t<decltype(*out)>;
    GATING_UNROLL
    for (int i = 0; i < Slots<KP>::count; ++i) {
      const int s = i * kQuad + lane.id();
      if (s >= select.top_k) continue;
      out[row * select.top_k + s] = Narrow<Weight>::from(value[i] / divisor * formula.scale);
      expert_ids[row * select.top_k + s] = packed_id(slots.key[i]);
    }
  });
}

// The whole row, as gate_row: E is a multiple of 32, K <= KP, x is aligned to 16 bytes.
template <int KP, class Lane, class Logit>
GATING_FN RowStatus gate_row16(Lane lane, int64_t row, const Logit* x, const void* recorded, Id id_type,
                               const Formula<float>& formula, const Selection& select, void* weights,
                               Real weights_type, int64_t* expert_ids) {
  static_assert(Lane::size == kQuad, "four lanes a row");
  Slots<KP> slots;
  RowStatus status = kAsRecorded;
  if (recorded != nullptr) status = read_record16(lane, x, recorded, id_type, row, select, slots);
  if (recorded == nullptr || status != kAsRecorded) {
    uint32_t best[KP];
    best_of_row(lane, x, select.num_experts, best);
    GATING_UNROLL
    for (int i = 0; i < KP; ++i) {
      if (i % kQuad == lane.id()) slots.key[i / kQuad] = i < select.top_k ? best[i] : 0;
    }
  } else if (select.compare_live && differs_from_live16(lane, x, select, slots)) {
    status = kDiffersLive;
  }
  write_slots16<KP>(lane, x, formula, select, slots, weights, weights_type, expert_ids, row);
  return status;
}

}  // namespace gating
