#pragma once
// Counter-based random numbers: a value depends on (seed, counters) only, never on what was drawn
// before it, so that any rank can draw any part of a stream.

#include <cstdint>

namespace lshmoe::launch {

/// splitmix64's finalizer (Steele, Lea, Flood 2014): a bijection of 64 bits.
[[nodiscard]] constexpr std::uint64_t mix64(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

/// 64 random bits of place (a, b) in the stream `seed`.
[[nodiscard]] constexpr std::uint64_t random_bits(std::uint64_t seed, std::uint64_t a,
                                                  std::uint64_t b) {
  return mix64(mix64(mix64(seed) ^ a) ^ b);
}

/// Uniform in 0 .. n-1 (bias below n / 2^64); n >= 1.
[[nodiscard]] constexpr std::int64_t random_below(std::uint64_t bits, std::int64_t n) {
  return static_cast<std::int64_t>((static_cast<unsigned __int128>(bits) * n) >> 64);
}

}  // namespace lshmoe::launch
