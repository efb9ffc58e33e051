// What needs no instruction set of its own: the choice of experts, rotation angles, and the measure of memory.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <new>

#include "kernels.h"

namespace ossia {

// The num_active largest logits of a token, equal ones by lower index, NaN last; softmax over those alone.
void route(const float* logits, int64_t num_tokens, int64_t num_experts, int64_t num_active, int32_t* experts, float* weights) {
  for (int64_t t = 0; t < num_tokens; ++t, logits += num_experts, experts += num_active, weights += num_active) {
    for (int64_t a = 0; a < num_active; ++a) {
      int64_t best = -1;
      for (int64_t e = 0; e < num_experts; ++e) {
        if (std::find(experts, experts + a, static_cast<int32_t>(e)) != experts + a) continue;
        const bool better = best < 0 || logits[e] > logits[best] || (std::isnan(logits[best]) && !std::isnan(logits[e]));
        if (better) best = e;
      }
      experts[a] = static_cast<int32_t>(best);
    }
    float sum = 0;
    for (int64_t a = 0; a < num_active; ++a) sum += weights[a] = std::exp(logits[experts[a]] - logits[experts[0]]);
    for (int64_t a = 0; a < num_active; ++a) weights[a] /= sum;
  }
}

void rope_angles(Workspace& work, const int32_t* positions, const float* inv_freq, int64_t num_tokens, int64_t pairs,
                 double concentration, float* cos, float* sin) {
  work.pool.for_each(num_tokens, num_tokens >= 32, [&](int64_t t, int) {
    for (int64_t p = 0; p < pairs; ++p) {
      // The models were trained with this product rounded to float32; the cosine is then taken exactly.
      const float angle = static_cast<float>(positions[t]) * inv_freq[p];
      cos[t * pairs + p] = static_cast<float>(std::cos(static_cast<double>(angle)) * concentration);
      sin[t * pairs + p] = static_cast<float>(std::sin(static_cast<double>(angle)) * concentration);
    }
  });
}

Scratch::~Scratch() { std::free(data_); }

void* Scratch::grow(size_t num_bytes) {
  const size_t rounded = (num_bytes / 64 + 2) * 64;
  if (rounded > size_) {
    std::free(data_);
    size_ = 0;
    data_ = std::aligned_alloc(64, rounded);
    if (!data_) throw std::bad_alloc();
    size_ = rounded;
  }
  return data_;
}

double integer_peak(ThreadPool& pool, const Kernels& kernels, int64_t num_rounds) {
  // Many small shares: a thread that gets a core late still takes part.
  const int64_t num_shares = 16 * pool.num_threads();
  double products = 0;
  std::mutex mutex;
  const auto start = std::chrono::steady_clock::now();
  pool.for_each(num_shares, true, [&](int64_t, int) {
    const double own = kernels.integer_products(num_rounds / 16);
    const std::lock_guard<std::mutex> lock(mutex);
    products += own;
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return products / seconds.count() / 1e9;
}

double read_bandwidth(ThreadPool& pool, int64_t num_bytes, int num_rounds) {
  const int64_t num_parts = 16 * pool.num_threads(), words = num_bytes / 8 / num_parts / 32 * 32;
  Scratch memory;
  uint64_t* data = memory.get<uint64_t>(words * num_parts);
  pool.for_each(num_parts, true, [&](int64_t part, int) { std::fill_n(data + part * words, words, part); });
  double best = 0;
  for (int round = 0; round < num_rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    pool.for_each(num_parts, true, [&](int64_t part, int) {
      const uint64_t* from = data + part * words;
      uint64_t sums[32] = {};
      for (int64_t i = 0; i < words; i += 32)
        for (int j = 0; j < 32; ++j) sums[j] ^= from[i + j];
      volatile uint64_t sink = 0;
      for (const uint64_t sum : sums) sink = sink ^ sum;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(words * num_parts * 8) / seconds.count() / 1e9);
  }
  return best;
}

}  // namespace ossia
