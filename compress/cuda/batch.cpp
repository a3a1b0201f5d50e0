#include "lshmoe/compress/cuda/batch.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "lshmoe/compress/cuda/stream_phases.hpp"
#include "lshmoe/compress/row_coder.hpp"

namespace lshmoe::cuda {
namespace {
using launchers::CodedGroup;
using launchers::CodedRows;
using launchers::PlanGroup;
using launchers::PlanResult;
using launchers::PlanRows;

// Of LshCodec.
constexpr double kMeanError = 0.05, kCentroidError = 0.1, kCentroidBits = 4.0;
// Copies read whole words.
constexpr std::int64_t kReadAhead = 32;

std::uint64_t bucket_count(const CodecOptions& options) {
  std::uint64_t buckets = 1;
  for (std::int64_t h = 0; h < options.hashes(); ++h) {
    buckets *= static_cast<std::uint64_t>(2 * options.hash_dim());
  }
  return buckets;
}
int bits_below(std::uint64_t count) { return std::max<int>(1, std::bit_width(count - 1)); }

/// fp32 rows coded like those of a parcel, each alone, and what decodes.
struct BaseRows {
  CodedRows coded;
  at::Tensor squared, decoded;  // double [rows], float [rows, hidden]
};

class Planner {
 public:
  Planner(const CodecOptions& options, std::int64_t hidden, at::Device device, BatchPlan& plan)
      : options_(options),
        hidden_(hidden),
        device_(device),
        stream_(current_stream(device)),
        plan_(plan) {}

  template <class V>
  V* make(std::int64_t count) {
    plan_.kept.push_back(room<V>(count, device_));
    return as<V>(plan_.kept.back());
  }
  template <class V>
  V* zeros(std::int64_t count) {
    V* made = make<V>(count);
    plan_.kept.back().zero_();
    return made;
  }
  template <class V>
  V* place(const std::vector<V>& values) {
    plan_.kept.push_back(upload(values, device_));
    return as<V>(plan_.kept.back());
  }

  /// The groups as the kernels see them; nothing decided yet.
  void set_groups(const Groups& groups) {
    PlanRows& rows = plan_.rows;
    for (const CodedGroup& group : groups.of_rows) {
      PlanGroup one;
      one.first = group.first;
      one.rows = group.rows;
      one.chunk = rows.chunks;
      one.slot = rows.slots;
      // Two rows a centroid could never pay.
      one.most = static_cast<std::int32_t>(std::min(options_.max_clusters(), group.rows / 3));
      rows.chunks += (group.rows + launchers::kChunkRows - 1) / launchers::kChunkRows;
      rows.slots += one.most;
      rows.rows += group.rows;
      rows.largest = std::max(rows.largest, group.rows);
      most_ = std::max<std::int64_t>(most_, one.most);
      plan_.groups.push_back(one);
    }
    rows.group_count = static_cast<std::int64_t>(plan_.groups.size());
    rows.groups = place(plan_.groups);
    rows.columns = options_.projection();
    plan_.ids = at::zeros({rows.rows}, at::dtype(at::kInt).device(device_));
    rows.id = as<std::int32_t>(plan_.ids);
  }

  BaseRows code(const float* x, std::int64_t rows, double max_error) {
    BaseRows base;
    const RowLayout layout(hidden_, StepCode(), 0, sizeof(float));
    const auto record_bytes = static_cast<std::int64_t>(layout.record_bytes);
    CodedRows& coded = base.coded;
    coded.record_stride = record_bytes;
    coded.payload_stride = (4 * hidden_ + 31) / 16 * 16;
    coded.records = make<std::uint8_t>(rows * record_bytes + kReadAhead);
    coded.payloads = make<std::uint8_t>(rows * coded.payload_stride + kReadAhead);
    coded.payload_bytes = make<std::int64_t>(rows);
    coded.whole = make<std::uint8_t>(rows);
    coded.error = make<double>(rows);
    base.squared = room<double>(rows, device_);
    base.decoded = room<float>(rows * hidden_, device_);
    const launchers::RowsOf<float> from{x, nullptr, rows, rows, hidden_};
    CodedGroup all;
    all.rows = rows;
    all.records = coded.records;
    all.payloads = coded.payloads;
    all.end = coded.payloads + rows * coded.payload_stride;
    CodedGroup* group = place(std::vector<CodedGroup>{all});
    double* bound = make<double>(rows);
    launchers::squared_norms<float>(as<double>(base.squared), from, stream_);
    launchers::row_bounds(bound, group, 1, as<const double>(base.squared), nullptr, max_error,
                          /*by_group=*/false, hidden_, stream_);
    launchers::encode_rows<float>(coded, from, group, 1, as<const double>(base.squared), bound,
                                  nullptr, stream_);
    launchers::copy_whole(coded, x, rows, hidden_, stream_);
    plan_.kept.push_back(at::arange(rows, at::dtype(at::kLong).device(device_)));
    plan_.kept.back().mul_(coded.payload_stride);
    const auto* offset = as<const std::int64_t>(plan_.kept.back());
    plan_.kept.push_back(none_bad(launchers::kBadKinds, device_));
    launchers::decode_rows<float>(as<float>(base.decoded), nullptr, rows,
                                  as<std::int64_t>(plan_.kept.back()), group, 1, offset, rows,
                                  hidden_, stream_);
    plan_.kept.push_back(base.squared);
    plan_.kept.push_back(base.decoded);
    return base;
  }

  /// Rows by the keys in key_, below 2^bits: order_, sorted_.
  void sort(int bits) {
    const std::int64_t rows = plan_.rows.rows;
    launchers::sort_by_key(order_, sorted_, key_, rows, bits, as<void>(scratch_),
                           static_cast<std::size_t>(scratch_.nbytes()), stream_);
  }

  /// Clusters of the groups: ids, and the members of each slot among order().
  template <class T>
  void find_clusters(const launchers::RowsOf<T>& rows, const Projection& projection,
                     const float* mean, const double* mean_squared, const double* squared,
                     const double* bound) {
    PlanRows& plan = plan_.rows;
    const launchers::RowsOf<float> means{mean, nullptr, plan.group_count, plan.group_count,
                                         hidden_};
    mark_phase("project");
    const at::Tensor z = projection(rows, device_), center = projection(means, device_);
    plan_.kept.push_back(z);
    plan_.kept.push_back(center);
    plan.z = as<float>(z);
    plan.squared_bound = make<float>(plan.rows);
    plan.z_energy = make<float>(plan.rows);
    plan.plain_bits = make<float>(plan.rows);
    launchers::center_rows(plan, as<const float>(center), squared, bound, mean_squared,
                           make<double>(2 * plan.chunks), stream_);

    mark_phase("sort");
    key_ = make<std::uint64_t>(plan.rows);
    sorted_ = make<std::uint64_t>(plan.rows);
    order_ = make<std::int64_t>(plan.rows);
    begin_ = make<std::int64_t>(plan.slots);
    end_ = make<std::int64_t>(plan.slots);
    scratch_ =
        room<std::uint8_t>(static_cast<std::int64_t>(launchers::sort_scratch(plan.rows)), device_);
    plan_.kept.push_back(scratch_);
    const auto groups = static_cast<std::uint64_t>(plan.group_count);
    const std::uint64_t buckets = bucket_count(options_);
    launchers::group_keys(key_, plan, static_cast<int>(options_.hashes()),
                          static_cast<int>(options_.hash_dim()), stream_);
    sort(bits_below(groups * buckets));
    auto* by_bucket = make<std::int64_t>(plan.rows);
    std::swap(order_, by_bucket);
    const int size_bits = std::bit_width(static_cast<std::uint64_t>(plan.largest));
    launchers::bucket_sizes(key_, sorted_, plan, buckets, size_bits, stream_);
    sort(bits_below(groups << size_bits));
    launchers::largest_buckets(begin_, end_, order_, sorted_, plan, size_bits, stream_);

    auto* mean_z = make<float>(plan.slots * plan.columns);
    auto* half_norm = make<float>(plan.slots);
    mark_phase("nearest");
    launchers::z_means(mean_z, half_norm, by_bucket, begin_, end_, plan, stream_);
    int levels = 1;
    while (levels < launchers::kMostLevels && most_ >> levels >= 4) ++levels;
    auto* level_ids = make<std::int32_t>(levels * plan.rows);
    auto* part = make<double>(levels * plan.chunks);
    auto* distance = make<float>(plan.rows);
    for (int level = 0; level < levels; ++level) {
      launchers::nearest_of_group(level_ids + level * plan.rows, distance, plan, mean_z, half_norm,
                                  level, stream_);
      launchers::row_savings(part + level * plan.chunks, distance, plan, stream_);
    }
    launchers::choose_level(plan, part, level_ids, levels, kCentroidBits, hidden_,
                            options_.refine() == 0, by_bucket, begin_, end_, stream_);

    mark_phase("clusters");
    auto* number = make<std::int32_t>(plan.slots);
    auto* keep = make<std::uint8_t>(plan.slots);
    for (std::int64_t pass = 0; pass < options_.refine(); ++pass) {
      // Centroids that save less than they cost go; their rows look for another one.
      by_cluster();
      launchers::z_means(mean_z, half_norm, order_, begin_, end_, plan, stream_);
      launchers::paying_centroids(keep, mean_z, order_, begin_, end_, plan, kCentroidBits, stream_);
      launchers::drop_centroids(number, keep, begin_, end_, mean_z, half_norm, plan, stream_);
      launchers::nearest_of_group(plan.id, distance, plan, mean_z, half_norm, -1, stream_);
    }
    by_cluster();
    launchers::drop_centroids(number, nullptr, begin_, end_, nullptr, nullptr, plan, stream_);
  }

  [[nodiscard]] const std::int64_t* order() const { return order_; }
  [[nodiscard]] const std::int64_t* begin() const { return begin_; }
  [[nodiscard]] const std::int64_t* end() const { return end_; }
  [[nodiscard]] launchers::Stream stream() const { return stream_; }

 private:
  const CodecOptions& options_;
  std::int64_t hidden_, most_ = 0;
  at::Device device_;
  launchers::Stream stream_;
  BatchPlan& plan_;
  std::uint64_t *key_ = nullptr, *sorted_ = nullptr;
  std::int64_t *order_ = nullptr, *begin_ = nullptr, *end_ = nullptr;
  at::Tensor scratch_;

  void by_cluster() {
    const PlanRows& plan = plan_.rows;
    launchers::cluster_keys(key_, plan, most_, stream_);
    sort(bits_below(static_cast<std::uint64_t>(plan.group_count * (most_ + 1))));
    launchers::cluster_members(begin_, end_, sorted_, plan, most_, stream_);
  }
};

}  // namespace

std::int64_t BatchPlan::shared_bytes(const PlanResult& result) const {
  std::int64_t bytes = result.ordered != 0 ? order_bytes : 0;
  if (result.variant != launchers::kPlain) {
    bytes += record_bytes * (1 + result.count) + result.mean_payload + result.centroid_payloads;
  }
  return bytes;
}

bool can_plan(const CodecOptions& options, std::int64_t groups) {
  const double buckets = std::pow(2.0 * static_cast<double>(options.hash_dim()),
                                  static_cast<double>(options.hashes()));
  return buckets * static_cast<double>(std::max<std::int64_t>(1, groups)) < 0x1p62;
}

template <class T>
BatchPlan plan_batch(const launchers::RowsOf<T>& rows, const Groups& groups,
                     const CodecOptions& options, const Projection& projection,
                     std::optional<std::uint32_t> dither_key, const double* squared,
                     const double* cap, double* bound, at::Device device) {
  BatchPlan plan;
  const std::int64_t hidden = rows.hidden;
  Planner planner(options, hidden, device, plan);
  const launchers::Stream stream = planner.stream();
  planner.set_groups(groups);
  const std::int64_t count = plan.rows.group_count, slots = plan.rows.slots;
  const RowLayout layout(hidden, StepCode(), 0, sizeof(float));
  const bool by_group = options.error_reference() == "group";
  const bool has_order = layout.bands > 1;
  plan.record_bytes = static_cast<std::int64_t>(layout.record_bytes);
  const int class_bits = std::bit_width(static_cast<std::uint64_t>(layout.bands - 1));
  plan.order_bytes = has_order ? (hidden * class_bits + 7) / 8 : 0;

  mark_phase("means");
  auto* mean = planner.make<float>(count * hidden);
  launchers::group_means<T>(mean, planner.make<float>(plan.rows.chunks * hidden), plan.rows, rows,
                            stream);
  const BaseRows means = planner.code(mean, count, kMeanError);
  plan.means = means.coded;
  const auto* mean_squared = as<const double>(means.squared);
  const auto* decoded_mean = as<const float>(means.decoded);

  // The groups coded in each way, and behind them those whose centroids are not coded yet.
  constexpr std::int64_t kUncoded = launchers::kVariants;
  auto* bases = planner.make<float>((slots + count) * hidden);
  auto* ordered = planner.make<float>((slots + count) * hidden);
  auto* orders = planner.make<std::int32_t>(has_order ? launchers::kVariants * count * hidden : 0);
  auto* places = planner.make<std::int32_t>(has_order ? launchers::kVariants * count * hidden : 0);
  plan.place = has_order ? places : nullptr;
  std::vector<CodedGroup> list;
  for (std::int64_t variant = 0; variant <= kUncoded; ++variant) {
    for (std::int64_t g = 0; g < count; ++g) {
      const PlanGroup& own = plan.groups[static_cast<std::size_t>(g)];
      CodedGroup group;
      group.first = own.first;
      group.rows = own.rows;
      group.dithered = dither_key.has_value();
      group.dither_key = dither_key.value_or(0);
      if (has_order && variant != kUncoded) {
        group.order = orders + (variant * count + g) * hidden;
        group.place = places + (variant * count + g) * hidden;
      }
      const std::int64_t base = (own.slot + g) * hidden;
      if (variant == launchers::kMean) group.bases = decoded_mean + g * hidden;
      if (variant == launchers::kClusters) group.bases = ordered + base;
      if (variant == kUncoded) group.bases = bases + base;
      list.push_back(group);
    }
  }
  CodedGroup* variants = planner.place(list);
  for (int variant = 0; variant < launchers::kVariants; ++variant) {
    launchers::row_bounds(bound, variants + variant * count, count, squared, cap,
                          options.max_error(), by_group, hidden, stream);
  }
  auto* energy = planner.make<float>(count * hidden);
  const auto make_order = [&](launchers::Variant variant, std::int64_t from,
                              const std::int32_t* ids) {
    if (!has_order) return;
    mark_phase("channel order");
    launchers::channel_energy<T>(energy, rows, variants + from * count, count, bound, ids, stream);
    launchers::order_channels(orders + variant * count * hidden, places + variant * count * hidden,
                              energy, count, hidden, stream);
  };
  const auto order_of = [&](launchers::Variant variant) -> const std::int32_t* {
    return has_order ? orders + variant * count * hidden : nullptr;
  };
  auto* bits = planner.zeros<std::int64_t>(2 * launchers::kVariants * count * 2);
  std::int64_t* more_bits = bits + launchers::kVariants * count * 2;
  plan.results = room<PlanResult>(count, device);
  auto* results = as<PlanResult>(plan.results);
  const auto estimate = [&](launchers::Variant variant, bool again) {
    const bool clusters = variant == launchers::kClusters;
    mark_phase("estimate");
    launchers::estimate_groups<T>(
        (again ? more_bits : bits) + variant * count * 2, rows, again ? launchers::kEnergyRows : 0,
        variants + variant * count, count, bound, clusters ? plan.rows.id : nullptr,
        clusters ? nullptr : order_of(variant), again ? results : nullptr, variant, stream);
  };
  for (const auto variant : {launchers::kPlain, launchers::kMean}) {
    make_order(variant, variant, nullptr);
    estimate(variant, false);
  }

  if (slots > 0) {
    planner.find_clusters(rows, projection, mean, mean_squared, squared, bound);
    mark_phase("means");
    launchers::centroid_means<T>(bases, decoded_mean, rows, planner.order(), planner.begin(),
                                 planner.end(), plan.rows, stream);
    // The order of the residuals from the means themselves; the coded centroids change it little.
    make_order(launchers::kClusters, kUncoded, plan.rows.id);
    mark_phase("centroids");
    auto* residuals = planner.make<float>(slots * hidden);
    launchers::centroid_rows(residuals, bases, order_of(launchers::kClusters), plan.rows, hidden,
                             stream);
    const BaseRows centroids = planner.code(residuals, slots, kCentroidError);
    plan.centroids = centroids.coded;
    plan.natural = room<float>(slots * hidden, device);
    launchers::decoded_centroids(ordered, as<float>(plan.natural),
                                 as<const float>(centroids.decoded), decoded_mean,
                                 order_of(launchers::kClusters), plan.rows, hidden, stream);
    estimate(launchers::kClusters, false);
  }

  launchers::PlanCosts costs;
  costs.bits = bits;
  costs.mean_squared = mean_squared;
  costs.mean_payload = plan.means.payload_bytes;
  costs.centroid_payload = plan.centroids.payload_bytes;
  costs.record_bytes = plan.record_bytes;
  costs.order_bytes = plan.order_bytes;
  costs.has_order = has_order;
  costs.has_clusters = slots > 0;
  launchers::decide(results, costs, plan.rows, /*again=*/false, stream);
  if (slots > 0) {
    for (const auto variant : {launchers::kPlain, launchers::kMean, launchers::kClusters}) {
      estimate(variant, true);
    }
    costs.bits = more_bits;
    costs.sample = launchers::kEnergyRows;
    launchers::decide(results, costs, plan.rows, /*again=*/true, stream);
  }
  plan.coded = room<CodedGroup>(count, device);
  launchers::use_plans(as<CodedGroup>(plan.coded), variants, results, ordered, decoded_mean,
                       order_of(launchers::kMean), plan.rows, hidden, stream);
  return plan;
}

template BatchPlan plan_batch<float>(const launchers::RowsOf<float>&, const Groups&,
                                     const CodecOptions&, const Projection&,
                                     std::optional<std::uint32_t>, const double*, const double*,
                                     double*, at::Device);
template BatchPlan plan_batch<kernels::Bfloat16>(const launchers::RowsOf<kernels::Bfloat16>&,
                                                 const Groups&, const CodecOptions&,
                                                 const Projection&, std::optional<std::uint32_t>,
                                                 const double*, const double*, double*, at::Device);

}  // namespace lshmoe::cuda
