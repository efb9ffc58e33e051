// Causal attention with sinks over paged keys and values.
//
//     s[j, l] = k[j, h] q[l, h] / sqrt(H)         p = softmax over j of (s, sink)         o[l, h] = p[j, l] v[j, h]
//
//   l  query lanes: the tokens of one piece of work times the G query heads of one key/value head, side by side in vectors
//   j  keys, by their position in the sequence: tiles of 32 (kKeyTile) in splits of 512 (kSplit), both at fixed positions
//
// Each split keeps (maximum, sum, o) from (sink, 0, 0) over its tiles; the splits are added in order to (sink, 1, 0).
// A key that a lane may not see has p = 0, and a tile without visible keys leaves the lane's state as it was, so a
// lane's bits depend neither on the other lanes nor on where passes, pieces of work or threads begin and end.
// Sources: online softmax arXiv:1805.02867, split keys of FlashDecoding; sinks: arXiv:2508.10925, section 2.
#include "attention.h"

#include <cmath>

#include "simd.h"

namespace ossia::OSSIA_NS {
namespace {

constexpr int64_t kKeyTile = 32;
constexpr int64_t kSplit = 512;
constexpr int64_t kMaxLanes = 64;
constexpr int64_t kWorthSharing = 1 << 15;  // multiply-accumulates; some 3 microseconds

OSSIA_INLINE int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

struct Shape {
  int64_t group, lanes, dim;  // query heads per key/value head; lanes of a piece and head dim, both in full vectors
  int64_t tokens_per_piece;
};

// One piece of work: some tokens of one sequence, one key/value head.
struct Piece {
  int64_t sequence, kv_head, first_token, num_tokens;
  int64_t first_position, end_key;  // keys first_key .. end_key-1 are seen by one query or another
  int64_t first_key;
  int64_t lanes;                    // of this piece, in full vectors
};

struct State {
  float* top;  // [lanes]
  float* sum;  // [lanes]
  float* o;    // [lanes, dim]
};
OSSIA_INLINE int64_t state_size(const Shape& shape) { return shape.lanes * (2 + shape.dim); }
OSSIA_INLINE State state_at(float* memory, const Shape& shape) {
  return {memory, memory + shape.lanes, memory + 2 * shape.lanes};
}

// What a worker needs for a piece.
struct Desk {
  float* q;         // [dim, lanes], times 1/sqrt(H)
  float* position;  // [lanes]
  float* sink;      // [lanes]
  float* scores;    // [kKeyTile, lanes]
  float* keys;      // [kKeyTile, dim]
  float* values;    // [kKeyTile, dim]
  float* columns;   // [dim, kKeyTile], the keys turned
  float* rescale;   // [lanes]
  State split, total;
  static int64_t size(const Shape& s) {
    return s.lanes * s.dim + 3 * s.lanes + kKeyTile * (s.lanes + 3 * s.dim) + 2 * state_size(s);
  }
  Desk(float* m, const Shape& s) {
    const auto take = [&](int64_t count) {
      float* here = m;
      m += count;
      return here;
    };
    q = take(s.lanes * s.dim);
    position = take(s.lanes);
    sink = take(s.lanes);
    rescale = take(s.lanes);
    scores = take(kKeyTile * s.lanes);
    keys = take(kKeyTile * s.dim);
    values = take(kKeyTile * s.dim);
    columns = take(kKeyTile * s.dim);
    split = state_at(take(state_size(s)), s);
    total = state_at(take(state_size(s)), s);
  }
};

// Storing and fetching keys ------------------------------------------------------------------------------------------

OSSIA_INLINE int64_t slot_index(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t position) {
  const int64_t block = a.table[sequence * a.table_width + position / a.block_size];
  return (block * a.num_kv_heads + kv_head) * a.block_size + position % a.block_size;
}

void store_row(KvFormat format, const KvStore& to, int64_t slot, const float* x, int64_t dim) {
  if (format == KvFormat::kF32) {
    std::memcpy(static_cast<float*>(to.data) + slot * dim, x, dim * sizeof(float));
  } else if (format == KvFormat::kBf16) {
    uint16_t* row = static_cast<uint16_t*>(to.data) + slot * dim;
    for (int64_t h = 0; h < dim; ++h) row[h] = float_to_bf16(x[h]);
  } else {
    uint32_t top = 0;
    for (int64_t h = 0; h < dim; ++h) top = greatest(top, bits_as<uint32_t>(x[h]) & 0x7fffffffu);
    int8_t* row = static_cast<int8_t*>(to.data) + slot * dim;
    float scale = top >= 0x7f800000u ? bits_as<float>(0x7fc00000u) : bits_as<float>(top) / 127.0f;
    if (scale < 0x1p-126f) scale = 0.0f;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int64_t h = 0; h < dim; ++h)
      row[h] = inverse > 0 ? static_cast<int8_t>(bits_as<int32_t>(x[h] * inverse + 12582912.0f) - 0x4b400000) : 0;
    to.scales[slot] = scale;
  }
}

// `count` rows that follow each other, as floats; dim is padded with zeros to full vectors.
OSSIA_INLINE void fetch_rows(KvFormat format, const KvStore& from, int64_t slot, int64_t count, int64_t dim, float* x) {
  const int64_t padded = round_up(dim, kLanes), start = slot * dim;
  if (format == KvFormat::kF32 && padded == dim) {
    std::memcpy(x, static_cast<const float*>(from.data) + start, count * dim * sizeof(float));
    return;
  }
  if (format == KvFormat::kBf16 && padded == dim) {
    const uint16_t* rows = static_cast<const uint16_t*>(from.data) + start;
    for (int64_t i = 0; i < count * dim; i += kLanes) store(x + i, load_bf16(rows + i));
    return;
  }
  for (int64_t j = 0; j < count; ++j, x += padded) {
    int64_t h = 0;
    if (format == KvFormat::kBf16) {
      const uint16_t* row = static_cast<const uint16_t*>(from.data) + start + j * dim;
      for (; h + kLanes <= dim; h += kLanes) store(x + h, load_bf16(row + h));
      for (; h < dim; ++h) x[h] = bf16_to_float(row[h]);
    } else if (format == KvFormat::kQ8) {
      const int8_t* row = static_cast<const int8_t*>(from.data) + start + j * dim;
      const float scale = from.scales[slot + j];
      for (; h + kLanes <= dim; h += kLanes) store(x + h, mul(set1(scale), load_int8(row + h)));
      for (; h < dim; ++h) x[h] = scale * row[h];
    } else {
      std::memcpy(x, static_cast<const float*>(from.data) + start + j * dim, dim * sizeof(float));
      h = dim;
    }
    for (; h < padded; ++h) x[h] = 0.0f;
  }
}

// Asks for the next tile's rows, keys first, a line at a time: a core has room for a few dozen open requests only, and
// what is asked beyond them waits. Rows that lie in more than one block are not asked for.
struct Ahead {
  const char *at = nullptr, *end = nullptr, *values = nullptr;
  int64_t size = 0;

  OSSIA_INLINE_MEMBER Ahead(const AttentionArgs& a, const Piece& piece, int64_t first_key) {
    const int64_t next = first_key + kKeyTile;
    if (!a.cached || next + kKeyTile > piece.end_key || a.block_size - next % a.block_size < kKeyTile) return;
    const int64_t row = a.head_dim * (a.kv_format == KvFormat::kQ8 ? 1 : a.kv_format == KvFormat::kBf16 ? 2 : 4);
    const int64_t offset = slot_index(a, piece.sequence, piece.kv_head, next) * row;
    size = kKeyTile * row;
    at = static_cast<const char*>(a.keys.data) + offset;
    end = at + size;
    values = static_cast<const char*>(a.values.data) + offset;
  }
  OSSIA_INLINE_MEMBER void ask() {
    if (at >= end) {
      if (!values) return;
      at = values;
      end = values + size;
      values = nullptr;
    }
    prefetch(at);
    at += 64;
  }
};

// keys[j], values[j] of positions first_key + j, j < count.
void fetch_tile(const AttentionArgs& a, const Piece& piece, int64_t first_key, int64_t count, const Shape& shape,
                const Desk& desk) {
  if (!a.cached) {
    const int64_t row = a.query_starts[piece.sequence] + first_key - a.positions[a.query_starts[piece.sequence]];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = (row + j) * a.num_kv_heads + piece.kv_head;
      fetch_rows(KvFormat::kF32, {const_cast<float*>(a.k), nullptr}, at, 1, a.head_dim, desk.keys + j * shape.dim);
      fetch_rows(KvFormat::kF32, {const_cast<float*>(a.v), nullptr}, at, 1, a.head_dim, desk.values + j * shape.dim);
    }
    return;
  }
  for (int64_t j = 0; j < count;) {
    const int64_t slot = slot_index(a, piece.sequence, piece.kv_head, first_key + j);
    const int64_t rows = least(count - j, a.block_size - (first_key + j) % a.block_size);
    fetch_rows(a.kv_format, a.keys, slot, rows, a.head_dim, desk.keys + j * shape.dim);
    fetch_rows(a.kv_format, a.values, slot, rows, a.head_dim, desk.values + j * shape.dim);
    j += rows;
  }
}

// Products -----------------------------------------------------------------------------------------------------------

// scores[j, l] = keys[j, h] q[h, l] for kKeys keys and kVectors vectors of lanes
template <int kKeys, int kVectors>
OSSIA_INLINE void score_patch(const float* keys, const float* q, int64_t dim, int64_t head_dim, int64_t lanes, float* scores) {
  Vf sums[kKeys][kVectors];
  OSSIA_UNROLL(16)
  for (int j = 0; j < kKeys; ++j)
    OSSIA_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) sums[j][i] = zero();
  for (int64_t h = 0; h < head_dim; ++h) {
    Vf q_lanes[kVectors];
    OSSIA_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) q_lanes[i] = load(q + h * lanes + i * kLanes);
    OSSIA_UNROLL(16)
    for (int j = 0; j < kKeys; ++j) {
      const Vf key = set1(keys[j * dim + h]);
      OSSIA_UNROLL(16)
      for (int i = 0; i < kVectors; ++i) sums[j][i] = fma(key, q_lanes[i], sums[j][i]);
    }
  }
  OSSIA_UNROLL(16)
  for (int j = 0; j < kKeys; ++j)
    OSSIA_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) store(scores + j * lanes + i * kLanes, sums[j][i]);
}

template <int kVectors>
OSSIA_INLINE void score_columns(const Desk& desk, int64_t column, int64_t count, const Shape& shape, int64_t head_dim,
                                int64_t lanes) {
  constexpr int kKeys = kVectors == 1 ? 8 : 4;
  int64_t j = 0;
  for (; j + kKeys <= count; j += kKeys)
    score_patch<kKeys, kVectors>(desk.keys + j * shape.dim, desk.q + column, shape.dim, head_dim, lanes,
                                 desk.scores + j * lanes + column);
  for (; j < count; ++j)
    score_patch<1, kVectors>(desk.keys + j * shape.dim, desk.q + column, shape.dim, head_dim, lanes,
                             desk.scores + j * lanes + column);
}

#if OSSIA_512

// to[j][i] = from[i][j] for 16 x 16 numbers.
OSSIA_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vf a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = load(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      const __m512d first = _mm512_castps_pd(b[i + k]), second = _mm512_castps_pd(b[i + 2 + k]);
      a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
      a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
    }
  // a[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g .. 4 g + 3, one in each quarter.
  for (int c = 0; c < 4; ++c) {
    const Vf low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const Vf low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const Vf high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    store(to + c * to_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    store(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    store(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    store(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}

constexpr int kFewLanes = 8;

// The same sums in the same order for a full tile and at most kFewLanes queries, which would leave half of every vector
// of lanes empty: keys stand in the lanes instead.
void score_few_lanes(const Desk& desk, const Shape& shape, int64_t head_dim, int64_t lanes, Ahead& ahead) {
  static_assert(kKeyTile == 2 * kLanes);
  for (int64_t j = 0; j < kKeyTile; j += kLanes)
    for (int64_t h = 0; h < shape.dim; h += kLanes)
      transpose(desk.keys + j * shape.dim + h, shape.dim, desk.columns + h * kKeyTile + j, kKeyTile);
  Vf sums[kFewLanes][2];
  OSSIA_UNROLL(16)
  for (int l = 0; l < kFewLanes; ++l) sums[l][0] = sums[l][1] = zero();
  for (int64_t h = 0; h < head_dim; ++h) {
    ahead.ask();
    const Vf first = load(desk.columns + h * kKeyTile), second = load(desk.columns + h * kKeyTile + kLanes);
    OSSIA_UNROLL(16)
    for (int l = 0; l < kFewLanes; ++l) {
      const Vf q = set1(desk.q[h * lanes + l]);
      sums[l][0] = fma(first, q, sums[l][0]);
      sums[l][1] = fma(second, q, sums[l][1]);
    }
  }
  alignas(64) float rows[kLanes][kKeyTile] = {};
  OSSIA_UNROLL(16)
  for (int l = 0; l < kFewLanes; ++l) {
    store(rows[l], sums[l][0]);
    store(rows[l] + kLanes, sums[l][1]);
  }
  for (int64_t j = 0; j < kKeyTile; j += kLanes) transpose(rows[0] + j, kKeyTile, desk.scores + j * lanes, lanes);
}

#endif

// scores[j, l] of `count` keys and the `used` first of the lanes.
OSSIA_INLINE void score_tile(const Desk& desk, int64_t count, const Shape& shape, int64_t head_dim, int64_t used,
                             int64_t lanes, Ahead& ahead) {
#if OSSIA_512
  if (used <= kFewLanes && count == kKeyTile) return score_few_lanes(desk, shape, head_dim, lanes, ahead);
#else
  (void)used, (void)ahead;
#endif
  int64_t column = 0;
  for (; column + 2 * kLanes <= lanes; column += 2 * kLanes)
    score_columns<2>(desk, column, count, shape, head_dim, lanes);
  for (; column < lanes; column += kLanes) score_columns<1>(desk, column, count, shape, head_dim, lanes);
}

// o[l, h] = o[l, h] rescale[l] + p[j, l] values[j, h] for kCount lanes and kVectors vectors of h
template <int kCount, int kVectors>
OSSIA_INLINE void value_patch(const float* p, const float* values, const float* rescale, int64_t count, int64_t lanes,
                              int64_t dim, float* o, Ahead& ahead) {
  Vf sums[kCount][kVectors];
  OSSIA_UNROLL(16)
  for (int l = 0; l < kCount; ++l)
    OSSIA_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) sums[l][i] = mul(load(o + l * dim + i * kLanes), set1(rescale[l]));
  for (int64_t j = 0; j < count; ++j) {
    ahead.ask();
    Vf value[kVectors];
    OSSIA_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) value[i] = load(values + j * dim + i * kLanes);
    OSSIA_UNROLL(16)
    for (int l = 0; l < kCount; ++l) {
      const Vf weight = set1(p[j * lanes + l]);
      OSSIA_UNROLL(16)
      for (int i = 0; i < kVectors; ++i) sums[l][i] = fma(weight, value[i], sums[l][i]);
    }
  }
  OSSIA_UNROLL(16)
  for (int l = 0; l < kCount; ++l)
    OSSIA_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) store(o + l * dim + i * kLanes, sums[l][i]);
}

template <int kCount>
OSSIA_INLINE void add_values_of(const Desk& desk, int64_t l, int64_t count, const Shape& shape, int64_t lanes,
                                Ahead& ahead) {
  int64_t h = 0;
  for (; h + 2 * kLanes <= shape.dim; h += 2 * kLanes)
    value_patch<kCount, 2>(desk.scores + l, desk.values + h, desk.rescale + l, count, lanes, shape.dim,
                           desk.split.o + l * shape.dim + h, ahead);
  for (; h < shape.dim; h += kLanes)
    value_patch<kCount, 1>(desk.scores + l, desk.values + h, desk.rescale + l, count, lanes, shape.dim,
                           desk.split.o + l * shape.dim + h, ahead);
}

OSSIA_INLINE void add_values(const Desk& desk, int64_t count, const Shape& shape, int64_t used, int64_t lanes, Ahead& ahead) {
  int64_t l = 0;
#if OSSIA_512
  for (; l + 8 <= used; l += 8) add_values_of<8>(desk, l, count, shape, lanes, ahead);
#endif
  for (; l < used; l += 4) add_values_of<4>(desk, l, count, shape, lanes, ahead);
}

// A piece of work -----------------------------------------------------------------------------------------------------

void prepare(const AttentionArgs& a, const Piece& piece, const Shape& shape, const Desk& desk) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  for (int64_t l = 0; l < piece.lanes; ++l) {
    // Lanes past the last query repeat it.
    const int64_t used = least(l, piece.num_tokens * shape.group - 1);
    const int64_t token = piece.first_token + used / shape.group;
    const int64_t head = piece.kv_head * shape.group + used % shape.group;
    const float* q = a.q + (token * a.num_heads + head) * a.head_dim;
    for (int64_t h = 0; h < a.head_dim; ++h) desk.q[h * piece.lanes + l] = q[h] * scale;
    desk.position[l] = static_cast<float>(a.positions[token]);  // exact below 2^24
    // A sink of minus infinity, which is no sink, must still be subtractable.
    desk.sink[l] = greatest(a.sinks[head], -0x1p120f);
  }
}

void begin(const State& state, const Desk& desk, const Shape& shape, int64_t lanes) {
  std::memcpy(state.top, desk.sink, lanes * sizeof(float));
  std::memset(state.sum, 0, lanes * sizeof(float));
  std::memset(state.o, 0, lanes * shape.dim * sizeof(float));
}

void softmax_tile(const AttentionArgs& a, const Desk& desk, int64_t first_key, int64_t count, int64_t first_position,
                  int64_t last_position, int64_t lanes) {
  const bool all_visible =
      first_key + count - 1 <= first_position && (a.window == 0 || first_key > last_position - a.window);
  const Vf hidden = set1(-INFINITY);
  for (int64_t l = 0; l < lanes; l += kLanes) {
    float* column = desk.scores + l;
    if (!all_visible) {
      const Vf position = load(desk.position + l);
      const Vf last_hidden = a.window ? sub(position, set1(static_cast<float>(a.window))) : hidden;
      for (int64_t j = 0; j < count; ++j) {
        const Vf key = set1(static_cast<float>(first_key + j));
        const Vf score = where_less(position, key, hidden, load(column + j * lanes));
        store(column + j * lanes, where_less(last_hidden, key, score, hidden));
      }
    }
    Vf top = load(desk.split.top + l);
    const Vf old_top = top;
    for (int64_t j = 0; j < count; ++j) top = max(top, load(column + j * lanes));
    const Vf rescale = exp(sub(old_top, top));
    Vf sum = mul(load(desk.split.sum + l), rescale);
    for (int64_t j = 0; j < count; ++j) {
      const Vf weight = exp(sub(load(column + j * lanes), top));
      store(column + j * lanes, weight);
      sum = add(sum, weight);
    }
    store(desk.split.top + l, top);
    store(desk.split.sum + l, sum);
    store(desk.rescale + l, rescale);
  }
}

// The keys of the piece that lie in one split, into desk.split.
void attend_split(const AttentionArgs& a, const Piece& piece, int64_t split, const Shape& shape, const Desk& desk) {
  begin(desk.split, desk, shape, piece.lanes);
  const int64_t first = greatest(piece.first_key, split * kSplit), end = least(piece.end_key, (split + 1) * kSplit);
  const int64_t last_position = piece.end_key - 1, used = piece.num_tokens * shape.group;
  for (int64_t tile = first / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
    const int64_t first_key = greatest(first, tile), count = least(end, tile + kKeyTile) - first_key;
    Ahead ahead(a, piece, tile);
    fetch_tile(a, piece, first_key, count, shape, desk);
    score_tile(desk, count, shape, a.head_dim, used, piece.lanes, ahead);
    softmax_tile(a, desk, first_key, count, piece.first_position, last_position, piece.lanes);
    add_values(desk, count, shape, used, piece.lanes, ahead);
  }
}

// total += split, with both brought to the larger maximum.
void add_split(const State& total, const State& split, const Shape& shape, int64_t lanes) {
  for (int64_t l = 0; l < lanes; l += kLanes) {
    const Vf total_top = load(total.top + l), split_top = load(split.top + l), top = max(total_top, split_top);
    float keep[kLanes], join[kLanes];
    store(keep, exp(sub(total_top, top)));
    store(join, exp(sub(split_top, top)));
    store(total.top + l, top);
    store(total.sum + l, add(mul(load(total.sum + l), load(keep)), mul(load(split.sum + l), load(join))));
    for (int lane = 0; lane < kLanes; ++lane) {
      float* o = total.o + (l + lane) * shape.dim;
      const float* more = split.o + (l + lane) * shape.dim;
      for (int64_t h = 0; h < shape.dim; h += kLanes)
        store(o + h, add(mul(load(o + h), set1(keep[lane])), mul(load(more + h), set1(join[lane]))));
    }
  }
}

void begin_total(const AttentionArgs& a, const Piece& piece, const Shape& shape, const Desk& desk) {
  begin(desk.total, desk, shape, piece.lanes);
  for (int64_t l = 0; l < piece.lanes; ++l) {
    const int64_t head = piece.kv_head * shape.group + least(l, piece.num_tokens * shape.group - 1) % shape.group;
    desk.total.sum[l] = a.sinks[head] < -0x1p120f ? 0.0f : 1.0f;
  }
}

void finish(const AttentionArgs& a, const Piece& piece, const Shape& shape, const State& total) {
  for (int64_t l = 0; l < piece.num_tokens * shape.group; ++l) {
    const int64_t token = piece.first_token + l / shape.group, head = piece.kv_head * shape.group + l % shape.group;
    float* out = a.out + (token * a.num_heads + head) * a.head_dim;
    for (int64_t h = 0; h < a.head_dim; ++h) out[h] = total.o[l * shape.dim + h] / total.sum[l];
  }
}

struct Split {
  int64_t piece, split;
};

}  // namespace

void attention(Workspace& work, const AttentionArgs& a) {
  const int64_t row = a.num_kv_heads * a.head_dim;
  if (a.cached) {
    work.pool.for_each(a.num_sequences, a.num_tokens * row >= kWorthSharing && a.num_sequences > 1, [&](int64_t n, int) {
      const int64_t first = a.query_starts[n], count = a.query_starts[n + 1] - first;
      for (int64_t t = first; t < first + count; ++t)
        for (int64_t head = 0; head < a.num_kv_heads; ++head) {
          const int64_t slot = slot_index(a, n, head, a.positions[t]);
          store_row(a.kv_format, a.keys, slot, a.k + t * row + head * a.head_dim, a.head_dim);
          store_row(a.kv_format, a.values, slot, a.v + t * row + head * a.head_dim, a.head_dim);
        }
    });
  }

  Shape shape;
  shape.group = a.num_heads / a.num_kv_heads;
  shape.tokens_per_piece = greatest<int64_t>(1, kMaxLanes / shape.group);
  shape.lanes = round_up(least(shape.tokens_per_piece, a.num_tokens) * shape.group, kLanes);
  shape.dim = round_up(a.head_dim, kLanes);

  int64_t num_pieces = 0;
  for (int64_t n = 0; n < a.num_sequences; ++n)
    num_pieces += divide_up(a.query_starts[n + 1] - a.query_starts[n], shape.tokens_per_piece) * a.num_kv_heads;
  Piece* pieces = work.lists.get<Piece>(num_pieces);
  int64_t made = 0, products = 0, num_splits = 0;
  for (int64_t n = 0; n < a.num_sequences; ++n)
    for (int64_t head = 0; head < a.num_kv_heads; ++head)
      for (int64_t t = a.query_starts[n]; t < a.query_starts[n + 1]; t += shape.tokens_per_piece) {
        Piece& piece = pieces[made++];
        piece.sequence = n;
        piece.kv_head = head;
        piece.first_token = t;
        piece.num_tokens = least(shape.tokens_per_piece, a.query_starts[n + 1] - t);
        piece.first_position = a.positions[t];
        piece.end_key = a.positions[t + piece.num_tokens - 1] + 1;
        // Without a cache the sequence begins with its first token here.
        const int64_t oldest = a.cached ? 0 : a.positions[a.query_starts[n]];
        piece.first_key = greatest(oldest, a.window ? piece.first_position - a.window + 1 : 0);
        piece.lanes = round_up(piece.num_tokens * shape.group, kLanes);
        products += piece.lanes * (piece.end_key - piece.first_key) * a.head_dim * 2;
        num_splits += (piece.end_key - 1) / kSplit - piece.first_key / kSplit + 1;
      }
  const bool worth_sharing = products >= kWorthSharing;
  const int num_threads = work.pool.num_threads();
  float* desks = work.per_worker.get<float>(round_up(Desk::size(shape), 16) * num_threads);
  const auto desk_of = [&](int worker) { return Desk(desks + worker * round_up(Desk::size(shape), 16), shape); };

  if (num_pieces >= 4 * num_threads || num_splits == num_pieces || !worth_sharing) {
    work.pool.for_each(num_pieces, worth_sharing, [&](int64_t index, int worker) {
      const Piece& piece = pieces[index];
      const Desk desk = desk_of(worker);
      prepare(a, piece, shape, desk);
      begin_total(a, piece, shape, desk);
      for (int64_t split = piece.first_key / kSplit; split * kSplit < piece.end_key; ++split) {
        attend_split(a, piece, split, shape, desk);
        add_split(desk.total, desk.split, shape, piece.lanes);
      }
      finish(a, piece, shape, desk.total);
    });
    return;
  }

  // Few long sequences: splits are the pieces of work, and are added afterwards.
  Split* splits = work.hidden.get<Split>(num_splits);
  int64_t* first_split = work.outputs.get<int64_t>(num_pieces + 1);
  int64_t count = 0;
  for (int64_t p = 0; p < num_pieces; ++p) {
    first_split[p] = count;
    for (int64_t split = pieces[p].first_key / kSplit; split * kSplit < pieces[p].end_key; ++split)
      splits[count++] = {p, split};
  }
  first_split[num_pieces] = count;
  float* states = work.partial.get<float>(num_splits * state_size(shape));
  work.pool.for_each(num_splits, true, [&](int64_t index, int worker) {
    const Piece& piece = pieces[splits[index].piece];
    Desk desk = desk_of(worker);
    desk.split = state_at(states + index * state_size(shape), shape);
    prepare(a, piece, shape, desk);
    attend_split(a, piece, splits[index].split, shape, desk);
  });
  work.pool.for_each(num_pieces, true, [&](int64_t index, int worker) {
    const Piece& piece = pieces[index];
    const Desk desk = desk_of(worker);
    prepare(a, piece, shape, desk);
    begin_total(a, piece, shape, desk);
    for (int64_t split = first_split[index]; split < first_split[index + 1]; ++split)
      add_split(desk.total, state_at(states + split * state_size(shape), shape), shape, piece.lanes);
    finish(a, piece, shape, desk.total);
  });
}

}  // namespace ossia::OSSIA_NS
