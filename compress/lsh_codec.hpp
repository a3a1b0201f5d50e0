#pragma once
// kind lsh: clusters by cross-polytope hashing, residuals within a hard bound. codec.md, steps 1-8.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

// Flags of a parcel of kind lsh_expert.
inline constexpr std::uint8_t kAllWhole = 1;  // the body is the rows as they are
inline constexpr std::uint8_t kHasMean = 2;   // the shared part has the group's mean
inline constexpr std::uint8_t kHasOrder = 4;  // ... the channel order
inline constexpr std::uint8_t kGroupStep =
    8;  // ... one step (reference group); rows have fractions of it
inline constexpr std::uint8_t kBasis = 16;   // coefficients in the learned state's basis
inline constexpr std::uint8_t kDither = 32;  // the shared part has the key of a dither

/// True where all rows travel as they are.
[[nodiscard]] bool sends_whole(const CodecOptions& options, const CodecContext& context);

struct LearnedState;
/// The states that a codec of state=learned codes against, and that it still decodes; null: none.
struct LearnedStates {
  std::shared_ptr<const LearnedState> current, previous;
};
/// What the rows of a parcel that explains itself are coded against.
struct SharedPart {
  std::vector<std::int32_t> order;  ///< [hidden] channel of each place; empty: as they are
  std::vector<float> bases;         ///< [1 + centroids, hidden] in that order
};
/// What the codec of GPU rows asks the CPU's, beside what every codec does.
class LshInternals {
 public:
  virtual ~LshInternals() = default;
  [[nodiscard]] virtual LearnedStates learned_states() const = 0;
  /// Trusts nothing: throws InvalidArgument.
  [[nodiscard]] virtual SharedPart shared_part(const ParcelHeader& header,
                                               std::span<const std::uint8_t> shared) const = 0;
};

/// For kind lsh, both kinds of restore. Local.
[[nodiscard]] std::shared_ptr<Codec> make_lsh_codec(const CodecOptions& options,
                                                    const CodecContext& context);

/// R [hidden_size, projection] of one layer, row-major: a function of (seed, layer) and the sizes
/// alone, the same bits on every rank and machine.
[[nodiscard]] std::vector<float> projection_matrix(const CodecOptions& options,
                                                   std::int64_t hidden_size, std::int64_t layer);

}  // namespace lshmoe
