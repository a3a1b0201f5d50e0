#pragma once
// How the rows of one group are coded in a parcel that explains itself: with a mean, clusters, a
// channel order, or none of them. What pays, by measuring a sample of the rows.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lshmoe/compress/clusters.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/compress/row_coder.hpp"
#include "lshmoe/compress/rows_view.hpp"
#include "lshmoe/kernels/packed_matrix.hpp"

namespace lshmoe {

/// Rows, their L2 norms, and what each may be off by.
template <class T>
struct BoundedRows {
  RowsView<T> rows;
  std::vector<double> norm, bound;  ///< [rows]
};

/// Rows that a parcel holds apart from its own: [mean] + centroids, coded like rows.
struct BaseRows {
  std::vector<float> mean;       ///< [hidden] decoded, natural order; empty: none
  std::vector<float> centroids;  ///< [K, hidden] decoded, natural order, mean included
  std::vector<std::uint8_t> mean_record, mean_payload;
  std::vector<std::uint8_t> records, payloads;
  [[nodiscard]] std::size_t bytes() const {
    return mean_record.size() + mean_payload.size() + records.size() + payloads.size();
  }
};

struct GroupPlan {
  Clusters clusters;
  BaseRows base;
  std::vector<std::int32_t> order;  ///< empty: the channels as they are
  /// Estimated, without steps, band indices and header: of the rows, and of what they share.
  double row_bits = 0, shared_bits = 0;
  [[nodiscard]] double bits() const { return row_bits + shared_bits; }

  /// [1 + K, hidden]: what a row without a cluster is taken from, then the centroids; natural
  /// order, and coding order.
  [[nodiscard]] std::vector<float> natural_bases(std::int64_t hidden) const;
  [[nodiscard]] std::vector<float> ordered_bases(std::int64_t hidden) const;
};

/// Plans for groups of rows of T (float or kernels::Bfloat16). Thread-compatible.
template <class T>
class GroupPlanner {
 public:
  /// Both must outlive it. projection [hidden, options.projection()].
  GroupPlanner(const CodecOptions& options, const kernels::PackedMatrix& projection)
      : options_(options), projection_(projection) {}

  /// The cheapest plan; without `clusters` only of those that have none.
  [[nodiscard]] GroupPlan choose(const BoundedRows<T>& group, const StepCode& steps,
                                 bool clusters) const;

  /// [hidden] of the rows; may have left the range of fp32.
  [[nodiscard]] std::vector<float> mean_of(const RowsView<T>& rows) const;
  struct Projected {
    std::vector<float> z;  ///< [rows, projection] less the mean's, scaled by a power of two to ~1
    double energy = 0;     ///< |x - mean|^2 is about that times |z|^2. 0: nothing to cluster
  };
  [[nodiscard]] Projected project(const BoundedRows<T>& group,
                                  const std::vector<float>& mean) const;

 private:
  const CodecOptions& options_;
  const kernels::PackedMatrix& projection_;

  [[nodiscard]] std::vector<std::int32_t> channel_order(const BoundedRows<T>& group,
                                                        const GroupPlan& plan) const;
  void measure(GroupPlan& plan, const BoundedRows<T>& group, RowCoder<T>& estimator,
               std::int64_t sample) const;
};

extern template class GroupPlanner<float>;
extern template class GroupPlanner<kernels::Bfloat16>;

}  // namespace lshmoe
