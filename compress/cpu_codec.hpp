#pragma once
// What the codecs of rows in host memory have in common: the checks, and the parcels one by one.

#include <span>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/compress/parcel.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

class CpuCodec : public Codec {
 public:
  using Codec::encode;
  [[nodiscard]] Encoded encode(const at::Tensor& x, const at::Tensor& row_index,
                               const std::vector<int64_t>& rows_per_group) const override;
  void decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                   const std::vector<int64_t>& bytes_per_group,
                   const std::vector<int64_t>& rows_per_group) const override;
  [[nodiscard]] Decoded decode(const at::Tensor& bytes,
                               const std::vector<int64_t>& bytes_per_group) const override;

 protected:
  using Codec::Codec;

  /// The rows to encode: those of x [tokens, hidden_size] that `index` names (null: all, in order).
  /// Checked by encode; pointers live as long as the call.
  struct Source {
    const void* data = nullptr;
    const std::int64_t* index = nullptr;
    std::int64_t rows = 0;
    [[nodiscard]] std::int64_t row(std::int64_t i) const { return index ? index[i] : i; }
  };
  /// Where decoded rows go: row i of a parcel to row index[first + i] (null: first + i) of out.
  struct Sink {
    void* data = nullptr;
    const std::int64_t* index = nullptr;
    std::int64_t first = 0;
    [[nodiscard]] std::int64_t row(std::int64_t i) const {
      return index ? index[first + i] : first + i;
    }
  };

 private:
  virtual Encoded do_encode(const Source& source,
                            const std::vector<int64_t>& rows_per_group) const = 0;
  /// The kind this codec writes and reads.
  [[nodiscard]] virtual ParcelKind parcel_kind() const = 0;
  /// Bytes of the body that a row takes at least, so that a parcel cannot ask for more memory than
  /// a small multiple of its size.
  [[nodiscard]] virtual std::size_t least_row_bytes(const ParcelHeader& header) const = 0;
  /// Checks what the kind adds to a parcel and writes its rows.
  virtual void do_decode(const Parcel& parcel, const Sink& sink) const = 0;

  [[nodiscard]] Parcel open(std::span<const std::uint8_t> bytes) const;
};

/// The checks of encode and decode_into that need no look at the data, for the context's device.
/// Throw InvalidArgument.
void check_encode(const CodecContext& context, const at::Tensor& x, const at::Tensor& row_index,
                  const std::vector<int64_t>& rows_per_group);
void check_bytes(const CodecContext& context, const at::Tensor& bytes,
                 const std::vector<int64_t>& bytes_per_group);
void check_decode(const CodecContext& context, const at::Tensor& out, const at::Tensor& row_index,
                  const at::Tensor& bytes, const std::vector<int64_t>& bytes_per_group,
                  const std::vector<int64_t>& rows_per_group);
/// Every row of a row_index on the CPU is one of `rows`. Throws InvalidArgument.
void check_index_values(const at::Tensor& row_index, int64_t rows, const char* what);

}  // namespace lshmoe
