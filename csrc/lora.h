// Low-rank changes of matrices, added to the products of each token's own adapter:
//
//   h[t, r] = scale a[r, i] x[t, i]
//   y[t, o] += h[t, r] b[o, r]        32 outputs at a time, r in order
//
// A token's numbers do not depend on what other tokens of the batch go through.
#pragma once

#include "dot.h"

namespace ossia::OSSIA_NS {

constexpr int64_t kLoraRows = kBlock;   // outputs of a packed piece of b, as many as a piece of work has rows
constexpr int64_t kLoraRanks = 4;       // rows of a that are multiplied side by side
constexpr int64_t kLoraTokens = 12;     // tokens that pass by while those rows stay in the nearest cache

OSSIA_INLINE const Lora* lora_of(const LoraRows& loras, int64_t token) {
  const int32_t index = loras.of_token[token];
  return index < 0 ? nullptr : loras.each[index];
}

// h[t][first .. first+count-1] of tokens that lie one after the other.
OSSIA_INLINE void lora_inputs(const Lora& lora, int64_t expert, int64_t first, int64_t count, const float* x, int64_t x_stride,
                              int64_t num_tokens, float* h, int64_t h_stride) {
  float_rows(lora.a.at(expert), first, count, x, x_stride, num_tokens, h + first, h_stride);
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t r = first; r < first + count; ++r) h[t * h_stride + r] *= lora.scale;
}

template <Format kFormat>
OSSIA_INLINE void add_lora_as(const uint8_t* b, int64_t rank, const float* h, float* y) {
  constexpr int kParts = kLoraRows / kLanes;
  Vf sums[kParts];
  OSSIA_UNROLL(4)
  for (int part = 0; part < kParts; ++part) sums[part] = zero();
  for (int64_t r = 0; r < rank; ++r) {
    const Vf factor = set1(h[r]);
    OSSIA_UNROLL(4)
    for (int part = 0; part < kParts; ++part)
      sums[part] = fma(factor, Numbers<kFormat>::vector(b + (r * kLoraRows + part * kLanes) * Numbers<kFormat>::kBytes), sums[part]);
  }
  OSSIA_UNROLL(4)
  for (int part = 0; part < kParts; ++part) store(y + part * kLanes, add(load(y + part * kLanes), sums[part]));
}

// y[0 .. count-1] += the change in rows 32 item .. 32 item + count-1 of a matrix, or of one of a stack.
OSSIA_INLINE void add_lora(const Lora& lora, int64_t expert, int64_t item, const float* h, float* y, int64_t count) {
  const int64_t rank = lora.a.rows, bytes = lora.a.format == Format::kF32 ? 4 : 2;
  const uint8_t* b = lora.b + expert * lora.b_stack_stride + item * rank * kLoraRows * bytes;
  float padded[kLoraRows];
  float* to = y;
  if (count < kLoraRows) {
    for (int64_t j = 0; j < kLoraRows; ++j) padded[j] = j < count ? y[j] : 0.0f;
    to = padded;
  }
  if (lora.a.format == Format::kF32) {
    add_lora_as<Format::kF32>(b, rank, h, to);
  } else {
    add_lora_as<Format::kBf16>(b, rank, h, to);
  }
  if (to == padded) std::memcpy(y, padded, count * sizeof(float));
}

}  // namespace ossia::OSSIA_NS
