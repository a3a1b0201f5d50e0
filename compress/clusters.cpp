#include "lshmoe/compress/clusters.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "lshmoe/kernels/lsh.hpp"

namespace lshmoe {
namespace {

struct Buckets {
  std::int64_t count = 0;
  std::vector<std::int64_t> order;    // [n] rows by bucket, in row order within one
  std::vector<std::int64_t> offsets;  // [count + 1]
  std::vector<std::int64_t> by_size;  // [count] largest first, equal ones by key
  [[nodiscard]] std::int64_t size(std::int64_t bucket) const {
    return offsets[static_cast<std::size_t>(bucket) + 1] -
           offsets[static_cast<std::size_t>(bucket)];
  }
};

Buckets make_buckets(const ClusterInput& input, const CodecOptions& options) {
  const auto n = static_cast<std::size_t>(input.rows);
  std::vector<std::uint64_t> keys(n);
  kernels::bucket_keys(keys.data(), input.z, input.rows, options.projection(),
                       static_cast<int>(options.hashes()), static_cast<int>(options.hash_dim()));
  Buckets buckets;
  buckets.order.resize(n);
  buckets.offsets.resize(n + 1);
  buckets.count =
      kernels::group_by_key(buckets.order.data(), buckets.offsets.data(), keys.data(), input.rows);
  buckets.offsets.resize(static_cast<std::size_t>(buckets.count) + 1);
  buckets.by_size.resize(static_cast<std::size_t>(buckets.count));
  std::iota(buckets.by_size.begin(), buckets.by_size.end(), std::int64_t{0});
  std::stable_sort(
      buckets.by_size.begin(), buckets.by_size.end(),
      [&](std::int64_t a, std::int64_t b) { return buckets.size(a) > buckets.size(b); });
  return buckets;
}

// Means of `count` clusters of the rows; those at -1 belong to none.
template <class T>
std::vector<float> means(const RowsView<T>& rows, const std::vector<std::int64_t>& assignment,
                         std::int64_t count) {
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(count) + 1, 0);
  for (const std::int64_t cluster : assignment) {
    if (cluster >= 0) ++offsets[static_cast<std::size_t>(cluster) + 1];
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);
  std::vector<std::int64_t> order(static_cast<std::size_t>(offsets.back()));
  for (std::size_t i = 0; i < assignment.size(); ++i) {
    if (assignment[i] < 0) continue;
    order[static_cast<std::size_t>(next[static_cast<std::size_t>(assignment[i])]++)] =
        rows.number(static_cast<std::int64_t>(i));
  }
  std::vector<float> mean(static_cast<std::size_t>(count * rows.hidden));
  kernels::segment_mean(mean.data(), rows.data, order.data(), offsets.data(), count, rows.hidden);
  return mean;
}
std::vector<float> means(const float* x, const std::vector<std::int64_t>& assignment,
                         std::int64_t count, std::int64_t columns) {
  return means(
      RowsView<float>{x, nullptr, 0, static_cast<std::int64_t>(assignment.size()), columns},
      assignment, count);
}

// The buckets by_size[0 .. count) as they are; the other rows in none.
std::vector<std::int64_t> assign_to_buckets(const Buckets& buckets, std::int64_t count) {
  std::vector<std::int64_t> assignment(buckets.order.size(), -1);
  for (std::int64_t k = 0; k < count; ++k) {
    const auto bucket = static_cast<std::size_t>(buckets.by_size[static_cast<std::size_t>(k)]);
    for (std::int64_t i = buckets.offsets[bucket]; i < buckets.offsets[bucket + 1]; ++i) {
      assignment[static_cast<std::size_t>(buckets.order[static_cast<std::size_t>(i)])] = k;
    }
  }
  return assignment;
}

// Numbers the clusters that `keep` names 0, 1, ... in their order; rows of the others get -1.
std::int64_t renumber(std::vector<std::int64_t>& assignment, const std::vector<bool>& keep) {
  std::vector<std::int64_t> number(keep.size(), -1);
  std::int64_t count = 0;
  for (std::size_t k = 0; k < keep.size(); ++k) {
    if (keep[k]) number[k] = count++;
  }
  for (std::int64_t& cluster : assignment) {
    if (cluster >= 0) cluster = number[static_cast<std::size_t>(cluster)];
  }
  return count;
}

std::int64_t drop_empty(std::vector<std::int64_t>& assignment, std::int64_t count) {
  std::vector<bool> used(static_cast<std::size_t>(count), false);
  for (const std::int64_t cluster : assignment) {
    if (cluster >= 0) used[static_cast<std::size_t>(cluster)] = true;
  }
  return renumber(assignment, used);
}

void set_centroids(const ClusterInput& input, Clusters& clusters) {
  if (input.x == nullptr) return;
  clusters.centroids = means(input.x, clusters.assignment, clusters.count, input.hidden);
}

// Bits per element of a row whose residual has `ratio` times the squared bound: fitted to coded
// rows of several layers (4.2 at ratio 100 with row-shaped residuals).
double expected_bits(double ratio) { return 0.5 * std::log2(1 + 2.3 * ratio); }

}  // namespace

template <class T>
std::vector<float> cluster_means(const RowsView<T>& rows, const Clusters& clusters) {
  return means(rows, clusters.assignment, clusters.count);
}
template std::vector<float> cluster_means(const RowsView<float>&, const Clusters&);
template std::vector<float> cluster_means(const RowsView<kernels::Bfloat16>&, const Clusters&);

Clusters bucket_clusters(const ClusterInput& input, const CodecOptions& options) {
  Clusters clusters;
  if (input.rows == 0) return clusters;
  const Buckets buckets = make_buckets(input, options);
  clusters.count = options.refine() == 0
                       ? buckets.count
                       : std::min(buckets.count, std::max<std::int64_t>(options.max_clusters(), 1));
  clusters.assignment = assign_to_buckets(buckets, clusters.count);
  std::vector<float> scratch;
  for (std::int64_t pass = 0; pass < options.refine(); ++pass) {
    const auto centroids =
        means(input.z, clusters.assignment, clusters.count, options.projection());
    scratch = std::vector<float>(
        static_cast<std::size_t>(kernels::nearest_scratch(clusters.count, options.projection())));
    kernels::nearest_centroid(clusters.assignment.data(), nullptr, scratch.data(), input.z,
                              centroids.data(), input.rows, clusters.count, options.projection(),
                              /*or_none=*/false);
    clusters.count = drop_empty(clusters.assignment, clusters.count);
  }
  set_centroids(input, clusters);
  return clusters;
}

std::vector<Probe> split_off_probes(const ClusterInput& input, const CodecOptions& options,
                                    Clusters& clusters) {
  std::vector<std::int64_t> followers;  // rows behind the first of their cluster
  std::vector<bool> met(static_cast<std::size_t>(clusters.count), false);
  for (std::int64_t i = 0; i < input.rows; ++i) {
    const auto cluster = static_cast<std::size_t>(clusters.assignment[static_cast<std::size_t>(i)]);
    if (met[cluster]) followers.push_back(i);
    met[cluster] = true;
  }
  const auto count = static_cast<std::int64_t>(followers.size());
  const std::int64_t most = std::min(options.alpha_probes(), count / 4);
  std::vector<Probe> probes;
  for (std::int64_t p = 0; p < most; ++p) {
    const std::int64_t row = followers[static_cast<std::size_t>((2 * p + 1) * count / (2 * most))];
    std::int64_t& cluster = clusters.assignment[static_cast<std::size_t>(row)];
    probes.push_back({row, std::exchange(cluster, clusters.count++)});
  }
  if (!probes.empty()) set_centroids(input, clusters);
  return probes;
}

Clusters paying_clusters(const ClusterInput& input, const CodecOptions& options,
                         const std::vector<float>& squared_bound, double centroid_bits) {
  Clusters none;
  none.assignment.assign(static_cast<std::size_t>(input.rows), -1);
  // Two rows a centroid could never pay.
  const std::int64_t most = std::min(options.max_clusters(), input.rows / 3);
  if (most < 1) return none;
  const std::int64_t projection = options.projection();
  const auto n = static_cast<std::size_t>(input.rows);
  const Buckets buckets = make_buckets(input, options);

  // Bits per element without clusters, row by row.
  std::vector<float> plain(n);
  for (std::size_t i = 0; i < n; ++i) {
    double energy = 0;
    for (std::int64_t j = 0; j < projection; ++j) {
      const double value = input.z[static_cast<std::int64_t>(i) * projection + j];
      energy += value * value;
    }
    const double bits = squared_bound[i] > 0 ? expected_bits(energy / squared_bound[i]) : 0;
    plain[i] = static_cast<float>(std::isfinite(bits) ? bits : 0);
  }
  const auto saving = [&](std::size_t row, float distance) {
    if (!(squared_bound[row] > 0)) return 0.0;
    const double bits = expected_bits(static_cast<double>(distance) / squared_bound[row]);
    return std::isfinite(bits) ? plain[row] - bits : 0.0;
  };
  const double id_bits = 8.0 / static_cast<double>(input.hidden);

  // Seeds: means of the largest buckets. Fewer and fewer of them, while that pays better.
  const std::int64_t seeds = std::min(most, buckets.count);
  const auto seed_means = means(input.z, assign_to_buckets(buckets, seeds), seeds, projection);
  std::vector<float> scratch(static_cast<std::size_t>(kernels::nearest_scratch(seeds, projection)));
  std::vector<std::int64_t> assignment(n), best_assignment;
  std::vector<float> distance(n);
  double best_gain = 0;
  std::int64_t best = 0;
  for (std::int64_t count = seeds; count >= std::min<std::int64_t>(seeds, 4); count /= 2) {
    kernels::nearest_centroid(assignment.data(), distance.data(), scratch.data(), input.z,
                              seed_means.data(), input.rows, count, projection, /*or_none=*/true);
    double gain = -static_cast<double>(count) * centroid_bits - static_cast<double>(n) * id_bits;
    for (std::size_t i = 0; i < n; ++i) gain += saving(i, distance[i]);
    if (gain > best_gain) {
      best_gain = gain;
      best = count;
      best_assignment = assignment;
    } else if (best > 0) {
      break;
    }
    if (count == 1) break;
  }
  if (best == 0) return none;

  Clusters clusters;
  clusters.count = best;
  clusters.assignment =
      options.refine() == 0 ? assign_to_buckets(buckets, best) : std::move(best_assignment);
  // The pass above was the first one.
  for (std::int64_t pass = 1; pass < options.refine() + 1; ++pass) {
    // Centroids that save less than they cost go; their rows look for another one.
    const auto centroids = means(input.z, clusters.assignment, clusters.count, projection);
    std::vector<double> saved(static_cast<std::size_t>(clusters.count), -centroid_bits);
    std::vector<float> to_own(n);
    for (std::size_t i = 0; i < n; ++i) {
      const std::int64_t cluster = clusters.assignment[i];
      if (cluster < 0) continue;
      float sum = 0;
      for (std::int64_t j = 0; j < projection; ++j) {
        const float difference = input.z[static_cast<std::int64_t>(i) * projection + j] -
                                 centroids[static_cast<std::size_t>(cluster * projection + j)];
        sum += difference * difference;
      }
      saved[static_cast<std::size_t>(cluster)] += saving(i, sum);
    }
    std::vector<bool> keep(saved.size());
    std::transform(saved.begin(), saved.end(), keep.begin(), [](double s) { return s > 0; });
    std::vector<float> kept;
    for (std::size_t k = 0; k < keep.size(); ++k) {
      if (!keep[k]) continue;
      const auto* row = centroids.data() + k * static_cast<std::size_t>(projection);
      kept.insert(kept.end(), row, row + projection);
    }
    clusters.count = renumber(clusters.assignment, keep);
    if (clusters.count == 0) return none;
    kernels::nearest_centroid(clusters.assignment.data(), distance.data(), scratch.data(), input.z,
                              kept.data(), input.rows, clusters.count, projection,
                              /*or_none=*/true);
  }
  clusters.count = drop_empty(clusters.assignment, clusters.count);
  if (clusters.count == 0) return none;
  set_centroids(input, clusters);
  return clusters;
}

}  // namespace lshmoe
