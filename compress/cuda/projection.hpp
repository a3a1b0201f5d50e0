#pragma once
// Rows of a GPU times the projection of their codec.

#include <memory>
#include <mutex>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/kernels/cuda/lsh.hpp"
#include "lshmoe/kernels/cuda/row_coder.hpp"

namespace lshmoe::cuda {

namespace launchers = kernels::cuda;

/// Thread-safe. Makes the matrix and a cuBLAS handle when first needed.
class Projection {
 public:
  Projection(const CodecOptions& options, const CodecContext& context)
      : options_(options), context_(context) {}

  [[nodiscard]] std::int64_t columns() const { return options_.projection(); }
  /// float [rows, columns], on the current stream. T: float or kernels::Bfloat16.
  template <class T>
  [[nodiscard]] at::Tensor operator()(const launchers::RowsOf<T>& rows, at::Device device) const;
  /// out [rows, columns] = x [rows, inner] matrix [inner, columns], fp32 without TF32 whatever
  /// torch is set to.
  void multiply(const at::Tensor& out, const at::Tensor& x, const at::Tensor& matrix,
                std::int64_t rows, std::int64_t inner, std::int64_t columns) const;

 private:
  CodecOptions options_;
  CodecContext context_;
  mutable std::mutex mutex_;
  mutable at::Tensor matrix_;
  mutable std::unique_ptr<launchers::Product> product_;
};

extern template at::Tensor Projection::operator()<float>(const launchers::RowsOf<float>&,
                                                         at::Device) const;
extern template at::Tensor Projection::operator()<kernels::Bfloat16>(
    const launchers::RowsOf<kernels::Bfloat16>&, at::Device) const;

}  // namespace lshmoe::cuda
