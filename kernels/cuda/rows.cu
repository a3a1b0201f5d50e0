#include "lshmoe/kernels/cuda/rows.hpp"

#include <atomic>
#include <limits>

#include "lshmoe/kernels/cuda/grid.hpp"
#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/rows.cuh"

namespace lshmoe::kernels::cuda {
namespace {

// 2^31 - 1 blocks is what a grid may have.
std::atomic<int> limit{std::numeric_limits<int>::max()};

template <class Unit>
void copy_units(void* to, const std::int64_t* to_index, const void* from,
                const std::int64_t* from_index, std::int64_t rows, std::size_t row_bytes,
                Stream stream) {
  launch("copy_rows", copy_rows_kernel<Unit>, grid_for(rows, 1), kBlock, 0, stream,
         static_cast<Unit*>(to), to_index, static_cast<const Unit*>(from), from_index, rows,
         static_cast<std::int64_t>(row_bytes / sizeof(Unit)));
}

void copy_rows(void* to, const std::int64_t* to_index, const void* from,
               const std::int64_t* from_index, std::int64_t rows, std::size_t row_bytes,
               Stream stream) {
  using Quad = Vector<std::uint32_t, 4>;
  if (aligned16(row_bytes, to, from)) {
    return copy_units<Quad>(to, to_index, from, from_index, rows, row_bytes, stream);
  }
  copy_units<std::uint8_t>(to, to_index, from, from_index, rows, row_bytes, stream);
}

template <class To, class From>
void convert_all(To* out, const From* in, std::int64_t count, Stream stream) {
  // 16 bytes of the wider type at a time.
  if (aligned16(16, out, in)) {
    launch("convert", convert_kernel<To, From, 4>, grid_for(count, 4 * kBlock), kBlock, 0, stream,
           out, in, count);
  } else {
    launch("convert", convert_kernel<To, From, 1>, grid_for(count, kBlock), kBlock, 0, stream, out,
           in, count);
  }
}

}  // namespace

int grid_limit() { return limit; }
void set_grid_limit(int blocks) { limit = blocks > 0 ? blocks : std::numeric_limits<int>::max(); }

void gather_rows(void* out, const void* in, const std::int64_t* index, std::int64_t rows,
                 std::size_t row_bytes, Stream stream) {
  copy_rows(out, nullptr, in, index, rows, row_bytes, stream);
}
void scatter_rows(void* out, const std::int64_t* index, const void* in, std::int64_t rows,
                  std::size_t row_bytes, Stream stream) {
  copy_rows(out, index, in, nullptr, rows, row_bytes, stream);
}

void convert(float* out, const Bfloat16* in, std::int64_t count, Stream stream) {
  convert_all(out, in, count, stream);
}
void convert(Bfloat16* out, const float* in, std::int64_t count, Stream stream) {
  convert_all(out, in, count, stream);
}

}  // namespace lshmoe::kernels::cuda
