#include "lshmoe/kernels/cuda/row_coder.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/row_coder.cuh"

namespace lshmoe::kernels::cuda {

template <class T>
void squared_norms(double* squared, const RowsOf<T>& rows, Stream stream) {
  with_lanes(rows.hidden, [&](auto threads) {
    launch("squared_norms", squared_norms_kernel<T, threads()>, grid_for(rows.rows, 1), threads(),
           0, stream, squared, rows);
  });
}

template <class T>
void widen_rows(float* out, const RowsOf<T>& rows, std::int64_t first, std::int64_t count,
                Stream stream) {
  launch("widen_rows", widen_rows_kernel<T, kBlock>, grid_for(count, 1), kBlock, 0, stream, out,
         rows, first, count);
}

void find_norm_cap(double* cap, const double* squared, const std::int64_t* number,
                   std::int64_t rows, std::int64_t numbers, Stream stream) {
  // One block: norms are few bytes, and its counts stay in shared memory.
  constexpr int kThreads = 1024;
  launch("find_norm_cap", norm_cap_kernel<kThreads>, dim3(1), kThreads, 0, stream, cap, squared,
         number, rows, numbers);
}

void row_bounds(double* bound, CodedGroup* groups, std::int64_t group_count, const double* squared,
                const double* cap, double max_error, bool by_group, std::int64_t hidden,
                Stream stream) {
  launch("row_bounds", row_bounds_kernel<kBlock>, grid_for(group_count, 1), kBlock, 0, stream,
         bound, groups, group_count, squared, cap, max_error, by_group, hidden);
}

template <class T>
void encode_rows(const CodedRows& out, const RowsOf<T>& rows, const CodedGroup* groups,
                 std::int64_t group_count, const double* squared, const double* bound,
                 const std::int32_t* id, Stream stream) {
  with_lanes(rows.hidden, [&](auto threads) {
    using Row = BlockRow<T, threads()>;
    launch("encode_rows", encode_rows_kernel<T, threads(), false>, grid_for(rows.rows, 1),
           threads(), Row::shared_bytes(rows.hidden), stream, out, rows,
           static_cast<const float*>(nullptr), groups, group_count, squared, bound, id);
  });
}

template <class T>
void encode_coefficients(const CodedRows& out, const RowsOf<T>& rows, const float* coefficients,
                         const CodedGroup* groups, std::int64_t group_count, const double* squared,
                         const double* bound, const std::int32_t* id, Stream stream) {
  with_lanes(rows.hidden, [&](auto threads) {
    using Row = BlockRow<T, threads()>;
    launch("encode_coefficients", encode_rows_kernel<T, threads(), true>, grid_for(rows.rows, 1),
           threads(), Row::shared_bytes(rows.hidden), stream, out, rows, coefficients, groups,
           group_count, squared, bound, id);
  });
}

template <class T>
void estimate_rows(std::int64_t* bits, const RowsOf<T>& rows, std::int64_t stride,
                   const CodedGroup* group, const double* bound, const std::int32_t* id,
                   const std::int32_t* count_order, std::size_t element_bytes, Stream stream) {
  with_lanes(rows.hidden, [&](auto threads) {
    using Row = BlockRow<T, threads()>;
    launch("estimate_rows", estimate_rows_kernel<T, threads()>, grid_for(rows.rows, stride),
           threads(), Row::shared_bytes(rows.hidden), stream, bits, rows, stride, group, bound, id,
           count_order, 8 * rows.hidden * static_cast<std::int64_t>(element_bytes));
  });
}

void choose_ids(CodedGroup* group, const std::int64_t* with, const std::int64_t* without,
                std::int64_t samples, Stream stream) {
  launch("choose_ids", choose_ids_kernel<32>, dim3(1), 32, 0, stream, group, with, without,
         samples);
}

void record_sizes(std::int64_t* payload_bytes, std::int64_t* bad, const CodedGroup* groups,
                  std::int64_t group_count, std::int64_t rows, std::int64_t hidden,
                  std::size_t element_bytes, Stream stream) {
  launch("record_sizes", record_sizes_kernel<kBlock>, grid_for(rows, kBlock / 32), kBlock, 0,
         stream, payload_bytes, bad, groups, group_count, rows, hidden,
         hidden * static_cast<std::int64_t>(element_bytes));
}

template <class T>
void decode_rows(T* out, const std::int64_t* index, std::int64_t out_rows, std::int64_t* bad,
                 const CodedGroup* groups, std::int64_t group_count, const std::int64_t* offset,
                 std::int64_t rows, std::int64_t hidden, Stream stream) {
  decode_coefficients<T>(out, nullptr, nullptr, index, out_rows, bad, groups, group_count, offset,
                         rows, hidden, stream);
}

template <class T>
void decode_coefficients(T* out, float* values, std::int32_t* base_id, const std::int64_t* index,
                         std::int64_t out_rows, std::int64_t* bad, const CodedGroup* groups,
                         std::int64_t group_count, const std::int64_t* offset, std::int64_t rows,
                         std::int64_t hidden, Stream stream) {
  with_lanes(hidden, [&](auto threads) {
    launch("decode_rows", decode_rows_kernel<T, threads()>, grid_for(rows, 1), threads(),
           static_cast<std::size_t>(hidden) * sizeof(T), stream, out, index, out_rows, bad, groups,
           group_count, offset, rows, hidden, values, base_id);
  });
}

#define LSHMOE_INSTANTIATE(T)                                                                      \
  template void squared_norms<T>(double*, const RowsOf<T>&, Stream);                               \
  template void widen_rows<T>(float*, const RowsOf<T>&, std::int64_t, std::int64_t, Stream);       \
  template void encode_rows<T>(const CodedRows&, const RowsOf<T>&, const CodedGroup*,              \
                               std::int64_t, const double*, const double*, const std::int32_t*,    \
                               Stream);                                                            \
  template void encode_coefficients<T>(const CodedRows&, const RowsOf<T>&, const float*,           \
                                       const CodedGroup*, std::int64_t, const double*,             \
                                       const double*, const std::int32_t*, Stream);                \
  template void estimate_rows<T>(std::int64_t*, const RowsOf<T>&, std::int64_t, const CodedGroup*, \
                                 const double*, const std::int32_t*, const std::int32_t*,          \
                                 std::size_t, Stream);                                             \
  template void decode_rows<T>(T*, const std::int64_t*, std::int64_t, std::int64_t*,               \
                               const CodedGroup*, std::int64_t, const std::int64_t*, std::int64_t, \
                               std::int64_t, Stream);                                              \
  template void decode_coefficients<T>(                                                            \
      T*, float*, std::int32_t*, const std::int64_t*, std::int64_t, std::int64_t*,                 \
      const CodedGroup*, std::int64_t, const std::int64_t*, std::int64_t, std::int64_t, Stream);
LSHMOE_INSTANTIATE(float)
LSHMOE_INSTANTIATE(Bfloat16)
#undef LSHMOE_INSTANTIATE

}  // namespace lshmoe::kernels::cuda
