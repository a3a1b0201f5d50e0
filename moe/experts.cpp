#include "lshmoe/moe/experts.hpp"

#include <ATen/record_function.h>

#include <numeric>
#include <optional>

#include "lshmoe/moe/first_order.hpp"
#include "lshmoe/moe/random.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum class Activation : int64_t { relu, gelu, swiglu };

Activation activation_named(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  LSHMOE_VALIDATE(name == "swiglu", "unknown activation '", name, "': use relu, gelu or swiglu");
  return Activation::swiglu;
}

/// Calls body(expert, first row, rows) for each expert that has rows.
template <class Body>
void for_each_block(const std::vector<int64_t>& rows_per_expert, Body body) {
  int64_t first = 0;
  for (std::size_t e = 0; e < rows_per_expert.size(); ++e) {
    if (rows_per_expert[e] > 0) body(static_cast<int64_t>(e), first, rows_per_expert[e]);
    first += rows_per_expert[e];
  }
}

/// out[block e] = in[block e] @ weight[e]^T (+ bias[e]); weight [E, m, n], in [rows, n].
at::Tensor grouped_linear(const at::Tensor& in, const at::Tensor& weight, const at::Tensor& bias,
                          const std::vector<int64_t>& rows_per_expert) {
  at::Tensor out = at::empty({in.size(0), weight.size(1)}, in.options());
  for_each_block(rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
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
at::Tensor grouped_linear_dx(const at::Tensor& grad, const at::Tensor& weight,
                             const std::vector<int64_t>& rows_per_expert) {
  at::Tensor out = at::empty({grad.size(0), weight.size(2)}, grad.options());
  for_each_block(rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.narrow(0, first, rows);
    at::mm_out(block, grad.narrow(0, first, rows), weight.select(0, e));
  });
  return out;
}

/// d weight[e] = grad[block e]^T @ in[block e]; zeros for an expert without rows.
at::Tensor grouped_linear_dw(const at::Tensor& grad, const at::Tensor& in,
                             const std::vector<int64_t>& rows_per_expert) {
  const auto experts = static_cast<int64_t>(rows_per_expert.size());
  at::Tensor out = at::zeros({experts, grad.size(1), in.size(1)}, grad.options());
  for_each_block(rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.select(0, e);
    at::mm_out(block, grad.narrow(0, first, rows).t(), in.narrow(0, first, rows));
  });
  return out;
}

/// d bias[e] = sum of grad[block e] over its rows.
at::Tensor grouped_linear_db(const at::Tensor& grad, const std::vector<int64_t>& rows_per_expert) {
  const auto experts = static_cast<int64_t>(rows_per_expert.size());
  at::Tensor out = at::zeros({experts, grad.size(1)}, grad.options());
  for_each_block(rows_per_expert, [&](int64_t e, int64_t first, int64_t rows) {
    at::Tensor block = out.select(0, e);
    at::sum_out(block, grad.narrow(0, first, rows), {0});
  });
  return out;
}

/// The feed-forward networks of all local experts as one autograd node: whole-tensor activations,
/// and blocks written in place, where plain autograd would slice, pad and concatenate.
class GroupedFfn : public torch::autograd::Function<GroupedFfn> {
 public:
  /// b1, b2: none for swiglu; w3: none but for swiglu. (Function takes no undefined tensors.)
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w1,
                            const std::optional<at::Tensor>& b1, const at::Tensor& w2,
                            const std::optional<at::Tensor>& b2,
                            const std::optional<at::Tensor>& w3,
                            std::vector<int64_t> rows_per_expert, int64_t activation) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor pre = grouped_linear(x, w1, b1.value_or(at::Tensor()), rows_per_expert);
    at::Tensor gate, hidden;
    switch (static_cast<Activation>(activation)) {
      case Activation::relu:
        hidden = at::relu(pre);
        break;
      case Activation::gelu:
        hidden = at::gelu(pre);
        break;
      case Activation::swiglu:
        gate = grouped_linear(x, *w3, {}, rows_per_expert);
        hidden = at::silu(pre).mul_(gate);
        break;
    }
    at::Tensor y = grouped_linear(hidden, w2, b2.value_or(at::Tensor()), rows_per_expert);
    ctx->save_for_backward({x, w1, w2, w3.value_or(at::Tensor()), pre, gate, hidden});
    ctx->saved_data["rows_per_expert"] = std::move(rows_per_expert);
    ctx->saved_data["activation"] = activation;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_order();
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w1 = saved[1], &w2 = saved[2], &w3 = saved[3], &pre = saved[4],
                     &gate = saved[5], &hidden = saved[6];
    const auto rows = ctx->saved_data["rows_per_expert"].toIntVector();
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    const at::Tensor gy = grads[0].contiguous();
    const bool biases = activation != Activation::swiglu;

    const at::Tensor dw2 = grouped_linear_dw(gy, hidden, rows);
    const at::Tensor db2 = biases ? grouped_linear_db(gy, rows) : at::Tensor();
    const at::Tensor dhidden = grouped_linear_dx(gy, w2, rows);
    at::Tensor dpre, dgate;
    switch (activation) {
      case Activation::relu:
        dpre = at::threshold_backward(dhidden, pre, 0);
        break;
      case Activation::gelu:
        dpre = at::gelu_backward(dhidden, pre);
        break;
      case Activation::swiglu:
        dgate = dhidden * at::silu(pre);
        dpre = at::silu_backward(dhidden * gate, pre);
        break;
    }
    const at::Tensor dw1 = grouped_linear_dw(dpre, x, rows);
    const at::Tensor db1 = biases ? grouped_linear_db(dpre, rows) : at::Tensor();
    at::Tensor dw3, dx;
    if (ctx->needs_input_grad(0)) dx = grouped_linear_dx(dpre, w1, rows);
    if (activation == Activation::swiglu) {
      dw3 = grouped_linear_dw(dgate, x, rows);
      if (dx.defined()) dx += grouped_linear_dx(dgate, w3, rows);
    }
    return {dx, dw1, db1, dw2, db2, dw3, {}, {}};
  }
};

}  // namespace

void validate(const ExpertsOptions& o) {
  LSHMOE_VALIDATE(o.hidden_size() >= 1, "hidden_size is ", o.hidden_size(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.ffn_hidden_size() >= 1, "ffn_hidden_size is ", o.ffn_hidden_size(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.num_local_experts() >= 1, "num_local_experts is ", o.num_local_experts(),
                  " (must be at least 1)");
  (void)activation_named(o.activation());
}

ExpertsImpl::ExpertsImpl(ExpertsOptions experts_options) : options(std::move(experts_options)) {
  validate(options);
  const int64_t local = options.num_local_experts(), hidden = options.hidden_size(),
                ffn = options.ffn_hidden_size();
  const bool swiglu = activation_named(options.activation()) == Activation::swiglu;
  std::vector<at::Tensor> all_w1, all_b1, all_w2, all_b2, all_w3;
  for (int64_t e = 0; e < local; ++e) {
    at::Generator stream = make_stream({options.seed(), static_cast<uint64_t>(options.layer()), 1,
                                        static_cast<uint64_t>(options.first_expert() + e)});
    all_w1.push_back(uniform_fan_in({ffn, hidden}, hidden, stream));
    all_w2.push_back(uniform_fan_in({hidden, ffn}, ffn, stream));
    if (swiglu) {
      all_w3.push_back(uniform_fan_in({ffn, hidden}, hidden, stream));
    } else {
      all_b1.push_back(uniform_fan_in({ffn}, hidden, stream));
      all_b2.push_back(uniform_fan_in({hidden}, ffn, stream));
    }
  }
  w1 = register_parameter("w1", at::stack(all_w1));
  if (!swiglu) b1 = register_parameter("b1", at::stack(all_b1));
  w2 = register_parameter("w2", at::stack(all_w2));
  if (!swiglu) b2 = register_parameter("b2", at::stack(all_b2));
  if (swiglu) w3 = register_parameter("w3", at::stack(all_w3));
}

at::Tensor ExpertsImpl::forward(const at::Tensor& rows,
                                const std::vector<int64_t>& rows_per_expert) {
  RECORD_FUNCTION("lshmoe::experts", std::vector<c10::IValue>{});
  LSHMOE_VALIDATE(static_cast<int64_t>(rows_per_expert.size()) == options.num_local_experts(),
                  "rows_per_expert has ", rows_per_expert.size(), " entries (there are ",
                  options.num_local_experts(), " local experts)");
  const int64_t sum = std::accumulate(rows_per_expert.begin(), rows_per_expert.end(), int64_t{0});
  LSHMOE_VALIDATE(rows.dim() == 2 && rows.size(0) == sum && rows.size(1) == options.hidden_size(),
                  "the experts' input is ", rows.sizes(), " (must be [", sum, ", ",
                  options.hidden_size(), "], the sum of rows_per_expert by hidden_size)");
  const auto cast = [&](const at::Tensor& parameter) { return parameter.to(rows.scalar_type()); };
  const auto cast_if = [&](const at::Tensor& parameter) {
    return parameter.defined() ? std::optional(cast(parameter)) : std::nullopt;
  };
  return GroupedFfn::apply(rows.contiguous(), cast(w1), cast_if(b1), cast(w2), cast_if(b2),
                           cast_if(w3), rows_per_expert,
                           static_cast<int64_t>(activation_named(options.activation())));
}

}  // namespace lshmoe
