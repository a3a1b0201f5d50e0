#pragma once
// What the codecs of GPU rows have in common.

#include <cstdint>
#include <span>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/compress/parcel.hpp"
#include "lshmoe/kernels/cuda/formats.hpp"
#include "lshmoe/kernels/cuda/parcel.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

namespace launchers = kernels::cuda;

/// The stream that torch queues work of `device` on.
[[nodiscard]] launchers::Stream current_stream(at::Device device);

/// Until all that was queued on it is done. Nothing on the CPU (tests).
void wait_for_stream(at::Device device);

/// uint8 [bytes]; a small copy to the device that does not wait.
[[nodiscard]] at::Tensor upload_bytes(const void* data, std::size_t bytes, at::Device device);
template <class T>
[[nodiscard]] at::Tensor upload(const std::vector<T>& values, at::Device device) {
  return upload_bytes(values.data(), values.size() * sizeof(T), device);
}
/// uint8, room for `count` values of T.
template <class T>
[[nodiscard]] at::Tensor room(std::int64_t count, at::Device device) {
  return at::empty({count * static_cast<std::int64_t>(sizeof(T))},
                   at::dtype(at::kByte).device(device));
}
template <class T>
[[nodiscard]] T* as(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}
/// Waits for the device.
template <class T>
[[nodiscard]] std::vector<T> download(const at::Tensor& bytes) {
  const at::Tensor host = bytes.cpu();
  const auto* from = static_cast<const T*>(host.const_data_ptr());
  return {from, from + host.nbytes() / sizeof(T)};
}

/// A row_index on the device; its values are checked now (CPU), or by a kernel that finds the least
/// i with a value outside 0 .. rows - 1.
class RowIndex {
 public:
  RowIndex(const at::Tensor& row_index, std::int64_t rows, at::Device device, const char* what);
  /// null: rows in their order.
  [[nodiscard]] const std::int64_t* data() const { return as<const std::int64_t>(index_); }
  [[nodiscard]] const at::Tensor& tensor() const { return index_; }
  /// int64 [1] on the device, that least i; undefined: nothing to check.
  [[nodiscard]] const at::Tensor& bad() const { return bad_; }
  /// Throws InvalidArgument, from what bad() held.
  void check(std::int64_t bad) const;

 private:
  at::Tensor index_, bad_;
  std::int64_t count_, rows_;
  const char* what_;
};

/// Rows first .. first + rows of the stream for every group with rows, in order; their numbers.
struct Groups {
  std::vector<launchers::CodedGroup> of_rows;
  std::vector<std::size_t> number;
};
[[nodiscard]] Groups groups_of(const std::vector<int64_t>& rows_per_group);

/// One checksum to be made: block_checksum(data, size, seed), to 4 bytes at out.
struct Summed {
  const std::uint8_t* data;
  std::int64_t size;
  std::uint64_t seed;
  std::uint8_t* out;
};
void block_checksums(std::vector<Summed> summed, at::Device device);

/// Parcels of one encode call: places, headers, then their bytes.
class Assembly {
 public:
  /// The next group's parcel: its header's lengths must be set. shared: its shared part, or the
  /// front of it: what is missing a kernel writes from the place returned on.
  std::int64_t add(std::int64_t first, const ParcelHeader& header,
                   std::span<const std::uint8_t> shared, std::int64_t record_bytes);
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(places_.size()); }
  /// Allocates the bytes and uploads the places.
  void allocate(at::Device device);
  [[nodiscard]] at::Tensor& out() { return out_; }
  [[nodiscard]] const launchers::ParcelPlace* places() const {
    return as<const launchers::ParcelPlace>(device_places_);
  }
  [[nodiscard]] const std::uint8_t* heads() const { return as<const std::uint8_t>(device_heads_); }
  /// The checksums of what was written since.
  void seal() const;

 private:
  std::vector<launchers::ParcelPlace> places_;
  std::vector<std::uint8_t> heads_;
  std::vector<std::uint64_t> seeds_;
  std::vector<std::int64_t> sizes_;
  std::int64_t bytes_ = 0;
  at::Tensor out_, device_places_, device_heads_;
};

/// Parcels to decode: their headers, checked, but for the checksums, which are being made. Waits
/// for the device once, for the headers.
class Opened {
 public:
  Opened(const at::Tensor& bytes, const std::vector<int64_t>& bytes_per_group, ParcelKind kind,
         const CodecContext& context);

  struct One {
    std::size_t group;
    ParcelHeader header;
    const std::uint8_t* shared;  ///< on the device
    const std::uint8_t* body;
    std::int64_t first;  ///< row of the stream
  };
  [[nodiscard]] const std::vector<One>& parcels() const { return parcels_; }
  [[nodiscard]] std::int64_t rows() const { return rows_; }
  [[nodiscard]] std::vector<int64_t> rows_per_group() const;
  /// On the host: the first 8 bytes of parcel i's shared part (its last byte where it has fewer).
  [[nodiscard]] const std::uint8_t* shared_head(std::size_t i) const {
    return heads_.data() + i * kHeadBytes + ParcelHeader::kBytes;
  }
  /// Throws InvalidArgument where the rows are not these.
  void check_rows(const std::vector<int64_t>& rows_per_group) const;
  /// uint8 [4 * parcels] on the device: the checksums computed.
  [[nodiscard]] const at::Tensor& sums() const { return sums_; }
  /// Throws InvalidArgument unless those are the headers'.
  void check_sums(const std::uint32_t* sums) const;

 private:
  // What is read of a parcel on the host: its header, and the steps of kind lsh.
  static constexpr std::size_t kHeadBytes = ParcelHeader::kBytes + 8;
  std::vector<One> parcels_;
  std::vector<std::uint8_t> heads_;
  std::size_t groups_;
  std::int64_t rows_ = 0;
  at::Tensor sums_;
};

/// Adds what a group's totals say to the statistics; refuses NaN and Inf, naming the row of x.
void add_totals(CodecStats& stats, const launchers::RowTotals& totals, double& relative_sum);
/// int64 on the device: what atomicMin starts from.
[[nodiscard]] at::Tensor none_bad(std::int64_t count, at::Device device);
inline constexpr std::int64_t kNoneBad = INT64_MAX;

}  // namespace lshmoe::cuda
