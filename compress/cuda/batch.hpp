#pragma once
// How groups are coded whose parcels explain themselves: planned by the GPU
// (kernels/cuda/plan.hpp).

#include <cstdint>
#include <optional>
#include <vector>

#include "lshmoe/compress/cuda/projection.hpp"
#include "lshmoe/compress/cuda/support.hpp"
#include "lshmoe/kernels/cuda/plan.hpp"

namespace lshmoe::cuda {

/// The plans of the groups of one encode call. Its pointers are of its tensors.
struct BatchPlan {
  launchers::PlanRows rows;
  at::Tensor coded;    ///< CodedGroup [groups]
  at::Tensor ids;      ///< int32 [rows]
  at::Tensor results;  ///< PlanResult [groups]
  at::Tensor natural;  ///< float [slots, hidden] decoded centroids
  launchers::CodedRows means, centroids;
  const std::int32_t* place = nullptr;  ///< [variants, groups, hidden]; null: one band
  std::int64_t record_bytes = 0;        ///< of a mean, and of a centroid
  std::int64_t order_bytes = 0;
  std::vector<launchers::PlanGroup> groups;  ///< what the host knows of them
  std::vector<at::Tensor> kept;

  /// Bytes of the shared part behind its steps.
  [[nodiscard]] std::int64_t shared_bytes(const launchers::PlanResult& result) const;
};

/// False where the keys of all groups do not fit 64 bits: such options are for the CPU.
[[nodiscard]] bool can_plan(const CodecOptions& options, std::int64_t groups);

/// Queues the planning on the current stream. rows: of the stream, group after group; squared
/// [rows]: of squared_norms; cap [1]: of find_norm_cap; bound [rows] is written. T: float or
/// kernels::Bfloat16.
template <class T>
[[nodiscard]] BatchPlan plan_batch(const launchers::RowsOf<T>& rows, const Groups& groups,
                                   const CodecOptions& options, const Projection& projection,
                                   std::optional<std::uint32_t> dither_key, const double* squared,
                                   const double* cap, double* bound, at::Device device);

extern template BatchPlan plan_batch<float>(const launchers::RowsOf<float>&, const Groups&,
                                            const CodecOptions&, const Projection&,
                                            std::optional<std::uint32_t>, const double*,
                                            const double*, double*, at::Device);
extern template BatchPlan plan_batch<kernels::Bfloat16>(const launchers::RowsOf<kernels::Bfloat16>&,
                                                        const Groups&, const CodecOptions&,
                                                        const Projection&,
                                                        std::optional<std::uint32_t>, const double*,
                                                        const double*, double*, at::Device);

}  // namespace lshmoe::cuda
