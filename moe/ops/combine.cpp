// combine: the weighted sums of the experts' outputs back to the tokens' ranks.

#include <ATen/record_function.h>

#include "lshmoe/moe/ops/common.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/ops/registration.hpp"

namespace lshmoe::ops {
namespace {

void check(const at::Tensor& expert_output, const at::Tensor& row_weights,
           const ReceivePlan& receive, int64_t hidden) {
  const int64_t places = receive.rows_per_expert.sum().item<int64_t>();
  check_rows(expert_output);
  LSHMOE_VALIDATE(expert_output.dim() == 2 && expert_output.size(0) == places &&
                      expert_output.size(1) == hidden,
                  "expert_output is ", expert_output.sizes(), " (must be [", places, ", ", hidden,
                  "], as the rows that dispatch returned)");
  LSHMOE_VALIDATE(row_weights.dim() == 1 && row_weights.size(0) == places &&
                      row_weights.scalar_type() == weight_type(expert_output.scalar_type()) &&
                      row_weights.device() == expert_output.device(),
                  "row_weights is ", row_weights.scalar_type(), " ", row_weights.sizes(), " on ",
                  row_weights.device(), " (must be ", weight_type(expert_output.scalar_type()),
                  " [", places, "]; expert_output is ", expert_output.scalar_type(), " on ",
                  expert_output.device(), ")");
}

at::Tensor combine_rows(const at::Tensor& expert_output_in, const at::Tensor& row_weights_in,
                        at::TensorList plan, const ExchangePtr& exchange) {
  ExchangeContext& context = exchange->context();
  const int64_t hidden = context.options.hidden_size();
  SendPlan send;
  ReceivePlan receive;
  from_tensors(plan, context.ranks(), send, receive);
  check(expert_output_in, row_weights_in, receive, hidden);
  const at::Tensor expert_output = expert_output_in.contiguous(),
                   row_weights = row_weights_in.contiguous();

  const auto on_device =
      to_device({receive.offset, receive.position, send.token_offset, send.token_row},
                expert_output.device());

  RowsOut out;
  out.direction = Direction::combine;
  {
    RECORD_FUNCTION("lshmoe::combine", std::vector<c10::IValue>{});
    out.rows = segment_sum(expert_output, on_device[0], on_device[1], row_weights);
  }
  out.rows_per_group = to_vector(receive.rows);
  out.expected_rows = to_vector(send.rows);
  out.raw_rows = sum_for_others(receive.rows, context.comm->rank());
  const RowsIn in = exchange->swap(out);
  at::Tensor received = at::empty({send.token.numel(), hidden}, expert_output.options());
  exchange->unpack(in, received, row_numbers(send.token.numel()));
  RECORD_FUNCTION("lshmoe::combine", std::vector<c10::IValue>{});
  return segment_sum(received, on_device[2], on_device[3], {});
}

std::tuple<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& grad_output_in,
                                                         const at::Tensor& expert_output_in,
                                                         const at::Tensor& row_weights_in,
                                                         at::TensorList plan,
                                                         const ExchangePtr& exchange) {
  ExchangeContext& context = exchange->context();
  const int64_t hidden = context.options.hidden_size();
  SendPlan send;
  ReceivePlan receive;
  from_tensors(plan, context.ranks(), send, receive);
  check(expert_output_in, row_weights_in, receive, hidden);
  LSHMOE_VALIDATE(grad_output_in.dim() == 2 && grad_output_in.size(0) == send.tokens() &&
                      grad_output_in.size(1) == hidden &&
                      grad_output_in.scalar_type() == expert_output_in.scalar_type() &&
                      grad_output_in.device() == expert_output_in.device(),
                  "grad_output is ", grad_output_in.scalar_type(), " ", grad_output_in.sizes(),
                  " on ", grad_output_in.device(), " (must be ", expert_output_in.scalar_type(),
                  " [", send.tokens(), ", ", hidden, "] on ", expert_output_in.device(), ")");
  const at::Tensor expert_output = expert_output_in.contiguous(),
                   row_weights = row_weights_in.contiguous();

  RowsOut out;
  out.direction = Direction::combine_backward;
  out.rows = grad_output_in.contiguous();
  out.index = send.token;
  out.rows_per_group = to_vector(send.rows);
  out.expected_rows = to_vector(receive.rows);
  out.raw_rows = sum_for_others(send.rows, context.comm->rank());
  const RowsIn in = exchange->swap(out);
  const int64_t count = receive.offset.size(0) - 1;
  at::Tensor received = at::empty({count, hidden}, out.rows.options());
  exchange->unpack(in, received, row_numbers(count));

  // Padding has no token and no gradient.
  const bool padded = receive.position.numel() < expert_output.size(0);
  at::Tensor grad_expert = padded ? at::zeros_like(expert_output) : at::empty_like(expert_output);
  at::Tensor grad_weights = padded ? at::zeros_like(row_weights) : at::empty_like(row_weights);
  const auto on_device = to_device({receive.offset, receive.position}, expert_output.device());
  segment_sum_backward(grad_expert, grad_weights, received, expert_output, on_device[0],
                       on_device[1], row_weights);
  return {grad_expert, grad_weights};
}

}  // namespace

at::Tensor combine(const at::Tensor& expert_output, const at::Tensor& row_weights,
                   at::TensorList plan, const ExchangePtr& exchange) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lshmoe::combine", "")
                             .typed<decltype(combine)>();
  return op.call(expert_output, row_weights, plan, exchange);
}

std::tuple<at::Tensor, at::Tensor> combine_backward(const at::Tensor& grad_output,
                                                    const at::Tensor& expert_output,
                                                    const at::Tensor& row_weights,
                                                    at::TensorList plan,
                                                    const ExchangePtr& exchange) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lshmoe::combine_backward", "")
                             .typed<decltype(combine_backward)>();
  return op.call(grad_output, expert_output, row_weights, plan, exchange);
}

void register_combine(torch::Library& m) {
  m.impl("combine", TORCH_FN(combine_rows));
  m.impl("combine_backward", TORCH_FN(combine_rows_backward));
}

}  // namespace lshmoe::ops
