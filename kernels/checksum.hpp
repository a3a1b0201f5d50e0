#pragma once
// Checksum of parcels.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// The state of a checksum: four 64-bit lanes in the manner of xxHash64.
struct ChecksumLanes {
  static constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87u;
  static constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
  static constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9u;

  LSHMOE_HOST_DEVICE static std::uint64_t rotate(std::uint64_t value, int bits) {
    return value << bits | value >> (64 - bits);
  }
  /// What lane 0 .. 3 starts from, and how it takes every fourth 8 bytes.
  LSHMOE_HOST_DEVICE static std::uint64_t start(int lane, std::uint64_t seed) {
    return lane == 0   ? seed + kPrime1 + kPrime2
           : lane == 1 ? seed + kPrime2
           : lane == 2 ? seed
                       : seed - kPrime1;
  }
  LSHMOE_HOST_DEVICE static std::uint64_t round(std::uint64_t lane, std::uint64_t value) {
    return rotate(lane + value * kPrime2, 31) * kPrime1;
  }
  /// The lanes folded, of `size` bytes; then every rest of up to 8 bytes, and the result.
  LSHMOE_HOST_DEVICE static std::uint64_t fold(const std::uint64_t* lane, std::uint64_t size) {
    return rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18) +
           size;
  }
  LSHMOE_HOST_DEVICE static std::uint64_t rest(std::uint64_t hash, std::uint64_t value) {
    return rotate(hash ^ round(0, value), 27) * kPrime1 + kPrime3;
  }
  LSHMOE_HOST_DEVICE static std::uint32_t finish(std::uint64_t hash) {
    hash = (hash ^ hash >> 33) * kPrime2;
    hash = (hash ^ hash >> 29) * kPrime3;
    return static_cast<std::uint32_t>(hash ^ hash >> 32);
  }
};

/// 32 bits over `size` bytes. Finds damage on the way, not forgery. The same on every machine
/// (bytes are read little-endian).
[[nodiscard]] std::uint32_t checksum(const void* data, std::size_t size, std::uint64_t seed = 0);

/// Bytes that block_checksum sums apart.
inline constexpr std::size_t kChecksumBlock = 1024;
/// The same for long data, so that many can work at it: the checksum of the checksums of its blocks
/// (seed 0), while there is more than one block.
[[nodiscard]] std::uint32_t block_checksum(const void* data, std::size_t size, std::uint64_t seed);

}  // namespace lshmoe::kernels
