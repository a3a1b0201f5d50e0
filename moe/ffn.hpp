#pragma once
// The feed-forward networks of one rank's experts, computed block by block; without autograd, so
// that input gradients and weight gradients can be taken at different times.

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

enum class Activation : int64_t { relu, gelu, swiglu };
/// Throws InvalidArgument for an unknown name.
[[nodiscard]] Activation activation_named(const std::string& name);

/// How the products of all experts are computed. loop: one GEMM an expert. grouped: torch's
/// _grouped_mm, one launch for all. automatic: grouped for bfloat16 on CUDA with sizes that it
/// takes (multiples of 8), else loop.
enum class GroupedGemm : int64_t { automatic, loop, grouped };
/// auto | loop | grouped; throws InvalidArgument for others.
[[nodiscard]] GroupedGemm grouped_gemm_named(const std::string& name);

/// Weights of the rows' dtype, as ExpertsImpl's parameters; undefined where there are none.
struct FfnWeights {
  at::Tensor w1, b1, w2, b2, w3;
};

/// Blocks of rows, one an expert, and how they are multiplied.
struct FfnShape {
  std::vector<int64_t> rows_per_expert;
  Activation activation = Activation::gelu;
  GroupedGemm gemm = GroupedGemm::automatic;
};

/// What the backward needs of a forward; all [rows, hidden or ffn].
struct FfnActivations {
  at::Tensor x, pre, gate, hidden;  ///< gate: swiglu only
};

/// Gradients of the two linear stages' outputs; all [rows, hidden or ffn].
struct FfnRowGradients {
  at::Tensor output, pre, gate;  ///< gate: swiglu only
};

/// x [rows, hidden] -> [rows, hidden]; fills `saved`. On the CPU, where every block has a multiple
/// of 4 rows, a row's result does not depend on the rows beside it (so MKL and oneDNN were measured
/// to do, with one thread); the same holds for ffn_backward_rows.
[[nodiscard]] at::Tensor ffn_forward(const at::Tensor& x, const FfnWeights& weights,
                                     const FfnShape& shape, FfnActivations& saved);

/// grad_output [rows, hidden] -> the rows' gradients, and that of x where `need_dx` (else
/// undefined).
[[nodiscard]] at::Tensor ffn_backward_rows(const at::Tensor& grad_output, const FfnWeights& weights,
                                           const FfnShape& shape, const FfnActivations& saved,
                                           bool need_dx, FfnRowGradients& gradients);

/// The weights' gradients; an expert without rows gets zeros.
[[nodiscard]] FfnWeights ffn_backward_weights(const FfnActivations& saved,
                                              const FfnRowGradients& gradients,
                                              const FfnShape& shape);

}  // namespace lshmoe
