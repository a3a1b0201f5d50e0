#include "lshmoe/kernels/cuda/parcel.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/parcel.cuh"

namespace lshmoe::kernels::cuda {

void check_index(std::int64_t* bad, const std::int64_t* index, std::int64_t rows,
                 std::int64_t tokens, Stream stream) {
  launch("check_index", check_index_kernel<kBlock>, grid_for(rows, kBlock), kBlock, 0, stream, bad,
         index, rows, tokens);
}

void row_totals(RowTotals* totals, std::int64_t* offset, const CodedGroup* groups,
                std::int64_t group_count, const CodedGroup* coded, std::int64_t coded_count,
                const std::int64_t* number, std::int64_t numbers, const std::int64_t* payload_bytes,
                const std::uint8_t* whole, const double* squared, const double* bound,
                const double* error, Stream stream) {
  launch("row_totals", row_totals_kernel<kBlock>, grid_for(group_count, 1), kBlock, 0, stream,
         totals, offset, groups, group_count, coded, coded_count, number, numbers, payload_bytes,
         whole, squared, bound, error);
}

template <class T>
void assemble(std::uint8_t* out, const ParcelPlace* places, std::int64_t count,
              const std::uint8_t* heads, const CodedRows& coded, const RowsOf<T>& rows,
              const std::int64_t* number, const std::int64_t* offset, Stream stream) {
  launch("assemble", assemble_kernel<T, kBlock>, grid_for(rows.rows + count, 1), kBlock, 0, stream,
         out, places, count, heads, coded, rows, number, offset);
}

void checksum_blocks(const ChecksumSpan* spans, std::int64_t count, std::int64_t blocks,
                     Stream stream) {
  launch("checksum_blocks", checksum_blocks_kernel<kBlock>, grid_for(blocks, kBlock / 4), kBlock, 0,
         stream, spans, count, blocks);
}

template <class T>
void scatter_raw(T* out, const std::int64_t* index, std::int64_t out_rows, const RawPlace* places,
                 std::int64_t count, std::int64_t rows, std::int64_t hidden, Stream stream) {
  launch("scatter_raw", scatter_raw_kernel<T>, grid_for(rows, 1), kBlock, 0, stream, out, index,
         out_rows, places, count, rows, hidden);
}

#define LSHMOE_INSTANTIATE(T)                                                                     \
  template void assemble<T>(std::uint8_t*, const ParcelPlace*, std::int64_t, const std::uint8_t*, \
                            const CodedRows&, const RowsOf<T>&, const std::int64_t*,              \
                            const std::int64_t*, Stream);                                         \
  template void scatter_raw<T>(T*, const std::int64_t*, std::int64_t, const RawPlace*,            \
                               std::int64_t, std::int64_t, std::int64_t, Stream);
LSHMOE_INSTANTIATE(float)
LSHMOE_INSTANTIATE(Bfloat16)
LSHMOE_INSTANTIATE(double)
#undef LSHMOE_INSTANTIATE

}  // namespace lshmoe::kernels::cuda
