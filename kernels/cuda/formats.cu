#include "lshmoe/kernels/cuda/formats.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/formats.cuh"

namespace lshmoe::kernels::cuda {
namespace {

std::int64_t row_bytes_of(RowFormat format, std::int64_t hidden) {
  return static_cast<std::int64_t>(format_row_bytes(format, hidden));
}

/// Calls f(format as a constant).
template <class F>
void with_format(RowFormat format, F f) {
  switch (format) {
    case RowFormat::fp8:
      return f(std::integral_constant<RowFormat, RowFormat::fp8>{});
    case RowFormat::int8:
      return f(std::integral_constant<RowFormat, RowFormat::int8>{});
    case RowFormat::int4:
      return f(std::integral_constant<RowFormat, RowFormat::int4>{});
  }
}

}  // namespace

template <class T>
void encode_format(RowFormat format, std::uint8_t* out, const ParcelPlace* places,
                   std::int64_t count, double* squared, double* error, const RowsOf<T>& rows,
                   StochasticNoise noise, Stream stream) {
  with_format(format, [&](auto constant) {
    constexpr RowFormat kFormat = decltype(constant)::value;
    const auto kernel =
        noise.on ? encode_format_kernel<T, kFormat, true> : encode_format_kernel<T, kFormat, false>;
    launch("encode_format", kernel, grid_for(rows.rows, kBlock / 32), kBlock, 0, stream, out,
           places, count, squared, error, rows, row_bytes_of(format, rows.hidden), noise.stream);
  });
}

template <class T>
void decode_format(RowFormat format, T* out, const std::int64_t* index, std::int64_t out_rows,
                   std::int64_t* bad, const RawPlace* places, std::int64_t count, std::int64_t rows,
                   std::int64_t hidden, Stream stream) {
  with_format(format, [&](auto constant) {
    constexpr RowFormat kFormat = decltype(constant)::value;
    launch("decode_format", decode_format_kernel<T, kFormat>, grid_for(rows, kBlock / 32), kBlock,
           0, stream, out, index, out_rows, bad, places, count, rows, hidden,
           row_bytes_of(format, hidden));
  });
}

void encode_bfloat16(std::uint8_t* out, const ParcelPlace* places, std::int64_t count,
                     double* squared, double* error, const RowsOf<float>& rows, Stream stream) {
  launch("encode_bfloat16", encode_bfloat16_kernel<kBlock>, grid_for(rows.rows, 1), kBlock, 0,
         stream, out, places, count, squared, error, rows);
}

void decode_bfloat16(float* out, const std::int64_t* index, std::int64_t out_rows,
                     const RawPlace* places, std::int64_t count, std::int64_t rows,
                     std::int64_t hidden, Stream stream) {
  launch("decode_bfloat16", decode_bfloat16_kernel<kBlock>, grid_for(rows, 1), kBlock, 0, stream,
         out, index, out_rows, places, count, rows, hidden);
}

#define LSHMOE_INSTANTIATE(T)                                                                     \
  template void encode_format<T>(RowFormat, std::uint8_t*, const ParcelPlace*, std::int64_t,      \
                                 double*, double*, const RowsOf<T>&, StochasticNoise, Stream);    \
  template void decode_format<T>(RowFormat, T*, const std::int64_t*, std::int64_t, std::int64_t*, \
                                 const RawPlace*, std::int64_t, std::int64_t, std::int64_t,       \
                                 Stream);
LSHMOE_INSTANTIATE(float)
LSHMOE_INSTANTIATE(Bfloat16)
#undef LSHMOE_INSTANTIATE

}  // namespace lshmoe::kernels::cuda
