#include "lshmoe/moe/ffn.hpp"

#include <numeric>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// Calls body(expert, first row, rows) for each expert that has rows.
template <class Body>
void for_each_block(const std::vector<int64_t>& rows_per_expert, Body body) {
  int64_t first = 0;
  for (std::size_t e = 0; e < rows_per_expert.size(); ++e) {
    if (rows_per_expert[e] > 0) body(static_cast<int64_t>(e), first, rows_per_expert[e]);
    first += rows_per_expert[e];
  }
}

/// Whether the products of blocks with `columns` and weights with `outputs` go through _grouped_mm.
bool grouped(const FfnShape& shape, const at::Tensor& rows, int64_t columns, int64_t outputs) {
  if (shape.gemm == GroupedGemm::loop || rows.size(0) == 0) return false;
  if (shape.gemm == GroupedGemm::grouped) return true;
  // It wants bfloat16, and rows that start at multiples of 16 bytes.
  return rows.is_cuda() && rows.scalar_type() == at::kBFloat16 && columns % 8 == 0 &&
         outputs % 8 == 0;
}

/// int32 [experts] on the rows' device: where each expert's block ends.
at::Tensor block_ends(const std::vector<int64_t>& rows_per_expert, const at::Tensor& rows) {
  std::vector<int32_t> ends;
  int64_t end = 0;
  for (const int64_t count : rows_per_expert) {
    end += count;
    LSHMOE_VALIDATE(end <= std::numeric_limits<int32_t>::max(), "the experts get ", end,
                    " rows (grouped GEMM counts to 2^31 - 1): use fewer tokens a step");
    ends.push_back(static_cast<int32_t>(end));
  }
  const at::Tensor host = at::tensor(ends, at::kInt);
  if (rows.is_cpu()) return host;
  // From pinned memory, so that the host does not wait for what is queued.
  return host.pin_memory().to(rows.device(), /*non_blocking=*/true);
}

/// Uninitialized [rows, columns]. On the CPU each row starts at a whole vector: torch's elementwise
/// loops then treat a row the same way wherever it stands (an end that fills no vector takes
/// another code path, which rounds otherwise).
at::Tensor empty_rows(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  constexpr int64_t kVector = 64;  // elements that such a loop takes at once, at most
  if (!options.device().is_cpu()) return at::empty({rows, columns}, options);
  return at::empty({rows, (columns + kVector - 1) / kVector * kVector}, options)
      .narrow(1, 0, columns);
}

/// out[block e] = in[block e] @ weight[e]^T (+ bias[e]); weight [E, m, n], in [rows, n].
at::Tensor linear(const at::Tensor& in, const at::Tensor& weight, const at::Tensor& bias,
                  const FfnShape& shape) {
  if (grouped(shape, in, weight.size(2), weight.size(1))) {
    at::Tensor out =
        at::_grouped_mm(in, weight.transpose(1, 2), block_ends(shape.rows_per_expert, in));
    if (bias.defined()) {
      for_each_block(shape.rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
        out.narrow(0, first, rows).add_(bias.select(0, e));
      });
    }
    return out;
  }
  at::Tensor out = empty_rows(in.size(0), weight.size(1), in.options());
  for_each_block(shape.rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.narrow(0, first, rows);
    const at::Tensor w = weight.select(0, e).t();
    if (bias.defined()) {
      at::addmm_out(block, bias.select(0, e), in.narrow(0, first, rows), w);
    } else {
      at::mm_out(block, in.narrow(0, first, rows), w);
    }
  });
  return out;
}

/// d in[block e] = grad[block e] @ weight[e].
at::Tensor linear_dx(const at::Tensor& grad, const at::Tensor& weight, const FfnShape& shape) {
  if (grouped(shape, grad, weight.size(1), weight.size(2))) {
    return at::_grouped_mm(grad, weight, block_ends(shape.rows_per_expert, grad));
  }
  at::Tensor out = empty_rows(grad.size(0), weight.size(2), grad.options());
  for_each_block(shape.rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.narrow(0, first, rows);
    at::mm_out(block, grad.narrow(0, first, rows), weight.select(0, e));
  });
  return out;
}

/// d weight[e] = grad[block e]^T @ in[block e]; zeros for an expert without rows.
at::Tensor linear_dw(const at::Tensor& grad, const at::Tensor& in, const FfnShape& shape) {
  const auto experts = static_cast<int64_t>(shape.rows_per_expert.size());
  if (grouped(shape, grad, grad.size(1), in.size(1))) {
    at::Tensor out = at::_grouped_mm(grad.t(), in, block_ends(shape.rows_per_expert, grad));
    for (int64_t e = 0; e < experts; ++e)
      if (shape.rows_per_expert[static_cast<std::size_t>(e)] == 0) out.select(0, e).zero_();
    return out;
  }
  at::Tensor out = at::zeros({experts, grad.size(1), in.size(1)}, grad.options());
  for_each_block(shape.rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.select(0, e);
    at::mm_out(block, grad.narrow(0, first, rows).t(), in.narrow(0, first, rows));
  });
  return out;
}

/// d bias[e] = sum of grad[block e] over its rows.
at::Tensor linear_db(const at::Tensor& grad, const FfnShape& shape) {
  const auto experts = static_cast<int64_t>(shape.rows_per_expert.size());
  at::Tensor out = at::zeros({experts, grad.size(1)}, grad.options());
  for_each_block(shape.rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.select(0, e);
    at::sum_out(block, grad.narrow(0, first, rows), {0});
  });
  return out;
}

}  // namespace

Activation activation_named(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  LSHMOE_VALIDATE(name == "swiglu", "unknown activation '", name, "': use relu, gelu or swiglu");
  return Activation::swiglu;
}

GroupedGemm grouped_gemm_named(const std::string& name) {
  if (name == "auto") return GroupedGemm::automatic;
  if (name == "loop") return GroupedGemm::loop;
  LSHMOE_VALIDATE(name == "grouped", "unknown grouped_gemm '", name,
                  "': use auto, loop or grouped");
  return GroupedGemm::grouped;
}

at::Tensor ffn_forward(const at::Tensor& x, const FfnWeights& weights, const FfnShape& shape,
                       FfnActivations& saved) {
  saved.x = x;
  saved.pre = linear(x, weights.w1, weights.b1, shape);
  switch (shape.activation) {
    case Activation::relu:
      saved.hidden = at::relu(saved.pre);
      break;
    case Activation::gelu:
      saved.hidden = at::gelu(saved.pre);
      break;
    case Activation::swiglu:
      saved.gate = linear(x, weights.w3, {}, shape);
      saved.hidden = at::silu(saved.pre).mul_(saved.gate);
      break;
  }
  return linear(saved.hidden, weights.w2, weights.b2, shape).contiguous();
}

at::Tensor ffn_backward_rows(const at::Tensor& grad_output, const FfnWeights& weights,
                             const FfnShape& shape, const FfnActivations& saved, bool need_dx,
                             FfnRowGradients& gradients) {
  gradients.output = grad_output.contiguous();
  const at::Tensor dhidden = linear_dx(gradients.output, weights.w2, shape);
  switch (shape.activation) {
    case Activation::relu:
      gradients.pre = at::threshold_backward(dhidden, saved.pre, 0);
      break;
    case Activation::gelu:
      gradients.pre = at::gelu_backward(dhidden, saved.pre);
      break;
    case Activation::swiglu:
      gradients.gate = dhidden * at::silu(saved.pre);
      gradients.pre = at::silu_backward(dhidden * saved.gate, saved.pre);
      break;
  }
  if (!need_dx) return {};
  at::Tensor dx = linear_dx(gradients.pre, weights.w1, shape);
  if (shape.activation == Activation::swiglu) dx += linear_dx(gradients.gate, weights.w3, shape);
  return dx.contiguous();
}

FfnWeights ffn_backward_weights(const FfnActivations& saved, const FfnRowGradients& gradients,
                                const FfnShape& shape) {
  FfnWeights d;
  d.w2 = linear_dw(gradients.output, saved.hidden, shape);
  d.w1 = linear_dw(gradients.pre, saved.x, shape);
  if (shape.activation == Activation::swiglu) {
    d.w3 = linear_dw(gradients.gate, saved.x, shape);
  } else {
    d.b2 = linear_db(gradients.output, shape);
    d.b1 = linear_db(gradients.pre, shape);
  }
  return d;
}

}  // namespace lshmoe
