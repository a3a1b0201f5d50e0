#pragma once
// Parcels on the GPU: putting rows together, and checksums. Launchers (stream.hpp).

#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/cuda/row_coder.hpp"

namespace lshmoe::kernels::cuda {

/// Flags index values outside 0 .. tokens - 1: bad[0] takes the least such i.
void check_index(std::int64_t* bad, const std::int64_t* index, std::int64_t rows,
                 std::int64_t tokens, Stream stream);

/// What becomes known of coded rows once they are: the sizes of their parcels.
struct RowTotals {
  std::int64_t payload_bytes = 0;  ///< of the group's rows
  std::int64_t whole_rows = 0;
  double relative_sum = 0;  ///< of |x - x'| / |x|
  double relative_max = 0;
  double ratio_max = 0;       ///< of |x - x'| / bound
  float step = 0;             ///< the group's, as coded
  std::int32_t id_bytes = 0;  ///< the same
  std::int64_t bad_row = -1;  ///< first row (of the stream) with NaN or Inf; -1: none
};
/// totals [group_count], and offset [rows]: the exclusive sums of the payload bytes within the
/// group (null: not wanted). Row i of the stream is coded row number[i] (null: i; clamped). What is
/// null of payload_bytes, whole, squared, bound and error counts as 0. coded: the groups that the
/// rows were coded in: these, or one for all.
void row_totals(RowTotals* totals, std::int64_t* offset, const CodedGroup* groups,
                std::int64_t group_count, const CodedGroup* coded, std::int64_t coded_count,
                const std::int64_t* number, std::int64_t numbers, const std::int64_t* payload_bytes,
                const std::uint8_t* whole, const double* squared, const double* bound,
                const double* error, Stream stream);

/// Where a group's parcel is in the bytes of all, and how it is made. In device memory.
struct ParcelPlace {
  std::int64_t first = 0, rows = 0;  ///< of the stream
  std::int64_t begin = 0;            ///< of the parcel
  std::int64_t head_begin = 0;       ///< of its header and shared part in `heads`
  std::int64_t head_copied = 0;      ///< bytes of it that are there; the others follow on their own
  std::int64_t head_bytes = 0;       ///< its size; the directory follows
  std::int64_t record_bytes = 0;     ///< 0: rows as they are, no directory
};

/// Writes headers and shared parts (from heads, packed), directories and payloads to out. coded
/// null records: all parcels are of rows as they are.
template <class T>
void assemble(std::uint8_t* out, const ParcelPlace* places, std::int64_t count,
              const std::uint8_t* heads, const CodedRows& coded, const RowsOf<T>& rows,
              const std::int64_t* number, const std::int64_t* offset, Stream stream);

/// One block_checksum, or a level of it: blocks first, first + 1, ... of a launch are those of
/// data.
struct ChecksumSpan {
  const std::uint8_t* data = nullptr;
  std::int64_t size = 0;
  std::uint64_t seed = 0;       ///< used where there is one block only: the last level
  std::uint8_t* out = nullptr;  ///< [4 * blocks] little-endian, any alignment
  std::int64_t first = 0;
};
/// spans [count] by rising first; blocks: of all spans.
void checksum_blocks(const ChecksumSpan* spans, std::int64_t count, std::int64_t blocks,
                     Stream stream);

/// Decoding rows that traveled as they are: row i of the stream from its parcel's body
/// to out[index[i]].
struct RawPlace {
  std::int64_t first = 0, rows = 0;
  const std::uint8_t* body = nullptr;
};
template <class T>
void scatter_raw(T* out, const std::int64_t* index, std::int64_t out_rows, const RawPlace* places,
                 std::int64_t count, std::int64_t rows, std::int64_t hidden, Stream stream);

}  // namespace lshmoe::kernels::cuda
