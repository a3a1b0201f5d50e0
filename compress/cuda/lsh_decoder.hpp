#pragma once
// Parcels of kind lsh into rows of a GPU.

#include "lshmoe/compress/cuda/lsh_state.hpp"
#include "lshmoe/compress/cuda/projection.hpp"
#include "lshmoe/compress/cuda/support.hpp"
#include "lshmoe/compress/lsh_codec.hpp"
#include "lshmoe/compress/row_coder.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

/// T: float or kernels::Bfloat16, the rows' own type.
template <class T>
class LshDecoder {
 public:
  /// cpu, states and projection must outlive it.
  LshDecoder(const CodecContext& context, const LshInternals& cpu, const DeviceStates& states,
             const Projection& projection)
      : context_(context), cpu_(cpu), states_(states), projection_(projection) {}

  /// Whether the GPU decodes these; what it does not know the CPU decodes, or refuses.
  [[nodiscard]] bool decodes(const Opened& opened) const;
  /// What the headers say of rows against the parcels' sizes. Throws InvalidArgument.
  void check_sizes(const Opened& opened) const;
  /// Into out[index]. Waits for the device, for the checks. Throws InvalidArgument.
  void decode(at::Tensor& out, const RowIndex& index, const Opened& opened) const;

 private:
  CodecContext context_;
  const LshInternals& cpu_;
  const DeviceStates& states_;
  const Projection& projection_;

  [[nodiscard]] RowLayout layout_of(const ParcelHeader& header) const;
  [[nodiscard]] DeviceState explained(const Opened::One& one, std::span<const std::uint8_t> shared,
                                      at::Device device) const;
};

extern template class LshDecoder<float>;
extern template class LshDecoder<kernels::Bfloat16>;

}  // namespace lshmoe::cuda
