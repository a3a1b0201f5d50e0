#include "lshmoe/compress/group_plan.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "lshmoe/compress/channel_order.hpp"
#include "lshmoe/compress/phases.hpp"
#include "lshmoe/compress/state_coder.hpp"
#include "lshmoe/kernels/lsh.hpp"

namespace lshmoe {
namespace {

// Relative errors of what rows are taken from; their own error does not add, so coarse is cheap.
constexpr double kMeanError = 0.05;
constexpr double kCentroidError = 0.1;
// Clusters that look better than this on the sample of rows are better on all of them.
constexpr double kSampleTrust = 0.85;

// Codes `row` (less `from`) to `relative` and appends record and payload; returns what decodes.
std::vector<float> code_base_row(RowCoder<float>& coder, const float* row, const float* from,
                                 const std::int32_t* order, double relative,
                                 std::vector<std::uint8_t>& records,
                                 std::vector<std::uint8_t>& payloads) {
  const auto hidden = static_cast<std::size_t>(coder.layout().hidden);
  std::vector<float> ordered(hidden), zeros(hidden, 0.0F), decoded(hidden);
  for (std::size_t j = 0; j < hidden; ++j) {
    const auto channel = order != nullptr ? static_cast<std::size_t>(order[j]) : j;
    ordered[j] = row[channel] - (from != nullptr ? from[channel] : 0.0F);
  }
  const double norm = std::sqrt(kernels::squared_norm(ordered.data(), coder.layout().hidden));
  const std::size_t record = records.size(), payload = payloads.size();
  records.resize(record + coder.layout().record_bytes);
  payloads.resize(payload + coder.max_payload());
  double error = 0;
  const std::size_t bytes =
      coder.encode(records.data() + record, payloads.data() + payload, ordered.data(), zeros.data(),
                   ordered.data(), relative * norm, norm, 0, &error);
  coder.decode(decoded.data(), records.data() + record, payloads.data() + payload, bytes + 8,
               zeros.data());
  payloads.resize(payload + bytes);
  std::vector<float> natural(hidden);
  for (std::size_t j = 0; j < hidden; ++j) {
    const auto channel = order != nullptr ? static_cast<std::size_t>(order[j]) : j;
    natural[channel] = decoded[j] + (from != nullptr ? from[channel] : 0.0F);
  }
  return natural;
}

}  // namespace

std::vector<float> GroupPlan::natural_bases(std::int64_t hidden) const {
  std::vector<float> bases(static_cast<std::size_t>(hidden), 0.0F);
  if (!base.mean.empty()) bases = base.mean;
  bases.insert(bases.end(), base.centroids.begin(), base.centroids.end());
  return bases;
}

std::vector<float> GroupPlan::ordered_bases(std::int64_t hidden) const {
  std::vector<float> bases = natural_bases(hidden);
  if (order.empty()) return bases;
  std::vector<float> ordered(bases.size());
  for (std::size_t from = 0; from < bases.size(); from += static_cast<std::size_t>(hidden)) {
    for (std::size_t j = 0; j < static_cast<std::size_t>(hidden); ++j) {
      ordered[from + j] = bases[from + static_cast<std::size_t>(order[j])];
    }
  }
  return ordered;
}

template <class T>
std::vector<float> GroupPlanner<T>::mean_of(const RowsView<T>& rows) const {
  Clusters one;
  one.count = 1;
  one.assignment.assign(static_cast<std::size_t>(rows.rows), 0);
  return cluster_means(rows, one);
}

template <class T>
typename GroupPlanner<T>::Projected GroupPlanner<T>::project(const BoundedRows<T>& group,
                                                             const std::vector<float>& mean) const {
  const std::int64_t hidden = group.rows.hidden, rows = group.rows.rows;
  const std::int64_t columns = projection_.columns(), block = block_rows(hidden);
  const PhaseScope timer(
      Phase::project,
      static_cast<std::int64_t>(sizeof(T)) * rows * hidden + 4 * columns * (hidden + rows),
      2 * rows * hidden * columns);
  Projected projected;
  projected.z.resize(static_cast<std::size_t>(rows * columns));
  std::vector<float> x(static_cast<std::size_t>(block * hidden));
  for (std::int64_t i = 0; i < rows; i += block) {
    const std::int64_t count = std::min(block, rows - i);
    group.rows.read(x.data(), i, count);
    projection_.multiply(projected.z.data() + i * columns, x.data(), count);
  }
  std::vector<float> center(static_cast<std::size_t>(columns));
  projection_.multiply(center.data(), mean.data(), 1);
  double energy = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    float* z = projected.z.data() + i * columns;
    for (std::int64_t j = 0; j < columns; ++j) z[j] -= center[static_cast<std::size_t>(j)];
    energy += kernels::squared_norm(z, columns);
  }
  const double rms = std::sqrt(energy / static_cast<double>(rows * columns));
  if (!(rms > 1e-35) || !(rms < 1e35)) return projected;
  const float scale = std::ldexp(1.0F, -std::ilogb(rms));
  for (float& value : projected.z) value *= scale;
  double squared = 0;
  for (const double norm : group.norm) squared += norm * norm;
  const double centered =
      squared - static_cast<double>(rows) * kernels::squared_norm(mean.data(), hidden);
  if (centered > 0) {
    projected.energy =
        centered / (energy * static_cast<double>(scale) * static_cast<double>(scale));
  }
  return projected;
}

// Channels by falling energy of the residuals in units of the rows' bounds, cut into bands; within
// a band ascending. Empty when there is one band only.
template <class T>
std::vector<std::int32_t> GroupPlanner<T>::channel_order(const BoundedRows<T>& group,
                                                         const GroupPlan& plan) const {
  const std::int64_t hidden = group.rows.hidden;
  if (hidden <= kernels::kBandValues) return {};
  const auto bases = plan.natural_bases(hidden);
  std::vector<float> energy(static_cast<std::size_t>(hidden), 0.0F), x(energy.size());
  const std::int64_t stride = std::max<std::int64_t>(1, group.rows.rows / 256);
  for (std::int64_t i = 0; i < group.rows.rows; i += stride) {
    const auto row = static_cast<std::size_t>(i);
    if (!(group.bound[row] > 1e-30) || !(group.bound[row] < 1e30)) continue;
    const auto scale = static_cast<float>(1 / group.bound[row]);
    group.rows.read(x.data(), i);
    const float* base = bases.data() + (plan.clusters.assignment[row] + 1) * hidden;
    for (std::size_t j = 0; j < x.size(); ++j) {
      const float value = (x[j] - base[j]) * scale;
      energy[j] += value * value;
    }
  }
  return order_by_energy(energy);
}

// Sets the plan's bits from about `sample` of its rows; drops an order that does not pay. Centroids
// are coded in the channel order: it stays with them.
template <class T>
void GroupPlanner<T>::measure(GroupPlan& plan, const BoundedRows<T>& group, RowCoder<T>& estimator,
                              std::int64_t sample) const {
  const std::int64_t hidden = group.rows.hidden, rows = group.rows.rows;
  const std::int64_t stride = std::max<std::int64_t>(1, rows / sample);
  const auto bases = plan.natural_bases(hidden);
  std::vector<float> residual(static_cast<std::size_t>(hidden));
  std::int64_t plain = 0, ordered = 0, sampled = 0;
  for (std::int64_t i = 0; i < rows; i += stride, ++sampled) {
    const auto row = static_cast<std::size_t>(i);
    const float* base = bases.data() + (plan.clusters.assignment[row] + 1) * hidden;
    group.rows.read(residual.data(), i);
    for (std::size_t j = 0; j < residual.size(); ++j) residual[j] -= base[j];
    std::int64_t bits_plain = 0, bits_ordered = 0;
    estimator.estimate(residual.data(), group.bound[row],
                       plan.order.empty() ? nullptr : plan.order.data(), &bits_plain,
                       &bits_ordered);
    plain += bits_plain;
    ordered += bits_ordered;
  }
  const double scale = static_cast<double>(rows) / static_cast<double>(sampled);
  plan.row_bits =
      scale * static_cast<double>(plain) +
      8.0 * static_cast<double>(rows) * static_cast<double>(centroid_id_bytes(plan.clusters.count));
  plan.shared_bits = 8.0 * static_cast<double>(plan.base.bytes());
  if (plan.order.empty()) return;
  const double order_cost =
      8.0 * static_cast<double>(order_bytes(hidden, estimator.layout().bands));
  const double saved = scale * static_cast<double>(plain - ordered);
  if (plan.clusters.count == 0 && saved <= order_cost) {
    plan.order.clear();
    return;
  }
  plan.row_bits -= saved;
  plan.shared_bits += order_cost;
}

template <class T>
GroupPlan GroupPlanner<T>::choose(const BoundedRows<T>& group, const StepCode& steps,
                                  bool clusters) const {
  const PhaseScope timer(Phase::plan);
  const std::int64_t hidden = group.rows.hidden, rows = group.rows.rows;
  const auto n = static_cast<std::size_t>(rows);
  RowCoder<float> base_coder(hidden, StepCode(), 0);
  RowCoder<T> estimator(hidden, steps, 0);
  const std::int64_t sample = std::clamp<std::int64_t>(rows / 8, 16, 64);

  const std::vector<float> mean = mean_of(group.rows);
  const bool usable_mean = std::isfinite(kernels::squared_norm(mean.data(), hidden));
  GroupPlan best;
  best.clusters.assignment.assign(n, -1);
  best.order = channel_order(group, best);
  measure(best, group, estimator, sample);
  BaseRows with_mean;
  if (usable_mean) {
    with_mean.mean = code_base_row(base_coder, mean.data(), nullptr, nullptr, kMeanError,
                                   with_mean.mean_record, with_mean.mean_payload);
    GroupPlan plan;
    plan.clusters.assignment.assign(n, -1);
    plan.base = with_mean;
    plan.order = channel_order(group, plan);
    measure(plan, group, estimator, sample);
    if (plan.bits() < best.bits()) best = std::move(plan);
  }
  if (!usable_mean || !clusters) return best;
  const Projected projected = project(group, mean);
  if (projected.energy <= 0) return best;
  std::vector<float> squared_bound(n);
  for (std::size_t i = 0; i < n; ++i) {
    squared_bound[i] = static_cast<float>(group.bound[i] * group.bound[i] / projected.energy);
  }
  GroupPlan plan;
  plan.clusters = paying_clusters({rows, hidden, nullptr, projected.z.data()}, options_,
                                  squared_bound, /*centroid_bits=*/4.0);
  if (plan.clusters.count == 0) return best;
  const std::vector<float> centroids = cluster_means(group.rows, plan.clusters);
  // The order of the residuals from the means themselves; the coded centroids change it little.
  plan.base = with_mean;
  plan.base.centroids = centroids;
  plan.order = channel_order(group, plan);
  for (std::int64_t k = 0; k < plan.clusters.count; ++k) {
    const auto decoded =
        code_base_row(base_coder, centroids.data() + k * hidden, plan.base.mean.data(),
                      plan.order.empty() ? nullptr : plan.order.data(), kCentroidError,
                      plan.base.records, plan.base.payloads);
    std::copy(decoded.begin(), decoded.end(), plan.base.centroids.begin() + k * hidden);
  }
  measure(plan, group, estimator, sample);
  if (plan.bits() < best.bits() && plan.bits() > kSampleTrust * best.bits()) {
    // A narrow gain may be the sample's luck.
    constexpr std::int64_t kMore = 256;
    measure(plan, group, estimator, kMore);
    measure(best, group, estimator, kMore);
  }
  return plan.bits() < best.bits() ? std::move(plan) : std::move(best);
}

template class GroupPlanner<float>;
template class GroupPlanner<kernels::Bfloat16>;

}  // namespace lshmoe
