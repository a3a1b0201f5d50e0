#pragma once
// What coding in a learned basis may lose besides its steps. C++17, shared with .cu files.

#include <cstdint>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// What of a row's error bound is left for its coefficients in a basis: the products at both ends
/// round (fp32 sums of `hidden` terms), and so does the cast to bfloat16. `norm`: the row's;
/// `stretch`: the most that the basis lengthens an error. May be negative.
LSHMOE_HOST_DEVICE inline double coefficient_bound(double bound, double norm, double stretch,
                                                   bool to_bfloat16, std::int64_t hidden) {
  const double products = 4.0 * static_cast<double>(hidden) * 0x1p-24 * norm;
  const double cast = to_bfloat16 ? 0x1p-8 * (norm + bound) : 0;
  return (bound - products - cast) / stretch;
}

}  // namespace lshmoe::kernels
