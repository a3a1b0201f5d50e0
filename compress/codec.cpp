#include "lshmoe/compress/codec.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/cuda/codec.hpp"
#include "lshmoe/compress/format_codec.hpp"
#include "lshmoe/compress/lsh_codec.hpp"
#include "lshmoe/compress/raw_codec.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
template <class Names>
bool contains(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// True for tensors on the context's device.
bool fits(const CodecContext& context, const at::Tensor& tensor) {
  const at::Device device = tensor.device();
  return device.type() == context.device.type() &&
         (!context.device.has_index() || device.index() == context.device.index());
}

std::string name_of(at::Device device) { return device.is_cpu() ? "the CPU" : device.str(); }

void check_index(const CodecContext& context, const at::Tensor& index, const char* what) {
  LSHMOE_VALIDATE(index.dim() == 1 && index.scalar_type() == at::kLong && index.is_contiguous() &&
                      (index.is_cpu() || fits(context, index)),
                  what, ": row_index must be a contiguous int64 vector on the CPU or on ",
                  name_of(context.device), ", it is ", index.toString(), " with ", index.dim(),
                  " dimensions on ", index.device());
}

void check_rows_per_group(const std::vector<int64_t>& rows_per_group, int64_t rows,
                          const char* what) {
  int64_t sum = 0;
  for (const int64_t count : rows_per_group) {
    LSHMOE_VALIDATE(count >= 0 && count <= std::numeric_limits<std::uint32_t>::max(), what,
                    ": a group of ", count, " rows (a parcel holds 0 to 2^32 - 1)");
    sum += count;
  }
  LSHMOE_VALIDATE(sum == rows, what, ": rows_per_group sums to ", sum, ", but there are ", rows,
                  " rows");
}
}  // namespace

std::string name_of_layer(int64_t layer) {
  return layer < kDrawnLayers
             ? detail::message("layer ", layer)
             : detail::message("layer ", layer - kDrawnLayers, " of those without a number");
}

std::string_view name_of(Direction direction) {
  switch (direction) {
    case Direction::dispatch:
      return "dispatch";
    case Direction::combine:
      return "combine";
    case Direction::combine_backward:
      return "combine_backward";
    case Direction::dispatch_backward:
      return "dispatch_backward";
  }
  throw InvalidArgument("a direction that is none of the four");
}

bool sends_centroids(const CodecOptions& options) {
  return options.kind() == "lsh" && options.restore() == "source" && options.max_error() > 0;
}

void validate(const CodecOptions& options) {
  static const std::array<std::string, 6> kKinds{"none", "bf16", "fp8", "int8", "int4", "lsh"};
  LSHMOE_VALIDATE(contains(kKinds, options.kind()), "unknown codec kind '", options.kind(),
                  "': use none, bf16, fp8, int8, int4 or lsh");
  LSHMOE_VALIDATE(options.restore() == "expert" || options.restore() == "source",
                  "unknown restore '", options.restore(), "': use expert or source");
  LSHMOE_VALIDATE(std::isfinite(options.max_error()) && options.max_error() >= 0, "max_error ",
                  options.max_error(),
                  " (it bounds a row's relative error) must be a finite number >= 0");
  LSHMOE_VALIDATE(options.error_reference().empty() || options.error_reference() == "row" ||
                      options.error_reference() == "group",
                  "unknown error_reference '", options.error_reference(),
                  "': use row or group, or leave it empty for the direction's default");
  LSHMOE_VALIDATE(options.hashes() >= 1 && options.hashes() <= 16, "hashes ", options.hashes(),
                  " must be 1 to 16");
  LSHMOE_VALIDATE(options.hash_dim() >= 1 && options.hash_dim() <= 1024, "hash_dim ",
                  options.hash_dim(), " must be 1 to 1024");
  LSHMOE_VALIDATE(
      static_cast<double>(options.hashes()) * std::log2(2.0 * options.hash_dim()) <= 64.0,
      "hashes ", options.hashes(), " of ", 2 * options.hash_dim(),
      " buckets each do not fit one 64-bit bucket key: lower hashes or hash_dim");
  LSHMOE_VALIDATE(options.projection() >= options.hashes() * options.hash_dim() &&
                      options.projection() <= 65536,
                  "projection ", options.projection(),
                  " must be hashes * hash_dim = ", options.hashes() * options.hash_dim(),
                  " at least (the hashes read that many) and ", 65536, " at most");
  LSHMOE_VALIDATE(options.refine() >= 0 && options.refine() <= 100, "refine ", options.refine(),
                  " must be 0 to 100");
  LSHMOE_VALIDATE(options.max_clusters() >= 0 && options.max_clusters() <= 65535, "max_clusters ",
                  options.max_clusters(), " must be 0 (no clusters) to 65535");
  LSHMOE_VALIDATE(options.state() == "batch" || options.state() == "learned", "unknown state '",
                  options.state(), "': use batch or learned");
  LSHMOE_VALIDATE(options.transform() == "channels" || options.transform() == "basis",
                  "unknown transform '", options.transform(), "': use channels or basis");
  LSHMOE_VALIDATE(options.transform() == "channels" || options.state() == "learned",
                  "transform basis needs state learned (a parcel cannot carry a basis): set it, or "
                  "use transform channels");
  LSHMOE_VALIDATE(options.codebook_size() >= 0 && options.codebook_size() <= 65535,
                  "codebook_size ", options.codebook_size(), " must be 0 (no codebook) to 65535");
  LSHMOE_VALIDATE(options.refresh_every() >= 1, "refresh_every ", options.refresh_every(),
                  " must be 1 or more");
  LSHMOE_VALIDATE(options.sample_rows() >= 0, "sample_rows ", options.sample_rows(),
                  " must be 0 (the default) or more");
  LSHMOE_VALIDATE(std::isfinite(options.alpha()), "alpha ", options.alpha(), " must be finite");
  LSHMOE_VALIDATE(!options.estimate_alpha() || options.restore() == "source",
                  "estimate_alpha needs restore source (restore expert adds no residual at the "
                  "source): set it, or leave estimate_alpha out");
  LSHMOE_VALIDATE(options.alpha_probes() >= 1, "alpha_probes ", options.alpha_probes(),
                  " must be 1 or more");
  const std::string& rounding = options.rounding();
  LSHMOE_VALIDATE(rounding.empty() || rounding == "nearest" || rounding == "stochastic" ||
                      rounding == "dithered",
                  "unknown rounding '", rounding, "': use nearest, stochastic or dithered");
  const bool fixed =
      options.kind() == "fp8" || options.kind() == "int8" || options.kind() == "int4";
  const bool fits = rounding.empty() || rounding == "nearest" ||
                    (rounding == "stochastic" ? fixed : options.kind() == "lsh");
  LSHMOE_VALIDATE(fits, "rounding ", rounding, " is not for kind ", options.kind(),
                  ": use nearest, stochastic with fp8, int8 and int4, or dithered with lsh");
  LSHMOE_VALIDATE(
      rounding != "dithered" || options.restore() == "expert",
      "rounding dithered is for restore expert (source sends centroids as they are): use "
      "rounding nearest");
}

CodecOptions resolved(CodecOptions options, Direction direction) {
  if (options.error_reference().empty()) {
    options.error_reference(direction == Direction::dispatch ? "row" : "group");
  }
  if (options.rounding().empty()) {
    const bool gradients =
        direction == Direction::combine_backward || direction == Direction::dispatch_backward;
    const bool rows = options.kind() == "lsh" && options.restore() == "expert";
    options.rounding(gradients && rows ? "dithered" : "nearest");
  }
  return options;
}

std::shared_ptr<Codec> make_codec(const CodecOptions& given, const CodecContext& context) {
  validate(given);
  const CodecOptions options = resolved(given, context.direction);
  LSHMOE_VALIDATE(context.hidden_size >= 1 && context.hidden_size <= (int64_t{1} << 24),
                  "hidden_size ", context.hidden_size, " must be 1 to 2^24");
  constexpr int64_t kMostBasisHidden = 2048;
  LSHMOE_VALIDATE(options.kind() != "lsh" || options.transform() != "basis" ||
                      context.hidden_size <= kMostBasisHidden || options.force_basis(),
                  "transform basis at hidden_size ", context.hidden_size, " (it takes 2 x ",
                  context.hidden_size, "^2 operations a row at each end; above ", kMostBasisHidden,
                  " that costs more than it saves on most links): use transform channels, or set "
                  "force_basis");
  const at::ScalarType dtype = context.dtype;
  LSHMOE_VALIDATE(dtype == at::kFloat || dtype == at::kBFloat16 ||
                      (dtype == at::kDouble && options.kind() == "none"),
                  "codec kind ", options.kind(), " does not take rows of dtype ", dtype,
                  ": use float32 or bfloat16 (none: float64 too)");
  LSHMOE_VALIDATE(context.device.is_cpu() || context.device.is_cuda(), "codec on device ",
                  context.device, ": use cpu or cuda");
  if (context.device.is_cuda()) return cuda::make_codec(options, context);
  if (options.kind() == "lsh") return make_lsh_codec(options, context);
  if (options.kind() == "none" || options.kind() == "bf16") return make_raw_codec(options, context);
  return make_format_codec(options, context);
}

Codec::Codec(CodecOptions options, CodecContext context)
    : options_(std::move(options)), context_(context) {}

NonFiniteRow::NonFiniteRow(const Codec& codec, int64_t row_of_x)
    : InvalidArgument(detail::message(
          "encode: row ", row_of_x, " holds NaN or Inf (", name_of(codec.context().direction),
          " of ", name_of_layer(codec.context().layer), "; kind ", codec.options().kind(),
          " has no code for them): find where it comes from, or use kind bf16 or none, which pass "
          "it on")),
      row(row_of_x) {}

void Codec::observe(const at::Tensor& /*x*/, const at::Tensor& /*row_index*/) {}
bool Codec::refresh(Communicator& /*comm*/) { return false; }
StateStats Codec::state_stats() const { return {}; }

void check_encode(const CodecContext& context, const at::Tensor& x, const at::Tensor& row_index,
                  const std::vector<int64_t>& rows_per_group) {
  LSHMOE_VALIDATE(x.defined() && fits(context, x), "encode: the rows must be a tensor on ",
                  name_of(context.device));
  LSHMOE_VALIDATE(x.dim() == 2 && x.size(1) == context.hidden_size, "encode: rows of shape ",
                  x.sizes(), ", expected [tokens, ", context.hidden_size, "]");
  LSHMOE_VALIDATE(x.scalar_type() == context.dtype, "encode: rows of dtype ", x.scalar_type(),
                  ", this codec was made for ", context.dtype);
  if (row_index.defined()) check_index(context, row_index, "encode");
  check_rows_per_group(rows_per_group, row_index.defined() ? row_index.numel() : x.size(0),
                       "encode");
}

void check_bytes(const CodecContext& context, const at::Tensor& bytes,
                 const std::vector<int64_t>& bytes_per_group) {
  LSHMOE_VALIDATE(bytes.defined() && fits(context, bytes) && bytes.dim() == 1 &&
                      bytes.scalar_type() == at::kByte && bytes.is_contiguous(),
                  "decode: the bytes must be a contiguous uint8 vector on ",
                  name_of(context.device));
  int64_t left = bytes.numel();
  for (const int64_t count : bytes_per_group) {
    LSHMOE_VALIDATE(count >= 0 && count <= left, "decode: bytes_per_group does not fit the ",
                    bytes.numel(), " bytes given");
    left -= count;
  }
  LSHMOE_VALIDATE(left == 0, "decode: bytes_per_group leaves ", left, " of ", bytes.numel(),
                  " bytes over");
}

void check_decode(const CodecContext& context, const at::Tensor& out, const at::Tensor& row_index,
                  const at::Tensor& bytes, const std::vector<int64_t>& bytes_per_group,
                  const std::vector<int64_t>& rows_per_group) {
  check_bytes(context, bytes, bytes_per_group);
  LSHMOE_VALIDATE(out.defined() && fits(context, out) && out.is_contiguous() && out.dim() == 2 &&
                      out.size(1) == context.hidden_size && out.scalar_type() == context.dtype,
                  "decode: out must be contiguous [rows, ", context.hidden_size, "] of dtype ",
                  context.dtype, " on ", name_of(context.device));
  LSHMOE_VALIDATE(row_index.defined(), "decode: row_index is undefined");
  check_index(context, row_index, "decode");
  check_rows_per_group(rows_per_group, row_index.numel(), "decode");
  LSHMOE_VALIDATE(rows_per_group.size() == bytes_per_group.size(),
                  "decode: ", rows_per_group.size(), " groups of rows, but ",
                  bytes_per_group.size(), " groups of bytes");
}

void check_index_values(const at::Tensor& row_index, int64_t rows, const char* what) {
  const auto* row = row_index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < row_index.numel(); ++i) {
    LSHMOE_VALIDATE(row[i] >= 0 && row[i] < rows, what, ": row_index[", i, "] = ", row[i],
                    " is not one of the ", rows, " rows");
  }
}

Encoded CpuCodec::encode(const at::Tensor& x, const at::Tensor& row_index,
                         const std::vector<int64_t>& rows_per_group) const {
  check_encode(context(), x, row_index, rows_per_group);
  const at::Tensor rows = x.contiguous();
  Source source;
  source.data = rows.const_data_ptr();
  source.rows = x.size(0);
  if (row_index.defined()) {
    check_index_values(row_index, x.size(0), "encode");
    source.index = row_index.const_data_ptr<int64_t>();
    source.rows = row_index.size(0);
  }
  return do_encode(source, rows_per_group);
}

Parcel CpuCodec::open(std::span<const std::uint8_t> bytes) const {
  const Parcel parcel = open_parcel(bytes, parcel_kind(), context().dtype, context().hidden_size);
  LSHMOE_VALIDATE(parcel.header.rows <= parcel.body.size() / least_row_bytes(parcel.header),
                  "decode: a parcel of ", bytes.size(), " bytes says it has ", parcel.header.rows,
                  " rows (damaged parcel)");
  return parcel;
}

void CpuCodec::decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                           const std::vector<int64_t>& bytes_per_group,
                           const std::vector<int64_t>& rows_per_group) const {
  check_decode(context(), out, row_index, bytes, bytes_per_group, rows_per_group);
  check_index_values(row_index, out.size(0), "decode");
  const auto* from = bytes.const_data_ptr<std::uint8_t>();
  Sink sink{out.mutable_data_ptr(), row_index.const_data_ptr<int64_t>(), 0};
  for (std::size_t group = 0; group < rows_per_group.size(); ++group) {
    const auto size = static_cast<std::size_t>(bytes_per_group[group]);
    if (size > 0) {
      const Parcel parcel = open({from, size});
      LSHMOE_VALIDATE(parcel.header.rows == rows_per_group[group], "decode: the parcel of group ",
                      group, " holds ", parcel.header.rows, " rows, expected ",
                      rows_per_group[group]);
      do_decode(parcel, sink);
    } else {
      LSHMOE_VALIDATE(rows_per_group[group] == 0, "decode: group ", group, " has no parcel, but ",
                      rows_per_group[group], " rows are expected");
    }
    from += size;
    sink.first += rows_per_group[group];
  }
}

Decoded CpuCodec::decode(const at::Tensor& bytes,
                         const std::vector<int64_t>& bytes_per_group) const {
  check_bytes(context(), bytes, bytes_per_group);
  const auto* from = bytes.const_data_ptr<std::uint8_t>();
  std::vector<Parcel> parcels(bytes_per_group.size());
  Decoded decoded;
  decoded.rows_per_group.resize(bytes_per_group.size());
  for (std::size_t group = 0; group < parcels.size(); ++group) {
    const auto size = static_cast<std::size_t>(bytes_per_group[group]);
    if (size == 0) continue;
    parcels[group] = open({from, size});
    decoded.rows_per_group[group] = parcels[group].header.rows;
    from += size;
  }
  const int64_t rows =
      std::accumulate(decoded.rows_per_group.begin(), decoded.rows_per_group.end(), int64_t{0});
  decoded.rows = at::empty({rows, context().hidden_size}, at::dtype(context().dtype));
  Sink sink{decoded.rows.mutable_data_ptr(), nullptr, 0};
  for (std::size_t group = 0; group < parcels.size(); ++group) {
    if (decoded.rows_per_group[group] > 0) do_decode(parcels[group], sink);
    sink.first += decoded.rows_per_group[group];
  }
  return decoded;
}

}  // namespace lshmoe
