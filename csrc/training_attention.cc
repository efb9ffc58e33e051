// Causal attention of sequences over their own tokens, with sinks, forward and backward in float32. Shapes: kernels.h.
//
// One worker has a sequence and a key/value head. It holds the keys and values as rows and turned over, and takes a tile
// of queries at a time over all keys that one of them sees:
//   S = Q K^T,  P = exp(S / sqrt(H) - L),  O = P V                                  L: log-sum-exp of scores and sink
//   dV += P^T G,  dP = G V^T,  dS = P (dP - rowsum(G O)) / sqrt(H),  dQ = dS K,  dK += dS^T Q
// Everything is filled up with zeros to whole registers, so that products have no edges. Source: FlashAttention-2,
// arXiv:2307.08691, without its blocks of keys: a tile's scores stay in the cache for sequences of thousands.
#include "training_attention.h"

#include <cmath>
#include <limits>

#include "simd.h"

namespace ossia::OSSIA_NS {
namespace {

constexpr int64_t kTile = 32;                 // queries
constexpr int kRows = OSSIA_512 ? 8 : 4;      // of a product's result in registers, by up to kVectors vectors
constexpr int kVectors = 2;
static_assert(kTile % kRows == 0 && kLanes % kRows == 0);

OSSIA_INLINE int64_t filled(int64_t count) { return divide_up(count, kLanes) * kLanes; }

// A matrix whose element [m, k] lies at data[m row + k column].
struct View {
  const float* data;
  int64_t row, column;
};

template <int kWide, bool kAdd>
OSSIA_INLINE void product_tile(View a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  Vf sums[kRows][kWide];
  OSSIA_UNROLL(8)
  for (int m = 0; m < kRows; ++m)
    OSSIA_UNROLL(2)
    for (int n = 0; n < kWide; ++n) sums[m][n] = kAdd ? load(c + m * c_row + n * kLanes) : zero();
  for (int64_t k = 0; k < depth; ++k) {
    Vf right[kWide];
    OSSIA_UNROLL(2)
    for (int n = 0; n < kWide; ++n) right[n] = load(b + k * b_row + n * kLanes);
    OSSIA_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const Vf left = set1(a.data[m * a.row + k * a.column]);
      OSSIA_UNROLL(2)
      for (int n = 0; n < kWide; ++n) sums[m][n] = fma(left, right[n], sums[m][n]);
    }
  }
  OSSIA_UNROLL(8)
  for (int m = 0; m < kRows; ++m)
    OSSIA_UNROLL(2)
    for (int n = 0; n < kWide; ++n) store(c + m * c_row + n * kLanes, sums[m][n]);
}

// c[m, n] (+)= a[m, k] b[k, n]; rows a multiple of kRows, columns of kLanes
template <bool kAdd>
void product(View a, const float* b, int64_t b_row, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t c_row) {
  for (int64_t n = 0; n < columns;) {
    const bool wide = n + kVectors * kLanes <= columns;
    for (int64_t m = 0; m < rows; m += kRows) {
      const View part{a.data + m * a.row, a.row, a.column};
      if (wide) {
        product_tile<kVectors, kAdd>(part, b + n, b_row, depth, c + m * c_row + n, c_row);
      } else {
        product_tile<1, kAdd>(part, b + n, b_row, depth, c + m * c_row + n, c_row);
      }
    }
    n += wide ? kVectors * kLanes : kLanes;
  }
}

// What a worker writes into, for sequences of up to `tokens` and heads of `dim` numbers, both filled up.
struct Room {
  float *keys, *values, *keys_turned, *values_turned;  // [tokens, dim], and [dim, tokens]
  float *dkeys, *dvalues;                              // [tokens, dim]
  float *scores, *slopes;                              // [kTile, tokens]
  float *queries, *gradients, *results;                // [kTile, dim]
  Room(float* memory, int64_t tokens, int64_t dim) {
    for (float** part : {&keys, &values, &keys_turned, &values_turned, &dkeys, &dvalues}) {
      *part = memory;
      memory += tokens * dim;
    }
    for (float** part : {&scores, &slopes}) {
      *part = memory;
      memory += kTile * tokens;
    }
    for (float** part : {&queries, &gradients, &results}) {
      *part = memory;
      memory += kTile * dim;
    }
  }
  static int64_t size(int64_t tokens, int64_t dim) { return 6 * tokens * dim + kTile * (2 * tokens + 3 * dim); }
};

// rows[t, h] of one head, filled up with zeros on both axes
void copy_rows(const float* from, int64_t stride, int64_t count, int64_t dim, int64_t filled_count, int64_t filled_dim, float* rows) {
  std::memset(rows, 0, filled_count * filled_dim * sizeof *rows);
  for (int64_t t = 0; t < count; ++t) std::memcpy(rows + t * filled_dim, from + t * stride, dim * sizeof *rows);
}

void turn(const float* rows, int64_t count, int64_t dim, float* turned) {
  for (int64_t h = 0; h < dim; ++h)
    for (int64_t t = 0; t < count; ++t) turned[h * count + t] = rows[t * dim + h];
}

// One tile of queries of one head, and the keys [first, end) that any of them sees, whole registers of them.
struct Span {
  int64_t query, count, first, end;
};

struct One {
  const TrainingAttention& args;
  int64_t start, length, filled_length, filled_dim;
  Room room;

  Span span(int64_t query) const {
    const int64_t count = least(kTile, length - query);
    const int64_t oldest = args.window ? greatest<int64_t>(0, query - args.window + 1) : 0;
    return {query, count, oldest / kLanes * kLanes, filled(query + count)};
  }

  // The place of a token's head in [T, Q, H].
  int64_t at(int64_t t, int64_t head) const { return ((start + t) * args.num_heads + head) * args.head_dim; }

  void load_tile(const float* from, const Span& s, int64_t head, float* to) const {
    copy_rows(from + at(s.query, head), args.num_heads * args.head_dim, s.count, args.head_dim, kTile, filled_dim, to);
  }

  // scores[r, j] = queries[r, h] keys[j, h]
  void score(const Span& s) const {
    product<false>({room.queries, filled_dim, 1}, room.keys_turned + s.first, filled_length, kTile, s.end - s.first,
                   args.head_dim, room.scores + s.first, filled_length);
  }

  // Takes what query `t` does not see out of its row.
  void hide(const Span& s, int64_t t, float* row) const {
    const int64_t oldest = args.window ? greatest<int64_t>(0, t - args.window + 1) : 0;
    for (int64_t j = s.first; j < oldest; ++j) row[j] = -std::numeric_limits<float>::infinity();
    for (int64_t j = t + 1; j < s.end; ++j) row[j] = -std::numeric_limits<float>::infinity();
  }

  void forward(int64_t head) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(args.head_dim));
    for (int64_t query = 0; query < length; query += kTile) {
      const Span s = span(query);
      load_tile(args.q, s, head, room.queries);
      score(s);
      float totals[kTile];
      for (int64_t r = 0; r < s.count; ++r) {
        float* row = room.scores + r * filled_length;
        hide(s, query + r, row);
        Vf tops = set1(-std::numeric_limits<float>::infinity());
        for (int64_t j = s.first; j < s.end; j += kLanes) tops = max(tops, load(row + j));
        float lanes[kLanes];
        store(lanes, tops);
        // The sink joins the maximum: what it outweighs must not overflow.
        float top = args.sinks[head];
        for (const float lane : lanes) top = greatest(top, lane * scale);
        Vf sum = zero();
        for (int64_t j = s.first; j < s.end; j += kLanes) {
          const Vf power = exp(sub(mul(load(row + j), set1(scale)), set1(top)));
          sum = add(sum, power);
          store(row + j, power);
        }
        totals[r] = sum_lanes(sum) + std::exp(args.sinks[head] - top);
        args.lse[(start + query + r) * args.num_heads + head] = top + std::log(totals[r]);
      }
      // results[r, h] = scores[r, j] values[j, h]
      product<false>({room.scores + s.first, filled_length, 1}, room.values + s.first * filled_dim, filled_dim, kTile,
                     filled_dim, s.end - s.first, room.results, filled_dim);
      for (int64_t r = 0; r < s.count; ++r)
        for (int64_t h = 0; h < args.head_dim; h += kLanes)
          store_up_to(args.out + at(query + r, head) + h, args.head_dim - h,
                      div(load(room.results + r * filled_dim + h), set1(totals[r])));
    }
  }

  void backward(int64_t head) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(args.head_dim));
    for (int64_t query = 0; query < length; query += kTile) {
      const Span s = span(query);
      const int64_t seen = s.end - s.first;
      load_tile(args.q, s, head, room.queries);
      load_tile(args.g, s, head, room.gradients);
      score(s);
      // slopes[r, j] = gradients[r, h] values[j, h]
      product<false>({room.gradients, filled_dim, 1}, room.values_turned + s.first, filled_length, kTile, seen,
                     args.head_dim, room.slopes + s.first, filled_length);
      for (int64_t r = 0; r < kTile; ++r) {
        float *row = room.scores + r * filled_length, *slope = room.slopes + r * filled_length;
        if (r >= s.count) {
          std::memset(row + s.first, 0, seen * sizeof *row);
          std::memset(slope + s.first, 0, seen * sizeof *slope);
          continue;
        }
        hide(s, query + r, row);
        Vf products = zero();
        for (int64_t h = 0; h < args.head_dim; h += kLanes)
          products = fma(load(room.gradients + r * filled_dim + h),
                         load_up_to(args.out + at(query + r, head) + h, args.head_dim - h), products);
        const float dot = sum_lanes(products);
        const int64_t place = (start + query + r) * args.num_heads + head;
        args.dots[place] = dot;
        for (int64_t j = s.first; j < s.end; j += kLanes) {
          const Vf power = exp(sub(mul(load(row + j), set1(scale)), set1(args.lse[place])));
          store(row + j, power);
          store(slope + j, mul(mul(power, set1(scale)), sub(load(slope + j), set1(dot))));
        }
      }
      const float *power = room.scores + s.first, *slope = room.slopes + s.first;
      // dvalues[j, h] += scores[r, j] gradients[r, h];  dkeys[j, h] += slopes[r, j] queries[r, h]
      product<true>({power, 1, filled_length}, room.gradients, filled_dim, seen, filled_dim, kTile,
                    room.dvalues + s.first * filled_dim, filled_dim);
      product<true>({slope, 1, filled_length}, room.queries, filled_dim, seen, filled_dim, kTile,
                    room.dkeys + s.first * filled_dim, filled_dim);
      // dq[r, h] = slopes[r, j] keys[j, h]
      product<false>({slope, filled_length, 1}, room.keys + s.first * filled_dim, filled_dim, kTile, filled_dim, seen,
                     room.results, filled_dim);
      for (int64_t r = 0; r < s.count; ++r)
        std::memcpy(args.dq + at(query + r, head), room.results + r * filled_dim, args.head_dim * sizeof(float));
    }
  }
};

// body(one, kv_head) for every sequence and key/value head, with the keys and values loaded.
template <class Body>
void for_each_head(Workspace& work, const TrainingAttention& args, bool backward, const Body& body) {
  int64_t longest = 0;
  for (int64_t n = 0; n < args.num_sequences; ++n) longest = greatest<int64_t>(longest, args.starts[n + 1] - args.starts[n]);
  const int64_t filled_dim = filled(args.head_dim), size = Room::size(filled(longest), filled_dim);
  float* memory = work.per_worker.get<float>(size * work.pool.num_threads());
  work.pool.for_each(args.num_sequences * args.num_kv_heads, true, [&](int64_t item, int worker) {
    const int64_t n = item / args.num_kv_heads, kv_head = item % args.num_kv_heads;
    const int64_t start = args.starts[n], length = args.starts[n + 1] - start, filled_length = filled(length);
    const One one{args, start, length, filled_length, filled_dim, Room(memory + worker * size, filled(longest), filled_dim)};
    const int64_t stride = args.num_kv_heads * args.head_dim, place = start * stride + kv_head * args.head_dim;
    copy_rows(args.k + place, stride, length, args.head_dim, filled_length, filled_dim, one.room.keys);
    copy_rows(args.v + place, stride, length, args.head_dim, filled_length, filled_dim, one.room.values);
    turn(one.room.keys, filled_length, filled_dim, one.room.keys_turned);
    if (backward) {
      turn(one.room.values, filled_length, filled_dim, one.room.values_turned);
      std::memset(one.room.dkeys, 0, filled_length * filled_dim * sizeof(float));
      std::memset(one.room.dvalues, 0, filled_length * filled_dim * sizeof(float));
    }
    body(one, kv_head);
    if (!backward) return;
    for (int64_t t = 0; t < length; ++t) {
      std::memcpy(args.dk + place + t * stride, one.room.dkeys + t * filled_dim, args.head_dim * sizeof(float));
      std::memcpy(args.dv + place + t * stride, one.room.dvalues + t * filled_dim, args.head_dim * sizeof(float));
    }
  });
}

}  // namespace

void training_attention(Workspace& work, const TrainingAttention& args) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  for_each_head(work, args, false, [&](const One& one, int64_t kv_head) {
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) one.forward(head);
  });
}

void training_attention_backward(Workspace& work, const TrainingAttention& args) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  for_each_head(work, args, true, [&](const One& one, int64_t kv_head) {
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) one.backward(head);
  });
}

}  // namespace ossia::OSSIA_NS
