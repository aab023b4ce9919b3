// New queries of sequences against what stayed of their prompts and the tokens since, in pages of `cache/pages.py`.
//
//   segments   sequence 0, some queries, head 0: kept | tokens     head 1: kept | tokens     ...
//
// A segment's entries lie in many runs: of kept rows up to a page's end, of tokens up to a block's.

#include "attend.h"

// What `defensivekv.attention.native_pages` fills in. Sizes and strides count elements, those of pages rows.
struct PageArguments {
  int64_t dtype;  // 0: float32, 1: bfloat16, 2: float16
  int64_t threads;
  int64_t sequences, heads, group, size;  // query heads of a key-value head; a multiple of 16
  int64_t most_rows;                      // group * positions that share a segment
  const char *queries;                    // (x, heads * group, size)
  int64_t query_strides[2];
  char *output;  // (x, heads * group, size)
  int64_t output_strides[2];
  const char *pages;  // (rows, size)
  int64_t block_size, block_stride, first, layer, layer_stride, packed_layers;  // of the layout
  const int32_t *blocks;                                                        // (sequences, n)
  int64_t blocks_stride;
  const int32_t *kept, *tokens, *first_query;  // (sequences), (sequences), (sequences + 1)
  const int32_t *starts;                       // (sequences, heads + 1)
  float scaling;
};

namespace {

struct Pages {
  struct Segment : ::Segment {
    int64_t sequence;
    int64_t first_query, positions;  // of its rows
    int64_t start, kept;             // its first kept row, and how many
    int64_t tokens;                  // that its first query sees; each one after sees one more
  };

  const PageArguments &a;
  Sizes sizes;

  template <class Type> void gather_queries(const Segment &segment, float *to) const {
    for (int64_t member = 0; member < a.group; member++)
      for (int64_t position = 0; position < segment.positions; position++) {
        const char *from = a.queries + Type::BYTES * ((segment.first_query + position) * a.query_strides[0] +
                                                      (segment.head * a.group + member) * a.query_strides[1]);
        Type::keep_query(from, (char *)to, a.size);
        to += a.size;
      }
  }

  // As `PageLayout.kept` and `PageLayout.tokens`.
  template <class Type> Run run(const Segment &segment, int64_t entry) const {
    int64_t page_rows = a.heads * a.block_size, slots = a.kept[segment.sequence];
    int64_t full = slots / a.block_size, rest = slots % a.block_size;
    int64_t block, layer = a.layer, row, length;
    if (entry < segment.kept) {
      int64_t number = segment.start + entry, in_full = full * a.packed_layers * page_rows;
      bool is_full = number < in_full;
      int64_t width = is_full ? page_rows : rest * a.heads;
      if (!is_full) number -= in_full;
      int64_t page = number / width;
      block = is_full ? page / a.packed_layers : full;
      if (a.packed_layers > 1) layer = is_full ? page % a.packed_layers : page;
      row = number % width;
      length = width - row < segment.kept - entry ? width - row : segment.kept - entry;
    } else {
      int64_t slot = slots + entry - segment.kept, place = slot % a.block_size;
      block = slot / a.block_size;
      int64_t before = block == full ? rest : 0;
      row = before * a.heads + place - before + segment.head * (a.block_size - before);
      length = a.block_size - place < segment.length - entry ? a.block_size - place : segment.length - entry;
    }
    int64_t page = a.blocks[segment.sequence * a.blocks_stride + block] * a.block_stride;
    int64_t stride = a.size * Type::BYTES;
    const char *keys = a.pages + (page + layer * a.layer_stride + a.first + row) * stride;
    return {keys, keys + page_rows * stride, stride, stride, length};
  }

  static int64_t seen(const Segment &segment, int64_t position) {
    int64_t tokens = segment.tokens + position;
    return segment.kept + (tokens > 0 ? tokens : 0);
  }

  int64_t seen_by_all(const Segment &segment) const { return seen(segment, 0); }

  void hide(const Segment &segment, int64_t first_row, int rows, int64_t first, int count, Tile logits) const {
    for (int row = 0; row < rows; row++) {
      int64_t visible = seen(segment, (first_row + row) % segment.positions);
      for (int entry = 0; entry < count; entry++)
        if (first + entry >= visible) logits[entry * ROWS + row] = -INFINITY;
    }
  }

  void add_segments(int64_t sequence, Plan<Pages> &plan) const {
    int64_t first = a.first_query[sequence], count = a.first_query[sequence + 1] - first;
    int64_t at_once = a.most_rows > a.group ? a.most_rows / a.group : 1;
    const int32_t *starts = a.starts + sequence * (a.heads + 1);
    for (int64_t query = 0; query < count; query += at_once) {
      int64_t positions = count - query < at_once ? count - query : at_once;
      int64_t tokens = a.tokens[sequence] - count + query + 1;
      for (int64_t head = 0; head < a.heads; head++) {
        Segment segment{{0, head, a.group * positions}, sequence, first + query, positions};
        segment.start = starts[head], segment.kept = starts[head + 1] - starts[head], segment.tokens = tokens;
        segment.length = seen(segment, positions - 1);
        plan.add(segment);
      }
    }
  }
};

template <class Type> void attend(const PageArguments &a) {
  Pages source{a, {a.threads, a.size, a.size, a.scaling, 0}};
  Plan<Pages> plan;
  plan.segments.reserve(a.sequences * a.heads);
  for (int64_t sequence = 0; sequence < a.sequences; sequence++) source.add_segments(sequence, plan);
  plan.cut(a.threads);
  attend_all<Type>(source, plan, plan.segments.size(), [&](const Merge &merge, int64_t i, float *sums) {
    const Pages::Segment &segment = plan.segments[i];
    for (int64_t row = 0; row < segment.rows; row++) {
      int64_t query = segment.first_query + row % segment.positions;
      int64_t member = segment.head * a.group + row / segment.positions;
      auto each = [&](auto visit) { plan.each_part(segment, [&](int64_t first) { visit(first + row); }); };
      merge.row<Type>(each, nullptr, sums,
                      a.output + Type::BYTES * (query * a.output_strides[0] + member * a.output_strides[1]));
    }
  });
}

}  // namespace

extern "C" int defensivekv_attend_pages(const PageArguments *arguments) {
  try {
    if (arguments->dtype == 0) attend<Float32>(*arguments);
    else if (arguments->dtype == 1) attend<BFloat16>(*arguments);
    else attend<Float16>(*arguments);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}
