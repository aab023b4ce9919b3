// Few queries against a ragged prefix and a dense tail, at the speed of the memory that they are read from.
//
//   segments   prefix: row 0 head 0 | row 0 head 1 | ...    tail: row 0 head 0 | row 0 head 1 | ...
//   pieces     [        |        |        |        |        |        |        |        ]   of equal work
//
// softmax(q k^T scaling) v over the entries of both, as parts merged by their log-sum-exp (flash-decoding; the softmax
// within a part is the online one of Milakov and Gimelshein, arXiv 1805.02867). The work, entries times query rows, is
// cut into equal pieces, which threads take as they come; a piece may begin and end within a segment.

#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int TILE = 32;          // entries
constexpr int ROWS = 4;           // query rows at a time
constexpr int VALUE_BLOCK = 4;    // vectors of a value at a time
constexpr int64_t AHEAD = 32768;  // bytes between what is read and what is fetched, of keys and of values
constexpr int PIECES_PER_THREAD = 4;
constexpr int64_t LEAST_WORK = 512;  // entries of a piece: less is not worth a thread

}  // namespace

// What `defensivekv.attention.native` fills in. Sizes and strides count elements.
struct Arguments {
  int64_t dtype;  // 0: float32, 1: bfloat16, 2: float16
  int64_t threads;
  int64_t batch, heads, group, positions;  // query heads of a key-value head; query positions
  int64_t key_size, value_size;            // multiples of 16
  const char *queries;                     // (batch, heads * group, positions, key_size)
  int64_t query_strides[3];
  char *output;  // (batch, heads * group, positions, value_size)
  int64_t output_strides[3];
  const char *keys, *values;  // (stored, key_size), (stored, value_size)
  int64_t sources;            // rows of the prefix
  const int64_t *offsets;     // (sources * heads + 1): where segments begin
  const int64_t *first_reader, *readers;  // (sources + 1), (batch): which batch rows read a row of the prefix
  const char *tail_keys, *tail_values;    // (batch, heads, used, key_size), (batch, heads, used, value_size)
  int64_t tail_key_strides[3], tail_value_strides[3];
  int64_t used;
  const uint8_t *visible;  // (batch, heads * group, positions, used) of the tail; null: causal
  int64_t visible_strides[4];
  const float *sinks;  // (heads * group); null: none
  float scaling, softcap;  // softcap 0: none
};

namespace {

// Entries of one key-value head that the same query rows read.
struct Segment {
  const char *keys, *values;
  int64_t key_stride, value_stride;  // bytes
  int64_t length, head;
  const int64_t *readers;  // batch rows
  int64_t num_readers;
  bool is_tail;
  int64_t rows;         // readers * group * positions
  int64_t weight;       // of one entry, in work
  int64_t first_work;   // work of the segments before
  int64_t first_row;    // rows of the segments before
};

// Running softmax of some rows: what a part of the entries came to.
struct Part {
  float *highest, *total, *output;
};

// Rows of `key_size` floats' room each, in the form that the type multiplies keys with.
template <class Type> void gather_queries(const Arguments &a, const Segment &segment, float *rows) {
  for (int64_t reader = 0; reader < segment.num_readers; reader++)
    for (int64_t member = 0; member < a.group; member++)
      for (int64_t position = 0; position < a.positions; position++) {
        const char *from = a.queries + Type::BYTES * (segment.readers[reader] * a.query_strides[0] +
                                                      (segment.head * a.group + member) * a.query_strides[1] +
                                                      position * a.query_strides[2]);
        Type::keep_query(from, (char *)rows, a.key_size);
        rows += a.key_size;
      }
}

// Of one tile and some query rows: lane 4 * entry + row. Rows that there are not are zero, or -inf beyond the entries.
typedef float Tile[TILE * ROWS];

// What lies AHEAD of what is read now; past a segment's end the next one begins, in most cases.
INLINE void fetch(const char *reading, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(reading + AHEAD + line, 0, 2);
}

// logits[entry][row] = queries[row] . keys[entry] * scaling for a tile, -inf beyond `count`. Entry after entry: a
// processor foresees one straight run through memory, and not four side by side.
// STEPS: thirty-two channels each, where the queries of all fit into registers; 0: they are loaded for every key.
template <class Type, int NUM, int STEPS>
INLINE void multiply_keys(const float *queries, int64_t size, const char *keys, int64_t stride, int count,
                          float scaling, bool fetches, Tile logits) {
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
        if (fetches) fetch(key, size * Type::BYTES);
        for (int step = 0; step < STEPS; step++) {
          typename Type::Channels channels = Type::load_keys(key + step * STEP * Type::BYTES);
          for (int row = 0; row < NUM; row++) Type::add_product(sums[row], channels, held[row][step]);
        }
      } else {
        int64_t place = 0;
        for (; place + STEP <= size; place += STEP) {
          if (fetches) fetch(key + place * Type::BYTES, STEP * Type::BYTES);
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
                       int count, bool fetches) {
  Floats sums[NUM][BLOCK];
  for (int row = 0; row < NUM; row++)
    for (int i = 0; i < BLOCK; i++) sums[row][i] = load<Floats>(output + row * size + i * WIDTH);
  for (int entry = 0; entry < count; entry++) {
    const char *from = values + stride * entry;
    if (fetches) fetch(from, BLOCK * WIDTH * Type::BYTES);
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

void hide(const Arguments &a, const Segment &segment, int64_t first_row, int rows, int64_t first, int count,
          Tile logits) {
  for (int row = 0; row < rows; row++) {
    int64_t number = first_row + row, position = number % a.positions, member = number / a.positions % a.group;
    if (!a.visible) {
      int64_t seen = a.used - a.positions + position + 1;
      for (int entry = 0; entry < count; entry++)
        if (first + entry >= seen) logits[entry * ROWS + row] = -INFINITY;
      continue;
    }
    int64_t reader = segment.readers[number / (a.positions * a.group)];
    const uint8_t *mask = a.visible + reader * a.visible_strides[0] +
                          (segment.head * a.group + member) * a.visible_strides[1] + position * a.visible_strides[2];
    for (int entry = 0; entry < count; entry++)
      if (!mask[(first + entry) * a.visible_strides[3]]) logits[entry * ROWS + row] = -INFINITY;
  }
}

// One tile, some query rows.
template <class Type, int NUM>
void attend_tile(const Arguments &a, const Segment &segment, const float *queries, int64_t first_row, int64_t first,
                 int count, bool is_masked, bool fetches, Part part) {
  alignas(64) Tile logits;
  const char *keys = segment.keys + first * segment.key_stride;
  const char *values = segment.values + first * segment.value_stride;
  auto multiply = [&](auto steps) {
    multiply_keys<Type, NUM, steps>(queries, a.key_size, keys, segment.key_stride, count, a.scaling, fetches, logits);
  };
  if (a.key_size == 64) multiply(std::integral_constant<int, 2>());
  else if (a.key_size == 128 && Type::HELD >= 4) multiply(std::integral_constant<int, Type::HELD>());
  else multiply(std::integral_constant<int, 0>());
  if (a.softcap != 0) cap(logits, a.softcap);
  if (is_masked) hide(a, segment, first_row, NUM, first, count, logits);
  if (!update_softmax<NUM>(logits, part, a.value_size)) return;
  int64_t place = 0;
  for (; place + VALUE_BLOCK * WIDTH <= a.value_size; place += VALUE_BLOCK * WIDTH)
    add_values<Type, NUM, VALUE_BLOCK>(part.output + place, a.value_size, logits, values + place * Type::BYTES,
                                       segment.value_stride, count, fetches);
  if (place + 2 * WIDTH <= a.value_size) {
    add_values<Type, NUM, 2>(part.output + place, a.value_size, logits, values + place * Type::BYTES,
                             segment.value_stride, count, fetches);
    place += 2 * WIDTH;
  }
  if (place < a.value_size)
    add_values<Type, NUM, 1>(part.output + place, a.value_size, logits, values + place * Type::BYTES,
                             segment.value_stride, count, fetches);
}

// Entries `first` to `last` of a segment, all of its query rows.
template <class Type>
void attend_piece(const Arguments &a, const Segment &segment, int64_t first, int64_t last, float *queries, Part part) {
  for (int64_t row = 0; row < segment.rows; row++) part.highest[row] = -INFINITY, part.total[row] = 0;
  std::memset(part.output, 0, sizeof(float) * segment.rows * a.value_size);
  if (first >= last) return;
  gather_queries<Type>(a, segment, queries);
  for (int64_t start = first; start < last; start += TILE) {
    int count = (int)(last - start < TILE ? last - start : TILE);
    bool is_masked = segment.is_tail && (a.visible || start + count > a.used - a.positions + 1);
    for (int64_t row = 0; row < segment.rows;) {
      int64_t left = segment.rows - row;
      int num = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      Part rows = {part.highest + row, part.total + row, part.output + row * a.value_size};
      const float *some = queries + row * a.key_size;
      if (num == 4) attend_tile<Type, 4>(a, segment, some, row, start, count, is_masked, row == 0, rows);
      else if (num == 2) attend_tile<Type, 2>(a, segment, some, row, start, count, is_masked, row == 0, rows);
      else attend_tile<Type, 1>(a, segment, some, row, start, count, is_masked, row == 0, rows);
      row += num;
    }
  }
}

struct Plan {
  std::vector<Segment> segments;
  std::vector<int64_t> identity;  // batch rows, as readers of their own tails
  int64_t work = 0, rows = 0, most_rows = 0, pieces = 1;

  template <class Type> static Plan of(const Arguments &a) {
    Plan plan;
    plan.identity.resize(a.batch);
    plan.segments.reserve((a.sources + a.batch) * a.heads);
    int64_t each = a.group * a.positions;
    for (int64_t source = 0; source < a.sources; source++) {
      int64_t first = a.first_reader[source], count = a.first_reader[source + 1] - first;
      for (int64_t head = 0; head < a.heads; head++) {
        int64_t start = a.offsets[source * a.heads + head], end = a.offsets[source * a.heads + head + 1];
        plan.add({a.keys + start * a.key_size * Type::BYTES, a.values + start * a.value_size * Type::BYTES,
                  a.key_size * Type::BYTES, a.value_size * Type::BYTES, count ? end - start : 0, head,
                  a.readers + first, count, false, count * each, 0, 0, 0});
      }
    }
    for (int64_t row = 0; row < a.batch; row++) {
      plan.identity[row] = row;
      for (int64_t head = 0; head < a.heads; head++)
        plan.add({a.tail_keys + Type::BYTES * (row * a.tail_key_strides[0] + head * a.tail_key_strides[1]),
                  a.tail_values + Type::BYTES * (row * a.tail_value_strides[0] + head * a.tail_value_strides[1]),
                  a.tail_key_strides[2] * Type::BYTES, a.tail_value_strides[2] * Type::BYTES, a.used, head,
                  &plan.identity[row], 1, true, each, 0, 0, 0});
    }
    int64_t most = plan.work / LEAST_WORK;
    int64_t wanted = a.threads == 1 ? 1 : a.threads * PIECES_PER_THREAD;
    plan.pieces = most < 1 ? 1 : most < wanted ? most : wanted;
    return plan;
  }

  void add(Segment segment) {
    segment.weight = (segment.rows + ROWS - 1) / ROWS;
    segment.first_work = work;
    segment.first_row = rows;
    work += segment.weight * segment.length;
    rows += segment.rows;
    most_rows = segment.rows > most_rows ? segment.rows : most_rows;
    segments.push_back(segment);
  }

  int64_t start_of(int64_t piece) const { return work * piece / pieces; }

  // The segment in which a piece starts: the last one that begins at or before, and is not empty.
  int64_t segment_at(int64_t position) const {
    int64_t low = 0, high = (int64_t)segments.size() - 1;
    while (low < high) {
      int64_t middle = (low + high + 1) / 2;
      if (segments[middle].first_work <= position) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  int64_t entry_at(const Segment &segment, int64_t position) const {
    int64_t inside = position - segment.first_work;
    if (inside <= 0) return 0;
    int64_t entry = inside / segment.weight;
    return entry < segment.length ? entry : segment.length;
  }

  // Row of the parts where those of a segment in a piece begin. Pieces and segments go up together, so that parts of
  // different pairs never meet.
  int64_t part_row(int64_t piece, const Segment &segment) const { return segment.first_row + piece * most_rows; }
  int64_t part_rows() const { return rows + pieces * most_rows; }

  // Pieces that hold some of a segment.
  int64_t first_piece(const Segment &segment) const {
    int64_t piece = work ? segment.first_work * pieces / work : 0;
    while (piece > 0 && start_of(piece) > segment.first_work) piece--;
    while (piece + 1 < pieces && start_of(piece + 1) <= segment.first_work) piece++;
    return piece;
  }
};

// Parts of one segment, for the rows of one reader, into one softmax.
struct Merge {
  const Plan &plan;
  const Arguments &a;
  const float *highest, *total, *output;

  template <class Visit> void each(int64_t number, Visit visit) const {
    const Segment &segment = plan.segments[number];
    if (segment.length == 0 || segment.rows == 0) return;
    int64_t end = segment.first_work + segment.weight * segment.length;
    for (int64_t piece = plan.first_piece(segment); piece < plan.pieces && plan.start_of(piece) < end; piece++)
      visit(plan.part_row(piece, segment));
  }

  template <class Type> void row(int64_t batch, int64_t head, int64_t source, int64_t reader, float *sums) const {
    int64_t each_rows = a.group * a.positions;
    int64_t tail = (a.sources + batch) * a.heads + head, prefix = source * a.heads + head;
    for (int64_t row = 0; row < each_rows; row++) {
      int64_t member = head * a.group + row / a.positions, position = row % a.positions;
      float top = a.sinks ? a.sinks[member] : -INFINITY, sum = 0;
      auto rows_of = [&](auto visit) {
        if (source >= 0) each(prefix, [&](int64_t first) { visit(first + reader * each_rows + row); });
        each(tail, [&](int64_t first) { visit(first + row); });
      };
      rows_of([&](int64_t part) { top = highest[part] > top ? highest[part] : top; });
      std::memset(sums, 0, sizeof(float) * a.value_size);
      if (a.sinks) sum = std::exp(a.sinks[member] - top);
      rows_of([&](int64_t part) {
        if (highest[part] == -INFINITY) return;
        float weight = std::exp(highest[part] - top);
        sum += total[part] * weight;
        for (int64_t lane = 0; lane < a.value_size; lane += WIDTH)
          store(sums + lane, load<Floats>(sums + lane) + load<Floats>(output + part * a.value_size + lane) * weight);
      });
      char *to = a.output + Type::BYTES * (batch * a.output_strides[0] + member * a.output_strides[1] +
                                           position * a.output_strides[2]);
      float scale = sum == 0 ? 0 : 1 / sum;
      int64_t lane = 0;
      for (; lane + 2 * WIDTH <= a.value_size; lane += 2 * WIDTH)
        Type::put_pair(to + Type::BYTES * lane, load<Floats>(sums + lane) * scale,
                       load<Floats>(sums + lane + WIDTH) * scale);
      if (lane < a.value_size) Type::put_one(to + Type::BYTES * lane, load<Floats>(sums + lane) * scale);
    }
  }
};

template <class Type> void attend(const Arguments &a) {
  Plan plan = Plan::of<Type>(a);
  int64_t part_rows = plan.part_rows();
  Buffer<float> highest(part_rows), total(part_rows), output(part_rows * a.value_size);
  Buffer<float> scratch(a.threads * (plan.most_rows * a.key_size + a.value_size));
  std::vector<int64_t> sources(a.batch, -1), places(a.batch, 0);
  for (int64_t source = 0; source < a.sources; source++)
    for (int64_t i = a.first_reader[source]; i < a.first_reader[source + 1]; i++)
      sources[a.readers[i]] = source, places[a.readers[i]] = i - a.first_reader[source];
  Merge merge{plan, a, highest.data, total.data, output.data};
  int64_t outputs = a.batch * a.heads;
  int threads = (int)(plan.pieces < a.threads ? plan.pieces : a.threads);
  int64_t space = plan.most_rows * a.key_size + a.value_size;

#pragma omp parallel num_threads(threads)
  {
    float *mine = scratch.data + omp_get_thread_num() * space;
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < plan.pieces; piece++) {
      int64_t start = plan.start_of(piece), end = plan.start_of(piece + 1);
      if (start == end) continue;
      for (int64_t index = plan.segment_at(start); index < (int64_t)plan.segments.size(); index++) {
        const Segment &segment = plan.segments[index];
        if (segment.first_work >= end) break;
        if (segment.length == 0 || segment.rows == 0) continue;
        int64_t row = plan.part_row(piece, segment);
        Part part = {highest.data + row, total.data + row, output.data + row * a.value_size};
        attend_piece<Type>(a, segment, plan.entry_at(segment, start), plan.entry_at(segment, end), mine, part);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < outputs; i++)
      merge.row<Type>(i / a.heads, i % a.heads, sources[i / a.heads], places[i / a.heads],
                      mine + plan.most_rows * a.key_size);
  }
}

}  // namespace

extern "C" int defensivekv_attend(const Arguments *arguments) {
  try {
    if (arguments->dtype == 0) attend<Float32>(*arguments);
    else if (arguments->dtype == 1) attend<BFloat16>(*arguments);
    else attend<Float16>(*arguments);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}
