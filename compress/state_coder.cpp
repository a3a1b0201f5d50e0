#include "lshmoe/compress/state_coder.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "lshmoe/compress/phases.hpp"
#include "lshmoe/kernels/lsh.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
constexpr std::int64_t kSampleRows = 64;
/// Rows that the receiver turns back at a time.
constexpr std::int64_t kBlockRows = 256;
}  // namespace

std::size_t centroid_id_bytes(std::int64_t centroids) {
  return centroids == 0 ? 0 : centroids < 256 ? 1 : 2;
}

template <class T>
StateCoder<T>::StateCoder(const LearnedState& state, StepCode steps, const CodecOptions& options,
                          std::span<const float> projection)
    : state_(state), steps_(steps), options_(options), projection_(projection) {}

// What of a row's bound is left for its coefficients: the products at both ends round, and so does
// the cast to bfloat16.
template <class T>
double StateCoder<T>::coefficient_bound(double bound, double norm) const {
  const double products = 4.0 * static_cast<double>(state_.hidden) * 0x1p-24 * norm;
  const double cast = std::is_same_v<T, float> ? 0 : 0x1p-8 * (norm + bound);
  return (bound - products - cast) / state_.stretch;
}

template <class T>
at::Tensor StateCoder<T>::coefficients(const float* x, const std::vector<std::int64_t>& rows,
                                       const std::vector<std::int64_t>& assignment) const {
  const std::int64_t hidden = state_.hidden;
  at::Tensor residual = at::empty({static_cast<std::int64_t>(rows.size()), hidden}, at::kFloat);
  auto* r = residual.mutable_data_ptr<float>();
  for (const std::int64_t row : rows) {
    const float* base =
        state_.bases.data() + (assignment[static_cast<std::size_t>(row)] + 1) * hidden;
    const float* from = x + row * hidden;
    for (std::int64_t j = 0; j < hidden; ++j) r[j] = from[j] - base[j];
    r += hidden;
  }
  const PhaseTimer timer(Phase::product, 4 * hidden * (2 * residual.size(0) + hidden));
  return at::mm(residual, state_.inverse);
}

template <class T>
std::int64_t StateCoder<T>::sample_bits(const float* x, std::int64_t rows, const double* bound,
                                        const double* norm,
                                        const std::vector<std::int64_t>& assignment) const {
  const std::int64_t hidden = state_.hidden, stride = std::max<std::int64_t>(1, rows / kSampleRows);
  RowCoder<T> coder(hidden, steps_, 0);
  std::vector<std::int64_t> sample;
  for (std::int64_t i = 0; i < rows; i += stride) sample.push_back(i);
  at::Tensor transformed;
  if (state_.basis.defined()) transformed = coefficients(x, sample, assignment);
  std::vector<float> residual(static_cast<std::size_t>(hidden));
  std::int64_t sum = 0;
  for (std::size_t s = 0; s < sample.size(); ++s) {
    const auto row = static_cast<std::size_t>(sample[s]);
    double allowed = bound[row];
    const float* r = residual.data();
    if (transformed.defined()) {
      r = transformed.const_data_ptr<float>() + static_cast<std::int64_t>(s) * hidden;
      allowed = coefficient_bound(allowed, norm[row]);
    } else {
      const float* base = state_.ordered_bases.data() + (assignment[row] + 1) * hidden;
      const float* from = x + sample[s] * hidden;
      for (std::int64_t j = 0; j < hidden; ++j) {
        const auto at = static_cast<std::size_t>(j);
        residual[at] = from[state_.order.empty() ? j : state_.order[at]] - base[j];
      }
    }
    std::int64_t bits = 0, unused = 0;
    coder.estimate(r, allowed, nullptr, &bits, &unused);
    sum += bits;
  }
  return sum;
}

template <class T>
StateRows StateCoder<T>::encode(const float* x, std::int64_t rows, const double* norm,
                                const double* bound) const {
  const std::int64_t hidden = state_.hidden, columns = options_.projection();
  const auto n = static_cast<std::size_t>(rows);
  StateRows out;
  out.assignment.assign(n, -1);
  out.errors.assign(n, 0);
  out.whole.assign(n, false);
  if (state_.centroids > 0 && rows > 0) {
    std::vector<float> z(n * static_cast<std::size_t>(columns));
    {
      const PhaseTimer timer(Phase::project, 4 * (rows + columns) * hidden + 4 * rows * columns);
      kernels::multiply(z.data(), x, projection_.data(), rows, hidden, columns);
      for (std::size_t i = 0; i < z.size(); ++i)
        z[i] -= state_.mean_z[i % static_cast<std::size_t>(columns)];
    }
    std::vector<std::int64_t> nearest(n);
    std::vector<float> scratch(
        static_cast<std::size_t>(kernels::nearest_scratch(state_.centroids, columns)));
    {
      const PhaseTimer timer(Phase::nearest, 4 * (rows + state_.centroids) * columns + 8 * rows);
      kernels::nearest_centroid(nearest.data(), nullptr, scratch.data(), z.data(),
                                state_.centroids_z.data(), rows, state_.centroids, columns,
                                /*or_none=*/true);
    }
    const PhaseTimer timer(Phase::plan);
    const auto id_bits = static_cast<std::int64_t>(8 * centroid_id_bytes(state_.centroids));
    const std::int64_t samples = (rows + std::max<std::int64_t>(1, rows / kSampleRows) - 1) /
                                 std::max<std::int64_t>(1, rows / kSampleRows);
    if (sample_bits(x, rows, bound, norm, nearest) + samples * id_bits <
        sample_bits(x, rows, bound, norm, out.assignment)) {
      out.codebook = true;
      out.assignment = std::move(nearest);
    }
  }

  RowCoder<T> coder(hidden, steps_, out.codebook ? centroid_id_bytes(state_.centroids) : 0);
  out.record_bytes = coder.layout().record_bytes;
  out.records.resize(n * out.record_bytes);
  out.offsets.assign(1, 0);
  at::Tensor transformed;
  if (state_.basis.defined()) {
    std::vector<std::int64_t> all(n);
    std::iota(all.begin(), all.end(), std::int64_t{0});
    transformed = coefficients(x, all, out.assignment);
  }
  const std::vector<float> zeros(static_cast<std::size_t>(hidden), 0.0F);
  std::vector<float> ordered(static_cast<std::size_t>(hidden));
  std::size_t at = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto row = static_cast<std::size_t>(i);
    if (out.payloads.size() < at + coder.max_payload()) {
      out.payloads.resize(at + at / 2 + coder.max_payload());
    }
    std::uint8_t* record = out.records.data() + row * out.record_bytes;
    std::uint8_t* payload = out.payloads.data() + at;
    const float* natural = x + i * hidden;
    const auto id = static_cast<std::uint32_t>(out.assignment[row] + 1);
    double error = 0;
    if (transformed.defined()) {
      const double allowed = coefficient_bound(bound[row], norm[row]);
      at += coder.template encode<float>(
          record, payload, transformed.const_data_ptr<float>() + i * hidden, zeros.data(), natural,
          std::max(allowed, 0.0), norm[row], id, &error);
      // What coefficient_bound kept back, at its most.
      if (!coder.is_whole(record) && !coder.is_zero(record)) {
        error = bound[row] - (allowed - error) * state_.stretch;
      }
    } else {
      const float* coded = natural;
      if (!state_.order.empty()) {
        const PhaseTimer timer(Phase::order, 12 * hidden);
        for (std::size_t j = 0; j < ordered.size(); ++j) ordered[j] = natural[state_.order[j]];
        coded = ordered.data();
      }
      at += coder.encode(record, payload, coded,
                         state_.ordered_bases.data() + static_cast<std::int64_t>(id) * hidden,
                         natural, bound[row], norm[row], id, &error);
    }
    out.errors[row] = error;
    out.whole[row] = coder.is_whole(record);
    out.offsets.push_back(at);
  }
  out.payloads.resize(at);
  return out;
}

template <class T>
void StateCoder<T>::decode_with_basis(T* out, const std::int64_t* to, std::int64_t n,
                                      std::span<const std::uint8_t> body, bool codebook) const {
  const std::int64_t hidden = state_.hidden;
  RowCoder<T> coder(hidden, steps_, codebook ? centroid_id_bytes(state_.centroids) : 0);
  const RowLayout& layout = coder.layout();
  const std::uint8_t* record = body.data();
  const std::uint8_t* payload = record + static_cast<std::size_t>(n) * layout.record_bytes;
  auto left = static_cast<std::size_t>(body.data() + body.size() - payload);
  const std::vector<float> zeros(static_cast<std::size_t>(hidden), 0.0F);
  for (std::int64_t first = 0; first < n; first += kBlockRows) {
    const std::int64_t block = std::min(kBlockRows, n - first);
    at::Tensor values = at::zeros({block, hidden}, at::kFloat);
    std::vector<std::int64_t> base(static_cast<std::size_t>(block), -1);  // -1: written already
    for (std::int64_t i = 0; i < block; ++i, record += layout.record_bytes) {
      T* row = out + to[first + i] * hidden;
      const std::size_t bytes = coder.payload_bytes(record);
      const std::uint32_t id = coder.id(record);
      LSHMOE_VALIDATE(bytes <= left, "decode: row ", first + i, "'s payload of ", bytes,
                      " bytes goes beyond its parcel (damaged parcel)");
      LSHMOE_VALIDATE(id <= state_.centroids, "decode: row ", first + i, " names centroid ", id,
                      " of ", state_.centroids, " (damaged parcel)");
      if (coder.is_whole(record) || coder.is_zero(record)) {
        coder.decode(row, record, payload, left, zeros.data());
      } else {
        base[static_cast<std::size_t>(i)] = id;
        coder.template decode<float>(values.mutable_data_ptr<float>() + i * hidden, record, payload,
                                     left, zeros.data());
      }
      payload += bytes;
      left -= bytes;
    }
    at::Tensor residual;
    {
      const PhaseTimer timer(Phase::product, 4 * hidden * (2 * block + hidden));
      residual = at::mm(values, state_.basis);
    }
    const PhaseTimer timer(Phase::scatter,
                           static_cast<std::int64_t>(8 + sizeof(T)) * block * hidden);
    const float* r = residual.const_data_ptr<float>();
    for (std::int64_t i = 0; i < block; ++i, r += hidden) {
      if (base[static_cast<std::size_t>(i)] < 0) continue;
      T* row = out + to[first + i] * hidden;
      const float* from = state_.bases.data() + base[static_cast<std::size_t>(i)] * hidden;
      for (std::int64_t j = 0; j < hidden; ++j) row[j] = kernels::from_float<T>(from[j] + r[j]);
    }
  }
  LSHMOE_VALIDATE(left == 0, "decode: ", left,
                  " bytes are left over after the last row (damaged parcel)");
}

template class StateCoder<float>;
template class StateCoder<kernels::Bfloat16>;

}  // namespace lshmoe
