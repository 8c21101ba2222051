// One row of masked top-k gating, as a program for a group of lanes that run in step.
//
// A lane group has `size` lanes with ids 0 .. size-1 and gives max, min, sum and any over its lanes, and sync. On a CPU
// it has one lane; on a GPU it is a warp. Lanes own experts and slots in stripes (lane, lane + size, ...), and all
// numbers that lanes share are in the scratch of the row.
// Names: E experts, K experts per token (slots), G groups.
#pragma once

#include "number.h"

namespace gating {

enum class Score : int { softmax, topk_softmax, sigmoid, sqrtsoftplus };
// What became of a row, as contract.RowStatus has it.
enum RowStatus : uint8_t { kAsRecorded = 0, kDiffersLive = 1, kMissing = 2, kInvalid = 3 };

template <class T>
struct Formula {
  Score score;
  bool renormalize;
  T eps, scale;

  // softmax over E, gathered and divided by its sum, is softmax over the K, which cannot become 0 / 0.
  GATING_FN bool over_chosen() const {
    return score == Score::topk_softmax || (score == Score::softmax && renormalize && eps == T(0));
  }
};

struct Selection {
  int num_experts, top_k;
  int n_group, topk_group;
  bool group_max;
  bool compare_live;
};

template <class T>
struct Scratch {
  typename Key<T>::type* key;    // (E,)
  typename Key<T>::type* group;  // (G,), where G > 1
  T* value;                      // (K,)
  int32_t* id;                   // (K,)
};

template <class T>
GATING_FN T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// sqrt(log(1 + exp(x))). Far below zero exp(x) would underflow long before its root does.
template <class T>
GATING_FN T sqrt_softplus(T x) {
  if (x < T(-40)) return exponential(T(0.5) * x);
  return sqrt(x > T(20) ? x : log1p(exponential(x)));
}

// Score of one expert that needs no other logit.
template <class T>
GATING_FN T lone_score(Score score, T x) {
  if (score == Score::sigmoid) return sigmoid(x);
  return score == Score::sqrtsoftplus ? sqrt_softplus(x) : x;
}

// Derivative of `lone_score`, given its value.
template <class T>
GATING_FN T lone_slope(Score score, T x, T value) {
  if (score == Score::sigmoid) return value * sigmoid(-x);
  return x < T(-40) ? T(0.5) * value : T(0.5) * sigmoid(x) / value;
}

template <class T>
struct Normalizer {
  T top, inverse;
  GATING_FN T probability(T x) const { return exponential(x - top) * inverse; }
};

// Normaliser of softmax over all E experts.
template <class Lane, class Logit, class T = typename Compute<Logit>::type>
GATING_FN Normalizer<T> normalizer(Lane lane, const Logit* x, int num_experts) {
  typename Key<T>::type best = lowest<typename Key<T>::type>;
  GATING_SIMD(max, best)
  for (int e = lane.id(); e < num_experts; e += Lane::size) {
    const auto key = Key<T>::of(widen(x[e]));
    best = key > best ? key : best;
  }
  const T top = Key<T>::number(lane.max(best));
  T total = 0;
  GATING_SIMD(+, total)
  for (int e = lane.id(); e < num_experts; e += Lane::size) total += exponential(widen(x[e]) - top);
  return {top, T(1) / lane.sum(total)};
}

// Index of the largest key, lowest index first, which then is `lowest`. A lane touches its own stripe alone.
template <class Lane, class K>
GATING_FN int take_largest(Lane lane, K* key, int count) {
  K best = lowest<K>;
  for (int e = lane.id(); e < count; e += Lane::size) best = key[e] > best ? key[e] : best;
  best = lane.max(best);
  int first = count;
  for (int e = lane.id(); e < count; e += Lane::size) {
    if (key[e] == best) {
      first = e;
      break;
    }
  }
  first = lane.min(first);
  if (first % Lane::size == lane.id()) key[first] = lowest<K>;
  return first;
}

// Keys of experts outside the best groups become `lowest`.
template <class Lane, class T>
GATING_FN void keep_best_groups(Lane lane, const Selection& select, const Scratch<T>& scratch) {
  using K = typename Key<T>::type;
  const int group_size = select.num_experts / select.n_group;
  lane.sync();
  for (int g = lane.id(); g < select.n_group; g += Lane::size) {
    K first = lowest<K>, second = lowest<K>;
    for (int e = g * group_size; e < (g + 1) * group_size; ++e) {
      const K key = scratch.key[e];
      second = key > first ? first : (key > second ? key : second);
      first = key > first ? key : first;
    }
    scratch.group[g] =
        select.group_max ? first : Key<T>::of(Key<T>::number(first) + Key<T>::number(second));
  }
  for (int i = 0; i < select.topk_group; ++i) take_largest(lane, scratch.group, select.n_group);
  lane.sync();
  for (int e = lane.id(); e < select.num_experts; e += Lane::size) {
    if (scratch.group[e / group_size] != lowest<K>) scratch.key[e] = lowest<K>;
  }
}

// What the live selection compares. Every score rises with its logit, so without bias and groups it is the logit.
template <class Lane, class Logit, class T = typename Compute<Logit>::type>
GATING_FN void write_keys(Lane lane, const Logit* x, const T* bias, Score score, const Selection& select,
                          const Scratch<T>& scratch) {
  const int num_experts = select.num_experts;
  if (bias == nullptr && select.n_group == 1) {
    for (int e = lane.id(); e < num_experts; e += Lane::size) scratch.key[e] = Key<T>::of(widen(x[e]));
  } else {
    Normalizer<T> over_all{};
    if (score == Score::softmax) over_all = normalizer(lane, x, num_experts);
    for (int e = lane.id(); e < num_experts; e += Lane::size) {
      const T logit = widen(x[e]);
      const T value = score == Score::softmax ? over_all.probability(logit) : lone_score(score, logit);
      scratch.key[e] = Key<T>::of(bias == nullptr ? value : value + bias[e]);
    }
  }
  if (select.n_group > 1) keep_best_groups(lane, select, scratch);
  lane.sync();
}

// Reads a recorded row into scratch.id and says what it is. Only a kAsRecorded row has ids that may be used.
template <class Lane, class T>
GATING_FN RowStatus read_record(Lane lane, const void* recorded, Id type, int64_t row, const Selection& select,
                              const Scratch<T>& scratch) {
  bool missing = false, unsound = false;
  with_ids(recorded, type, [&](const auto* given) {
    using Storage = std::decay_t<decltype(*given)>;
    const WideId<Storage> mark = static_cast<Storage>(-1);  // 255 in uint8
    for (int s = lane.id(); s < select.top_k; s += Lane::size) {
      const WideId<Storage> id = given[row * select.top_k + s];
      missing |= id == mark;
      unsound |= id < 0 || id >= select.num_experts;
      scratch.id[s] = int32_t(id);
    }
  });
  lane.sync();
  int own = 0, equal = 0;
  for (int s = lane.id(); s < select.top_k; s += Lane::size) {
    ++own;
    for (int other = 0; other < select.top_k; ++other) equal += scratch.id[other] == scratch.id[s];
  }
  unsound |= equal != own;
  if (lane.any(missing)) return kMissing;
  return lane.any(unsound) ? kInvalid : kAsRecorded;
}

// Whether the live selection is another set than scratch.id. It is the same one if and only if just the K - 1 others
// of the set rank before its last one, so one count replaces a selection.
template <class Lane, class T>
GATING_FN bool differs_from_live(Lane lane, const Selection& select, const Scratch<T>& scratch) {
  using K = typename Key<T>::type;
  K last = highest<K>;
  for (int s = lane.id(); s < select.top_k; s += Lane::size) {
    const K key = scratch.key[scratch.id[s]];
    last = key < last ? key : last;
  }
  last = lane.min(last);
  int last_id = 0;
  for (int s = lane.id(); s < select.top_k; s += Lane::size) {
    const int id = scratch.id[s];
    if (scratch.key[id] == last && id > last_id) last_id = id;
  }
  last_id = lane.max(last_id);
  if (last == lowest<K>) return true;  // in a group that is not selected
  int ahead = 0;
  for (int e = lane.id(); e < select.num_experts; e += Lane::size) ahead += scratch.key[e] > last - (e < last_id);
  return lane.sum(ahead) != select.top_k - 1;
}

// Largest of the K logits in `value`, as a normaliser that leaves the sum to the caller.
template <class Lane, class T>
GATING_FN Normalizer<T> chosen_top(Lane lane, const T* value, int top_k) {
  using K = typename Key<T>::type;
  K best = lowest<K>;
  for (int s = lane.id(); s < top_k; s += Lane::size) {
    const K key = Key<T>::of(value[s]);
    best = key > best ? key : best;
  }
  return {Key<T>::number(lane.max(best)), T(1)};
}

// Weights of the experts scratch.id.
template <class Lane, class Logit, class T = typename Compute<Logit>::type>
GATING_FN void write_weights(Lane lane, const Logit* x, const Formula<T>& formula, const Selection& select,
                             const Scratch<T>& scratch, void* weights, Real type, int64_t row) {
  const bool over_chosen = formula.over_chosen();
  T* const value = scratch.value;
  for (int s = lane.id(); s < select.top_k; s += Lane::size) value[s] = widen(x[scratch.id[s]]);
  if (over_chosen || formula.score == Score::softmax) {
    const Normalizer<T> over =
        over_chosen ? chosen_top(lane, value, select.top_k) : normalizer(lane, x, select.num_experts);
    for (int s = lane.id(); s < select.top_k; s += Lane::size) value[s] = over.probability(value[s]);
  } else {
    for (int s = lane.id(); s < select.top_k; s += Lane::size) value[s] = lone_score(formula.score, value[s]);
  }
  T divisor = 1;
  if (over_chosen || formula.renormalize) {
    T total = 0;
    for (int s = lane.id(); s < select.top_k; s += Lane::size) total += value[s];
    divisor = over_chosen ? lane.sum(total) : lane.sum(total) + formula.eps;
    if (over_chosen && formula.renormalize) divisor *= T(1) + formula.eps;
  }
  with_reals(weights, type, [&](auto* out) {
    using Weight = std::decay_t<decltype(*out)>;
    for (int s = lane.id(); s < select.top_k; s += Lane::size) {
      out[row * select.top_k + s] = Narrow<Weight>::from(value[s] / divisor * formula.scale);
    }
  });
}

// The whole row: record or live selection, ids, weights. `x` is the row itself, the other pointers are whole tensors.
template <class Lane, class Logit, class T = typename Compute<Logit>::type>
GATING_FN RowStatus gate_row(Lane lane, int64_t row, const Logit* x, const void* recorded, Id id_type, const T* bias,
                             const Formula<T>& formula, const Selection& select, const Scratch<T>& scratch,
                             void* weights, Real weights_type, int64_t* expert_ids) {
  RowStatus status = kAsRecorded;
  if (recorded != nullptr) status = read_record(lane, recorded, id_type, row, select, scratch);
  const bool live = recorded == nullptr || status != kAsRecorded;
  if (live || select.compare_live) write_keys(lane, x, bias, formula.score, select, scratch);
  if (live) {
    for (int s = 0; s < select.top_k; ++s) {
      const int id = take_largest(lane, scratch.key, select.num_experts);
      if (s % Lane::size == lane.id()) scratch.id[s] = id;
    }
  } else if (select.compare_live && differs_from_live(lane, select, scratch)) {
    status = kDiffersLive;
  }
  for (int s = lane.id(); s < select.top_k; s += Lane::size) expert_ids[row * select.top_k + s] = scratch.id[s];
  write_weights(lane, x, formula, select, scratch, weights, weights_type, row);
  return status;
}

}  // namespace gating
