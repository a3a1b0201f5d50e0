// Backward of dispatch, combine and swap_rows. Undefined gradients count as zeros: every rank
// enters every exchange.

#include "lshmoe/moe/first_order.hpp"
#include "lshmoe/moe/ops/common.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/ops/registration.hpp"

namespace lshmoe::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Whether autograd will record a call with these inputs.
bool records(std::initializer_list<const at::Tensor*> inputs) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor* input : inputs)
    if (input->requires_grad()) return true;
  return false;
}

at::Tensor or_zeros(const at::Tensor& grad, at::IntArrayRef sizes, at::ScalarType dtype,
                    at::Device device) {
  return grad.defined() ? grad : at::zeros(sizes, at::dtype(dtype).device(device));
}

class DispatchFunction : public torch::autograd::Function<DispatchFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const at::Tensor& topk_weights, const at::Tensor& topk_ids,
                               const ExchangePtr& exchange) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [rows, row_weights, tokens_per_expert, plan] =
        dispatch(x, topk_weights, topk_ids, exchange);
    variable_list integers = plan;
    integers.push_back(tokens_per_expert);
    ctx->mark_non_differentiable(integers);
    ctx->set_materialize_grads(false);
    ctx->saved_data["plan"] = plan;
    ctx->saved_data["top_k"] = topk_ids.size(1);
    ctx->saved_data["rows"] = rows.size(0);
    ctx->saved_data["hidden"] = rows.size(1);
    ctx->saved_data["dtype"] = static_cast<int64_t>(rows.scalar_type());
    ctx->saved_data["device"] = rows.device();
    ctx->saved_data["exchange"] = exchange;
    variable_list outputs{rows, row_weights, tokens_per_expert};
    outputs.insert(outputs.end(), plan.begin(), plan.end());
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_order();
    const int64_t rows = ctx->saved_data["rows"].toInt();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const at::Device device = ctx->saved_data["device"].toDevice();
    auto [grad_x, grad_weights] = dispatch_backward(
        or_zeros(grads[0], {rows, ctx->saved_data["hidden"].toInt()}, dtype, device),
        or_zeros(grads[1], {rows}, weight_type(dtype), device),
        ctx->saved_data["plan"].toTensorVector(), ctx->saved_data["top_k"].toInt(),
        ctx->saved_data["exchange"].toCustomClass<Exchange>());
    return {grad_x, grad_weights, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> dispatch_autograd(
    const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const ExchangePtr& exchange) {
  const auto out = DispatchFunction::apply(x, topk_weights, topk_ids,
                                           exchange->for_call(records({&x, &topk_weights})));
  return {out[0], out[1], out[2], {out.begin() + 3, out.end()}};
}

class CombineFunction : public torch::autograd::Function<CombineFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& expert_output,
                            const at::Tensor& row_weights, std::vector<at::Tensor> plan,
                            const ExchangePtr& exchange) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    at::Tensor y = combine(expert_output, row_weights, plan, exchange);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({expert_output, row_weights});
    ctx->saved_data["tokens"] = y.size(0);
    ctx->saved_data["plan"] = std::move(plan);
    ctx->saved_data["exchange"] = exchange;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_order();
    const auto saved = ctx->get_saved_variables();
    auto [grad_output, grad_weights] =
        combine_backward(or_zeros(grads[0], {ctx->saved_data["tokens"].toInt(), saved[0].size(1)},
                                  saved[0].scalar_type(), saved[0].device()),
                         saved[0], saved[1], ctx->saved_data["plan"].toTensorVector(),
                         ctx->saved_data["exchange"].toCustomClass<Exchange>());
    return {grad_output, grad_weights, {}, {}};
  }
};

at::Tensor combine_autograd(const at::Tensor& expert_output, const at::Tensor& row_weights,
                            at::TensorList plan, const ExchangePtr& exchange) {
  return CombineFunction::apply(expert_output, row_weights, plan.vec(),
                                exchange->for_call(records({&expert_output, &row_weights})));
}

class SwapRowsFunction : public torch::autograd::Function<SwapRowsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& rows, const at::Tensor& link,
                               const at::Tensor& rows_per_group, const at::Tensor& routed_rows,
                               const at::Tensor& expected_rows, const at::Tensor& parcels,
                               const at::Tensor& parcel_bytes, int64_t direction,
                               const ExchangePtr& exchange) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [received, received_per_group, peers_routed, ones] =
        swap_rows(rows, link, rows_per_group, routed_rows, expected_rows, parcels, parcel_bytes,
                  direction, exchange);
    ctx->mark_non_differentiable({received_per_group, peers_routed});
    ctx->set_materialize_grads(false);
    ctx->saved_data["back"] =
        std::vector<at::Tensor>{received_per_group, peers_routed, rows_per_group};
    ctx->saved_data["rows"] = received.size(0);
    ctx->saved_data["hidden"] = received.size(1);
    ctx->saved_data["dtype"] = static_cast<int64_t>(received.scalar_type());
    ctx->saved_data["device"] = received.device();
    // dispatch <-> dispatch_backward, combine <-> combine_backward
    ctx->saved_data["direction"] = 3 - direction;
    ctx->saved_data["exchange"] = exchange;
    return {received, received_per_group, peers_routed, ones};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_order();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const auto back = ctx->saved_data["back"].toTensorVector();
    const at::Tensor grad =
        or_zeros(grads[0], {ctx->saved_data["rows"].toInt(), ctx->saved_data["hidden"].toInt()},
                 dtype, ctx->saved_data["device"].toDevice());
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor none = at::empty({0}, at::kLong);
    const at::Tensor grad_rows =
        std::get<0>(swap_rows(grad, none, back[0], back[1], back[2], at::empty({0}, at::kByte),
                              none, ctx->saved_data["direction"].toInt(),
                              ctx->saved_data["exchange"].toCustomClass<Exchange>()));
    return {grad_rows, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swap_rows_autograd(
    const at::Tensor& rows, const at::Tensor& link, const at::Tensor& rows_per_group,
    const at::Tensor& routed_rows, const at::Tensor& expected_rows, const at::Tensor& parcels,
    const at::Tensor& parcel_bytes, int64_t direction, const ExchangePtr& exchange) {
  const auto out =
      SwapRowsFunction::apply(rows, link, rows_per_group, routed_rows, expected_rows, parcels,
                              parcel_bytes, direction, exchange->for_call(records({&rows, &link})));
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

void register_autograd(torch::Library& m) {
  m.impl("dispatch", TORCH_FN(dispatch_autograd));
  m.impl("combine", TORCH_FN(combine_autograd));
  m.impl("swap_rows", TORCH_FN(swap_rows_autograd));
}

}  // namespace lshmoe::ops
