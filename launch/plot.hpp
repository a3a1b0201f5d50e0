#pragma once
// A rate-distortion picture as SVG.

#include <string>
#include <vector>

namespace lshmoe::launch {

struct PlotPoint {
  double bits = 0;   ///< per element
  double error = 0;  ///< mean relative error
};
/// Points of one color and marker, joined in the order of their bits.
struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points;
};

/// Bits per element (across) against error (up, logarithmic), with a legend. Points without an
/// error, which a logarithm does not show, are left out.
[[nodiscard]] std::string rate_distortion_svg(const std::string& title,
                                              const std::vector<PlotSeries>& series);

}  // namespace lshmoe::launch
