#pragma once
// Rows coded against a learned state: a record and a payload each, the same for every destination.

#include <cstdint>
#include <span>
#include <vector>

#include "lshmoe/compress/group_plan.hpp"
#include "lshmoe/compress/learned_state.hpp"
#include "lshmoe/compress/row_coder.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Rows on the wire, before they are put together to parcels.
struct StateRows {
  bool codebook = false;  ///< records name centroids
  std::size_t record_bytes = 0;
  std::vector<std::uint8_t> records;     ///< [rows, record_bytes]
  std::vector<std::uint8_t> payloads;    ///< one after another
  std::vector<std::size_t> offsets;      ///< [rows + 1] into payloads
  std::vector<std::int64_t> assignment;  ///< [rows] centroid, or -1
  std::vector<double> errors;            ///< [rows] |x - x'|; with a basis a bound of it
  std::vector<bool> whole;               ///< [rows]

  [[nodiscard]] std::size_t bytes(std::size_t row) const {
    return record_bytes + offsets[row + 1] - offsets[row];
  }
};

/// Bytes of a centroid's number in a record.
[[nodiscard]] std::size_t centroid_id_bytes(std::int64_t centroids);

/// T: float or kernels::Bfloat16, the rows' own type.
template <class T>
class StateCoder {
 public:
  /// All must outlive it. projection [hidden, options.projection()].
  StateCoder(const LearnedState& state, StepCode steps, const CodecOptions& options,
             const kernels::PackedMatrix& projection);

  /// Centroids are used only where a sample of the rows says that they save bytes.
  [[nodiscard]] StateRows encode(const BoundedRows<T>& rows) const;

  /// Decodes n rows with a basis: the records, and behind them the payloads, fill `body`. Row i
  /// goes to out + to[i] * hidden. Throws InvalidArgument.
  void decode_with_basis(T* out, const std::int64_t* to, std::int64_t n,
                         std::span<const std::uint8_t> body, bool codebook) const;

 private:
  const LearnedState& state_;
  StepCode steps_;
  const CodecOptions& options_;
  const kernels::PackedMatrix& projection_;

  [[nodiscard]] double coefficient_bound(double bound, double norm) const;
  [[nodiscard]] std::vector<std::int64_t> nearest(const RowsView<T>& rows) const;
  [[nodiscard]] std::int64_t sample_bits(const BoundedRows<T>& rows,
                                         const std::vector<std::int64_t>& assignment) const;
  void encode_channels(StateRows& out, const BoundedRows<T>& rows) const;
  void encode_basis(StateRows& out, const BoundedRows<T>& rows) const;
};

extern template class StateCoder<float>;
extern template class StateCoder<kernels::Bfloat16>;

}  // namespace lshmoe
