#include "lshmoe/moe/experts.hpp"

#include <ATen/record_function.h>

#include <numeric>
#include <optional>

#include "lshmoe/moe/check_sizes.hpp"
#include "lshmoe/moe/first_order.hpp"
#include "lshmoe/moe/layer_number.hpp"
#include "lshmoe/moe/random.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The feed-forward networks of all local experts as one autograd node: whole-tensor activations,
/// and blocks written in place, where plain autograd would slice, pad and concatenate.
class GroupedFfn : public torch::autograd::Function<GroupedFfn> {
 public:
  /// b1, b2: none for swiglu; w3: none but for swiglu. (Function takes no undefined tensors.)
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w1,
                            const std::optional<at::Tensor>& b1, const at::Tensor& w2,
                            const std::optional<at::Tensor>& b2,
                            const std::optional<at::Tensor>& w3,
                            std::vector<int64_t> rows_per_expert, int64_t activation,
                            int64_t gemm) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    FfnShape shape{std::move(rows_per_expert), static_cast<Activation>(activation),
                   static_cast<GroupedGemm>(gemm)};
    FfnActivations saved;
    at::Tensor y = ffn_forward(
        x,
        {w1, b1.value_or(at::Tensor()), w2, b2.value_or(at::Tensor()), w3.value_or(at::Tensor())},
        shape, saved);
    ctx->save_for_backward(
        {x, w1, w2, w3.value_or(at::Tensor()), saved.pre, saved.gate, saved.hidden});
    ctx->saved_data["rows_per_expert"] = std::move(shape.rows_per_expert);
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["gemm"] = gemm;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_order();
    const auto saved = ctx->get_saved_variables();
    const FfnShape shape{ctx->saved_data["rows_per_expert"].toIntVector(),
                         static_cast<Activation>(ctx->saved_data["activation"].toInt()),
                         static_cast<GroupedGemm>(ctx->saved_data["gemm"].toInt())};
    const FfnActivations activations{saved[0], saved[4], saved[5], saved[6]};
    FfnRowGradients gradients;
    const at::Tensor dx = ffn_backward_rows(grads[0], {saved[1], {}, saved[2], {}, saved[3]}, shape,
                                            activations, ctx->needs_input_grad(0), gradients);
    const FfnWeights d = ffn_backward_weights(activations, gradients, shape);
    return {dx, d.w1, d.b1, d.w2, d.b2, d.w3, {}, {}, {}};
  }
};

}  // namespace

void validate(const ExpertsOptions& o) {
  validate_layer_number(o.layer());
  LSHMOE_VALIDATE(o.hidden_size() >= 1, "hidden_size is ", o.hidden_size(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.ffn_hidden_size() >= 1, "ffn_hidden_size is ", o.ffn_hidden_size(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.num_local_experts() >= 1, "num_local_experts is ", o.num_local_experts(),
                  " (must be at least 1)");
  (void)activation_named(o.activation());
  (void)grouped_gemm_named(o.grouped_gemm());
}

ExpertsImpl::ExpertsImpl(ExpertsOptions experts_options)
    : options(numbered(std::move(experts_options))) {
  validate(options);
  const int64_t local = options.num_local_experts(), hidden = options.hidden_size(),
                ffn = options.ffn_hidden_size();
  const bool swiglu = activation_named(options.activation()) == Activation::swiglu;
  std::vector<at::Tensor> all_w1, all_b1, all_w2, all_b2, all_w3;
  for (int64_t e = 0; e < local; ++e) {
    at::Generator stream = make_stream({options.seed(), static_cast<uint64_t>(*options.layer()), 1,
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

FfnWeights ExpertsImpl::weights(at::ScalarType dtype) const {
  const int64_t local = options.num_local_experts(), hidden = options.hidden_size(),
                ffn = options.ffn_hidden_size();
  check_sizes("the experts' w1", w1, {local, ffn, hidden});
  check_sizes("the experts' w2", w2, {local, hidden, ffn});
  if (b1.defined()) check_sizes("the experts' b1", b1, {local, ffn});
  if (b2.defined()) check_sizes("the experts' b2", b2, {local, hidden});
  if (w3.defined()) check_sizes("the experts' w3", w3, {local, ffn, hidden});
  const auto cast = [&](const at::Tensor& parameter) {
    return parameter.defined() ? parameter.to(dtype) : at::Tensor();
  };
  return {cast(w1), cast(b1), cast(w2), cast(b2), cast(w3)};
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
  const FfnWeights cast = weights(rows.scalar_type());
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  };
  return GroupedFfn::apply(rows.contiguous(), cast.w1, optional(cast.b1), cast.w2,
                           optional(cast.b2), optional(cast.w3), rows_per_expert,
                           static_cast<int64_t>(activation_named(options.activation())),
                           static_cast<int64_t>(grouped_gemm_named(options.grouped_gemm())));
}

}  // namespace lshmoe
