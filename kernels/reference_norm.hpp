#pragma once
// What the error bound of a row is relative to: its norm, but no more than three times the median
// norm of the rows coded with it, so that a few outliers do not set the bound of all others.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// References are no more than this times the median.
inline constexpr double kMostMedians = 3;

// The median is known to an eighth of an octave: norms are counted in bins, whose limits are
// compared with squared norms, so that a CPU and a GPU count alike.

/// Squared norms 2^kLeastOctave .. 2^-kLeastOctave: all that rows of fp32 have.
inline constexpr int kLeastOctave = -300;
inline constexpr int kNormBins = 4 * 2 * -kLeastOctave;

/// 2^(quarter / 4), quarter 0 .. 3.
LSHMOE_HOST_DEVICE constexpr double quarter_octave(int quarter) {
  return quarter == 0   ? 1.0
         : quarter == 1 ? 1.189207115002721
         : quarter == 2 ? 1.4142135623730951
                        : 1.681792830507429;
}

/// floor(8 log2(norm)), counted from the least; -1: zero, NaN or Inf, which are not counted.
LSHMOE_HOST_DEVICE inline int norm_bin(double squared_norm) {
  if (!(squared_norm > 0) || squared_norm > 1.7976931348623157e308) return -1;
  std::uint64_t bits;
  std::memcpy(&bits, &squared_norm, sizeof bits);
  const int octave = static_cast<int>(bits >> 52) - 1023;
  bits = (bits & ((std::uint64_t{1} << 52) - 1)) | std::uint64_t{1023} << 52;
  double part;  // 1 .. 2
  std::memcpy(&part, &bits, sizeof part);
  int bin = 4 * (octave - kLeastOctave);
  for (int quarter = 1; quarter < 4; ++quarter) bin += part >= quarter_octave(quarter) ? 1 : 0;
  return bin < 0 ? 0 : bin < kNormBins ? bin : kNormBins - 1;
}

/// What references are cut off at where the median is in `bin`, of which its lower limit is taken;
/// -1, no row to have a median: infinity.
LSHMOE_HOST_DEVICE inline double norm_cap(int bin) {
  if (bin < 0) return HUGE_VAL;
  return kMostMedians * std::sqrt(std::ldexp(quarter_octave(bin % 4), bin / 4 + kLeastOctave));
}

/// The reference of a row.
LSHMOE_HOST_DEVICE inline double reference_norm(double norm, double cap) {
  return norm < cap ? norm : cap;
}

/// The cap of the rows whose squared norms are squared[number[i]], i = 0 .. count - 1 (null: i).
/// The median is that of the rows that are not zero, the lower of two.
[[nodiscard]] double norm_cap(const double* squared, const std::int64_t* number,
                              std::int64_t count);

/// What the common bound of a group is relative to: the root mean square of its rows' references,
/// without rows that are zero; 0 where all are. norm [count].
[[nodiscard]] double group_reference(const double* norm, std::int64_t count, double cap);

}  // namespace lshmoe::kernels
