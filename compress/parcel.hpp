#pragma once
// The parcel: the bytes of one group of rows, for every kind. Little-endian.
//
//   header (kHeaderBytes) | shared part | row directory + payloads (what the kind says)
//
// Header, by offset:
//    0 u32 magic "LSHP"        12 u32 hidden size        32 u32 bytes of the shared part
//    4 u8  format version      16 u32 centroids K        36 u32 checksum of the whole parcel,
//    5 u8  kind                20 u32 state version             this field taken as 0
//    6 u8  row dtype           24 u64 bytes after the
//    7 u8  flags of the kind          shared part
//    8 u32 rows
// Checksum: block_checksum of what follows the header, with the checksum of its first 36 bytes as
// seed.
// A group without rows has no parcel: 0 bytes.

#include <ATen/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// On the wire: never renumber.
enum class ParcelKind : std::uint8_t {
  none = 0,
  bf16 = 1,
  lsh_expert = 2,
  lsh_source = 3,
  fp8 = 4,
  int8 = 5,
  int4 = 6
};

struct ParcelHeader {
  static constexpr std::size_t kBytes = 40;
  ParcelKind kind = ParcelKind::none;
  at::ScalarType dtype = at::kFloat;
  std::uint8_t flags = 0;
  std::uint32_t rows = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t centroids = 0;
  std::uint32_t state_version = 0;  ///< 0: the parcel explains itself
  std::uint64_t body_bytes = 0;
  std::uint32_t shared_bytes = 0;
};

/// A parcel whose header, lengths and checksum hold. Views into the caller's bytes.
struct Parcel {
  ParcelHeader header;
  std::span<const std::uint8_t> shared;
  std::span<const std::uint8_t> body;
};

/// Writes a header, all but its checksum, to kBytes at `out`; returns the checksum's seed for what
/// follows.
std::uint32_t write_header(const ParcelHeader& header, std::uint8_t* out);
/// Where the checksum is in a header.
inline constexpr std::size_t kChecksumOffset = 36;

/// Checks all but the checksum of a header of kBytes, of a parcel of `size` bytes, as open_parcel
/// does.
[[nodiscard]] ParcelHeader read_header(const std::uint8_t* head, std::size_t size, ParcelKind kind,
                                       at::ScalarType dtype, std::int64_t hidden_size);
/// Throws InvalidArgument for a parcel of fewer bytes than a header.
void check_has_header(std::size_t size);
/// Throws InvalidArgument for a checksum other than the header's.
void check_checksum(const std::uint8_t* head, std::uint32_t computed);

/// Writes the header over the first kBytes of `parcel` (header, shared part and body in place; the
/// lengths of `header` must sum to its size) and its checksum.
void seal_parcel(const ParcelHeader& header, std::span<std::uint8_t> parcel);

/// Checks a parcel that came from a wire: magic, version, dtype, lengths, checksum, at least one
/// row. Throws InvalidArgument. `kind`, `dtype` and `hidden_size` are what the receiver expects.
[[nodiscard]] Parcel open_parcel(std::span<const std::uint8_t> bytes, ParcelKind kind,
                                 at::ScalarType dtype, std::int64_t hidden_size);

}  // namespace lshmoe
