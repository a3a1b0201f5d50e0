#pragma once
// Rows within a hard bound on the GPU: records and payloads as compress/row_coder.hpp says, the
// same bytes as on the CPU for the same rows, bases and bounds.
//
// Launchers (stream.hpp). A block codes a row, kept in shared memory: hidden <= kMaxCodedHidden.

#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/cuda/stream.hpp"

namespace lshmoe::kernels::cuda {

inline constexpr std::int64_t kMaxCodedHidden = 16384;

/// What the rows first .. first + rows of a stream are coded against. In device memory, by rising
/// `first`; its pointers too.
struct CodedGroup {
  std::int64_t first = 0, rows = 0;
  float step = 0;         ///< rows use fractions of it; 0: every row its own step
  bool dithered = false;  ///< records have a salt
  std::uint32_t dither_key = 0;
  std::int32_t id_bytes = 0;               ///< of a record; 0: all rows use base 0
  std::int32_t centroids = 0;              ///< largest id
  const std::int32_t* order = nullptr;     ///< [hidden] channel of each place; null: as they are
  const std::int32_t* place = nullptr;     ///< [hidden] its inverse
  const float* bases = nullptr;            ///< [1 + centroids, hidden] coding order; null: zeros
  bool coefficients = false;               ///< decode: rows are coefficients of a basis
  const std::uint8_t* records = nullptr;   ///< decode: the directory
  const std::uint8_t* payloads = nullptr;  ///< decode: behind it
  const std::uint8_t* end = nullptr;       ///< decode: of the payloads
};

/// Rows of x [tokens, hidden] that index [rows] names (null: all, in order; values are clamped).
template <class T>
struct RowsOf {
  const T* x = nullptr;
  const std::int64_t* index = nullptr;
  std::int64_t tokens = 0, rows = 0, hidden = 0;
};

/// Coded rows, before they are put together. In device memory.
struct CodedRows {
  std::uint8_t* records = nullptr;  ///< [rows, record_stride]
  std::int64_t record_stride = 0;
  std::uint8_t* payloads = nullptr;       ///< [rows, payload_stride]; a whole row is not here
  std::int64_t payload_stride = 0;        ///< a multiple of 16, hidden * sizeof(T) + 16 at least
  std::int64_t* payload_bytes = nullptr;  ///< [rows]
  std::uint8_t* whole = nullptr;          ///< [rows] 1: sent as it is
  double* error = nullptr;                ///< [rows] the true |x - x'|
};

/// squared [rows]: sums of squares, as kernels::squared_norm.
template <class T>
void squared_norms(double* squared, const RowsOf<T>& rows, Stream stream);

/// out [count, hidden]: the rows first .. first + count as fp32.
template <class T>
void widen_rows(float* out, const RowsOf<T>& rows, std::int64_t first, std::int64_t count,
                Stream stream);

/// cap [1]: kernels::norm_cap of `rows` rows; squared [numbers], number [rows] clamped (null: the
/// rows in order).
void find_norm_cap(double* cap, const double* squared, const std::int64_t* number,
                   std::int64_t rows, std::int64_t numbers, Stream stream);

/// bound [rows]: max_error times each row's reference_norm, or with by_group times the
/// group_reference of its group, whose step is then set. As LshCodec's bounds. cap [1]; null: none.
void row_bounds(double* bound, CodedGroup* groups, std::int64_t group_count, const double* squared,
                const double* cap, double max_error, bool by_group, std::int64_t hidden,
                Stream stream);

/// Codes every row to its bound. id [rows]: base of the row, used where its group has id_bytes.
/// groups [group_count] cover the rows. T: float or Bfloat16.
template <class T>
void encode_rows(const CodedRows& out, const RowsOf<T>& rows, const CodedGroup* groups,
                 std::int64_t group_count, const double* squared, const double* bound,
                 const std::int32_t* id, Stream stream);

/// The same for rows whose coefficients [rows, hidden] are coded, to bounds of theirs: error is
/// what is lost of those. Groups' bases and orders are not used, and ids only named.
template <class T>
void encode_coefficients(const CodedRows& out, const RowsOf<T>& rows, const float* coefficients,
                         const CodedGroup* groups, std::int64_t group_count, const double* squared,
                         const double* bound, const std::int32_t* id, Stream stream);

/// bits[0] += bits of the payloads that the rows 0, stride, 2 stride, ... would have with their
/// ids; bits[1] += the same with the ids' group coded in the other order (see below). Exact integer
/// sums. The rows' residuals are taken and quantized in the group's coding order (place), and then
/// counted in that order and, where count_order is given, in count_order. element_bytes: of a row
/// that travels whole.
template <class T>
void estimate_rows(std::int64_t* bits, const RowsOf<T>& rows, std::int64_t stride,
                   const CodedGroup* group, const double* bound, const std::int32_t* id,
                   const std::int32_t* count_order, std::size_t element_bytes, Stream stream);

/// The group's ids are used only where they save bits: id_bytes = 0 unless with[0] + samples * 8 *
/// id_bytes < without[0], bits of estimate_rows.
void choose_ids(CodedGroup* group, const std::int64_t* with, const std::int64_t* without,
                std::int64_t samples, Stream stream);

/// Checks the records of all rows and writes payload_bytes [rows]. bad [kBadKinds] takes the least
/// row with each fault.
enum BadRow : int { kBadRecord, kBadId, kBadNumber, kBadKinds };
void record_sizes(std::int64_t* payload_bytes, std::int64_t* bad, const CodedGroup* groups,
                  std::int64_t group_count, std::int64_t rows, std::int64_t hidden,
                  std::size_t element_bytes, Stream stream);

/// Decodes every row to out[index[i]] (null: i; values outside 0 .. out_rows are skipped), hidden
/// elements each. offset [rows]: of the payloads, within the group's (row_totals).
template <class T>
void decode_rows(T* out, const std::int64_t* index, std::int64_t out_rows, std::int64_t* bad,
                 const CodedGroup* groups, std::int64_t group_count, const std::int64_t* offset,
                 std::int64_t rows, std::int64_t hidden, Stream stream);
/// The same for groups of which some hold coefficients: their rows go to values [rows, hidden] and
/// base_id [rows] is their centroid's id; -1: the row is done (whole, zero, of other groups).
template <class T>
void decode_coefficients(T* out, float* values, std::int32_t* base_id, const std::int64_t* index,
                         std::int64_t out_rows, std::int64_t* bad, const CodedGroup* groups,
                         std::int64_t group_count, const std::int64_t* offset, std::int64_t rows,
                         std::int64_t hidden, Stream stream);

}  // namespace lshmoe::kernels::cuda
