// Value norms, without ever writing what the output projection makes of every token.
//
//   norms[t] = mean over the group of sum over j of |values[t] . projection[j, member]|      j: the hidden size
//
//               columns: members of the group times the hidden size
//               +---------+---------+---      a panel: COLUMNS of them, packed so that what a step of the product
//   values      |  panel  |  panel  |         needs of all lies side by side. TOKENS times COLUMNS products stay in
//   tokens x v  |         |         |         registers over all channels, and only their sizes are added up.
//               +---------+---------+---
//
// Threads share the packing of a head's panels, and then its tokens. Source: CriticalKV, arXiv 2502.03805, section 4.

#include "threads.h"
#include "vectors.h"

// What `defensivekv.kernels.native.value_norm` fills in. Strides count elements; channels lie side by side.
struct ValueNorms {
  int64_t dtype, threads;
  int64_t heads, group, tokens, size, hidden;  // size: channels of a value, a multiple of 2
  const char *values;                          // (heads, tokens, size)
  int64_t value_strides[2];
  const char *projection;  // (hidden, heads * group * size)
  int64_t projection_stride;
  float *norms;  // (heads, tokens)
};

#if defined(__AVX512F__)

namespace {

constexpr int TOKENS = 6, VECTORS = 4, COLUMNS = VECTORS * WIDTH;
constexpr int64_t CHUNK = 64 * TOKENS;  // tokens that a thread takes at a time: their values stay in its cache

// A step of a product takes PAIR channels of a column, and as many of a token's value.
struct FloatSteps {
  static constexpr int PAIR = 1;
  typedef float Element;
  typedef Floats Operand;
  INLINE Operand repeat(const Element *value) { return splat(*value); }
  INLINE void multiply(Floats &sum, Operand panel, Operand value) { sum += panel * value; }
};

template <class Type> struct Widened : FloatSteps {
  static void convert(const char *from, Element *to, int64_t size) {
    alignas(64) char rest[WIDTH * 4] = {};
    float lanes[WIDTH];
    for (int64_t place = 0; place < size; place += WIDTH) {
      int64_t count = size - place < WIDTH ? size - place : WIDTH;
      std::memcpy(rest, from + place * Type::BYTES, count * Type::BYTES);
      store(lanes, Type::load_one(rest));
      std::memcpy(to + place, lanes, count * sizeof(float));
    }
  }
};

#if defined(__AVX512BF16__)
struct BFloatSteps {
  static constexpr int PAIR = 2;
  typedef uint16_t Element;
  typedef __m512bh Operand;
  INLINE Operand repeat(const Element *value) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(value)); }
  INLINE void multiply(Floats &sum, Operand panel, Operand value) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, panel, value);
  }
  static void convert(const char *from, Element *to, int64_t size) { std::memcpy(to, from, 2 * size); }
};
#else
typedef Widened<BFloat16> BFloatSteps;
#endif

// Adds the sizes of NUM tokens' products with a panel to their sums.
template <class Steps, int NUM>
INLINE void multiply_panel(const typename Steps::Element *values, const typename Steps::Element *panel, int64_t size,
                           float *sums) {
  Floats products[NUM][VECTORS] = {};
  for (int64_t channel = 0; channel < size; channel += Steps::PAIR) {
    typename Steps::Operand columns[VECTORS];
    for (int i = 0; i < VECTORS; i++)
      columns[i] = load<typename Steps::Operand>(panel + channel * COLUMNS + i * WIDTH * Steps::PAIR);
    for (int token = 0; token < NUM; token++) {
      typename Steps::Operand value = Steps::repeat(values + token * size + channel);
      for (int i = 0; i < VECTORS; i++) Steps::multiply(products[token][i], columns[i], value);
    }
  }
  for (int token = 0; token < NUM; token++) {
    Floats sum = load<Floats>(sums + token * WIDTH);
    for (int i = 0; i < VECTORS; i++) sum += (Floats)((Words)products[token][i] & 0x7fffffffu);
    store(sums + token * WIDTH, sum);
  }
}

// panel[channel / PAIR][column][channel % PAIR]; columns that there are not are zero. `line` holds one column.
template <class Steps, int BYTES>
void pack_panel(const ValueNorms &a, int64_t head, int64_t first, typename Steps::Element *line,
                typename Steps::Element *panel) {
  for (int64_t column = 0; column < COLUMNS; column++) {
    int64_t number = first + column, member = number / a.hidden, row = number % a.hidden;
    if (member < a.group)
      Steps::convert(a.projection + BYTES * (row * a.projection_stride + (head * a.group + member) * a.size), line,
                     a.size);
    else std::memset(line, 0, a.size * sizeof *line);
    for (int64_t channel = 0; channel < a.size; channel++)
      panel[channel / Steps::PAIR * Steps::PAIR * COLUMNS + column * Steps::PAIR + channel % Steps::PAIR] =
          line[channel];
  }
}

// Norms of tokens `start` to `end` of a head. values, sums: room for a chunk of them.
template <class Steps, int BYTES>
void add_chunk(const ValueNorms &a, int64_t head, int64_t start, int64_t end, int64_t panels,
               const typename Steps::Element *packed, typename Steps::Element *values, float *sums) {
  int64_t count = end - start;
  for (int64_t token = 0; token < count; token++)
    Steps::convert(a.values + BYTES * (head * a.value_strides[0] + (start + token) * a.value_strides[1]),
                   values + token * a.size, a.size);
  std::memset(sums, 0, count * WIDTH * sizeof(float));
  for (int64_t number = 0; number < panels; number++) {
    const typename Steps::Element *panel = packed + number * COLUMNS * a.size;
    int64_t token = 0;
    for (; token + TOKENS <= count; token += TOKENS)
      multiply_panel<Steps, TOKENS>(values + token * a.size, panel, a.size, sums + token * WIDTH);
    for (; token < count; token++)
      multiply_panel<Steps, 1>(values + token * a.size, panel, a.size, sums + token * WIDTH);
  }
  for (int64_t token = 0; token < count; token++) {
    float total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += sums[token * WIDTH + lane];
    a.norms[head * a.tokens + start + token] = total / a.group;
  }
}

template <class Steps, int BYTES> void value_norms(const ValueNorms &a) {
  typedef typename Steps::Element Element;
  int64_t panels = (a.group * a.hidden + COLUMNS - 1) / COLUMNS, chunks = (a.tokens + CHUNK - 1) / CHUNK;
  Buffer<Element> packed(panels * COLUMNS * a.size), values(a.threads * CHUNK * a.size), lines(a.threads * a.size);
  Buffer<float> sums(a.threads * CHUNK * WIDTH);
#pragma omp parallel num_threads((int)a.threads)
  {
    int64_t thread = omp_get_thread_num();
    for (int64_t head = 0; head < a.heads; head++) {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < panels; panel++)
        pack_panel<Steps, BYTES>(a, head, panel * COLUMNS, lines.data + thread * a.size,
                                 packed.data + panel * COLUMNS * a.size);
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        add_chunk<Steps, BYTES>(a, head, chunk * CHUNK, a.tokens < (chunk + 1) * CHUNK ? a.tokens : (chunk + 1) * CHUNK,
                                panels, packed.data, values.data + thread * CHUNK * a.size,
                                sums.data + thread * CHUNK * WIDTH);
    }
  }
}

}  // namespace

extern "C" int defensivekv_makes_value_norms() { return 1; }

extern "C" int defensivekv_value_norms(const ValueNorms *arguments) {
  try {
    if (arguments->dtype == 0) value_norms<Widened<Float32>, 4>(*arguments);
    else if (arguments->dtype == 1) value_norms<BFloatSteps, 2>(*arguments);
    else value_norms<Widened<Float16>, 2>(*arguments);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

#else

// With fewer registers, a library's matrix products are faster than these.
extern "C" int defensivekv_makes_value_norms() { return 0; }

#endif
