#pragma once
// Clusters of one group of rows: LSH buckets, moved to their nearest centroids, as many as pay.

#include <cstdint>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/compress/rows_view.hpp"

namespace lshmoe {

/// Clusters of n rows. Centroids are the fp32 means of their members, which are summed in row
/// order.
struct Clusters {
  std::int64_t count = 0;
  std::vector<std::int64_t> assignment;  ///< [n] 0 .. count-1, or -1
  std::vector<float> centroids;          ///< [count, hidden]; empty where the input had no x
};

/// One group, and what the search for clusters reads of it.
struct ClusterInput {
  std::int64_t rows = 0;
  std::int64_t hidden = 0;
  const float* x = nullptr;  ///< [rows, hidden]; null: cluster_means makes the centroids
  const float* z = nullptr;  ///< [rows, projection], centered, scaled to about 1
};

/// [count, hidden]: the centroids of clusters of these rows.
template <class T>
[[nodiscard]] std::vector<float> cluster_means(const RowsView<T>& rows, const Clusters& clusters);

/// All LSH buckets (refine = 0), or the max_clusters largest moved to nearest centroids: every row
/// has a cluster. For restore=source.
[[nodiscard]] Clusters bucket_clusters(const ClusterInput& input, const CodecOptions& options);

/// Takes rows out of their clusters to stand alone, as clusters behind the others: spread evenly
/// over the rows that are not the first of their cluster, alpha_probes at most and no more than a
/// quarter of them. Every cluster keeps a row. Centroids are the means again. Returns the rows in
/// order, each with the cluster it left.
std::vector<Probe> split_off_probes(const ClusterInput& input, const CodecOptions& options,
                                    Clusters& clusters);

/// As many clusters as pay, or none. squared_bound [rows]: the rows' bounds, squared, in units of
/// |z|^2 (the energy of a row in Z standing for all of it). centroid_bits, per element: what a
/// centroid costs. Rows may stay without a cluster.
[[nodiscard]] Clusters paying_clusters(const ClusterInput& input, const CodecOptions& options,
                                       const std::vector<float>& squared_bound,
                                       double centroid_bits);

}  // namespace lshmoe
