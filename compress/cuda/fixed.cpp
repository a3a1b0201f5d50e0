// Kinds none, bf16, fp8, int8 and int4 on a GPU.

#include <algorithm>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/cuda/kinds.hpp"
#include "lshmoe/compress/cuda/stream_phases.hpp"
#include "lshmoe/compress/cuda/support.hpp"
#include "lshmoe/compress/noise.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {
namespace {
using kernels::RowFormat;

template <class T>
class FixedCodec final : public Codec {
 public:
  FixedCodec(const CodecOptions& options, const CodecContext& context)
      : Codec(options, context),
        rounds_(options.kind() == "bf16" && context.dtype == at::kFloat),
        coded_(options.kind() != "none" && options.kind() != "bf16") {
    if (options.kind() == "bf16") kind_ = ParcelKind::bf16;
    if (options.kind() == "fp8") kind_ = ParcelKind::fp8, format_ = RowFormat::fp8;
    if (options.kind() == "int8") kind_ = ParcelKind::int8, format_ = RowFormat::int8;
    if (options.kind() == "int4") kind_ = ParcelKind::int4, format_ = RowFormat::int4;
    const auto hidden = static_cast<std::size_t>(context.hidden_size);
    row_bytes_ = coded_    ? kernels::format_row_bytes(format_, context.hidden_size)
                 : rounds_ ? 2 * hidden
                           : sizeof(T) * hidden;
    noise_ = {options.rounding() == "stochastic", noise_stream(options.seed(), context)};
  }

  using Codec::encode;
  [[nodiscard]] Encoded encode(const at::Tensor& x_in, const at::Tensor& row_index,
                               const std::vector<int64_t>& rows_per_group) const override {
    check_encode(context(), x_in, row_index, rows_per_group);
    const at::Tensor x = x_in.contiguous();
    const at::Device device = x.device();
    const c10::DeviceGuard guard(device);
    const launchers::Stream stream = current_stream(device);
    const RowIndex index(row_index, x.size(0), device, "encode");
    const Groups groups = groups_of(rows_per_group);
    const launchers::RowsOf<T> rows{as<const T>(x), index.data(), x.size(0),
                                    row_index.defined() ? row_index.numel() : x.size(0), x.size(1)};
    Assembly assembly;
    Encoded encoded;
    encoded.bytes_per_group.assign(rows_per_group.size(), 0);
    encoded.centroids_per_group.assign(rows_per_group.size(), 0);
    for (std::size_t i = 0; i < groups.of_rows.size(); ++i) {
      ParcelHeader header;
      header.kind = kind_;
      header.dtype = context().dtype;
      header.rows = static_cast<std::uint32_t>(groups.of_rows[i].rows);
      header.hidden_size = static_cast<std::uint32_t>(context().hidden_size);
      header.body_bytes = header.rows * row_bytes_;
      encoded.bytes_per_group[groups.number[i]] =
          static_cast<int64_t>(ParcelHeader::kBytes + header.body_bytes);
      assembly.add(groups.of_rows[i].first, header, {}, 0);
    }
    assembly.allocate(device);
    encoded.bytes = assembly.out();
    CodecStats& stats = encoded.stats;
    stats.rows = rows.rows;
    stats.raw_bytes = 2 * rows.rows * rows.hidden;
    stats.sent_bytes = assembly.bytes();
    if (rows.rows == 0) return encoded;

    mark_phase("assemble");
    // Headers alone where the rows are coded.
    launchers::RowsOf<T> copied = rows;
    if (coded_ || rounds_) copied.rows = 0;
    launchers::assemble<T>(as<std::uint8_t>(encoded.bytes), assembly.places(), assembly.count(),
                           assembly.heads(), {}, copied, nullptr, nullptr, stream);
    if (!coded_ && !rounds_) {
      stats.whole_rows = rows.rows;
      mark_phase("checksum");
      assembly.seal();
      if (index.bad().defined()) index.check(download<std::int64_t>(index.bad())[0]);
      return encoded;
    }
    const at::Tensor squared = room<double>(rows.rows, device);
    const at::Tensor error = room<double>(rows.rows, device);
    mark_phase("code");
    code(as<std::uint8_t>(encoded.bytes), assembly, squared, error, rows, stream);
    mark_phase("sizes");
    const at::Tensor on_device = upload(groups.of_rows, device);
    const at::Tensor totals = room<launchers::RowTotals>(assembly.count(), device);
    launchers::row_totals(
        as<launchers::RowTotals>(totals), nullptr, as<const launchers::CodedGroup>(on_device),
        assembly.count(), as<const launchers::CodedGroup>(on_device), 1, nullptr, rows.rows,
        nullptr, nullptr, as<const double>(squared), nullptr, as<const double>(error), stream);
    mark_phase("checksum");
    assembly.seal();
    if (index.bad().defined()) index.check(download<std::int64_t>(index.bad())[0]);
    double relative_sum = 0;
    for (const auto& total : download<launchers::RowTotals>(totals)) {
      if (total.bad_row >= 0) throw NonFiniteRow(*this, row_number(row_index, total.bad_row));
      add_totals(stats, total, relative_sum);
    }
    stats.mean_relative_error = relative_sum / static_cast<double>(rows.rows);
    return encoded;
  }

  void decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                   const std::vector<int64_t>& bytes_per_group,
                   const std::vector<int64_t>& rows_per_group) const override {
    check_decode(context(), out, row_index, bytes, bytes_per_group, rows_per_group);
    const c10::DeviceGuard guard(bytes.device());
    const RowIndex index(row_index, out.size(0), bytes.device(), "decode");
    const Opened opened(bytes, bytes_per_group, kind_, context());
    opened.check_rows(rows_per_group);
    decode_opened(out, index, opened);
  }

  [[nodiscard]] Decoded decode(const at::Tensor& bytes,
                               const std::vector<int64_t>& bytes_per_group) const override {
    check_bytes(context(), bytes, bytes_per_group);
    const c10::DeviceGuard guard(bytes.device());
    const Opened opened(bytes, bytes_per_group, kind_, context());
    Decoded decoded;
    decoded.rows_per_group = opened.rows_per_group();
    // What a parcel says of its rows is checked against its size first.
    check_sizes(opened);
    decoded.rows = at::empty({opened.rows(), context().hidden_size},
                             at::dtype(context().dtype).device(bytes.device()));
    decode_opened(decoded.rows, RowIndex({}, opened.rows(), bytes.device(), "decode"), opened);
    return decoded;
  }

 private:
  bool rounds_;  // fp32 rows of kind bf16
  bool coded_;   // in a format
  ParcelKind kind_ = ParcelKind::none;
  RowFormat format_ = RowFormat::fp8;
  std::size_t row_bytes_ = 0;
  launchers::StochasticNoise noise_;

  void code(std::uint8_t* out, const Assembly& assembly, const at::Tensor& squared,
            const at::Tensor& error, const launchers::RowsOf<T>& rows,
            launchers::Stream stream) const {
    if constexpr (std::is_same_v<T, float>) {
      if (rounds_) {
        return launchers::encode_bfloat16(out, assembly.places(), assembly.count(),
                                          as<double>(squared), as<double>(error), rows, stream);
      }
    }
    if constexpr (!std::is_same_v<T, double>) {
      launchers::encode_format<T>(format_, out, assembly.places(), assembly.count(),
                                  as<double>(squared), as<double>(error), rows, noise_, stream);
    }
  }

  void check_sizes(const Opened& opened) const {
    for (const auto& one : opened.parcels()) {
      const std::size_t expected = one.header.rows * row_bytes_;
      LSHMOE_VALIDATE(one.header.flags == 0 && one.header.centroids == 0 &&
                          one.header.shared_bytes == 0 && one.header.body_bytes == expected,
                      "decode: a parcel of ", one.header.rows, " rows has ", one.header.body_bytes,
                      " bytes of them, expected ", expected, " (damaged parcel)");
    }
  }

  void decode_opened(at::Tensor& out, const RowIndex& index, const Opened& opened) const {
    check_sizes(opened);
    const at::Device device = out.device();
    const launchers::Stream stream = current_stream(device);
    std::vector<launchers::RawPlace> list;
    for (const auto& one : opened.parcels()) list.push_back({one.first, one.header.rows, one.body});
    const at::Tensor places = upload(list, device), bad = none_bad(1, device);
    const auto* place = as<const launchers::RawPlace>(places);
    const auto count = static_cast<std::int64_t>(list.size());
    mark_phase("unpack and restore");
    T* to = as<T>(out);
    const std::int64_t rows = opened.rows(), hidden = out.size(1), out_rows = out.size(0);
    if (!coded_ && !rounds_) {
      launchers::scatter_raw<T>(to, index.data(), out_rows, place, count, rows, hidden, stream);
    }
    if constexpr (std::is_same_v<T, float>) {
      if (rounds_) {
        launchers::decode_bfloat16(to, index.data(), out_rows, place, count, rows, hidden, stream);
      }
    }
    if constexpr (!std::is_same_v<T, double>) {
      if (coded_) {
        launchers::decode_format<T>(format_, to, index.data(), out_rows, as<std::int64_t>(bad),
                                    place, count, rows, hidden, stream);
      }
    }
    mark_phase("checks");
    const at::Tensor bad_index = index.bad().defined() ? index.bad() : none_bad(1, device);
    const auto found = download<std::uint32_t>(
        at::cat({bad.view(at::kByte), bad_index.view(at::kByte), opened.sums()}));
    std::int64_t faults[2];
    std::memcpy(faults, found.data(), sizeof faults);
    opened.check_sums(found.data() + 4);
    LSHMOE_VALIDATE(faults[0] == kNoneBad, "decode: row ", faults[0], " of kind ", options().kind(),
                    " has a scale, code or padding that is never written (damaged parcel)");
    index.check(faults[1]);
  }
};

}  // namespace

std::int64_t row_number(const at::Tensor& row_index, std::int64_t i) {
  return row_index.defined() ? row_index[i].item<std::int64_t>() : i;
}

std::shared_ptr<Codec> make_fixed_codec(const CodecOptions& options, const CodecContext& context) {
  if (context.dtype == at::kBFloat16) {
    return std::make_shared<FixedCodec<kernels::Bfloat16>>(options, context);
  }
  if (context.dtype == at::kDouble) return std::make_shared<FixedCodec<double>>(options, context);
  return std::make_shared<FixedCodec<float>>(options, context);
}

}  // namespace lshmoe::cuda
