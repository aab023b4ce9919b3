// Sixteen floats at a time, in the compiler's own vector types: GCC and Clang make of them what the processor has.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int WIDTH = 16;

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));

#define INLINE static inline __attribute__((always_inline))

template <class Vector> INLINE Vector load(const void *from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

INLINE void store(float *to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

// Keeps a vector in a register that compilers would load again for each use: loads are what runs out first.
#if defined(__AVX512F__)
#define IN_REGISTER(vector) asm("" : "+v"(vector))
#else
#define IN_REGISTER(vector) (void)(vector)
#endif

INLINE Floats splat(float value) { return value - Floats{}; }

INLINE Floats highest(Floats a, Floats b) { return a > b ? a : b; }

// Element types. `load_one` gives sixteen elements in order; `load_pair` thirty-two as two vectors, in an order of the
// type's own, which `put_pair` undoes. Keys are multiplied thirty-two at a time, with queries kept in a form of the
// type's own too: HELD steps of four queries fit into registers.

struct Pair {
  Floats first, second;
};

// Queries as floats, in the order of pairs.
template <class Type> struct FloatQueries {
  static constexpr int QUERY_BYTES = 4, HELD = 2;
  typedef Pair Channels;
  INLINE Channels load_keys(const char *from) {
    Pair pair;
    Type::load_pair(from, pair.first, pair.second);
    return pair;
  }
  INLINE Channels load_queries(const char *from) { return {load<Floats>(from), load<Floats>(from + sizeof(Floats))}; }
  INLINE Floats load_query(const char *from) { return load<Floats>(from); }
  INLINE void add_product(Floats &sum, Channels keys, Channels queries) {
    sum += keys.first * queries.first;
    sum += keys.second * queries.second;
  }
  INLINE void keep_query(const char *from, char *to, int64_t size) {
    float *floats = (float *)to;
    int64_t place = 0;
    for (; place + 2 * WIDTH <= size; place += 2 * WIDTH) {
      Pair pair = load_keys(from + place * Type::BYTES);
      store(floats + place, pair.first);
      store(floats + place + WIDTH, pair.second);
    }
    if (place < size) store(floats + place, Type::load_one(from + place * Type::BYTES));
  }
};

struct Float32 : FloatQueries<Float32> {
  static constexpr int BYTES = 4;
  INLINE Floats load_one(const char *from) { return load<Floats>(from); }
  INLINE void load_pair(const char *from, Floats &first, Floats &second) {
    first = load<Floats>(from);
    IN_REGISTER(first);
    second = load<Floats>(from + sizeof(Floats));
    IN_REGISTER(second);
  }
  INLINE void put_one(char *to, Floats one) { std::memcpy(to, &one, sizeof one); }
  INLINE void put_pair(char *to, Floats first, Floats second) {
    put_one(to, first);
    put_one(to + sizeof(Floats), second);
  }
};

struct BFloat16;

INLINE Floats widened(Halves bfloats) { return (Floats)(__builtin_convertvector(bfloats, Words) << 16); }

#if defined(__AVX512BF16__)
// Queries as they are: products of pairs of bfloat16 are one instruction, summed up in float32.
struct BFloat16Queries {
  static constexpr int QUERY_BYTES = 2, HELD = 4;
  typedef __m512bh Channels;
  INLINE Channels load_keys(const char *from) { return load<__m512bh>(from); }
  INLINE Channels load_queries(const char *from) { return load<__m512bh>(from); }
  INLINE Floats load_query(const char *from) { return widened(load<Halves>(from)); }
  INLINE void add_product(Floats &sum, Channels keys, Channels queries) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, keys, queries);
  }
  INLINE void keep_query(const char *from, char *to, int64_t size) { std::memcpy(to, from, 2 * size); }
};
#else
typedef FloatQueries<BFloat16> BFloat16Queries;
#endif

struct BFloat16 : BFloat16Queries {
  static constexpr int BYTES = 2;
  INLINE Floats load_one(const char *from) { return widened(load<Halves>(from)); }
  // Even elements, then odd ones: a shift and a mask, where keeping the order takes two widening moves as well.
  INLINE void load_pair(const char *from, Floats &first, Floats &second) {
    Words both = load<Words>(from);
    IN_REGISTER(both);
    first = (Floats)(both << 16);
    second = (Floats)(both & 0xffff0000u);
  }
  // To the nearest, ties to even, in the upper half; a NaN stays one.
  INLINE Words rounded(Floats value) {
    Words word = (Words)value;
    return value != value ? Words{} + 0x7fc00000u : word + 0x7fffu + ((word >> 16) & 1);
  }
  INLINE void put_one(char *to, Floats one) {
    Halves halves = __builtin_convertvector(rounded(one) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
  INLINE void put_pair(char *to, Floats first, Floats second) {
    Words both = (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
    std::memcpy(to, &both, sizeof both);
  }
};

struct Float16 : FloatQueries<Float16> {
  static constexpr int BYTES = 2;
  INLINE Floats load_one(const char *from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#else
    Words word = __builtin_convertvector(load<Halves>(from), Words);
    Words size = (word & 0x7fffu) << 13;
    Words scaled = (Words)((Floats)size * 0x1p112f);
    scaled = size >= (0x7c00u << 13) ? (size | 0x7f800000u) : scaled;
    return (Floats)(scaled | ((word & 0x8000u) << 16));
#endif
  }
  INLINE void load_pair(const char *from, Floats &first, Floats &second) {
    first = load_one(from);
    second = load_one(from + sizeof(Halves));
  }
  INLINE void put_one(char *to, Floats one) {
#if defined(__AVX512F__)
    __m256i halves = _mm512_cvtps_ph((__m512)one, _MM_FROUND_TO_NEAREST_INT);
#else
    Halves halves;
    for (int lane = 0; lane < WIDTH; lane++) halves[lane] = to_half(one[lane]);
#endif
    std::memcpy(to, &halves, sizeof halves);
  }
  INLINE void put_pair(char *to, Floats first, Floats second) {
    put_one(to, first);
    put_one(to + sizeof(Halves), second);
  }
  static uint16_t to_half(float value) {
    uint32_t word = load<uint32_t>(&value), size = word & 0x7fffffffu;
    uint16_t half;
    if (size > 0x7f800000u) half = 0x7e00;
    else if (size >= 0x477ff000u) half = 0x7c00;
    else if (size < 0x38800000u) {
      // Below the smallest normal number: a sum whose last bits are the subnormal's, rounded by the adder.
      float shifted = load<float>(&size) + 0.5f;
      half = (uint16_t)(load<uint32_t>(&shifted) - 0x3f000000u);
    } else half = (uint16_t)((size - 0x38000000u + 0xfff + ((size >> 13) & 1)) >> 13);
    return half | (uint16_t)((word >> 16) & 0x8000u);
  }
};

// exp(x) for x <= 88, within 2 units in the last place; 0 below the smallest normal number.
INLINE Floats exp(Floats x) {
  Floats scaled = x * 1.44269504088896341f;
  Floats clamped = scaled < -126.0f ? splat(-126.0f) : scaled;
  Floats whole = (clamped + 12582912.0f) - 12582912.0f;  // to the nearest integer
  Floats part = clamped - whole;
  Floats power = splat(1.535336188319500e-4f);
  power = power * part + 1.339887440266574e-3f;
  power = power * part + 9.618437357674640e-3f;
  power = power * part + 5.550332471162809e-2f;
  power = power * part + 2.402264791363012e-1f;
  power = power * part + 6.931472028550421e-1f;
  power = power * part + 1.0f;
  Floats result = power * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
  return scaled < -126.0f ? Floats{} : result;
}

// tanh(x), within a few units in the last place: by exp, and by its series where that would cancel.
INLINE Floats tanh(Floats x) {
  Floats square = x * x, bounded = x > 40.0f ? splat(40.0f) : x;
  Floats series = splat(-1382.0f / 155925);
  series = series * square + 62.0f / 2835;
  series = series * square - 17.0f / 315;
  series = series * square + 2.0f / 15;
  series = series * square - 1.0f / 3;
  Floats closed = 1 - 2 / (exp(2 * bounded) + 1);
  // A comparison that is false for NaN, which the closed form hands on.
  return square < 0.1f ? x + x * square * series : closed;
}

#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// Every fourth lane together: lane `row` of the result, and the others equal to it, is that of lanes row, row + 4, ...
INLINE Floats highest_of_quarters(Floats v) {
  v = highest(v, PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  return highest(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
}

INLINE Floats sum_of_quarters(Floats v) {
  v += PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  return v + PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}

// The sums of sixteen vectors at once: lane 4 * entry + row of the result is that of sums[entry][row].
INLINE Floats sums_of(const Floats vectors[4][4]) {
  Floats quarter[4];
  for (int entry = 0; entry < 4; entry++) {
    const Floats *row = vectors[entry];
    Floats low = PICK(row[0], row[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                 PICK(row[0], row[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    Floats high = PICK(row[2], row[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  PICK(row[2], row[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    quarter[entry] = PICK(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                     PICK(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  Floats first = PICK(quarter[0], quarter[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                 PICK(quarter[0], quarter[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  Floats second = PICK(quarter[2], quarter[3], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                  PICK(quarter[2], quarter[3], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  return PICK(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         PICK(first, second, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#undef PICK
}
