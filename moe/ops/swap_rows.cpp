// swap_rows: rows to their ranks without a plan; restore=source is made of it.

#include "lshmoe/moe/ops/common.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/ops/registration.hpp"

namespace lshmoe::ops {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swap_rows_kernel(
    const at::Tensor& rows, const at::Tensor& /*link*/, const at::Tensor& rows_per_group,
    const at::Tensor& routed_rows, const at::Tensor& expected_rows, const at::Tensor& parcels,
    const at::Tensor& parcel_bytes, int64_t direction, const ExchangePtr& exchange) {
  ExchangeContext& context = exchange->context();
  const int64_t ranks = context.ranks(), groups = context.num_local_experts() * ranks,
                hidden = context.options.hidden_size();
  check_rows(rows);
  LSHMOE_VALIDATE(direction >= 0 && direction < 4, "direction is ", direction,
                  " (must be 0 .. 3, see Direction)");
  for (const at::Tensor* counts : {&rows_per_group, &routed_rows, &expected_rows, &parcel_bytes})
    LSHMOE_VALIDATE(counts->is_cpu() && counts->scalar_type() == at::kLong && counts->dim() == 1 &&
                        counts->is_contiguous() && counts->ge(0).all().item<bool>(),
                    "counts must be contiguous int64 vectors on the CPU, not negative");
  LSHMOE_VALIDATE(rows_per_group.numel() == groups && routed_rows.numel() == ranks &&
                      (expected_rows.numel() == 0 || expected_rows.numel() == groups) &&
                      (parcel_bytes.numel() == 0 || parcel_bytes.numel() == groups),
                  "rows_per_group, expected_rows and parcel_bytes have one entry for each of the ",
                  groups, " groups (the last two may be empty), routed_rows for each of the ",
                  ranks, " ranks");
  LSHMOE_VALIDATE(rows.dim() == 2 && rows.size(1) == hidden &&
                      rows.size(0) == rows_per_group.sum().item<int64_t>(),
                  "rows is ", rows.sizes(), " (must be [", rows_per_group.sum().item<int64_t>(),
                  ", ", hidden, "], the sum of rows_per_group)");

  RowsOut out;
  out.direction = static_cast<Direction>(direction);
  out.rows = rows.contiguous();
  out.rows_per_group = to_vector(rows_per_group);
  out.assignments = to_vector(routed_rows);
  out.expected_rows = to_vector(expected_rows);
  out.raw_rows = sum_for_others(routed_rows, context.comm->rank());
  Encoded encoded;
  if (parcel_bytes.numel() > 0) {
    LSHMOE_VALIDATE(parcels.device() == rows.device() && parcels.scalar_type() == at::kByte &&
                        parcels.dim() == 1 && parcels.is_contiguous() &&
                        parcels.numel() == parcel_bytes.sum().item<int64_t>(),
                    "parcels must be a uint8 vector of sum(parcel_bytes) bytes beside the rows");
    encoded.bytes = parcels;
    encoded.bytes_per_group = to_vector(parcel_bytes);
    out.encoded = &encoded;
  }
  const RowsIn in = exchange->swap(out);
  const at::Tensor received_per_group = at::tensor(in.rows_per_group, at::kLong);
  const int64_t count = received_per_group.sum().item<int64_t>();
  at::Tensor received = at::empty({count, hidden}, rows.options());
  exchange->unpack(in, received, row_numbers(count));
  return {received, received_per_group, at::tensor(in.assignments, at::kLong),
          at::ones({count}, rows.options().dtype(weight_type(rows.scalar_type())))};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swap_rows(
    const at::Tensor& rows, const at::Tensor& link, const at::Tensor& rows_per_group,
    const at::Tensor& routed_rows, const at::Tensor& expected_rows, const at::Tensor& parcels,
    const at::Tensor& parcel_bytes, int64_t direction, const ExchangePtr& exchange) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lshmoe::swap_rows", "")
                             .typed<decltype(swap_rows)>();
  return op.call(rows, link, rows_per_group, routed_rows, expected_rows, parcels, parcel_bytes,
                 direction, exchange);
}

void register_swap_rows(torch::Library& m) { m.impl("swap_rows", TORCH_FN(swap_rows_kernel)); }

}  // namespace lshmoe::ops
