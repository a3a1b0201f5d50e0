#include "lshmoe/kernels/reference_norm.hpp"

#include <array>

#include "lshmoe/kernels/lanes.hpp"

namespace lshmoe::kernels {

double norm_cap(const double* squared, const std::int64_t* number, std::int64_t count) {
  std::array<std::int64_t, kNormBins> rows{};
  std::int64_t all = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const int bin = norm_bin(squared[number != nullptr ? number[i] : i]);
    if (bin < 0) continue;
    ++rows[static_cast<std::size_t>(bin)];
    ++all;
  }
  std::int64_t below = 0;
  for (int bin = 0; bin < kNormBins; ++bin) {
    below += rows[static_cast<std::size_t>(bin)];
    if (below > 0 && 2 * below >= all) return norm_cap(bin);
  }
  return norm_cap(-1);
}

double group_reference(const double* norm, std::int64_t count, double cap) {
  const double squares = lane_sum<double>(count, [=](std::int64_t i) {
    const double reference = reference_norm(norm[i], cap);
    return reference * reference;
  });
  std::int64_t rows = 0;
  for (std::int64_t i = 0; i < count; ++i) rows += norm[i] > 0 ? 1 : 0;
  return rows > 0 ? std::sqrt(squares / static_cast<double>(rows)) : 0;
}

}  // namespace lshmoe::kernels
