#include "lshmoe/launch/plot.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace lshmoe::launch {
namespace {
constexpr double kWidth = 900, kHeight = 560;
constexpr double kLeft = 76, kRight = 660, kTop = 52, kBottom = 500;  // of the axes
constexpr double kLegend = 684;

// Okabe and Ito's colors, which color-blind readers tell apart, without the yellow.
constexpr std::array<const char*, 7> kColors{"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                             "#56B4E9", "#E69F00", "#444444"};
constexpr int kMarkers = 5;

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else {
      out += c;
    }
  }
  return out;
}

std::string text_at(double x, double y, const char* anchor, const std::string& text,
                    const char* more = "") {
  return format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>", x, y, anchor, more) +
         escaped(text) + "</text>\n";
}

std::string marker(std::size_t number, double x, double y) {
  const char* color = kColors[number % kColors.size()];
  switch (number % kMarkers) {
    case 0:
      return format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4.5\" fill=\"%s\"/>\n", x, y, color);
    case 1:
      return format("<rect x=\"%.1f\" y=\"%.1f\" width=\"8\" height=\"8\" fill=\"%s\"/>\n", x - 4,
                    y - 4, color);
    case 2:
      return format("<path d=\"M%.1f %.1fl5.5 9.5h-11z\" fill=\"%s\"/>\n", x, y - 6, color);
    case 3:
      return format("<path d=\"M%.1f %.1fl5.5 5.5l-5.5 5.5l-5.5 -5.5z\" fill=\"%s\"/>\n", x,
                    y - 5.5, color);
    default:
      return format("<path d=\"M%.1f %.1fl5.5 -9.5h-11z\" fill=\"%s\"/>\n", x, y + 6, color);
  }
}

struct Axes {
  double most_bits = 1;
  double low = -3, high = 0;  // exponents of 10
  [[nodiscard]] double x(double bits) const { return kLeft + (kRight - kLeft) * bits / most_bits; }
  [[nodiscard]] double y(double error) const {
    return kBottom - (kBottom - kTop) * (std::log10(error) - low) / (high - low);
  }
};

Axes axes_of(const std::vector<PlotSeries>& series) {
  double bits = 1, least = 1, most = 0;
  for (const PlotSeries& one : series) {
    for (const PlotPoint& point : one.points) {
      bits = std::max(bits, point.bits);
      least = std::min(least, point.error);
      most = std::max(most, point.error);
    }
  }
  Axes axes;
  axes.most_bits = std::ceil(bits * 1.03);
  if (most > 0) {
    // To the next 1, 2 or 5 beyond the points.
    const auto rounded = [](double value, bool up) {
      const double exponent = std::floor(std::log10(value));
      const double mantissa = value / std::pow(10, exponent);
      const std::array<double, 4> steps{1, 2, 5, 10};
      double found = up ? 10 : 1;
      for (const double step : steps) {
        if (up && step >= mantissa) return exponent + std::log10(step);
        if (!up && step <= mantissa) found = step;
      }
      return exponent + std::log10(found);
    };
    axes.low = rounded(least * 0.95, false);
    axes.high = rounded(most * 1.05, true);
  }
  return axes;
}

std::string grid(const Axes& axes) {
  std::string out;
  for (double exponent = std::floor(axes.low); exponent <= axes.high; ++exponent) {
    for (const double step : {1.0, 2.0, 5.0}) {
      const double error = step * std::pow(10, exponent), position = std::log10(error);
      if (position < axes.low - 1e-9 || position > axes.high + 1e-9) continue;
      const double y = axes.y(error);
      out += format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n",
                    kLeft, y, kRight, y, step == 1.0 ? "#c8c8c8" : "#ececec");
      out += text_at(kLeft - 8, y + 4, "end", format("%g", error));
    }
  }
  const double step = axes.most_bits > 12 ? 2 : 1;
  for (double bits = 0; bits <= axes.most_bits + 1e-9; bits += step) {
    const double x = axes.x(bits);
    out += format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#ececec\"/>\n", x,
                  kTop, x, kBottom);
    out += text_at(x, kBottom + 20, "middle", format("%g", bits));
  }
  out += format(
      "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"none\" "
      "stroke=\"#808080\"/>\n",
      kLeft, kTop, kRight - kLeft, kBottom - kTop);
  out += text_at((kLeft + kRight) / 2, kBottom + 42, "middle", "bits per element");
  const double middle = (kTop + kBottom) / 2;
  out += text_at(20, middle, "middle", "mean relative error",
                 format(" transform=\"rotate(-90 20 %.1f)\"", middle).c_str());
  return out;
}

}  // namespace

std::string rate_distortion_svg(const std::string& title, const std::vector<PlotSeries>& all) {
  std::vector<PlotSeries> series;
  for (PlotSeries one : all) {
    std::erase_if(one.points, [](const PlotPoint& p) { return !(p.error > 0); });
    std::stable_sort(one.points.begin(), one.points.end(),
                     [](const PlotPoint& a, const PlotPoint& b) { return a.bits < b.bits; });
    if (!one.points.empty()) series.push_back(std::move(one));
  }
  const Axes axes = axes_of(series);
  const double legend_end = kTop + 10 + 22 * static_cast<double>(series.size());
  const double height = std::max(kHeight, legend_end + 20);
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
      "viewBox=\"0 0 %.0f %.0f\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#202020\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
      kWidth, height, kWidth, height);
  svg += text_at(kLeft, 30, "start", title, " font-size=\"16\"");
  svg += grid(axes);
  for (std::size_t i = 0; i < series.size(); ++i) {
    std::string line;
    for (const PlotPoint& point : series[i].points) {
      line += format("%.1f,%.1f ", axes.x(point.bits), axes.y(point.error));
    }
    if (series[i].points.size() > 1) {
      svg += format("<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\" points=\"",
                    kColors[i % kColors.size()]) +
             line + "\"/>\n";
    }
    for (const PlotPoint& point : series[i].points) {
      svg += marker(i, axes.x(point.bits), axes.y(point.error));
    }
    const double y = kTop + 10 + 22 * static_cast<double>(i);
    svg += marker(i, kLegend, y);
    svg += text_at(kLegend + 14, y + 4.5, "start", series[i].name);
  }
  return svg + "</svg>\n";
}

}  // namespace lshmoe::launch
