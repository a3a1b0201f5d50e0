#pragma once
// One row on the wire: a record of fixed size in the directory, and a payload. codec.md, steps
// 6, 7.
//
// Record: step (2 bytes, or 1 with a group step) | salt of the dither (1 byte, or none) | cluster
// id (0, 1 or 2 bytes) | band indices (4 bits a band, even bands in the low half). Payload: the
// bands' numbers, or the row itself.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/quantize.hpp"

namespace lshmoe {

using kernels::StepCode;

/// Sizes of the parts of a record.
struct RowLayout {
  RowLayout(std::int64_t hidden_size, const StepCode& steps, std::size_t id_bytes,
            std::size_t element_bytes);

  std::int64_t hidden;
  std::int64_t bands;
  std::size_t step_bytes, salt_bytes, id_bytes, index_bytes;
  std::size_t record_bytes;
  std::size_t whole_bytes;  ///< of a row sent as it is
};

/// Encodes and decodes rows whose values are T (float or kernels::Bfloat16), with its own buffers.
template <class T>
class RowCoder {
 public:
  RowCoder(std::int64_t hidden, StepCode steps, std::size_t id_bytes);

  [[nodiscard]] const RowLayout& layout() const { return layout_; }

  /// Writes the row's record and its payload (room: max_payload()), and returns the payload's
  /// bytes. x, base [hidden] in coding order: the row, and what the receiver adds (zeros for
  /// nothing). natural [hidden]: the row in the order in which it travels when it travels whole.
  /// bound: on |x - x'|; norm: |x|, both from double sums. id: 0 or the cluster's number + 1.
  /// With a dither the salt is taken from natural: equal rows get equal bytes.
  /// `error`: the true |x - x'|. Received: what the receiver makes of the row's values; float for
  /// coefficients that it turns into values of T by itself.
  template <class Received = T>
  std::size_t encode(std::uint8_t* record, std::uint8_t* payload, const float* x, const float* base,
                     const float* natural, double bound, double norm, std::uint32_t id,
                     double* error);
  [[nodiscard]] std::size_t max_payload() const { return layout_.whole_bytes + 16; }

  /// Bits of the payload that encode would write, for the orders given (null: as it stands); the
  /// row quantised at the step searched, without the exact check.
  void estimate(const float* r, double bound, const std::int32_t* order, std::int64_t* bits_plain,
                std::int64_t* bits_ordered);

  /// Payload bytes of a record. Throws InvalidArgument for a step or padding that encode never
  /// writes.
  [[nodiscard]] std::size_t payload_bytes(const std::uint8_t* record);
  /// Cluster id of a record.
  [[nodiscard]] std::uint32_t id(const std::uint8_t* record) const;
  /// True when the row is zero, whatever its base.
  [[nodiscard]] bool is_zero(const std::uint8_t* record) const;
  /// True when the payload is the row itself.
  [[nodiscard]] bool is_whole(const std::uint8_t* record) const;
  /// Decodes one row whose payload_bytes were checked into out [hidden], in coding order (a whole
  /// row: as it travelled). `readable`: bytes that may be read from payload on. Throws
  /// InvalidArgument. Received as for encode; then no whole rows.
  template <class Received = T>
  void decode(Received* out, const std::uint8_t* record, const std::uint8_t* payload,
              std::size_t readable, const float* base);

 private:
  RowLayout layout_;
  StepCode steps_;
  std::vector<float> residual_;
  std::vector<float> offset_;  // the dither of the row at hand; empty: none
  std::vector<std::int32_t> q_, ordered_;
  std::vector<std::uint8_t> index_;
  std::vector<std::uint8_t> padded_;

  void set_salt(std::uint32_t salt);
  [[nodiscard]] const float* offset() const { return offset_.empty() ? nullptr : offset_.data(); }
  [[nodiscard]] std::uint16_t step_of(const std::uint8_t* record) const;
  void write_record(std::uint8_t* record, std::uint16_t step, std::uint32_t salt,
                    std::uint32_t id) const;
  void read_index(const std::uint8_t* record);
};

extern template class RowCoder<float>;
extern template class RowCoder<kernels::Bfloat16>;

}  // namespace lshmoe
