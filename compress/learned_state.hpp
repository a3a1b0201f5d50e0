#pragma once
// State of a codec that both ends know: codebook, channel order, basis. codec.md calls it learned.

#include <torch/torch.h>

#include <cstdint>
#include <span>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/kernels/packed_matrix.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Equal on all ranks of an expert group, and fixed once made.
struct LearnedState {
  std::uint32_t version = 0;  ///< from 1 on; 0: none
  std::int64_t hidden = 0;
  std::int64_t centroids = 0;
  /// [1 + centroids, hidden]: what a row is taken from: the mean for rows without a centroid.
  std::vector<float> bases;
  std::vector<std::uint8_t> parcel;  ///< the bases as they travel
  std::vector<std::int32_t> order;   ///< [hidden] channels by falling energy; empty: as they are
  at::Tensor basis;  ///< [hidden, hidden] bfloat16, row j the j-th direction; undefined: none
  // Derived: the bases in coding order, and in the projection, for the sender's search.
  std::vector<float> ordered_bases;  ///< [1 + centroids, hidden]
  std::vector<float> mean_z;         ///< [projection]
  std::vector<float> centroids_z;    ///< [centroids, projection], less mean_z
  // And with a basis, which is not exactly orthonormal: residual = coefficients to_residual,
  // coefficients = residual to_coefficients.
  kernels::PackedMatrix to_residual, to_coefficients;
  double stretch = 1.0;  ///< |residual| <= stretch |coefficients|

  [[nodiscard]] std::int64_t memory_bytes() const;
  /// Of everything above but the version's number.
  [[nodiscard]] std::uint32_t checksum() const;
};

/// Fits a state to sample rows [n, hidden] float32, n >= 1: centroids from LSH buckets and two
/// nearest-centroid updates (options.codebook_size at most, eight rows each at least), the channel
/// order of the residuals and, with transform=basis and at least 4 x hidden rows, the eigenvectors
/// of their second moment. Residuals count in units of their row's norm; by_group: in
/// one unit for all rows. Local; deterministic, for any number of threads.
[[nodiscard]] LearnedState fit_state(const at::Tensor& rows, const CodecOptions& options,
                                     bool by_group, std::span<const float> projection,
                                     std::uint32_t version);

/// The state as bytes, and back. from_bytes trusts nothing: throws InvalidArgument for anything
/// that to_bytes did not write for this hidden size, before it takes memory for more than the bytes
/// can hold.
[[nodiscard]] std::vector<std::uint8_t> to_bytes(const LearnedState& state);
[[nodiscard]] LearnedState state_from_bytes(std::span<const std::uint8_t> bytes,
                                            std::int64_t hidden, const CodecOptions& options,
                                            std::span<const float> projection);
/// Bytes that no state of these options is larger than.
[[nodiscard]] std::size_t most_state_bytes(std::int64_t hidden, const CodecOptions& options);

}  // namespace lshmoe
