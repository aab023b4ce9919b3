// Few queries against a ragged prefix and a dense tail.
//
//   segments   prefix: row 0 head 0 | row 0 head 1 | ...    tail: row 0 head 0 | row 0 head 1 | ...

#include "attend.h"

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

struct Ragged {
  struct Segment : ::Segment {
    Run entries;
    const int64_t *readers;  // batch rows
    int64_t num_readers;
    bool is_tail;
  };

  const Arguments &a;
  Sizes sizes;

  template <class Type> void gather_queries(const Segment &segment, float *to) const {
    for (int64_t reader = 0; reader < segment.num_readers; reader++)
      for (int64_t member = 0; member < a.group; member++)
        for (int64_t position = 0; position < a.positions; position++) {
          const char *from = a.queries + Type::BYTES * (segment.readers[reader] * a.query_strides[0] +
                                                        (segment.head * a.group + member) * a.query_strides[1] +
                                                        position * a.query_strides[2]);
          Type::keep_query(from, (char *)to, a.key_size);
          to += a.key_size;
        }
  }

  template <class Type> Run run(const Segment &segment, int64_t entry) const {
    const Run &all = segment.entries;
    return {all.keys + entry * all.key_stride, all.values + entry * all.value_stride, all.key_stride, all.value_stride,
            segment.length - entry};
  }

  int64_t seen_by_all(const Segment &segment) const {
    return !segment.is_tail ? segment.length : a.visible ? 0 : a.used - a.positions + 1;
  }

  void hide(const Segment &segment, int64_t first_row, int rows, int64_t first, int count, Tile logits) const {
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

  Segment segment(int64_t length, int64_t head, Run entries, const int64_t *readers, int64_t count, bool tail) const {
    return {{length, head, count * a.group * a.positions}, entries, readers, count, tail};
  }
};

template <class Type> void attend(const Arguments &a) {
  Ragged source{a, {a.threads, a.key_size, a.value_size, a.scaling, a.softcap}};
  Plan<Ragged> plan;
  plan.segments.reserve((a.sources + a.batch) * a.heads);
  // Of each batch row: its row of the prefix, its place among those that read it; itself, as reader of its own tail.
  std::vector<int64_t> sources(a.batch, -1), places(a.batch, 0), identity(a.batch);
  for (int64_t number = 0; number < a.sources; number++) {
    int64_t first = a.first_reader[number], count = a.first_reader[number + 1] - first;
    for (int64_t i = 0; i < count; i++) sources[a.readers[first + i]] = number, places[a.readers[first + i]] = i;
    for (int64_t head = 0; head < a.heads; head++) {
      int64_t start = a.offsets[number * a.heads + head], end = a.offsets[number * a.heads + head + 1];
      int64_t key_stride = a.key_size * Type::BYTES, value_stride = a.value_size * Type::BYTES;
      Run entries = {a.keys + start * key_stride, a.values + start * value_stride, key_stride, value_stride};
      plan.add(source.segment(count ? end - start : 0, head, entries, a.readers + first, count, false));
    }
  }
  for (int64_t row = 0; row < a.batch; row++) {
    identity[row] = row;
    for (int64_t head = 0; head < a.heads; head++) {
      Run entries = {a.tail_keys + Type::BYTES * (row * a.tail_key_strides[0] + head * a.tail_key_strides[1]),
                     a.tail_values + Type::BYTES * (row * a.tail_value_strides[0] + head * a.tail_value_strides[1]),
                     a.tail_key_strides[2] * Type::BYTES, a.tail_value_strides[2] * Type::BYTES};
      plan.add(source.segment(a.used, head, entries, &identity[row], 1, true));
    }
  }
  plan.cut(a.threads);

  attend_all<Type>(source, plan, a.batch * a.heads, [&](const Merge &merge, int64_t i, float *sums) {
    int64_t batch = i / a.heads, head = i % a.heads, each_rows = a.group * a.positions;
    const Ragged::Segment &tail = plan.segments[a.sources * a.heads + i];
    for (int64_t row = 0; row < each_rows; row++) {
      int64_t member = head * a.group + row / a.positions, position = row % a.positions;
      auto each = [&](auto visit) {
        if (sources[batch] >= 0)
          plan.each_part(plan.segments[sources[batch] * a.heads + head],
                         [&](int64_t first) { visit(first + places[batch] * each_rows + row); });
        plan.each_part(tail, [&](int64_t first) { visit(first + row); });
      };
      merge.row<Type>(each, a.sinks ? a.sinks + member : nullptr, sums,
                      a.output + Type::BYTES * (batch * a.output_strides[0] + member * a.output_strides[1] +
                                                position * a.output_strides[2]));
    }
  });
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
