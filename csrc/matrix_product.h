// Blocked matrix products for one thread, in terms of `Vector`, `tile_rows` and `tile_vectors` of the file that includes
// this one. Sums are float32. `Element` is what stands in memory, float or BFloat16; `Factor` is what a step of a product
// multiplies, one float, to which elements are widened where a factor is packed, or a Pair of BFloat16. Everything here
// has internal linkage, because each instruction set compiles it anew.
//
// The left factor is always read element by element and multiplied with vectors of the right factor, which is packed
// into panels of `panel_width` columns. A tile of the result stays in registers while the products are summed up.
#pragma once

#include <string.h>

#include <type_traits>

#include "bfloat16.h"
#include "compiler.h"
#include "sizes.h"
#include "vector_math.h"

namespace {

inline Vector load_factors(const float* from) { return Vector::load(from); }
inline Vector fill_factors(float value) { return Vector::fill(value); }

constexpr int line_bytes = 64;  // of the cache
constexpr int panel_width = tile_vectors * Vector::width;
// Steps of a left factor that stand together, and the distance of their rows: not a power of two, so that the rows of a
// tile do not meet in the same lines of the cache.
constexpr int block_width = 256;
constexpr int block_stride = block_width + 16;
template <class Factor>
constexpr int block_numbers = block_width * numbers_per<Factor>;
// Steps that are summed up at once into a weight's gradient, at most.
constexpr int most_steps = 320;

template <class Factor>
constexpr int64_t steps_of(int64_t numbers) {
  return divide_up(numbers, numbers_per<Factor>);
}

// Memory that will be read soon: rows of whole lines of the cache, brought closer a few lines at a time. Many at once
// would keep the loads that a tile waits for from being served.
class Ahead {
 public:
  Ahead() = default;
  // `calls` calls of some() cover all of it.
  template <class Element>
  Ahead(const Element* data, int64_t rows, int64_t columns, int64_t stride, int64_t calls)
      : data_(reinterpret_cast<const char*>(data)),
        lines_(divide_up(columns * int64_t(sizeof(Element)), line_bytes)),
        skip_(stride * int64_t(sizeof(Element)) - lines_ * line_bytes),
        left_(rows * lines_),
        per_call_(divide_up(left_, calls)),
        left_in_row_(lines_) {}

  void some() {
    const int64_t now = smaller(per_call_, left_);
    left_ -= now;
    for (int64_t i = 0; i < now; ++i) {
      MOESAIC_PREFETCH(data_);
      data_ += line_bytes;
      if (--left_in_row_ == 0) data_ += skip_, left_in_row_ = lines_;
    }
  }

 private:
  const char* data_ = nullptr;
  int64_t lines_ = 0, skip_ = 0, left_ = 0, per_call_ = 0, left_in_row_ = 0;
};

// Where a product goes: into float32 sums, which, once they are complete, are rounded into the result. Of floats the sums
// are the result.
template <class Element>
struct Into {
  float* sums;
  int64_t stride;
  bool accumulate;            // adds to the sums that stand there
  Element* result = nullptr;  // NULL where the sums will not be complete
  int64_t result_stride = 0;

  Into from(int64_t row, int64_t column) const {
    return {sums + row * stride + column, stride, accumulate,
            result ? result + row * result_stride + column : nullptr, result_stride};
  }

  void prefetch(int64_t row, int width) const {
    constexpr int line = line_bytes / int(sizeof(Element));
    for (int j = 0; j < width; j += line) {
      if constexpr (std::is_same_v<Element, float>) {
        MOESAIC_PREFETCH_FOR_WRITE(sums + row * stride + j);
      } else if (result) {
        MOESAIC_PREFETCH_FOR_WRITE(result + row * result_stride + j);
      }
    }
  }

  void put(int64_t row, int64_t column, Vector sum) const {
    float* const to = sums + row * stride + column;
    if (accumulate) sum = Vector::load(to) + sum;
    if constexpr (!std::is_same_v<Element, float>) {
      if (result) return sum.store(result + row * result_stride + column);
    }
    sum.store(to);
  }

  void put(int64_t row, int64_t column, float sum) const {
    float* const to = sums + row * stride + column;
    if (accumulate) sum = *to + sum;
    if constexpr (!std::is_same_v<Element, float>) {
      if (result) return void(result[row * result_stride + column] = rounded(sum));
    }
    *to = sum;
  }
};

// Steps between two looks ahead.
constexpr int stretch = 8;

template <int rows, int vectors, int row_stride, class Factor>
inline void add_step(const Factor* a, const Factor* panel, Vector (&sums)[rows][vectors]) {
  decltype(load_factors(panel)) right[vectors];
  MOESAIC_UNROLL
  for (int j = 0; j < vectors; ++j) right[j] = load_factors(panel + j * Vector::width);
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    const auto left = fill_factors(a[i * row_stride]);
    MOESAIC_UNROLL
    for (int j = 0; j < vectors; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
  }
}

// The sum over steps of a's column times the first `vectors` vectors of the panel's row. Element (row i, step p) of the
// left factor is a[i * row_stride + p * step_stride].
template <int rows, int vectors, int row_stride, int step_stride, class Factor, class Element>
void full_tile(const Factor* a, const Factor* panel, int64_t steps, const Into<Element> into, Ahead& ahead) {
  Vector sums[rows][vectors];
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    MOESAIC_UNROLL
    for (int j = 0; j < vectors; ++j) sums[i][j] = Vector::fill(0.0f);
  }
  int64_t p = 0;
  for (int64_t i = 0; p + stretch <= steps; p += stretch, ++i) {
    if (i < rows) into.prefetch(i, vectors * Vector::width);
    ahead.some();
    MOESAIC_UNROLL
    for (int k = 0; k < stretch; ++k) {
      add_step<rows, vectors, row_stride>(a + k * step_stride, panel + k * panel_width, sums);
    }
    a += stretch * step_stride;
    panel += stretch * panel_width;
  }
  for (; p < steps; ++p, a += step_stride, panel += panel_width) add_step<rows, vectors, row_stride>(a, panel, sums);
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    MOESAIC_UNROLL
    for (int j = 0; j < vectors; ++j) into.put(i, j * Vector::width, sums[i][j]);
  }
}

template <int vectors, int row_stride, int step_stride, int most_rows = tile_rows, class Factor, class Element>
void full_tile_of_rows(int64_t rows, const Factor* a, const Factor* panel, int64_t steps, const Into<Element>& into,
                       Ahead& ahead) {
  if constexpr (most_rows > 0) {
    if (rows == most_rows) {
      full_tile<most_rows, vectors, row_stride, step_stride>(a, panel, steps, into, ahead);
    } else {
      full_tile_of_rows<vectors, row_stride, step_stride, most_rows - 1>(rows, a, panel, steps, into, ahead);
    }
  }
}

template <int row_stride, int step_stride, int most_vectors = tile_vectors, class Factor, class Element>
void full_tile_of(int64_t rows, int64_t vectors, const Factor* a, const Factor* panel, int64_t steps,
                  const Into<Element>& into, Ahead& ahead) {
  if constexpr (most_vectors > 0) {
    if (vectors == most_vectors) {
      full_tile_of_rows<most_vectors, row_stride, step_stride>(rows, a, panel, steps, into, ahead);
    } else {
      full_tile_of<row_stride, step_stride, most_vectors - 1>(rows, vectors, a, panel, steps, into, ahead);
    }
  }
}

// The same where the result has only `width` columns, which may end within a vector; the panel's go on.
template <int row_stride, int step_stride, class Factor, class Element>
void tile(int64_t rows, int64_t width, const Factor* a, const Factor* panel, int64_t steps, const Into<Element>& into,
          Ahead& ahead) {
  const int64_t vectors = divide_up(width, Vector::width);
  if (width == vectors * Vector::width) {
    full_tile_of<row_stride, step_stride>(rows, vectors, a, panel, steps, into, ahead);
    return;
  }
  float whole[tile_rows * panel_width];
  const Into<float> into_whole{whole, panel_width, false};
  full_tile_of<row_stride, step_stride>(rows, vectors, a, panel, steps, into_whole, ahead);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) into.put(i, j, whole[i * panel_width + j]);
  }
}

// `count` numbers of the rows that one step takes: one row, or two for pairs, where there is a second.
template <class Element>
inline void copy_step(const Element* from, const Element*, int64_t count, float* to) {
  copy_floats(from, count, to);
}

// `width` numbers of each to the start of a panel's row, zeros behind them.
template <class Element, class Factor>
inline void copy_panel_row(const Element* from, const Element* second, int64_t width, Factor* to) {
  if (width == panel_width) return copy_step(from, second, panel_width, to);
  copy_step(from, second, width, to);
  for (int64_t j = width; j < panel_width; ++j) to[j] = Factor{};
}

// The numbers of one step from a row, of which `left` are left.
template <class Element>
inline void copy_factor(const Element* from, int64_t, float* to) {
  *to = widened(*from);
}

// to (columns, rows) = from (rows, columns), transposed; or (columns / 2, rows) of pairs.
template <class Element, class Factor>
inline void transpose(const Element* from, int64_t stride, int64_t rows, int64_t columns, Factor* to, int64_t to_stride) {
  // Of a block that transpose_block() takes: rows and numbers of a row.
  constexpr int size = Vector::width, row_size = size * int(sizeof(float) / sizeof(Element)), per = numbers_per<Factor>;
  const int64_t whole_columns = columns / row_size * row_size, whole_rows = rows / size * size;
  for (int64_t i = 0; i < whole_rows; i += size) {
    for (int64_t j = 0; j < whole_columns; j += row_size) {
      transpose_block(from + i * stride + j, stride, to + j / per * to_stride + i, to_stride);
    }
  }
  for (int64_t j = 0; j < columns; j += per) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      copy_factor(from + i * stride + j, columns - j, to + j / per * to_stride + i);
    }
  }
}

// A right factor (numbers, columns) in memory: as it stands, or transposed, that is as (columns, numbers).
template <class Element, class Factor = float>
struct Right {
  const Element* data;
  int64_t stride;
  bool transposed;

  // From row `number` and column `column` on.
  Right from(int64_t number, int64_t column) const {
    return {data + (transposed ? column * stride + number : number * stride + column), stride, transposed};
  }

  void pack(int64_t numbers, int64_t width, Factor* panel) const {
    constexpr int per = numbers_per<Factor>;
    if (!transposed) {
      for (int64_t p = 0; p < numbers; p += per) {
        const Element* const row = data + p * stride;
        copy_panel_row(row, p + 1 < numbers ? row + stride : nullptr, width, panel + p / per * panel_width);
      }
      return;
    }
    transpose(data, stride, width, numbers, panel, panel_width);
    for (int64_t p = 0; width < panel_width && p < steps_of<Factor>(numbers); ++p) {
      for (int64_t j = width; j < panel_width; ++j) panel[p * panel_width + j] = Factor{};
    }
  }

  // What pack() will read, in `calls` parts.
  Ahead ahead(int64_t numbers, int64_t width, int64_t calls) const {
    return transposed ? Ahead(data, width, numbers, stride, calls) : Ahead(data, numbers, width, stride, calls);
  }
};

// left (rows, numbers) times right (numbers, columns), with at most block_width steps and rows of the left factor
// block_stride apart. `panel` has room for a packed panel.
template <class Element, class Factor>
inline void multiply(const Factor* left, int64_t rows, int64_t numbers, Right<Element, Factor> right, int64_t columns,
                     Into<float> into, Factor* panel) {
  const Parts tiles(rows, tile_rows);
  const int64_t steps = steps_of<Factor>(numbers);
  const int64_t looks = tiles.number * (steps / stretch);
  for (int64_t j = 0; j < columns; j += panel_width) {
    const int64_t width = smaller<int64_t>(panel_width, columns - j);
    right.from(0, j).pack(numbers, width, panel);
    const int64_t next_width = smaller<int64_t>(panel_width, columns - j - width);
    Ahead ahead = next_width && looks ? right.from(0, j + width).ahead(numbers, next_width, looks) : Ahead();
    for (int64_t i = 0; i < tiles.number; ++i) {
      tile<block_stride, 1>(tiles.size(i), width, left + tiles.start(i) * block_stride, panel, steps,
                            into.from(tiles.start(i), j), ahead);
    }
  }
}

// The rows of a weight's gradient, cut into parts of at most most_steps steps, and where the steps of each stand. Pairs
// do not reach from one part into the next, so that there may be one step more.
template <class Factor>
struct SumParts : Parts {
  explicit SumParts(int64_t rows) : Parts(rows, most_steps * numbers_per<Factor>) {}
  int64_t steps(int64_t part) const { return steps_of<Factor>(size(part)); }
  int64_t first_step(int64_t part) const { return steps_of<Factor>(start(part)) + (numbers_per<Factor> - 1) * part; }
};

// At least the steps of a packed right factor times its columns: for each part the panels, one after another.
constexpr int64_t panels_size(int64_t rows, int64_t columns) { return rows * round_up(columns, panel_width); }

// left (rows, left_columns) transposed times the packed right factor (rows, packed_columns), of which the columns first
// .. first + count - 1 are used; `first` is the start of a panel. Steps of the left factor are block_stride apart.
template <class Factor, class Element>
inline void multiply_transposed(const Factor* left, int64_t rows, int64_t left_columns, const Factor* panels,
                                int64_t packed_columns, ColumnRange columns, Into<Element> into) {
  const SumParts<Factor> sums(rows);
  const Parts tiles(left_columns, tile_rows);
  const int64_t padded = round_up(packed_columns, panel_width);
  Ahead nothing;
  for (int64_t s = 0; s < sums.number; ++s) {
    const int64_t steps = sums.steps(s), first_step = sums.first_step(s);
    const Factor* const part = left + first_step * block_stride;
    Into<Element> part_into = into;
    part_into.accumulate = into.accumulate || s > 0;
    if (s + 1 < sums.number) part_into.result = nullptr;
    for (int64_t j = 0; j < columns.count; j += panel_width) {
      const Factor* const panel = panels + first_step * padded + (columns.first + j) * steps;
      const int64_t width = smaller<int64_t>(panel_width, columns.count - j);
      for (int64_t i = 0; i < tiles.number; ++i) {
        tile<1, block_stride>(tiles.size(i), width, part + tiles.start(i), panel, steps,
                              part_into.from(tiles.start(i), j), nothing);
      }
    }
  }
}

}  // namespace
