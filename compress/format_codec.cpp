#include "lshmoe/compress/format_codec.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/fixed_rows.hpp"
#include "lshmoe/compress/noise.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/kernels/formats.hpp"
#include "lshmoe/kernels/quantize.hpp"
#include "lshmoe/kernels/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
using kernels::RowFormat;

RowFormat format_of(const std::string& kind) {
  if (kind == "fp8") return RowFormat::fp8;
  return kind == "int8" ? RowFormat::int8 : RowFormat::int4;
}

template <class T>
class FormatCodec final : public CpuCodec {
 public:
  FormatCodec(const CodecOptions& options, const CodecContext& context)
      : CpuCodec(options, context),
        format_(format_of(options.kind())),
        row_bytes_(kernels::format_row_bytes(format_, context.hidden_size)),
        stochastic_(options.rounding() == "stochastic"),
        stream_(noise_stream(options.seed(), context)) {}

 private:
  RowFormat format_;
  std::size_t row_bytes_;
  bool stochastic_;
  std::uint64_t stream_;

  ParcelKind parcel_kind() const override {
    switch (format_) {
      case RowFormat::fp8:
        return ParcelKind::fp8;
      case RowFormat::int8:
        return ParcelKind::int8;
      case RowFormat::int4:
        break;
    }
    return ParcelKind::int4;
  }

  std::size_t least_row_bytes(const ParcelHeader& /*header*/) const override { return row_bytes_; }

  Encoded do_encode(const Source& source,
                    const std::vector<int64_t>& rows_per_group) const override {
    const int64_t hidden = context().hidden_size;
    std::vector<float> x(static_cast<std::size_t>(hidden));
    std::vector<T> decoded(x.size());
    double sum = 0, largest = 0;
    const auto fill = [&](int64_t first, int64_t rows, std::uint8_t* body) {
      for (int64_t i = first; i < first + rows; ++i, body += row_bytes_) {
        const T* row = static_cast<const T*>(source.data) + source.row(i) * hidden;
        kernels::convert(x.data(), row, hidden);
        const double squared = kernels::squared_norm(x.data(), hidden);
        if (!std::isfinite(squared)) throw NonFiniteRow(*this, source.row(i));
        const kernels::NoiseKey key =
            stochastic_ ? noise_key(stream_, row, static_cast<std::size_t>(hidden) * sizeof(T))
                        : kernels::NoiseKey{};
        kernels::encode_row(format_, body, x.data(), hidden, stochastic_ ? &key : nullptr);
        // What the receiver will have, for the statistics.
        const bool good = kernels::decode_row(format_, decoded.data(), body, hidden);
        LSHMOE_ASSERT(good);
        const double error = kernels::squared_distance(x.data(), decoded.data(), hidden);
        const double relative = squared > 0 ? std::sqrt(error / squared) : 0;
        sum += relative;
        largest = std::max(largest, relative);
      }
    };
    Encoded encoded = encode_fixed_rows(context(), parcel_kind(), row_bytes_, rows_per_group, fill);
    encoded.stats.max_relative_error = largest;
    if (source.rows > 0) encoded.stats.mean_relative_error = sum / static_cast<double>(source.rows);
    return encoded;
  }

  void do_decode(const Parcel& parcel, const Sink& sink) const override {
    const int64_t hidden = context().hidden_size;
    check_fixed_rows(parcel, row_bytes_);
    const std::uint8_t* from = parcel.body.data();
    for (int64_t i = 0; i < parcel.header.rows; ++i, from += row_bytes_) {
      T* to = static_cast<T*>(sink.data) + sink.row(i) * hidden;
      LSHMOE_VALIDATE(kernels::decode_row(format_, to, from, hidden), "decode: row ", i,
                      " of kind ", options().kind(),
                      " has a scale, code or padding that is never written "
                      "(damaged parcel)");
    }
  }
};

}  // namespace

std::shared_ptr<Codec> make_format_codec(const CodecOptions& options, const CodecContext& context) {
  if (context.dtype == at::kBFloat16) {
    return std::make_shared<FormatCodec<kernels::Bfloat16>>(options, context);
  }
  return std::make_shared<FormatCodec<float>>(options, context);
}

}  // namespace lshmoe
