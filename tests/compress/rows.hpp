#pragma once
// Rows that codecs are tested with, and a reader of their parcels that shares no code with them.

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/kernels/checksum.hpp"

namespace lshmoe::testing {

inline at::Tensor gaussian(int64_t rows, int64_t hidden, uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn({rows, hidden}, generator);
}

/// Rows near `centers` random centers of unit variance, `spread` around them.
inline at::Tensor clustered(int64_t rows, int64_t hidden, int64_t centers, double spread,
                            uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const at::Tensor center = at::randn({centers, hidden}, generator);
  const at::Tensor id = at::randint(centers, {rows}, generator, at::kLong);
  return center.index_select(0, id) + spread * at::randn({rows, hidden}, generator);
}

/// Kinds of rows by name; those in between are what breaks codecs.
inline const std::vector<std::string>& row_kinds() {
  static const std::vector<std::string> kinds{
      "gaussian",    "clustered",     "outliers", "tiny",      "huge",
      "mixed",       "duplicates",    "zeros",    "denormals", "offset",
      "one_outlier", "half_outliers", "few_rows", "equal",     "all_zero"};
  return kinds;
}
inline at::Tensor make_rows(const std::string& kind, int64_t rows, int64_t hidden, uint64_t seed) {
  at::Tensor x = gaussian(rows, hidden, seed);
  const at::Tensor number = at::arange(rows).unsqueeze(1);
  if (kind == "clustered") return clustered(rows, hidden, 5, 0.1, seed);
  if (kind == "outliers") {
    x.slice(1, 0, hidden, 7).mul_(1000);
  } else if (kind == "tiny") {
    x.mul_(1e-30);
  } else if (kind == "huge") {
    x.mul_(1e+30);
  } else if (kind == "mixed") {
    x.mul_(at::pow(10.0, 30 * (number % 3 - 1)).to(at::kDouble)).clamp_(-3e38, 3e38);
    x = x.to(at::kFloat);
  } else if (kind == "duplicates") {
    x = x.index_select(0, at::arange(rows).div(4, "floor"));
  } else if (kind == "zeros") {
    x.mul_(number % 3 != 0);
  } else if (kind == "denormals") {
    x.mul_(1e-40);
  } else if (kind == "offset") {
    x.mul_(1e-3).add_(100);  // |x| far above what sets rows apart
  } else if (kind == "one_outlier") {
    x.mul_(at::where(number == rows / 2, 50, 1));
  } else if (kind == "half_outliers") {
    x.mul_(at::where(number % 2 == 0, 50, 1));
  } else if (kind == "few_rows") {
    x.mul_(number % 10 == 3);  // nine in ten are zero
  } else if (kind == "equal") {
    x.copy_(x.slice(0, 0, 1).clone());
  } else if (kind == "all_zero") {
    x.zero_();
  }
  return x;
}

/// What the bounds of the rows of one encode call are relative to, as codec.hpp says it
/// (error_reference): double [rows].
inline at::Tensor references(const at::Tensor& rows, const std::vector<int64_t>& rows_per_group,
                             bool by_group) {
  const at::Tensor squared = rows.to(at::kDouble).square().sum(1);
  at::Tensor reference = squared.sqrt();
  const at::Tensor some = squared.masked_select(squared > 0);
  if (some.numel() > 0) {
    // at::median takes the lower of two. An eighth of an octave is a quarter of one of squares.
    const double quarters = std::floor(4 * std::log2(some.median().item<double>()));
    reference = reference.clamp_max(3 * std::exp2(quarters / 8));
  }
  if (!by_group) return reference;
  std::vector<at::Tensor> groups{at::zeros({0}, at::kDouble)};
  for (const at::Tensor& group : reference.split_with_sizes(rows_per_group)) {
    const at::Tensor nonzero = group.masked_select(group > 0);
    const double rms = nonzero.numel() > 0 ? nonzero.square().mean().sqrt().item<double>() : 0;
    groups.push_back(at::full_like(group, rms));
  }
  return at::cat(groups);
}

/// The bytes of a tensor, for comparisons bit for bit.
inline std::vector<uint8_t> bytes_of(const at::Tensor& tensor) {
  const at::Tensor t = tensor.contiguous();
  std::vector<uint8_t> bytes(t.nbytes());
  if (!bytes.empty()) std::memcpy(bytes.data(), t.const_data_ptr(), bytes.size());
  return bytes;
}
inline at::Tensor to_tensor(const std::vector<uint8_t>& bytes) {
  return at::tensor(at::ArrayRef<uint8_t>(bytes), at::kByte);
}

/// One number of a parcel, by the table in parcel.hpp.
template <class T>
T field(const uint8_t* parcel, std::size_t offset) {
  T value;
  std::memcpy(&value, parcel + offset, sizeof value);
  return value;
}

/// The checksum of more than 1,024 bytes is that of the checksums of every 1,024 of them.
inline std::uint32_t blocks_checksum(std::vector<uint8_t> bytes, std::uint64_t seed) {
  while (bytes.size() > 1024) {
    std::vector<uint8_t> sums;
    for (std::size_t i = 0; i < bytes.size(); i += 1024) {
      const std::uint32_t sum =
          kernels::checksum(&bytes[i], std::min<std::size_t>(1024, bytes.size() - i));
      for (int shift = 0; shift < 32; shift += 8) sums.push_back(uint8_t(sum >> shift));
    }
    bytes = sums;
  }
  return kernels::checksum(bytes.data(), bytes.size(), seed);
}

/// Writes the checksum that fits the rest of the parcel, so that checks behind it are reached.
inline void reseal(uint8_t* parcel, std::size_t size) {
  if (size < 40) return;
  const std::uint32_t head = kernels::checksum(parcel, 36);
  const std::uint32_t sum = blocks_checksum({parcel + 40, parcel + size}, head);
  std::memcpy(parcel + 36, &sum, sizeof sum);
}

/// What the row directory of a parcel of kind lsh, restore=expert, says.
struct Directory {
  bool all_whole = false, has_mean = false, has_order = false, group_step = false;
  int64_t centroids = 0;
  std::vector<int64_t> id;  ///< [rows] 0: no cluster
  std::vector<bool> whole;  ///< [rows]
};
inline Directory read_directory(const uint8_t* parcel) {
  Directory directory;
  const auto flags = field<uint8_t>(parcel, 7);
  const auto rows = field<uint32_t>(parcel, 8), hidden = field<uint32_t>(parcel, 12);
  directory.all_whole = flags == 1;
  directory.has_mean = (flags & 2) != 0;
  directory.has_order = (flags & 4) != 0;
  directory.group_step = (flags & 8) != 0;
  directory.centroids = field<uint32_t>(parcel, 16);
  directory.id.assign(rows, 0);
  directory.whole.assign(rows, directory.all_whole);
  if (directory.all_whole) return directory;
  const std::size_t step = directory.group_step ? 1 : 2;
  const std::size_t id = directory.centroids == 0 ? 0 : directory.centroids < 256 ? 1 : 2;
  const std::size_t salt = (flags & 32) != 0 ? 1 : 0;
  const std::size_t record = step + salt + id + (hidden + 31) / 32;
  const uint8_t* at = parcel + 40 + field<uint32_t>(parcel, 32);
  for (std::size_t i = 0; i < rows; ++i, at += record) {
    directory.whole[i] = step == 1 ? field<uint8_t>(at, 0) == 255 : field<uint16_t>(at, 0) == 65535;
    if (id == 1) directory.id[i] = field<uint8_t>(at, step + salt);
    if (id == 2) directory.id[i] = field<uint16_t>(at, step + salt);
  }
  return directory;
}

}  // namespace lshmoe::testing
