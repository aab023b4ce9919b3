// One tile of entries against four query rows: logits, the running softmax, weighted values.

#pragma once

#include <type_traits>

#include "vectors.h"

namespace {

constexpr int TILE = 32;        // entries
constexpr int ROWS = 4;         // query rows at a time
constexpr int VALUE_BLOCK = 4;  // vectors of a value at a time

// Running softmax of some rows: what a part of the entries came to.
struct Part {
  float *highest, *total, *output;
};

// Of one tile and some query rows: lane 4 * entry + row. Rows that there are not are zero, or -inf beyond the entries.
typedef float Tile[TILE * ROWS];

// Entries that are read a little later: how many, and where they lie, in bytes from those that are read now.
struct Ahead {
  int64_t length, keys, values;
};

INLINE void fetch(const char *later, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(later + line, 0, 2);
}

// logits[entry][row] = queries[row] . keys[entry] * scaling for a tile, -inf beyond `count`. Entry after entry: a
// processor foresees one straight run through memory, and not four side by side.
// STEPS: thirty-two channels each, where the queries of all fit into registers; 0: they are loaded for every key.
template <class Type, int NUM, int STEPS>
INLINE void multiply_keys(const float *queries, int64_t size, const char *keys, int64_t stride, int count,
                          float scaling, Ahead ahead, Tile logits) {
  constexpr int STEP = 2 * WIDTH;
  auto query_at = [&](int row, int64_t place) { return (const char *)(queries + row * size) + place * Type::QUERY_BYTES; };
  typename Type::Channels held[NUM][STEPS ? STEPS : 1];
  for (int row = 0; row < NUM; row++)
    for (int step = 0; step < STEPS; step++) held[row][step] = Type::load_queries(query_at(row, step * STEP));
  for (int entry = 0; entry < TILE; entry += 4) {
    if (entry >= count) {
      store(logits + entry * ROWS, splat(-INFINITY));
      continue;
    }
    Floats products[4][4] = {};
    for (int e = 0; e < 4; e++) {
      const char *key = keys + stride * (entry + e < count ? entry + e : count - 1);
      Floats sums[ROWS] = {};
      if constexpr (STEPS > 0) {
        if (entry + e < ahead.length) fetch(key + ahead.keys, size * Type::BYTES);
        for (int step = 0; step < STEPS; step++) {
          typename Type::Channels channels = Type::load_keys(key + step * STEP * Type::BYTES);
          for (int row = 0; row < NUM; row++) Type::add_product(sums[row], channels, held[row][step]);
        }
      } else {
        int64_t place = 0;
        for (; place + STEP <= size; place += STEP) {
          if (entry + e < ahead.length) fetch(key + ahead.keys + place * Type::BYTES, STEP * Type::BYTES);
          typename Type::Channels channels = Type::load_keys(key + place * Type::BYTES);
          for (int row = 0; row < NUM; row++)
            Type::add_product(sums[row], channels, Type::load_queries(query_at(row, place)));
        }
        if (place < size)
          for (int row = 0; row < NUM; row++)
            sums[row] += Type::load_one(key + place * Type::BYTES) * Type::load_query(query_at(row, place));
      }
      for (int row = 0; row < NUM; row++) products[e][row] = sums[row];
    }
    store(logits + entry * ROWS, sums_of(products) * scaling);
    for (int e = count - entry; e < 4; e++)
      for (int row = 0; row < ROWS; row++) logits[(entry + e) * ROWS + row] = -INFINITY;
  }
}

// output[row] += sum of weights[row][entry] * values[entry], over a block of the value's elements.
template <class Type, int NUM, int BLOCK>
INLINE void add_values(float *output, int64_t size, const Tile weights, const char *values, int64_t stride,
                       int count, Ahead ahead) {
  Floats sums[NUM][BLOCK];
  for (int row = 0; row < NUM; row++)
    for (int i = 0; i < BLOCK; i++) sums[row][i] = load<Floats>(output + row * size + i * WIDTH);
  for (int entry = 0; entry < count; entry++) {
    const char *from = values + stride * entry;
    if (entry < ahead.length) fetch(from + ahead.values, BLOCK * WIDTH * Type::BYTES);
    Floats value[BLOCK];
    if constexpr (BLOCK == 1) value[0] = Type::load_one(from);
    else
      for (int i = 0; i < BLOCK; i += 2)
        Type::load_pair(from + i * WIDTH * Type::BYTES, value[i], value[i + 1]);
    for (int row = 0; row < NUM; row++)
      for (int i = 0; i < BLOCK; i++) sums[row][i] += value[i] * weights[entry * ROWS + row];
  }
  for (int row = 0; row < NUM; row++)
    for (int i = 0; i < BLOCK; i++) store(output + row * size + i * WIDTH, sums[row][i]);
}

// Logits to weights under the running maximum, which may rise. Whether there is any weight.
template <int NUM> INLINE bool update_softmax(Tile logits, Part part, int64_t value_size) {
  float before[ROWS] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, lanes[WIDTH];
  std::memcpy(before, part.highest, NUM * sizeof(float));
  Floats tops = load<Floats>(logits);
  for (int lane = WIDTH; lane < TILE * ROWS; lane += WIDTH) tops = highest(tops, load<Floats>(logits + lane));
  store(lanes, highest_of_quarters(tops));
  bool is_any = false;
  for (int row = 0; row < NUM; row++) {
    if (lanes[row] > before[row]) {
      float factor = std::exp(before[row] - lanes[row]);
      part.total[row] *= factor;
      float *output = part.output + row * value_size;
      for (int64_t lane = 0; lane < value_size; lane += WIDTH)
        store(output + lane, load<Floats>(output + lane) * factor);
      before[row] = part.highest[row] = lanes[row];
    }
    is_any |= before[row] != -INFINITY;
  }
  // While nothing was visible, all weights are zero, and not exp(-inf + inf).
  for (int lane = 0; lane < WIDTH; lane++) {
    float top = before[lane % ROWS];
    lanes[lane] = top == -INFINITY ? 0 : top;
  }
  Floats top = load<Floats>(lanes), total{};
  for (int lane = 0; lane < TILE * ROWS; lane += WIDTH) {
    Floats weights = exp(load<Floats>(logits + lane) - top);
    store(logits + lane, weights);
    total += weights;
  }
  store(lanes, sum_of_quarters(total));
  for (int row = 0; row < NUM; row++) part.total[row] += lanes[row];
  return is_any;
}

INLINE void cap(Tile logits, float softcap) {
  for (int lane = 0; lane < TILE * ROWS; lane += WIDTH) {
    Floats logit = load<Floats>(logits + lane);
    store(logits + lane, logit == -INFINITY ? logit : tanh(logit / softcap) * softcap);
  }
}

}  // namespace
