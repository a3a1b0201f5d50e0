// dispatch: each token once to each rank that holds one of its experts.

#include <ATen/record_function.h>

#include <cstring>

#include "lshmoe/moe/ops/common.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/ops/registration.hpp"

namespace lshmoe::ops {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> dispatch_rows(
    const at::Tensor& x_in, const at::Tensor& weights_in, const at::Tensor& ids_in,
    const ExchangePtr& exchange) {
  ExchangeContext& context = exchange->context();
  const DispatcherOptions& options = context.options;
  const int64_t hidden = options.hidden_size(), own = context.comm->rank();
  check_rows(x_in);
  LSHMOE_VALIDATE(x_in.dim() == 2 && x_in.size(1) == hidden, "x is ", x_in.sizes(),
                  " (must be [tokens, ", hidden, "])");
  LSHMOE_VALIDATE(ids_in.dim() == 2 && ids_in.size(0) == x_in.size(0) && ids_in.size(1) >= 1 &&
                      ids_in.scalar_type() == at::kLong,
                  "topk_ids is ", ids_in.scalar_type(), " ", ids_in.sizes(),
                  " (must be int64 [tokens, k] for ", x_in.size(0), " tokens)");
  const at::ScalarType weight_dtype = weight_type(x_in.scalar_type());
  LSHMOE_VALIDATE(weights_in.sizes() == ids_in.sizes() &&
                      weights_in.scalar_type() == weight_dtype &&
                      weights_in.device() == x_in.device(),
                  "topk_weights is ", weights_in.scalar_type(), " ", weights_in.sizes(), " on ",
                  weights_in.device(), " (must be ", weight_dtype, " ", ids_in.sizes(),
                  ", as topk_ids, on ", x_in.device(), ", as x)");
  LSHMOE_VALIDATE(!context.restores_at_source(),
                  "restore=source has no dispatch plan: use Dispatcher, or swap_rows");
  const at::Tensor x = x_in.contiguous();
  // The layer's one wait for its counts: the plan is made by the host.
  const std::vector<at::Tensor> choices = to_host({ids_in, weights_in});
  const at::Tensor &ids = choices[0], &weights = choices[1];

  RowsOut out;
  out.direction = Direction::dispatch;
  out.rows = x;
  out.top_k = ids.size(1);
  const PlanShape shape{options.num_experts(), context.num_local_experts(), context.ranks(),
                        out.top_k, weight_dtype};
  SendPlan send;
  {
    RECORD_FUNCTION("lshmoe::plan", std::vector<c10::IValue>{});
    send = make_send_plan(ids, shape);
    out.index = send.token;
    out.rows_per_group = to_vector(send.rows);
    out.assignments = to_vector(send.assignments);
    int64_t bytes = 0;
    for (std::size_t r = 0; r < out.assignments.size(); ++r) {
      out.attachment_bytes.push_back(shape.wire_bytes(out.rows_per_group[r], out.assignments[r]));
      bytes += out.attachment_bytes.back();
    }
    out.attachment = at::empty({bytes}, at::kByte);
    auto* to = static_cast<std::byte*>(out.attachment.mutable_data_ptr());
    for (int64_t r = 0; r < shape.ranks; ++r) {
      const auto size = static_cast<std::size_t>(out.attachment_bytes[static_cast<std::size_t>(r)]);
      write_plan(send, shape, r, ids, weights, {to, size});
      to += size;
    }
  }
  out.raw_rows = sum_for_others(send.rows, own);
  out.attachment_due = [&shape](int64_t, int64_t rows, int64_t assignments) {
    return shape.is_possible(rows, assignments) ? shape.wire_bytes(rows, assignments) : -1;
  };
  const RowsIn in = exchange->swap(out);

  ReceivePlan receive;
  at::Tensor row_weights;
  std::vector<int64_t> tokens_per_expert;
  {
    RECORD_FUNCTION("lshmoe::plan", std::vector<c10::IValue>{});
    std::vector<std::string> names;
    for (int64_t r = 0; r < shape.ranks; ++r) names.push_back(context.name_of_rank(r));
    receive = read_plans(in.attachment, in.rows_per_group, in.assignments, shape,
                         options.alignment(), names, row_weights, tokens_per_expert);
  }

  // Every row straight to the place of its first expert, from there to the others'.
  const int64_t count = receive.offset.size(0) - 1, places = row_weights.size(0);
  at::Tensor rows = at::empty({places, hidden}, x.options());
  const auto* offset = receive.offset.const_data_ptr<int64_t>();
  const auto* position = receive.position.const_data_ptr<int64_t>();
  const int64_t others = receive.position.numel() - count;
  at::Tensor first_place = at::empty({count}, at::kLong), from = at::empty({others}, at::kLong),
             to = at::empty({others}, at::kLong);
  auto* next_from = from.mutable_data_ptr<int64_t>();
  auto* next_to = to.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    first_place.mutable_data_ptr<int64_t>()[i] = position[offset[i]];
    for (int64_t a = offset[i] + 1; a < offset[i + 1]; ++a) {
      *next_from++ = position[offset[i]];
      *next_to++ = position[a];
    }
  }
  exchange->unpack(in, rows, first_place);
  copy_rows(rows, to, rows, from);
  // Padding stands at the end of each block.
  int64_t end = 0;
  for (std::size_t e = 0; e < tokens_per_expert.size(); ++e) {
    const int64_t block = receive.rows_per_expert.const_data_ptr<int64_t>()[e];
    const int64_t padding = block - tokens_per_expert[e];
    end += block;
    if (padding > 0) rows.narrow(0, end - padding, padding).zero_();
  }
  return {rows, row_weights.to(x.device()), at::tensor(tokens_per_expert, at::kLong),
          to_tensors(send, receive)};
}

std::tuple<at::Tensor, at::Tensor> dispatch_rows_backward(const at::Tensor& grad_rows_in,
                                                          const at::Tensor& grad_weights_in,
                                                          at::TensorList plan, int64_t top_k,
                                                          const ExchangePtr& exchange) {
  ExchangeContext& context = exchange->context();
  SendPlan send;
  ReceivePlan receive;
  from_tensors(plan, context.ranks(), send, receive);
  const int64_t places = receive.rows_per_expert.sum().item<int64_t>(),
                hidden = context.options.hidden_size();
  const at::ScalarType weight_dtype = weight_type(grad_rows_in.scalar_type());
  LSHMOE_VALIDATE(grad_rows_in.dim() == 2 && grad_rows_in.size(0) == places &&
                      grad_rows_in.size(1) == hidden && grad_weights_in.dim() == 1 &&
                      grad_weights_in.size(0) == places &&
                      grad_weights_in.scalar_type() == weight_dtype &&
                      grad_weights_in.device() == grad_rows_in.device(),
                  "the gradients are ", grad_rows_in.sizes(), " and ",
                  grad_weights_in.scalar_type(), " ", grad_weights_in.sizes(), " (must be [",
                  places, ", ", hidden, "] and ", weight_dtype, " [", places, "])");
  const int64_t slots = send.tokens() * top_k;
  LSHMOE_VALIDATE(top_k >= 1 && (send.slot.numel() == 0 || send.slot.max().item<int64_t>() < slots),
                  "top_k ", top_k, " does not fit the plan");
  check_rows(grad_rows_in);
  const at::Tensor grad_rows = grad_rows_in.contiguous();
  const auto on_device = to_device(
      {receive.offset, receive.position, send.token_offset, send.token_row}, grad_rows.device());

  RowsOut out;
  out.direction = Direction::dispatch_backward;
  out.top_k = top_k;
  out.rows = segment_sum(grad_rows, on_device[0], on_device[1], {});
  out.rows_per_group = to_vector(receive.rows);
  out.expected_rows = to_vector(send.rows);
  out.assignments = to_vector(receive.assignments);
  out.raw_rows = sum_for_others(receive.rows, context.comm->rank());
  // The weights' gradients go uncompressed: there is one number for each assignment.
  out.attachment = to_host({grad_weights_in.index_select(0, on_device[1])})[0].view(at::kByte);
  const auto size = static_cast<int64_t>(at::elementSize(weight_dtype));
  for (const int64_t count : out.assignments) out.attachment_bytes.push_back(count * size);
  out.attachment_due = [&send, size](int64_t rank, int64_t, int64_t assignments) {
    const int64_t sent = send.assignments.const_data_ptr<int64_t>()[rank];
    return assignments == sent ? sent * size : -1;
  };
  const RowsIn in = exchange->swap(out);

  at::Tensor slot_grads = at::zeros({slots}, weight_dtype);
  auto* to = static_cast<std::byte*>(slot_grads.mutable_data_ptr());
  const auto* slot = send.slot.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < context.ranks(); ++r) {
    const auto attachment = in.attachment[static_cast<std::size_t>(r)];  // as due
    const int64_t count = send.assignments.const_data_ptr<int64_t>()[r];
    for (int64_t a = 0; a < count; ++a) {
      std::memcpy(to + *slot++ * size, attachment.data() + a * size,
                  static_cast<std::size_t>(size));
    }
  }
  at::Tensor received = at::empty({send.token.numel(), hidden}, grad_rows.options());
  exchange->unpack(in, received, row_numbers(send.token.numel()));
  return {segment_sum(received, on_device[2], on_device[3], {}),
          slot_grads.view({send.tokens(), top_k}).to(grad_rows.device())};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> dispatch(
    const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const ExchangePtr& exchange) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lshmoe::dispatch", "")
                             .typed<decltype(dispatch)>();
  return op.call(x, topk_weights, topk_ids, exchange);
}

std::tuple<at::Tensor, at::Tensor> dispatch_backward(const at::Tensor& grad_rows,
                                                     const at::Tensor& grad_row_weights,
                                                     at::TensorList plan, int64_t top_k,
                                                     const ExchangePtr& exchange) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lshmoe::dispatch_backward", "")
                             .typed<decltype(dispatch_backward)>();
  return op.call(grad_rows, grad_row_weights, plan, top_k, exchange);
}

void register_dispatch(torch::Library& m) {
  m.impl("dispatch", TORCH_FN(dispatch_rows));
  m.impl("dispatch_backward", TORCH_FN(dispatch_rows_backward));
}

}  // namespace lshmoe::ops
