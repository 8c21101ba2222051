// One row of the backward of masked top-k gating, as a program for a group of lanes (see gate_row.h).
#pragma once

#include "gate_row.h"

namespace gating {

// Writes the gradient of one row of logits into `stage` (E,), which all lanes may read afterwards. The lane group also
// gives zero, which clears a row.
//
// With s the scores of the K experts, u = s / (sum(s) + eps), g the scaled incoming gradient and G = sum(g u), a score
// receives h = (g - G) / (sum(s) + eps), or h = g where nothing is renormalised, and passes it on through its
// derivative. Softmax over all E experts adds -p sum(h s) everywhere.
template <class Lane, class Logit, class T = typename Compute<Logit>::type>
GATING_FN void gate_row_backward(Lane lane, int64_t row, const Logit* x, const int64_t* expert_ids, const void* grad,
                                 Real grad_type, const Formula<T>& formula, int num_experts, int top_k, T* value,
                                 Logit* stage) {
  const int64_t* id = expert_ids + row * top_k;
  const bool over_chosen = formula.over_chosen();
  const bool over_all = !over_chosen && formula.score == Score::softmax;
  for (int s = lane.id(); s < top_k; s += Lane::size) value[s] = widen(x[id[s]]);
  Normalizer<T> over{T(0), T(1)};
  if (over_all) over = normalizer(lane, x, num_experts);
  if (over_chosen) over = chosen_top(lane, value, top_k);
  T total = 0, dot = 0;
  for (int s = lane.id(); s < top_k; s += Lane::size) {
    value[s] = over_chosen || over_all ? over.probability(value[s]) : lone_score(formula.score, value[s]);
    total += value[s];
    dot += value[s] * load_real<T>(grad, row * top_k + s, grad_type);
  }
  total = lane.sum(total);
  dot = lane.sum(dot) * formula.scale;
  const bool divided = over_chosen || formula.renormalize;
  const T eps = over_chosen ? T(0) : formula.eps;
  const T divisor = divided ? total + eps : T(1);
  const T mean = divided ? dot / divisor : T(0);  // G
  const T constant = over_chosen && formula.renormalize ? T(1) / (T(1) + formula.eps) : T(1);
  const T everywhere = over_all ? (divided ? mean * eps / divisor : dot) : T(0);

  if (over_all) {
    for (int e = lane.id(); e < num_experts; e += Lane::size) {
      stage[e] = Narrow<Logit>::from(-over.probability(widen(x[e])) * everywhere);
    }
  } else {
    lane.zero(stage, num_experts);
  }
  lane.sync();
  for (int s = lane.id(); s < top_k; s += Lane::size) {
    const T logit = widen(x[id[s]]);
    const T g = load_real<T>(grad, row * top_k + s, grad_type) * formula.scale;
    const T u = value[s] / divisor;
    T slot;
    if (over_chosen) {
      slot = constant * u * (g - mean);
    } else if (over_all) {
      slot = u * (g - mean) - value[s] * everywhere;
    } else {
      slot = lone_slope(formula.score, logit, value[s]) / divisor * (g - mean);
    }
    stage[id[s]] = Narrow<Logit>::from(slot);
  }
  lane.sync();
}

}  // namespace gating
