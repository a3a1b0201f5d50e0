#pragma once
// How the groups of a call are coded that explain themselves: means, channel orders, clusters and
// what pays, as LshCodec::choose_plan and compress/clusters.cpp decide it. Launchers (stream.hpp).
//
// Everything is decided in device memory; sums have a fixed order (chunks of kChunkRows rows),
// which is not the CPU's: plans may differ where two cost nearly the same.

#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/cuda/row_coder.hpp"

namespace lshmoe::kernels::cuda {

inline constexpr std::int64_t kChunkRows = 64;
/// Rows of a group that a channel's energy is summed over: this, up to twice as many.
inline constexpr std::int64_t kEnergyRows = 256;
/// Counts of seeds that are tried: all of them, half of them, ... four.
inline constexpr int kMostLevels = 16;
/// Ways to code a group: rows as they are, less their mean, less their centroids.
enum Variant : int { kPlain, kMean, kClusters, kVariants };

/// A group of rows of the stream. In device memory; what is above the line the caller sets.
struct PlanGroup {
  std::int64_t first = 0, rows = 0;
  std::int64_t chunk = 0;  ///< the first of its chunks; all groups' are numbered through
  std::int64_t slot = 0;   ///< the first of its centroids; all groups' are numbered through
  std::int32_t most = 0;   ///< centroids at most
  // ----
  std::int32_t seeds = 0;   ///< buckets that may become centroids
  std::int32_t count = 0;   ///< centroids kept
  std::int32_t level = -1;  ///< of the seeds chosen; -1: none
  float scale = 0;          ///< of z: a power of two
  double energy_per_z = 0;  ///< |x - mean|^2 is about that times |z|^2; 0: nothing to cluster
};

/// What was decided. Downloaded by the caller.
struct PlanResult {
  std::int32_t variant = kPlain;
  std::int32_t ordered = 0;  ///< coded in a channel order
  std::int32_t count = 0;    ///< centroids
  std::int32_t again = 0;    ///< while deciding: measured with more rows
  std::int64_t mean_payload = 0, centroid_payloads = 0;  ///< bytes
};

/// Work of all rows: what the launchers below read and write. Arrays in device memory.
struct PlanRows {
  PlanGroup* groups = nullptr;  ///< [group_count]
  std::int64_t group_count = 0, chunks = 0, slots = 0, rows = 0;
  std::int64_t largest = 0;        ///< rows of the largest group
  std::int64_t columns = 0;        ///< of z
  float* z = nullptr;              ///< [rows, columns]
  float* squared_bound = nullptr;  ///< [rows] in units of |z|^2
  float* z_energy = nullptr;       ///< [rows] |z|^2
  float* plain_bits = nullptr;     ///< [rows] bits an element without a centroid
  std::int32_t* id = nullptr;      ///< [rows] 0: none, else the centroid's number + 1
};

/// sums [chunks, hidden]: fp32 sums of the chunks' rows; mean [groups, hidden] from them.
template <class T>
void group_means(float* mean, float* sums, const PlanRows& plan, const RowsOf<T>& rows,
                 Stream stream);

/// energy [groups, hidden] of the residuals of some rows, in units of the rows' bounds. groups:
/// where residuals are taken from, bases in the channels' own order; ids null: base 0.
template <class T>
void channel_energy(float* energy, const RowsOf<T>& rows, const CodedGroup* groups,
                    std::int64_t group_count, const double* bound, const std::int32_t* id,
                    Stream stream);
/// order, place [groups, hidden]: channels by falling energy, ascending within a band; its inverse.
void order_channels(std::int32_t* order, std::int32_t* place, const float* energy,
                    std::int64_t group_count, std::int64_t hidden, Stream stream);

/// bits [groups, 2] += as estimate_rows, for `sample` rows of each group (0: an eighth of them, 16
/// to 64); with count_order [groups, hidden] rows are taken in the channels' own order (null: in
/// the group's). results: only groups to be measured again, whose best variant, or kClusters, this
/// is; null: all.
template <class T>
void estimate_groups(std::int64_t* bits, const RowsOf<T>& rows, std::int64_t sample,
                     const CodedGroup* groups, std::int64_t group_count, const double* bound,
                     const std::int32_t* id, const std::int32_t* count_order,
                     const PlanResult* results, Variant variant, Stream stream);
/// Rows that estimate_groups takes of a group.
[[nodiscard]] std::int64_t sampled_rows(std::int64_t rows, std::int64_t sample);

/// z less center [groups, columns], scaled to about 1; bounds in its units; bits without centroids.
/// squared [rows], bound [rows] of the rows; mean_squared [groups]; part [2 * chunks] scratch.
void center_rows(const PlanRows& plan, const float* center, const double* squared,
                 const double* bound, const double* mean_squared, double* part, Stream stream);

/// key [rows]: the rows' buckets (lsh.hpp), group by group; below group_count * (2 m)^hashes.
void group_keys(std::uint64_t* key, const PlanRows& plan, int hashes, int m, Stream stream);
/// by_size [rows] from keys sorted: the buckets of each group fall in size, in key order where they
/// are equal; behind them rows that begin no bucket. size_bits: the largest group fits.
void bucket_sizes(std::uint64_t* by_size, const std::uint64_t* sorted, const PlanRows& plan,
                  std::uint64_t buckets, int size_bits, Stream stream);
/// begin, end [slots]: the members of the largest buckets among rows sorted by key. bucket [rows]:
/// the places of by_size, sorted.
void largest_buckets(std::int64_t* begin, std::int64_t* end, const std::int64_t* bucket,
                     const std::uint64_t* by_size, const PlanRows& plan, int size_bits,
                     Stream stream);
/// mean [slots, columns] of the members order[begin .. end) of each slot, in z; half_norm [slots].
void z_means(float* mean, float* half_norm, const std::int64_t* order, const std::int64_t* begin,
             const std::int64_t* end, const PlanRows& plan, Stream stream);

/// id, distance [rows]: nearest of the group's first `seeds >> level` centroids (level -1: of its
/// first `count`), or none; |z - c|^2.
void nearest_of_group(std::int32_t* id, float* distance, const PlanRows& plan,
                      const float* centroids, const float* half_norm, int level, Stream stream);
/// part [chunks]: bits an element that the rows save at these distances.
void row_savings(double* part, const float* distance, const PlanRows& plan, Stream stream);
/// The level that saves most, from part [levels, chunks]: sets level and count, and the rows' ids
/// from level_ids [levels, rows]; with `as_buckets` from the buckets themselves.
void choose_level(const PlanRows& plan, const double* part, const std::int32_t* level_ids,
                  int levels, double centroid_bits, std::int64_t hidden, bool as_buckets,
                  const std::int64_t* order, const std::int64_t* begin, const std::int64_t* end,
                  Stream stream);

/// key [rows]: rows by group and centroid.
void cluster_keys(std::uint64_t* key, const PlanRows& plan, std::int64_t most, Stream stream);
/// begin, end [slots]: the members of each centroid among rows sorted so.
void cluster_members(std::int64_t* begin, std::int64_t* end, const std::uint64_t* sorted,
                     const PlanRows& plan, std::int64_t most, Stream stream);
/// keep [slots]: centroids whose members save more than centroid_bits (mean: z_means of them).
void paying_centroids(std::uint8_t* keep, const float* mean, const std::int64_t* order,
                      const std::int64_t* begin, const std::int64_t* end, const PlanRows& plan,
                      double centroid_bits, Stream stream);
/// Leaves out centroids: those that keep does not name (null: those without members), moving
/// begin, end, mean and half_norm (null: not those) of the others up; ids follow, those of the
/// others become 0. number [slots] scratch.
void drop_centroids(std::int32_t* number, const std::uint8_t* keep, std::int64_t* begin,
                    std::int64_t* end, float* mean, float* half_norm, const PlanRows& plan,
                    Stream stream);

/// bases [slots + groups, hidden], group g from row slot + g on: mean [groups, hidden], then the
/// centroids: fp32 means of the members in x, zeros behind the last.
template <class T>
void centroid_means(float* bases, const float* mean, const RowsOf<T>& rows,
                    const std::int64_t* order, const std::int64_t* begin, const std::int64_t* end,
                    const PlanRows& plan, Stream stream);
/// coded [slots, hidden]: centroids less the mean, in coding order (null: as they are).
void centroid_rows(float* coded, const float* bases, const std::int32_t* order,
                   const PlanRows& plan, std::int64_t hidden, Stream stream);
/// The other way round: ordered [slots + groups, hidden] and natural [slots, hidden] from decoded.
void decoded_centroids(float* ordered, float* natural, const float* decoded, const float* mean,
                       const std::int32_t* order, const PlanRows& plan, std::int64_t hidden,
                       Stream stream);

/// Payloads of rows that travel whole: the rows themselves, as RowCoder leaves them. x [rows,
/// hidden].
void copy_whole(const CodedRows& coded, const float* x, std::int64_t rows, std::int64_t hidden,
                Stream stream);

/// All that decide reads. Variants' arrays one behind the other.
struct PlanCosts {
  const std::int64_t* bits = nullptr;              ///< [variants, groups, 2] of estimate_groups
  const double* mean_squared = nullptr;            ///< [groups]
  const std::int64_t* mean_payload = nullptr;      ///< [groups]
  const std::int64_t* centroid_payload = nullptr;  ///< [slots]
  std::int64_t record_bytes = 0;                   ///< of a mean, and of a centroid
  std::int64_t order_bytes = 0;
  std::int64_t sample = 0;  ///< of estimate_groups
  bool has_order = false, has_clusters = false;
};
/// results [groups]. With costs of few rows first, then (again) with costs of more.
void decide(PlanResult* results, const PlanCosts& costs, const PlanRows& plan, bool again,
            Stream stream);
/// coded [groups] from variants [variants, groups]; ids of groups without centroids become 0.
/// mean [groups, hidden] decoded; ordered: the bases of all variants, row slot + g of group g.
void use_plans(CodedGroup* coded, const CodedGroup* variants, const PlanResult* results,
               float* ordered, const float* mean, const std::int32_t* mean_order,
               const PlanRows& plan, std::int64_t hidden, Stream stream);

/// What the shared part of a parcel holds behind its steps. In device memory.
struct SharedPlace {
  std::int64_t group = 0;
  std::int64_t begin = 0;  ///< in the bytes of all parcels
};
/// Writes channel order, mean and centroids. means, centroids: as coded; orders [variants, groups,
/// hidden] of places.
void write_shared(std::uint8_t* out, const SharedPlace* places, std::int64_t count,
                  const PlanResult* results, const PlanRows& plan, const CodedRows& means,
                  const CodedRows& centroids, const std::int32_t* place, std::int64_t record_bytes,
                  std::int64_t hidden, Stream stream);

/// out [rows]: id - 1 + centroids_before [groups] of the row's group, -1 without an id or where
/// that is -1.
void assignments(std::int64_t* out, const std::int32_t* id, const PlanRows& plan,
                 const std::int64_t* centroids_before, Stream stream);

}  // namespace lshmoe::kernels::cuda
