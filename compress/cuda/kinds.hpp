#pragma once
// The codecs that make_codec chooses from, and what they share.

#include <memory>

#include "lshmoe/compress/codec.hpp"

namespace lshmoe::cuda {

/// Kinds none, bf16, fp8, int8, int4: coded by the GPU.
[[nodiscard]] std::shared_ptr<Codec> make_fixed_codec(const CodecOptions& options,
                                                      const CodecContext& context);

/// Kind lsh, up to hidden size kMaxCodedHidden. Encode with a state other than on the CPU does not
/// try a parcel that explains itself; groups that do explain themselves are planned by the GPU in
/// sums of its own order (kernels/cuda/plan.hpp), so that their bytes may differ from the CPU's,
/// not what they decode to. Parcels that explain themselves are decoded by the GPU once the host
/// has read their shared part. With a basis the products are cuBLAS's, in fp32: what is decoded may
/// differ from the CPU's by rounding, for which the bound has room. Through the CPU's codec
/// (StagedCodec) go restore=source, wider rows, and hashes whose keys of all groups do not fit 62
/// bits.
[[nodiscard]] std::shared_ptr<Codec> make_lsh_codec(const CodecOptions& options,
                                                    const CodecContext& context);

/// row_index[i], or i. Waits for the device; for error texts.
[[nodiscard]] std::int64_t row_number(const at::Tensor& row_index, std::int64_t i);

/// Copies to the host, codes there, copies back.
class StagedCodec : public Codec {
 public:
  StagedCodec(const CodecOptions& options, const CodecContext& context);

  using Codec::encode;
  [[nodiscard]] Encoded encode(const at::Tensor& x, const at::Tensor& row_index,
                               const std::vector<int64_t>& rows_per_group) const override;
  void decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                   const std::vector<int64_t>& bytes_per_group,
                   const std::vector<int64_t>& rows_per_group) const override;
  [[nodiscard]] Decoded decode(const at::Tensor& bytes,
                               const std::vector<int64_t>& bytes_per_group) const override;
  void observe(const at::Tensor& x, const at::Tensor& row_index) override;
  bool refresh(Communicator& comm) override { return cpu_->refresh(comm); }
  [[nodiscard]] StateStats state_stats() const override { return cpu_->state_stats(); }

 protected:
  [[nodiscard]] const Codec& cpu() const { return *cpu_; }

 private:
  std::shared_ptr<Codec> cpu_;
};

}  // namespace lshmoe::cuda
