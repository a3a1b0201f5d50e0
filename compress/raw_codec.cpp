#include "lshmoe/compress/raw_codec.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/fixed_rows.hpp"
#include "lshmoe/kernels/rows.hpp"

namespace lshmoe {
namespace {

class RawCodec final : public CpuCodec {
 public:
  RawCodec(const CodecOptions& options, const CodecContext& context)
      : CpuCodec(options, context),
        rounds_(options.kind() == "bf16" && context.dtype == at::kFloat),
        element_bytes_(rounds_ ? 2 : at::elementSize(context.dtype)) {}

 private:
  // bf16 rows of kind bf16 travel as they are.
  bool rounds_;
  std::size_t element_bytes_;

  ParcelKind parcel_kind() const override {
    return options().kind() == "bf16" ? ParcelKind::bf16 : ParcelKind::none;
  }

  std::size_t least_row_bytes(const ParcelHeader& /*header*/) const override {
    return element_bytes_ * static_cast<std::size_t>(context().hidden_size);
  }

  Encoded do_encode(const Source& source,
                    const std::vector<int64_t>& rows_per_group) const override {
    const int64_t hidden = context().hidden_size;
    const std::size_t row_bytes = element_bytes_ * static_cast<std::size_t>(hidden);
    double relative_sum = 0, largest = 0;
    const auto fill = [&](int64_t first, int64_t rows, std::uint8_t* body) {
      if (rounds_) {
        for (int64_t i = 0; i < rows; ++i) {
          const auto* x = static_cast<const float*>(source.data) + source.row(first + i) * hidden;
          auto* y =
              reinterpret_cast<kernels::Bfloat16*>(body + static_cast<std::size_t>(i) * row_bytes);
          kernels::convert(y, x, hidden);
          const double relative = rounding_error(x, y, hidden);
          relative_sum += relative;
          largest = std::max(largest, relative);
        }
      } else if (source.index != nullptr) {
        kernels::gather_rows(body, source.data, source.index + first, rows, row_bytes);
      } else {
        kernels::gather_rows(body,
                             static_cast<const std::uint8_t*>(source.data) +
                                 static_cast<std::size_t>(first) * row_bytes,
                             nullptr, rows, row_bytes);
      }
    };
    Encoded encoded = encode_fixed_rows(context(), parcel_kind(), row_bytes, rows_per_group, fill);
    CodecStats& stats = encoded.stats;
    stats.max_relative_error = largest;
    stats.whole_rows = rounds_ ? 0 : source.rows;
    if (source.rows > 0)
      stats.mean_relative_error = relative_sum / static_cast<double>(source.rows);
    return encoded;
  }

  void do_decode(const Parcel& parcel, const Sink& sink) const override {
    const int64_t hidden = context().hidden_size;
    const std::size_t row_bytes = element_bytes_ * static_cast<std::size_t>(hidden);
    const auto rows = static_cast<int64_t>(parcel.header.rows);
    check_fixed_rows(parcel, row_bytes);
    if (rounds_) {
      for (int64_t i = 0; i < rows; ++i) {
        // The parcel may start at any byte: no typed load may assume alignment.
        const std::uint8_t* from = parcel.body.data() + static_cast<std::size_t>(i) * row_bytes;
        float* to = static_cast<float*>(sink.data) + sink.row(i) * hidden;
        for (int64_t j = 0; j < hidden; ++j) {
          kernels::Bfloat16 value;
          std::memcpy(&value, from + 2 * j, 2);
          to[j] = kernels::to_float(value);
        }
      }
    } else if (sink.index != nullptr) {
      kernels::scatter_rows(sink.data, sink.index + sink.first, parcel.body.data(), rows,
                            row_bytes);
    } else {
      kernels::scatter_rows(
          static_cast<std::uint8_t*>(sink.data) + static_cast<std::size_t>(sink.first) * row_bytes,
          nullptr, parcel.body.data(), rows, row_bytes);
    }
  }

  static double rounding_error(const float* x, const kernels::Bfloat16* y, int64_t hidden) {
    double error = 0, norm = 0;
    for (int64_t j = 0; j < hidden; ++j) {
      const double value = x[j];
      const double difference = value - static_cast<double>(kernels::to_float(y[j]));
      error += difference * difference;
      norm += value * value;
    }
    // NaN and Inf pass through; they have no relative error.
    return norm > 0 && std::isfinite(norm) && std::isfinite(error) ? std::sqrt(error / norm) : 0;
  }
};

}  // namespace

std::shared_ptr<Codec> make_raw_codec(const CodecOptions& options, const CodecContext& context) {
  return std::make_shared<RawCodec>(options, context);
}

}  // namespace lshmoe
