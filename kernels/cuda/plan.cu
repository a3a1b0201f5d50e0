#include "lshmoe/kernels/cuda/plan.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"
#include "lshmoe/kernels/cuda/lsh.hpp"

#include "lshmoe/kernels/cuda/plan.cuh"

namespace lshmoe::kernels::cuda {
namespace {
constexpr int kWarpsEach = kBlock / 32;
constexpr int kSortThreads = 512;
// What a grid may have in its second direction.
constexpr std::int64_t kMostGroups = 65535;

std::int64_t parts_of(std::int64_t columns) { return (columns + kBlock - 1) / kBlock; }
dim3 grid_of_groups(std::int64_t units, std::int64_t groups) {
  dim3 grid = grid_for(units, 1);
  grid.y = static_cast<unsigned>(std::min(groups, kMostGroups));
  return grid;
}
}  // namespace

template <class T>
void group_means(float* mean, float* sums, const PlanRows& plan, const RowsOf<T>& rows,
                 Stream stream) {
  const std::int64_t parts = parts_of(rows.hidden);
  launch("chunk_sums", chunk_sums_kernel<T, kBlock>, grid_for(plan.chunks * parts, 1), kBlock, 0,
         stream, sums, plan, rows);
  launch("fold_means", fold_means_kernel<kBlock>, grid_for(plan.group_count * parts, 1), kBlock, 0,
         stream, mean, sums, plan, rows.hidden);
}

template <class T>
void channel_energy(float* energy, const RowsOf<T>& rows, const CodedGroup* groups,
                    std::int64_t group_count, const double* bound, const std::int32_t* id,
                    Stream stream) {
  launch("channel_energy", channel_energy_kernel<T, kBlock>,
         grid_for(group_count * parts_of(rows.hidden), 1), kBlock, 0, stream, energy, rows, groups,
         group_count, bound, id);
}

void order_channels(std::int32_t* order, std::int32_t* place, const float* energy,
                    std::int64_t group_count, std::int64_t hidden, Stream stream) {
  std::int64_t padded = 1;
  while (padded < hidden) padded *= 2;
  launch("order_channels", order_channels_kernel<kSortThreads>, grid_for(group_count, 1),
         kSortThreads, static_cast<std::size_t>(8 * padded), stream, order, place, energy,
         group_count, hidden, padded);
}

std::int64_t sampled_rows(std::int64_t rows, std::int64_t sample) {
  const std::int64_t stride = sample_stride(rows, sample);
  return (rows + stride - 1) / stride;
}

template <class T>
void estimate_groups(std::int64_t* bits, const RowsOf<T>& rows, std::int64_t sample,
                     const CodedGroup* groups, std::int64_t group_count, const double* bound,
                     const std::int32_t* id, const std::int32_t* count_order,
                     const PlanResult* results, Variant variant, Stream stream) {
  // Twice the sample is the most that a group gives.
  const std::int64_t most = std::min(rows.rows, 2 * (sample > 0 ? sample : 64));
  with_lanes(rows.hidden, [&](auto threads) {
    using Row = BlockRow<T, threads()>;
    launch("estimate_groups", estimate_groups_kernel<T, threads()>,
           grid_of_groups(most, group_count), threads(), Row::shared_bytes(rows.hidden), stream,
           bits, rows, sample, groups, group_count, bound, id, count_order, results, variant);
  });
}

void center_rows(const PlanRows& plan, const float* center, const double* squared,
                 const double* bound, const double* mean_squared, double* part, Stream stream) {
  launch("center_rows", center_rows_kernel<kBlock>, grid_for(plan.chunks, kWarpsEach), kBlock, 0,
         stream, plan, center, squared, part);
  launch("scale_groups", scale_groups_kernel<kBlock>, grid_for(plan.group_count, kBlock), kBlock, 0,
         stream, plan, static_cast<const double*>(part), mean_squared);
  launch("scale_rows", scale_rows_kernel<kBlock>, grid_for(plan.rows, kWarpsEach), kBlock, 0,
         stream, plan, bound);
}

void group_keys(std::uint64_t* key, const PlanRows& plan, int hashes, int m, Stream stream) {
  std::uint64_t buckets = 1;
  for (int h = 0; h < hashes; ++h) buckets *= static_cast<std::uint64_t>(2 * m);
  launch("group_keys", group_keys_kernel<kBlock>, grid_for(plan.rows, kBlock), kBlock, 0, stream,
         key, plan, hashes, m, buckets);
}

void bucket_sizes(std::uint64_t* by_size, const std::uint64_t* sorted, const PlanRows& plan,
                  std::uint64_t buckets, int size_bits, Stream stream) {
  launch("bucket_sizes", bucket_sizes_kernel<kBlock>, grid_for(plan.rows, kBlock), kBlock, 0,
         stream, by_size, sorted, plan, buckets, size_bits);
}

void largest_buckets(std::int64_t* begin, std::int64_t* end, const std::int64_t* bucket,
                     const std::uint64_t* by_size, const PlanRows& plan, int size_bits,
                     Stream stream) {
  launch("largest_buckets", largest_buckets_kernel<kBlock>, grid_for(plan.slots, kBlock), kBlock, 0,
         stream, begin, end, bucket, by_size, plan, size_bits);
}

void z_means(float* mean, float* half_norm, const std::int64_t* order, const std::int64_t* begin,
             const std::int64_t* end, const PlanRows& plan, Stream stream) {
  launch("z_means", z_means_kernel<kBlock>, grid_for(plan.slots, 1), kBlock, 0, stream, mean, order,
         begin, end, plan);
  half_norms(half_norm, mean, plan.slots, plan.columns, stream);
}

void nearest_of_group(std::int32_t* id, float* distance, const PlanRows& plan,
                      const float* centroids, const float* half_norm, int level, Stream stream) {
  const std::int64_t tiles = (plan.largest + NearestTiles::kRows - 1) / NearestTiles::kRows;
  launch("nearest_of_group", nearest_of_group_kernel<kBlock>,
         grid_of_groups(tiles, plan.group_count), kBlock, 0, stream, id, distance, plan, centroids,
         half_norm, level);
}

void row_savings(double* part, const float* distance, const PlanRows& plan, Stream stream) {
  launch("row_savings", row_savings_kernel<kBlock>, grid_for(plan.chunks, kWarpsEach), kBlock, 0,
         stream, part, distance, plan);
}

void choose_level(const PlanRows& plan, const double* part, const std::int32_t* level_ids,
                  int levels, double centroid_bits, std::int64_t hidden, bool as_buckets,
                  const std::int64_t* order, const std::int64_t* begin, const std::int64_t* end,
                  Stream stream) {
  launch("choose_level", choose_level_kernel<kBlock>, grid_for(plan.group_count, kBlock), kBlock, 0,
         stream, plan, part, levels, centroid_bits, 8.0 / static_cast<double>(hidden));
  if (as_buckets) {
    launch("bucket_ids", bucket_ids_kernel<kBlock>, grid_for(plan.slots, 1), kBlock, 0, stream,
           plan, order, begin, end);
  } else {
    launch("level_ids", level_ids_kernel<kBlock>, grid_for(plan.rows, kBlock), kBlock, 0, stream,
           plan, level_ids);
  }
}

void cluster_keys(std::uint64_t* key, const PlanRows& plan, std::int64_t most, Stream stream) {
  launch("cluster_keys", cluster_keys_kernel<kBlock>, grid_for(plan.rows, kBlock), kBlock, 0,
         stream, key, plan, most);
}
void cluster_members(std::int64_t* begin, std::int64_t* end, const std::uint64_t* sorted,
                     const PlanRows& plan, std::int64_t most, Stream stream) {
  launch("cluster_members", cluster_members_kernel<kBlock>, grid_for(plan.slots, kBlock), kBlock, 0,
         stream, begin, end, sorted, plan, most);
}

void paying_centroids(std::uint8_t* keep, const float* mean, const std::int64_t* order,
                      const std::int64_t* begin, const std::int64_t* end, const PlanRows& plan,
                      double centroid_bits, Stream stream) {
  launch("paying_centroids", paying_centroids_kernel<kBlock>, grid_for(plan.slots, kWarpsEach),
         kBlock, 0, stream, keep, mean, order, begin, end, plan, centroid_bits);
}

void drop_centroids(std::int32_t* number, const std::uint8_t* keep, std::int64_t* begin,
                    std::int64_t* end, float* mean, float* half_norm, const PlanRows& plan,
                    Stream stream) {
  launch("drop_centroids", drop_centroids_kernel<kBlock>, grid_for(plan.group_count, 1), kBlock, 0,
         stream, number, keep, begin, end, mean, half_norm, plan);
  launch("renumber", renumber_kernel<kBlock>, grid_for(plan.rows, kBlock), kBlock, 0, stream, plan,
         static_cast<const std::int32_t*>(number));
}

template <class T>
void centroid_means(float* bases, const float* mean, const RowsOf<T>& rows,
                    const std::int64_t* order, const std::int64_t* begin, const std::int64_t* end,
                    const PlanRows& plan, Stream stream) {
  launch("centroid_means", centroid_means_kernel<T, kBlock>,
         grid_for((plan.slots + plan.group_count) * parts_of(rows.hidden), 1), kBlock, 0, stream,
         bases, mean, rows, order, begin, end, plan);
}
void centroid_rows(float* coded, const float* bases, const std::int32_t* order,
                   const PlanRows& plan, std::int64_t hidden, Stream stream) {
  launch("centroid_rows", centroid_rows_kernel<kBlock>, grid_for(plan.slots, 1), kBlock, 0, stream,
         coded, bases, order, plan, hidden);
}
void decoded_centroids(float* ordered, float* natural, const float* decoded, const float* mean,
                       const std::int32_t* order, const PlanRows& plan, std::int64_t hidden,
                       Stream stream) {
  launch("decoded_centroids", decoded_centroids_kernel<kBlock>,
         grid_for(plan.slots + plan.group_count, 1), kBlock, 0, stream, ordered, natural, decoded,
         mean, order, plan, hidden);
}

void copy_whole(const CodedRows& coded, const float* x, std::int64_t rows, std::int64_t hidden,
                Stream stream) {
  launch("copy_whole", copy_whole_kernel<kBlock>, grid_for(rows, 1), kBlock, 0, stream, coded, x,
         rows, hidden);
}

void decide(PlanResult* results, const PlanCosts& costs, const PlanRows& plan, bool again,
            Stream stream) {
  launch("decide", decide_kernel<kBlock>, grid_for(plan.group_count, kBlock), kBlock, 0, stream,
         results, costs, plan, again);
}
void use_plans(CodedGroup* coded, const CodedGroup* variants, const PlanResult* results,
               float* ordered, const float* mean, const std::int32_t* mean_order,
               const PlanRows& plan, std::int64_t hidden, Stream stream) {
  launch("use_plans", use_plans_kernel<kBlock>, grid_for(plan.group_count, 1), kBlock, 0, stream,
         coded, variants, results, ordered, mean, mean_order, plan, hidden);
}

void write_shared(std::uint8_t* out, const SharedPlace* places, std::int64_t count,
                  const PlanResult* results, const PlanRows& plan, const CodedRows& means,
                  const CodedRows& centroids, const std::int32_t* place, std::int64_t record_bytes,
                  std::int64_t hidden, Stream stream) {
  launch("write_shared", write_shared_kernel<kBlock>, grid_for(count, 1), kBlock, 0, stream, out,
         places, count, results, plan, means, centroids, place, record_bytes, hidden);
}

void assignments(std::int64_t* out, const std::int32_t* id, const PlanRows& plan,
                 const std::int64_t* centroids_before, Stream stream) {
  launch("assignments", assignments_kernel<kBlock>, grid_for(plan.rows, kBlock), kBlock, 0, stream,
         out, id, plan, centroids_before);
}

#define LSHMOE_INSTANTIATE(T)                                                                   \
  template void group_means<T>(float*, float*, const PlanRows&, const RowsOf<T>&, Stream);      \
  template void channel_energy<T>(float*, const RowsOf<T>&, const CodedGroup*, std::int64_t,    \
                                  const double*, const std::int32_t*, Stream);                  \
  template void estimate_groups<T>(std::int64_t*, const RowsOf<T>&, std::int64_t,               \
                                   const CodedGroup*, std::int64_t, const double*,              \
                                   const std::int32_t*, const std::int32_t*, const PlanResult*, \
                                   Variant, Stream);                                            \
  template void centroid_means<T>(float*, const float*, const RowsOf<T>&, const std::int64_t*,  \
                                  const std::int64_t*, const std::int64_t*, const PlanRows&,    \
                                  Stream);
LSHMOE_INSTANTIATE(float)
LSHMOE_INSTANTIATE(Bfloat16)
#undef LSHMOE_INSTANTIATE

}  // namespace lshmoe::kernels::cuda
