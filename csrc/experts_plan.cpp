#include "experts.h"

extern "C" int64_t moesaic_plan_size(int64_t num_tokens, int64_t num_rows, int64_t num_experts) {
  return (num_experts + 1) + (num_tokens + 1) + 3 * num_rows;
}

extern "C" moesaic_plan moesaic_plan_view(const int32_t* plan, int64_t num_tokens, int64_t num_rows,
                                          int64_t num_experts) {
  moesaic_plan view;
  view.expert_offsets = plan;
  view.assignments = view.expert_offsets + num_experts + 1;
  view.tokens = view.assignments + num_rows;
  view.token_offsets = view.tokens + num_rows;
  view.token_rows = view.token_offsets + num_tokens + 1;
  return view;
}

namespace {

// Turns counts, counts[i] standing at offsets[i + 1], into the offsets where each group starts; offsets[0] is 0.
void sum_up(int32_t* offsets, int64_t num_groups) {
  for (int64_t i = 0; i < num_groups; ++i) offsets[i + 1] += offsets[i];
}

// After offsets[i] has moved to the end of its group, that is to the start of the next: move all back.
void move_back(int32_t* offsets, int64_t num_groups) {
  for (int64_t i = num_groups; i > 0; --i) offsets[i] = offsets[i - 1];
  offsets[0] = 0;
}

}  // namespace

extern "C" int64_t moesaic_make_plan(const int64_t* token_ids, const int64_t* expert_ids, int64_t num_tokens,
                                     int64_t num_rows, int64_t num_experts, int32_t* plan) {
  const moesaic_plan view = moesaic_plan_view(plan, num_tokens, num_rows, num_experts);
  int32_t* const expert_offsets = plan;
  int32_t* const assignments = plan + (view.assignments - plan);
  int32_t* const tokens = plan + (view.tokens - plan);
  int32_t* const token_offsets = plan + (view.token_offsets - plan);
  int32_t* const token_rows = plan + (view.token_rows - plan);

  for (int64_t e = 0; e <= num_experts; ++e) expert_offsets[e] = 0;
  for (int64_t t = 0; t <= num_tokens; ++t) token_offsets[t] = 0;
  for (int64_t n = 0; n < num_rows; ++n) {
    const bool known = uint64_t(token_ids[n]) < uint64_t(num_tokens) && uint64_t(expert_ids[n]) < uint64_t(num_experts);
    if (!known) return n;
    ++expert_offsets[expert_ids[n] + 1];
    ++token_offsets[token_ids[n] + 1];
  }
  sum_up(expert_offsets, num_experts);
  sum_up(token_offsets, num_tokens);
  for (int64_t n = 0; n < num_rows; ++n) {
    const int32_t row = expert_offsets[expert_ids[n]]++;
    assignments[row] = int32_t(n);
    tokens[row] = int32_t(token_ids[n]);
    token_rows[token_offsets[token_ids[n]]++] = row;
  }
  move_back(expert_offsets, num_experts);
  move_back(token_offsets, num_tokens);
  return -1;
}
