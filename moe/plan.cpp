#include "lshmoe/moe/plan.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

int64_t bytes_for(int64_t values) { return values <= 256 ? 1 : values <= 65536 ? 2 : 4; }

at::Tensor int_tensor(int64_t size) { return at::empty({size}, at::kLong); }

int64_t* data(at::Tensor& tensor) { return tensor.mutable_data_ptr<int64_t>(); }
const int64_t* data(const at::Tensor& tensor) { return tensor.const_data_ptr<int64_t>(); }

int64_t total_of(const at::Tensor& counts) {
  return std::accumulate(data(counts), data(counts) + counts.numel(), int64_t{0});
}

/// Little-endian unsigned numbers of 1, 2 or 4 bytes.
void put(std::byte*& to, int64_t bytes, int64_t value) {
  for (int64_t i = 0; i < bytes; ++i) *to++ = static_cast<std::byte>(value >> (8 * i));
}
int64_t take(const std::byte*& from, int64_t bytes) {
  int64_t value = 0;
  for (int64_t i = 0; i < bytes; ++i) value |= std::to_integer<int64_t>(*from++) << (8 * i);
  return value;
}

}  // namespace

int64_t PlanShape::id_bytes() const { return bytes_for(num_local_experts); }
// A count is 1 .. min(top_k, num_local_experts) and travels less one.
int64_t PlanShape::count_bytes() const { return bytes_for(std::min(top_k, num_local_experts)); }
bool PlanShape::is_possible(int64_t rows, int64_t assignments) const {
  const int64_t most = std::min(top_k, num_local_experts);
  return rows >= 0 && assignments >= rows && (assignments + most - 1) / most <= rows;
}
int64_t PlanShape::wire_bytes(int64_t rows, int64_t assignments) const {
  return rows * count_bytes() +
         assignments * (id_bytes() + static_cast<int64_t>(at::elementSize(weight_dtype)));
}

SendPlan make_send_plan(const at::Tensor& topk_ids, const PlanShape& shape) {
  const int64_t tokens = topk_ids.size(0), k = shape.top_k;
  const int64_t* ids = data(topk_ids);
  SendPlan plan;
  plan.rows = at::zeros({shape.ranks}, at::kLong);
  plan.assignments = at::zeros({shape.ranks}, at::kLong);
  plan.token_offset = int_tensor(tokens + 1);
  int64_t* rows = data(plan.rows);
  int64_t* assignments = data(plan.assignments);
  int64_t* token_offset = data(plan.token_offset);

  // Count. The token that a rank or an expert met last tells whether this one has been there.
  std::vector<int64_t> rank_met(static_cast<std::size_t>(shape.ranks), -1);
  std::vector<int64_t> expert_met(static_cast<std::size_t>(shape.num_experts), -1);
  token_offset[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t ranks_of_token = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = ids[t * k + i];
      if (id == -1) continue;
      LSHMOE_VALIDATE(id >= 0 && id < shape.num_experts, "topk_ids[", t, "][", i, "] is ", id,
                      " (experts are 0 .. ", shape.num_experts - 1, ", -1 = dropped)");
      int64_t& met = expert_met[static_cast<std::size_t>(id)];
      LSHMOE_VALIDATE(met != t, "topk_ids[", t, "] names expert ", id,
                      " twice (a token goes to an expert once): pass different experts");
      met = t;
      const int64_t rank = id / shape.num_local_experts;
      ++assignments[rank];
      if (rank_met[static_cast<std::size_t>(rank)] != t) {
        rank_met[static_cast<std::size_t>(rank)] = t;
        ++rows[rank];
        ++ranks_of_token;
      }
    }
    token_offset[t + 1] = token_offset[t] + ranks_of_token;
  }

  const int64_t total_rows = token_offset[tokens];
  plan.token = int_tensor(total_rows);
  plan.token_row = int_tensor(total_rows);
  plan.slot = int_tensor(total_of(plan.assignments));
  plan.row_count.assign(static_cast<std::size_t>(total_rows), 0);
  std::vector<int64_t> next_row(static_cast<std::size_t>(shape.ranks), 0);
  std::vector<int64_t> next_assignment(static_cast<std::size_t>(shape.ranks), 0);
  for (int64_t r = 1; r < shape.ranks; ++r) {
    const auto i = static_cast<std::size_t>(r);
    next_row[i] = next_row[i - 1] + rows[r - 1];
    next_assignment[i] = next_assignment[i - 1] + assignments[r - 1];
  }
  // Fill. Tokens come in order, so every rank's rows and assignments do.
  std::fill(rank_met.begin(), rank_met.end(), -1);
  int64_t* token = data(plan.token);
  int64_t* slot = data(plan.slot);
  int64_t* token_row = data(plan.token_row);
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t* rows_of_token = token_row + token_offset[t];
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = ids[t * k + i];
      if (id == -1) continue;
      const auto rank = static_cast<std::size_t>(id / shape.num_local_experts);
      if (rank_met[rank] != t) {
        rank_met[rank] = t;
        *rows_of_token++ = next_row[rank];
        token[next_row[rank]++] = t;
      }
      ++plan.row_count[static_cast<std::size_t>(next_row[rank] - 1)];
      slot[next_assignment[rank]++] = t * k + i;
    }
    // Rows are numbered rank by rank, so sorted rows are in rank order.
    std::sort(token_row + token_offset[t], rows_of_token);
  }
  return plan;
}

void write_plan(const SendPlan& plan, const PlanShape& shape, int64_t destination,
                const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                std::span<std::byte> to) {
  const int64_t* rows = data(plan.rows);
  const int64_t* assignments = data(plan.assignments);
  const int64_t first_row = std::accumulate(rows, rows + destination, int64_t{0});
  const int64_t first = std::accumulate(assignments, assignments + destination, int64_t{0});
  const int64_t count = assignments[destination];
  LSHMOE_ASSERT(static_cast<int64_t>(to.size()) == shape.wire_bytes(rows[destination], count));

  std::byte* out = to.data();
  for (int64_t r = 0; r < rows[destination]; ++r)
    put(out, shape.count_bytes(), plan.row_count[static_cast<std::size_t>(first_row + r)] - 1);
  const int64_t* ids = data(topk_ids);
  const int64_t* slot = data(plan.slot) + first;
  for (int64_t a = 0; a < count; ++a)
    put(out, shape.id_bytes(), ids[slot[a]] - destination * shape.num_local_experts);
  const std::size_t size = at::elementSize(shape.weight_dtype);
  const auto* weights = static_cast<const std::byte*>(topk_weights.const_data_ptr());
  for (int64_t a = 0; a < count; ++a, out += size)
    std::memcpy(out, weights + static_cast<std::size_t>(slot[a]) * size, size);
}

ReceivePlan read_plans(std::span<const std::span<const std::byte>> wire,
                       std::span<const int64_t> rows, std::span<const int64_t> assignments,
                       const PlanShape& shape, int64_t alignment,
                       std::span<const std::string> source_names, at::Tensor& row_weights,
                       std::vector<int64_t>& tokens_per_expert) {
  const int64_t experts = shape.num_local_experts, most = std::min(shape.top_k, experts);
  ReceivePlan plan;
  plan.rows = int_tensor(shape.ranks);
  plan.assignments = int_tensor(shape.ranks);
  int64_t total_rows = 0, total = 0;
  for (std::size_t s = 0; s < wire.size(); ++s) {
    LSHMOE_VALIDATE(
        shape.is_possible(rows[s], assignments[s]) &&
            static_cast<int64_t>(wire[s].size()) == shape.wire_bytes(rows[s], assignments[s]),
        "the plan from ", source_names[s], " has ", wire[s].size(), " bytes for ", rows[s],
        " rows with ", assignments[s], " assignments (each row has 1 .. ", most,
        "): the ranks run different settings, or its bytes are damaged");
    data(plan.rows)[s] = rows[s];
    data(plan.assignments)[s] = assignments[s];
    total_rows += rows[s];
    total += assignments[s];
  }

  plan.offset = int_tensor(total_rows + 1);
  plan.position = int_tensor(total);
  int64_t* offset = data(plan.offset);
  int64_t* expert = data(plan.position);  // the experts first, their places later
  tokens_per_expert.assign(static_cast<std::size_t>(experts), 0);
  std::vector<int64_t> met(static_cast<std::size_t>(experts), -1);
  offset[0] = 0;
  int64_t row = 0, a = 0;
  for (std::size_t s = 0; s < wire.size(); ++s) {
    const std::byte* counts = wire[s].data();
    const std::byte* ids = counts + rows[s] * shape.count_bytes();
    const int64_t end = a + assignments[s];
    for (const int64_t last = row + rows[s]; row < last; ++row) {
      const int64_t count = take(counts, shape.count_bytes()) + 1;
      LSHMOE_VALIDATE(count <= most && count <= end - a, "the plan from ", source_names[s],
                      " gives a row ", count, " experts (", end - a,
                      " assignments are left): its bytes are damaged");
      for (int64_t i = 0; i < count; ++i) {
        const int64_t id = take(ids, shape.id_bytes());
        LSHMOE_VALIDATE(id < experts, "the plan from ", source_names[s], " names expert ", id,
                        " of this rank, which has ", experts, ": its bytes are damaged");
        int64_t& last_row = met[static_cast<std::size_t>(id)];
        LSHMOE_VALIDATE(last_row != row, "the plan from ", source_names[s], " names expert ", id,
                        " twice in one row: its bytes are damaged");
        last_row = row;
        ++tokens_per_expert[static_cast<std::size_t>(id)];
        expert[a++] = id;
      }
      offset[row + 1] = a;
    }
    LSHMOE_VALIDATE(a == end, "the plan from ", source_names[s], " announces ", assignments[s],
                    " assignments, but its rows name ", assignments[s] - (end - a),
                    ": its bytes are damaged");
  }

  plan.rows_per_expert = int_tensor(experts);
  std::vector<int64_t> next(static_cast<std::size_t>(experts));
  int64_t padded = 0;
  for (std::size_t e = 0; e < next.size(); ++e) {
    next[e] = padded;
    const int64_t block = (tokens_per_expert[e] + alignment - 1) / alignment * alignment;
    data(plan.rows_per_expert)[e] = block;
    padded += block;
  }
  row_weights = padded == total ? at::empty({padded}, shape.weight_dtype)
                                : at::zeros({padded}, shape.weight_dtype);
  auto* weight_to = static_cast<std::byte*>(row_weights.mutable_data_ptr());
  const std::size_t size = at::elementSize(shape.weight_dtype);
  a = 0;
  for (std::size_t s = 0; s < wire.size(); ++s) {
    const std::byte* from =
        wire[s].data() + wire[s].size() - static_cast<std::size_t>(assignments[s]) * size;
    for (const int64_t end = a + assignments[s]; a < end; ++a, from += size) {
      const int64_t place = next[static_cast<std::size_t>(expert[a])]++;
      expert[a] = place;
      std::memcpy(weight_to + static_cast<std::size_t>(place) * size, from, size);
    }
  }
  return plan;
}

std::vector<at::Tensor> to_tensors(const SendPlan& send, const ReceivePlan& receive) {
  return {send.token,
          send.slot,
          send.rows,
          send.assignments,
          send.token_offset,
          send.token_row,
          receive.rows,
          receive.assignments,
          receive.offset,
          receive.position,
          receive.rows_per_expert};
}

void from_tensors(at::TensorList tensors, int64_t ranks, SendPlan& send, ReceivePlan& receive) {
  constexpr const char* kAdvice = ": pass the plan that dispatch returned, unchanged";
  LSHMOE_VALIDATE(tensors.size() == 11, "a plan has 11 tensors, not ", tensors.size(), kAdvice);
  for (const at::Tensor& t : tensors)
    LSHMOE_VALIDATE(t.defined() && t.is_cpu() && t.scalar_type() == at::kLong && t.dim() == 1 &&
                        t.is_contiguous(),
                    "a plan's tensors are contiguous int64 vectors on the CPU", kAdvice);
  send = {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], {}};
  receive = {tensors[6], tensors[7], tensors[8], tensors[9], tensors[10]};

  const auto in_range = [](const at::Tensor& t, int64_t end) {
    return std::all_of(data(t), data(t) + t.numel(),
                       [end](int64_t v) { return v >= 0 && v < end; });
  };
  const auto counts = [](const at::Tensor& t, int64_t total) {
    return std::all_of(data(t), data(t) + t.numel(),
                       [total](int64_t v) { return v >= 0 && v <= total; }) &&
           total_of(t) == total;
  };
  const auto offsets = [](const at::Tensor& t, int64_t total) {
    return t.numel() >= 1 && data(t)[0] == 0 && data(t)[t.numel() - 1] == total &&
           std::is_sorted(data(t), data(t) + t.numel());
  };
  constexpr int64_t kAny = int64_t{1} << 48;
  LSHMOE_VALIDATE(
      send.rows.numel() == ranks && send.assignments.numel() == ranks &&
          receive.rows.numel() == ranks && receive.assignments.numel() == ranks &&
          counts(send.rows, send.token.numel()) && counts(send.assignments, send.slot.numel()) &&
          offsets(send.token_offset, send.token.numel()) &&
          send.token_row.numel() == send.token.numel() && in_range(send.token, send.tokens()) &&
          in_range(send.token_row, send.token.numel()) && in_range(send.slot, kAny) &&
          in_range(receive.rows_per_expert, kAny) &&
          offsets(receive.offset, receive.position.numel()) &&
          counts(receive.rows, receive.offset.numel() - 1) &&
          counts(receive.assignments, receive.position.numel()) &&
          in_range(receive.position, total_of(receive.rows_per_expert)),
      "the tensors given are no plan of ", ranks, " ranks", kAdvice);
}

}  // namespace lshmoe
