// Few query rows against entries wherever they lie, at the speed of the memory that they are read from.
//
//   segments   row 0 head 0 | row 0 head 1 | row 1 head 0 | ...
//   pieces     [      |      |      |      |      |      ]   of equal work
//
// softmax(q k^T scaling) v, as parts merged by their log-sum-exp (flash-decoding; the softmax within a part is the
// online one of Milakov and Gimelshein, arXiv 1805.02867). The work, entries times query rows, is cut into equal
// pieces, which threads take as they come; a piece may begin and end within a segment.
//
// Where entries lie, and which of them a query sees, is for a `Source` to say:
//
//   Segment                            of its own, derived from the one below
//   sizes
//   gather_queries<Type>(segment, to)  rows of `key_size` floats' room each, in the form that the type multiplies with
//   run<Type>(segment, entry)          the entries from there on that lie at equal distances
//   seen_by_all(segment)               entries before this one are visible to all rows
//   hide(segment, first_row, rows, first, count, logits)  -inf for entries that a row does not see

#pragma once

#include <vector>

#include "threads.h"
#include "tiles.h"

namespace {

constexpr int64_t AHEAD = 32768;  // bytes between what is read and what is fetched, of keys and of values
constexpr int PIECES_PER_THREAD = 4;
constexpr int64_t LEAST_WORK = 512;  // entries of a piece: less is not worth a thread

struct Sizes {
  int64_t threads;
  int64_t key_size, value_size;  // multiples of 16
  float scaling, softcap;        // softcap 0: none
};

// Entries of one key-value head that the same query rows read.
struct Segment {
  int64_t length, head;
  int64_t rows;        // of queries
  int64_t weight;      // of one entry, in work
  int64_t first_work;  // work of the segments before
  int64_t first_row;   // rows of the segments before
};

// Entries `key_stride` and `value_stride` bytes apart.
struct Run {
  const char *keys, *values;
  int64_t key_stride, value_stride, length;
};

template <class Source> struct Plan {
  typedef typename Source::Segment Segment;
  std::vector<Segment> segments;
  int64_t work = 0, rows = 0, most_rows = 0, pieces = 1;

  void add(Segment segment) {
    segment.weight = (segment.rows + ROWS - 1) / ROWS;
    segment.first_work = work;
    segment.first_row = rows;
    work += segment.weight * segment.length;
    rows += segment.rows;
    most_rows = segment.rows > most_rows ? segment.rows : most_rows;
    segments.push_back(segment);
  }

  void cut(int64_t threads) {
    int64_t most = work / LEAST_WORK;
    int64_t wanted = threads == 1 ? 1 : threads * PIECES_PER_THREAD;
    pieces = most < 1 ? 1 : most < wanted ? most : wanted;
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

  // Row of the parts, for each piece that holds some of a segment.
  template <class Visit> void each_part(const Segment &segment, Visit visit) const {
    if (segment.length == 0 || segment.rows == 0) return;
    int64_t end = segment.first_work + segment.weight * segment.length;
    for (int64_t piece = first_piece(segment); piece < pieces && start_of(piece) < end; piece++)
      visit(part_row(piece, segment));
  }
};

// The tiles of a piece, one after the other.
template <class Type, class Source> struct Tiles {
  const Source &source;
  const Plan<Source> &plan;
  int64_t start, end;  // of the piece, in work
  int64_t index;       // segment
  int64_t entry = 0, last = 0;
  Run left{};  // of the run, from `entry` on

  Tiles(const Source &source, const Plan<Source> &plan, int64_t piece)
      : source(source), plan(plan), start(plan.start_of(piece)), end(plan.start_of(piece + 1)),
        index(plan.segment_at(start) - 1) {}

  const typename Source::Segment &segment() const { return plan.segments[index]; }

  // Goes to the next segment that has work in the piece: part of an entry's, it may be, and so no entry.
  bool open() {
    while (++index < (int64_t)plan.segments.size() && segment().first_work < end) {
      if (segment().length == 0 || segment().rows == 0) continue;
      entry = plan.entry_at(segment(), start), last = plan.entry_at(segment(), end);
      left.length = 0;
      return true;
    }
    index = (int64_t)plan.segments.size();
    return false;
  }

  // The next entries of the segment, `length` of them; 0: there are none.
  Run next() {
    if (entry >= last) return {};
    if (left.length == 0) {
      left = source.template run<Type>(segment(), entry);
      left.length = left.length < last - entry ? left.length : last - entry;
    }
    Run tile = left;
    tile.length = left.length < TILE ? left.length : TILE;
    left.keys += tile.length * left.key_stride, left.values += tile.length * left.value_stride;
    left.length -= tile.length;
    entry += tile.length;
    return tile;
  }

  // As `next`, of whatever segment.
  Run next_of_all() {
    while (entry >= last)
      if (index >= (int64_t)plan.segments.size() || !open()) return {};
    return next();
  }
};

// One tile, some query rows.
template <class Type, int NUM, class Source>
void attend_tile(const Source &source, const typename Source::Segment &segment, const float *queries, int64_t first_row,
                 int64_t first, const Run &tile, bool is_masked, Ahead ahead, Part part) {
  alignas(64) Tile logits;
  const Sizes &sizes = source.sizes;
  const char *values = tile.values;
  int count = (int)tile.length;
  auto multiply = [&](auto steps) {
    multiply_keys<Type, NUM, steps>(queries, sizes.key_size, tile.keys, tile.key_stride, count, sizes.scaling, ahead,
                                    logits);
  };
  if (sizes.key_size == 64) multiply(std::integral_constant<int, 2>());
  else if (sizes.key_size == 128 && Type::HELD >= 4) multiply(std::integral_constant<int, Type::HELD>());
  else multiply(std::integral_constant<int, 0>());
  if (sizes.softcap != 0) cap(logits, sizes.softcap);
  if (is_masked) source.hide(segment, first_row, NUM, first, count, logits);
  if (!update_softmax<NUM>(logits, part, sizes.value_size)) return;
  auto add = [&](auto block, int64_t place) {
    add_values<Type, NUM, block>(part.output + place, sizes.value_size, logits, values + place * Type::BYTES,
                                 tile.value_stride, count, ahead);
  };
  int64_t place = 0;
  for (; place + VALUE_BLOCK * WIDTH <= sizes.value_size; place += VALUE_BLOCK * WIDTH)
    add(std::integral_constant<int, VALUE_BLOCK>(), place);
  if (place + 2 * WIDTH <= sizes.value_size) {
    add(std::integral_constant<int, 2>(), place);
    place += 2 * WIDTH;
  }
  if (place < sizes.value_size) add(std::integral_constant<int, 1>(), place);
}

// What a piece holds of every segment, all of its query rows.
template <class Type, class Source>
void attend_piece(const Source &source, const Plan<Source> &plan, int64_t piece, float *queries, Part parts) {
  const Sizes &sizes = source.sizes;
  Tiles<Type, Source> reading(source, plan, piece), fetching(source, plan, piece);
  int64_t distance = AHEAD / (TILE * sizes.key_size * Type::BYTES);
  for (int64_t i = 0; i < distance; i++) fetching.next_of_all();
  while (reading.open()) {
    const auto &segment = reading.segment();
    int64_t part_row = plan.part_row(piece, segment), seen_by_all = source.seen_by_all(segment);
    Part part = {parts.highest + part_row, parts.total + part_row, parts.output + part_row * sizes.value_size};
    for (int64_t row = 0; row < segment.rows; row++) part.highest[row] = -INFINITY, part.total[row] = 0;
    std::memset(part.output, 0, sizeof(float) * segment.rows * sizes.value_size);
    source.template gather_queries<Type>(segment, queries);
    for (Run tile; (tile = reading.next()).length;) {
      Run later = fetching.next_of_all();
      int64_t first = reading.entry - tile.length;
      bool is_masked = reading.entry > seen_by_all;
      for (int64_t entry = tile.length; entry < later.length; entry++) {
        fetch(later.keys + entry * later.key_stride, sizes.key_size * Type::BYTES);
        fetch(later.values + entry * later.value_stride, sizes.value_size * Type::BYTES);
      }
      for (int64_t row = 0; row < segment.rows;) {
        int64_t left = segment.rows - row;
        int num = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        Ahead ahead = {row ? 0 : later.length, later.keys - tile.keys, later.values - tile.values};
        Part rows = {part.highest + row, part.total + row, part.output + row * sizes.value_size};
        const float *some = queries + row * sizes.key_size;
        if (num == 4) attend_tile<Type, 4>(source, segment, some, row, first, tile, is_masked, ahead, rows);
        else if (num == 2) attend_tile<Type, 2>(source, segment, some, row, first, tile, is_masked, ahead, rows);
        else attend_tile<Type, 1>(source, segment, some, row, first, tile, is_masked, ahead, rows);
        row += num;
      }
    }
  }
}

// A query row's softmax, from parts of any number of segments.
struct Merge {
  const Sizes &sizes;
  Part parts;

  // each(visit): visits the rows of the parts. sink: a logit without a value; null: none. sums: room for a value.
  template <class Type, class Each> void row(Each each, const float *sink, float *sums, char *to) const {
    float top = sink ? *sink : -INFINITY, sum = 0;
    each([&](int64_t part) { top = parts.highest[part] > top ? parts.highest[part] : top; });
    std::memset(sums, 0, sizeof(float) * sizes.value_size);
    if (sink) sum = std::exp(*sink - top);
    each([&](int64_t part) {
      if (parts.highest[part] == -INFINITY) return;
      float weight = std::exp(parts.highest[part] - top);
      const float *output = parts.output + part * sizes.value_size;
      sum += parts.total[part] * weight;
      for (int64_t lane = 0; lane < sizes.value_size; lane += WIDTH)
        store(sums + lane, load<Floats>(sums + lane) + load<Floats>(output + lane) * weight);
    });
    float scale = sum == 0 ? 0 : 1 / sum;
    int64_t lane = 0;
    for (; lane + 2 * WIDTH <= sizes.value_size; lane += 2 * WIDTH)
      Type::put_pair(to + Type::BYTES * lane, load<Floats>(sums + lane) * scale,
                     load<Floats>(sums + lane + WIDTH) * scale);
    if (lane < sizes.value_size) Type::put_one(to + Type::BYTES * lane, load<Floats>(sums + lane) * scale);
  }
};

// All pieces, and then merge_output(merge, i, sums) for every i < outputs.
template <class Type, class Source, class MergeOutput>
void attend_all(const Source &source, const Plan<Source> &plan, int64_t outputs, MergeOutput merge_output) {
  const Sizes &sizes = source.sizes;
  int64_t part_rows = plan.part_rows(), queries = plan.most_rows * sizes.key_size, space = queries + sizes.value_size;
  Buffer<float> highest(part_rows), total(part_rows), output(part_rows * sizes.value_size);
  Buffer<float> scratch(sizes.threads * space);
  Part parts = {highest.data, total.data, output.data};
  Merge merge{sizes, parts};
  int threads = (int)(plan.pieces < sizes.threads ? plan.pieces : sizes.threads);

#pragma omp parallel num_threads(threads)
  {
    float *mine = scratch.data + omp_get_thread_num() * space;
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < plan.pieces; piece++) attend_piece<Type>(source, plan, piece, mine, parts);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < outputs; i++) merge_output(merge, i, mine + queries);
  }
}

}  // namespace
