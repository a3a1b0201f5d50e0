#pragma once
// One row on the wire: a record of fixed size in the directory, and a payload. codec.md, steps
// 6, 7.
//
// Record: step (2 bytes, or 1 with a group step) | salt of the dither (1 byte, or none) | cluster
// id (0, 1 or 2 bytes) | band indices (4 bits a band, even bands in the low half). Payload: the
// bands' numbers, or the row itself.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lshmoe/compress/rows_view.hpp"
#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/quantize.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

using kernels::StepCode;

/// Rows that are coded at a time: about 32,768 values, so that the buffers of all stages stay in
/// the second-level cache.
[[nodiscard]] std::int64_t block_rows(std::int64_t hidden);

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

/// Blocks of rows as floats in coding order.
template <class T>
class OrderedRows {
 public:
  /// order [hidden] or empty: as they are; must outlive it.
  OrderedRows(std::int64_t hidden, const std::vector<std::int32_t>& order)
      : order_(order), natural_(static_cast<std::size_t>(hidden)) {}
  /// [rows, hidden], until the next call.
  const float* read(const RowsView<T>& rows);

 private:
  const std::vector<std::int32_t>& order_;
  std::vector<float> natural_, ordered_;
};

/// Encodes and decodes rows whose values are T (float or kernels::Bfloat16), with its own buffers.
template <class T>
class RowCoder {
 public:
  RowCoder(std::int64_t hidden, StepCode steps, std::size_t id_bytes);

  [[nodiscard]] const RowLayout& layout() const { return layout_; }
  [[nodiscard]] const StepCode& steps() const { return steps_; }

  /// One row to encode.
  struct Row {
    const float* x = nullptr;     ///< [hidden] in coding order
    const float* base = nullptr;  ///< [hidden] in coding order: what the receiver adds
    const T* natural = nullptr;   ///< [hidden] as it travels when it travels whole
    double bound = 0;             ///< on |x - x'|
    double norm = 0;              ///< |x|; both from double sums
    std::uint32_t id = 0;         ///< 0 or the cluster's number + 1
    // What encode finds.
    double error = 0;  ///< the true |x - x'|
    std::size_t payload_bytes = 0;
    std::uint16_t step = 0;  ///< its code
    std::uint32_t salt = 0;
    bool is_near = false;  ///< the base alone is within the bound
  };
  /// Encodes rows, stage by stage: their buffers should fit a cache (block_rows). Writes their
  /// records one after another, and their payloads (room: max_payload() each); returns the
  /// payloads' bytes. With a dither the salt is taken from natural: equal rows get equal bytes.
  /// Received: what the receiver makes of a row's values; float for coefficients that it turns into
  /// values of T by itself.
  template <class Received = T>
  std::size_t encode(std::span<Row> rows, std::uint8_t* records, std::uint8_t* payloads);
  /// The same for one row; natural as floats. Returns its payload's bytes.
  template <class Received = T>
  std::size_t encode(std::uint8_t* record, std::uint8_t* payload, const float* x, const float* base,
                     const float* natural, double bound, double norm, std::uint32_t id,
                     double* error);
  [[nodiscard]] std::size_t max_payload() const { return layout_.whole_bytes + 16; }

  /// Bits of the payload that encode would write, for the orders given (null: as it stands); the
  /// row quantized at the step searched, without the exact check.
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
  /// row: as it traveled). `readable`: bytes that may be read from payload on. Throws
  /// InvalidArgument. Received as for encode; then no whole rows.
  template <class Received = T>
  void decode(Received* out, const std::uint8_t* record, const std::uint8_t* payload,
              std::size_t readable, const float* base);
  /// Its two stages, for rows that are neither zero nor whole: the quantized values [hidden], then
  /// what they stand for.
  void unpack(std::int32_t* q, const std::uint8_t* record, const std::uint8_t* payload,
              std::size_t readable);
  template <class Received = T>
  void reconstruct(Received* out, const std::uint8_t* record, const std::int32_t* q,
                   const float* base);

 private:
  RowLayout layout_;
  StepCode steps_;
  std::vector<float> residual_;
  std::vector<float> offset_;  // the dithers of the rows at hand; empty: none
  std::vector<float> wide_;    // with a dither: a row as floats
  std::vector<std::int32_t> q_, ordered_;
  std::vector<std::uint8_t> index_;
  std::vector<std::uint8_t> padded_;
  std::vector<T> natural_;

  // The stages of encode: the step to try, the values that keep the bound, their bytes.
  template <class Received>
  void search(Row& row, float* offset);
  template <class Received>
  void quantize(Row& row, const float* offset, std::int32_t* q);
  void pack(Row& row, const std::int32_t* q, std::uint8_t* record, std::uint8_t* payload);

  void set_residual(const Row& row);
  // The dither of row number `row` of a block; null: none.
  [[nodiscard]] float* offset(std::size_t row);
  void set_salt(float* offset, std::uint32_t salt) const;
  [[nodiscard]] std::uint16_t step_of(const std::uint8_t* record) const;
  void write_record(std::uint8_t* record, std::uint16_t step, std::uint32_t salt,
                    std::uint32_t id) const;
  void read_index(const std::uint8_t* record);
};

/// Reads the rows of a parcel's body, one after another: their records, and behind all of those
/// their payloads. Trusts nothing.
template <class T>
class RowReader {
 public:
  /// `coder` and `body` must outlive it. A row's id is `centroids` at most.
  RowReader(RowCoder<T>& coder, std::span<const std::uint8_t> body, std::int64_t rows,
            std::int64_t centroids);

  struct Row {
    const std::uint8_t* record;
    const std::uint8_t* payload;
    std::size_t readable;  ///< bytes from payload on
    std::size_t bytes;     ///< of the payload
    std::uint32_t id;
  };
  /// The next row, `rows` times. Throws InvalidArgument.
  [[nodiscard]] Row next();
  /// Bytes of payloads that are left.
  [[nodiscard]] std::size_t left() const { return left_; }
  /// Throws InvalidArgument when bytes are left over.
  void finish() const;

 private:
  RowCoder<T>& coder_;
  const std::uint8_t* record_;
  const std::uint8_t* payload_;
  std::size_t left_;
  std::int64_t row_ = 0, centroids_;
};

extern template class OrderedRows<float>;
extern template class OrderedRows<kernels::Bfloat16>;
extern template class RowCoder<float>;
extern template class RowCoder<kernels::Bfloat16>;
extern template class RowReader<float>;
extern template class RowReader<kernels::Bfloat16>;

}  // namespace lshmoe
