#include "lshmoe/compress/learned_state.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

#include "lshmoe/compress/channel_order.hpp"
#include "lshmoe/compress/clusters.hpp"
#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/kernels/lsh.hpp"
#include "lshmoe/kernels/quantize.hpp"
#include "lshmoe/kernels/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

constexpr std::int64_t kRowsPerCentroid = 8;
constexpr std::int64_t kRowsPerDirection = 4;
constexpr int kUpdates = 2;

// Relative error of the bases as they travel: residuals are taken from what arrives, so it costs
// bits only where it is large beside them, and half the bytes of bfloat16 are saved.
constexpr double kBaseError = 0.005;

constexpr const char* kDamaged = " (the ranks run different settings, or the bytes are damaged)";

std::shared_ptr<Codec> base_codec(const CodecOptions& options, std::int64_t hidden) {
  return make_codec(CodecOptions(options)
                        .state("batch")
                        .transform("channels")
                        .rounding("nearest")
                        .error_reference("row")
                        .max_error(kBaseError)
                        .max_clusters(0),
                    {hidden, 0, Direction::dispatch, at::kFloat});
}

/// The bases that the state's parcel holds.
void unpack_bases(LearnedState& state, const CodecOptions& options) {
  at::Tensor bytes = at::empty({static_cast<std::int64_t>(state.parcel.size())}, at::kByte);
  std::copy(state.parcel.begin(), state.parcel.end(), bytes.mutable_data_ptr<std::uint8_t>());
  // As many rows as the parcel has bytes for, whatever number of centroids was announced.
  const at::Tensor rows = base_codec(options, state.hidden)->decode(bytes, {bytes.numel()}).rows;
  LSHMOE_VALIDATE(rows.size(0) == 1 + state.centroids, "a learned state of ", state.centroids,
                  " centroids holds ", rows.size(0), " rows (one more is expected)", kDamaged);
  LSHMOE_VALIDATE(at::isfinite(rows).all().item<bool>(),
                  "a learned state's centroids hold NaN or Inf", kDamaged);
  const float* values = rows.const_data_ptr<float>();
  state.bases.assign(values, values + rows.numel());
}

/// torch on one thread while it lives: sums of LAPACK and BLAS depend on their number.
class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

/// The fields that follow from the others.
void derive(LearnedState& state, const CodecOptions& options, std::span<const float> projection) {
  const std::int64_t columns = options.projection(), hidden = state.hidden;
  std::vector<float> z(static_cast<std::size_t>((1 + state.centroids) * columns));
  kernels::multiply(z.data(), state.bases.data(), projection.data(), 1 + state.centroids, hidden,
                    columns);
  state.mean_z.assign(z.begin(), z.begin() + columns);
  state.centroids_z.assign(z.begin() + columns, z.end());
  for (std::size_t i = 0; i < state.centroids_z.size(); ++i) {
    state.centroids_z[i] -= state.mean_z[i % static_cast<std::size_t>(columns)];
  }
  state.ordered_bases = state.bases;
  if (!state.order.empty()) {
    for (std::size_t i = 0; i < state.bases.size(); ++i) {
      const std::size_t j = i % static_cast<std::size_t>(hidden);
      state.ordered_bases[i] = state.bases[i - j + static_cast<std::size_t>(state.order[j])];
    }
  }
  if (!state.basis.defined()) return;
  // Before anything is solved with it: no element of an orthonormal basis is above 1, NaN is not
  // below, and what hardly stretches or shrinks a row can be inverted.
  const OneThread guard;
  const at::Tensor basis = state.basis.to(at::kFloat), exact = basis.to(at::kDouble);
  const double largest = exact.abs().max().item<double>();
  LSHMOE_VALIDATE(largest < 1.1, "a learned basis has an element of ", largest,
                  " (it is far from orthonormal)", kDamaged);
  const at::Tensor squared = at::linalg_eigvalsh(exact.matmul(exact.t()));
  const double least = squared.min().item<double>(), most = squared.max().item<double>();
  LSHMOE_VALIDATE(least > 0.9 * 0.9 && most < 1.1 * 1.1,
                  "a learned basis stretches the squares of rows by ", least, " to ", most,
                  " (it is far from orthonormal)", kDamaged);
  state.stretch = std::sqrt(most) * (1 + 1e-9);
  const at::Tensor inverse = at::linalg_inv(exact).to(at::kFloat).contiguous();
  state.to_residual = kernels::PackedMatrix(basis.const_data_ptr<float>(), hidden, hidden);
  state.to_coefficients = kernels::PackedMatrix(inverse.const_data_ptr<float>(), hidden, hidden);
}

}  // namespace

std::int64_t LearnedState::memory_bytes() const {
  const auto floats = parcel.size() / 4 + 2 * bases.size() + mean_z.size() + centroids_z.size();
  const auto packed = to_residual.packed().size() + to_coefficients.packed().size();
  const auto square = basis.defined() ? 2 * hidden * hidden : 0;
  return static_cast<std::int64_t>(4 * (floats + order.size() + packed)) + square;
}

std::uint32_t LearnedState::checksum() const {
  std::uint32_t sum = 0;
  const auto add = [&sum](const auto& values) {
    sum = kernels::checksum(values.data(), values.size() * sizeof(values[0]), sum);
  };
  add(bases);
  add(order);
  add(to_residual.packed());
  add(to_coefficients.packed());
  add(std::array{stretch});
  add(ordered_bases);
  add(mean_z);
  add(centroids_z);
  return sum;
}

LearnedState fit_state(const at::Tensor& rows_in, const CodecOptions& options, bool by_group,
                       std::span<const float> projection, std::uint32_t version) {
  const at::Tensor rows = rows_in.contiguous();
  const std::int64_t n = rows.size(0), hidden = rows.size(1), columns = options.projection();
  const float* x = rows.const_data_ptr<float>();
  LearnedState state;
  state.version = version;
  state.hidden = hidden;

  std::vector<std::int64_t> all(static_cast<std::size_t>(n));
  std::iota(all.begin(), all.end(), std::int64_t{0});
  const std::int64_t offsets[2] = {0, n};
  state.bases.resize(static_cast<std::size_t>(hidden));
  kernels::segment_mean(state.bases.data(), x, all.data(), offsets, 1, hidden);

  std::vector<std::int64_t> assignment(static_cast<std::size_t>(n), -1);
  const std::int64_t most = std::min(options.codebook_size(), n / kRowsPerCentroid);
  if (most > 0) {
    std::vector<float> z(static_cast<std::size_t>(n * columns)),
        mean_z(static_cast<std::size_t>(columns));
    kernels::multiply(z.data(), x, projection.data(), n, hidden, columns);
    kernels::multiply(mean_z.data(), state.bases.data(), projection.data(), 1, hidden, columns);
    for (std::size_t i = 0; i < z.size(); ++i)
      z[i] -= mean_z[i % static_cast<std::size_t>(columns)];
    Clusters clusters = bucket_clusters({n, hidden, x, z.data()},
                                        CodecOptions(options).max_clusters(most).refine(kUpdates));
    state.centroids = clusters.count;
    state.bases.insert(state.bases.end(), clusters.centroids.begin(), clusters.centroids.end());
    assignment = std::move(clusters.assignment);
  }
  const at::Tensor bases =
      at::from_blob(state.bases.data(), {1 + state.centroids, hidden}, at::kFloat);
  const Encoded encoded = base_codec(options, hidden)->encode(bases, {bases.size(0)});
  const auto* parcel = encoded.bytes.const_data_ptr<std::uint8_t>();
  state.parcel.assign(parcel, parcel + encoded.bytes.numel());
  unpack_bases(state, options);

  // Residuals in units of their row's norm (of a common bound by group): by its bound an outlier
  // would count more than others.
  at::Tensor residuals = at::zeros({n, hidden}, at::kFloat);
  auto* residual = residuals.mutable_data_ptr<float>();
  std::vector<float> energy(static_cast<std::size_t>(hidden), 0.0F);
  for (std::int64_t i = 0; i < n; ++i, residual += hidden) {
    const double norm = std::sqrt(kernels::squared_norm(x + i * hidden, hidden));
    if (!(norm > 1e-30) || !(norm < 1e30)) continue;
    const float scale = by_group ? 1.0F : static_cast<float>(1 / norm);
    const float* base = state.bases.data() + (assignment[static_cast<std::size_t>(i)] + 1) * hidden;
    for (std::int64_t j = 0; j < hidden; ++j) {
      residual[j] = (x[i * hidden + j] - base[j]) * scale;
      energy[static_cast<std::size_t>(j)] += residual[j] * residual[j];
    }
  }
  state.order = order_by_energy(energy);
  if (options.transform() == "basis" && n >= kRowsPerDirection * hidden) {
    const OneThread guard;
    const at::Tensor exact = residuals.to(at::kDouble);
    const at::Tensor directions =
        std::get<1>(at::linalg_eigh(exact.t().matmul(exact))).t().flip(0);  // largest first
    state.basis = directions.to(at::kBFloat16).contiguous();
  }
  derive(state, options, projection);
  return state;
}

namespace {

// Bytes of a state, little-endian: u32 magic, u32 checksum of what follows, u32 version, u32
// hidden, u32 centroids, u32 bytes of the bases' parcel, u32 1 with a basis; then that parcel, u16
// or u32 channel order (if there is more than one band), bfloat16 basis.
constexpr std::uint32_t kMagic = 0x5353484C;  // "LHSS"
constexpr std::size_t kHeadWords = 7, kHead = 4 * kHeadWords;

std::size_t order_count(std::int64_t hidden) {
  return hidden <= kernels::kBandValues ? 0 : static_cast<std::size_t>(hidden);
}
std::size_t channel_bytes(std::int64_t hidden) { return hidden <= 65536 ? 2 : 4; }

}  // namespace

std::vector<std::uint8_t> to_bytes(const LearnedState& state) {
  const auto square =
      state.basis.defined() ? static_cast<std::size_t>(state.hidden * state.hidden) : 0;
  const std::size_t channel = channel_bytes(state.hidden);
  std::vector<std::uint8_t> bytes(kHead + state.parcel.size() + channel * state.order.size() +
                                  2 * square);
  const std::uint32_t head[kHeadWords] = {kMagic,
                                          0,
                                          state.version,
                                          static_cast<std::uint32_t>(state.hidden),
                                          static_cast<std::uint32_t>(state.centroids),
                                          static_cast<std::uint32_t>(state.parcel.size()),
                                          square > 0 ? 1U : 0U};
  std::memcpy(bytes.data(), head, kHead);
  std::uint8_t* out = std::copy(state.parcel.begin(), state.parcel.end(), bytes.data() + kHead);
  for (const std::int32_t value : state.order) {
    std::memcpy(out, &value, channel);
    out += channel;
  }
  if (square > 0) {
    std::memcpy(out, state.basis.const_data_ptr(), 2 * square);
  }
  const std::uint32_t sum = kernels::checksum(bytes.data() + 8, bytes.size() - 8);
  std::memcpy(bytes.data() + 4, &sum, 4);
  return bytes;
}

std::size_t most_state_bytes(std::int64_t hidden, const CodecOptions& options) {
  // A parcel that explains itself takes no more than its rows whole, or it would hold those.
  const auto n = static_cast<std::size_t>(hidden);
  const auto rows = static_cast<std::size_t>(1 + options.codebook_size());
  return kHead + ParcelHeader::kBytes + rows * 4 * n + channel_bytes(hidden) * order_count(hidden) +
         (options.transform() == "basis" ? 2 * n * n : 0);
}

LearnedState state_from_bytes(std::span<const std::uint8_t> bytes, std::int64_t hidden,
                              const CodecOptions& options, std::span<const float> projection) {
  std::uint32_t head[kHeadWords] = {};
  LSHMOE_VALIDATE(bytes.size() >= kHead, "a learned state of ", bytes.size(), " bytes", kDamaged);
  std::memcpy(head, bytes.data(), kHead);
  LearnedState state;
  state.version = head[2];
  state.hidden = head[3];
  state.centroids = head[4];
  const bool has_basis = head[6] == 1;
  LSHMOE_VALIDATE(head[0] == kMagic &&
                      head[1] == kernels::checksum(bytes.data() + 8, bytes.size() - 8) &&
                      state.version >= 1 && state.hidden == hidden && head[6] <= 1 &&
                      state.centroids <= options.codebook_size() &&
                      (!has_basis || options.transform() == "basis"),
                  "a learned state that is not one of this codec", kDamaged);
  const auto square = has_basis ? static_cast<std::size_t>(hidden * hidden) : 0;
  const std::size_t channel = channel_bytes(hidden);
  LSHMOE_VALIDATE(bytes.size() == kHead + head[5] + channel * order_count(hidden) + 2 * square,
                  "a learned state has ", bytes.size(), " bytes", kDamaged);
  const std::uint8_t* in = bytes.data() + kHead;
  state.parcel.assign(in, in + head[5]);
  in += head[5];
  unpack_bases(state, options);
  state.order.resize(order_count(hidden), 0);
  std::vector<bool> met(state.order.size(), false);
  for (std::int32_t& value : state.order) {
    std::memcpy(&value, in, channel);
    in += channel;
    LSHMOE_VALIDATE(value >= 0 && value < hidden && !met[static_cast<std::size_t>(value)],
                    "a learned state's channel order is none", kDamaged);
    met[static_cast<std::size_t>(value)] = true;
  }
  if (has_basis) {
    state.basis = at::empty({hidden, hidden}, at::kBFloat16);
    std::memcpy(state.basis.mutable_data_ptr(), in, 2 * square);
  }
  derive(state, options, projection);
  return state;
}

}  // namespace lshmoe
