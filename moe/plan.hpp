#pragma once
// Dispatch plan: from the gate's choices, what this rank sends where, and from the peers' plans,
// where each received row stands among the experts' rows. restore=expert: a token goes once to
// every rank that holds one of its experts.
//
// Local, host memory. Ranks are ranks of the expert group.

#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// The shape all ranks of an expert group agree on.
struct PlanShape {
  int64_t num_experts = 0;        ///< global
  int64_t num_local_experts = 0;  ///< each rank holds as many, a contiguous block
  int64_t ranks = 0;
  int64_t top_k = 0;
  at::ScalarType weight_dtype = at::kFloat;  ///< float32, or float64

  /// Bytes of one expert id on the wire: 1, 2 or 4.
  [[nodiscard]] int64_t id_bytes() const;
  /// Bytes of a row's number of assignments on the wire: 1, 2 or 4.
  [[nodiscard]] int64_t count_bytes() const;
  /// Whether `rows` rows can have `assignments` assignments: each 1 .. min(top_k, local experts).
  [[nodiscard]] bool is_possible(int64_t rows, int64_t assignments) const;
  /// Bytes of a plan of `rows` rows with `assignments` assignments on the wire.
  [[nodiscard]] int64_t wire_bytes(int64_t rows, int64_t assignments) const;
};

/// What this rank sends. A row is a token for one destination rank, rows are ordered by
/// (destination rank, token). An assignment is one expert of a row; in row order, then choice
/// order.
struct SendPlan {
  at::Tensor token;         ///< int64 [rows]: the row's token
  at::Tensor slot;          ///< int64 [assignments]: token * top_k + choice
  at::Tensor rows;          ///< int64 [ranks]: rows for each destination
  at::Tensor assignments;   ///< int64 [ranks]
  at::Tensor token_offset;  ///< int64 [tokens + 1]: rows of each token, indices into token_row
  at::Tensor token_row;     ///< int64 [rows]: a token's rows in rank order
  std::vector<int64_t> row_count;  ///< [rows]: assignments of each row

  [[nodiscard]] int64_t tokens() const { return token_offset.size(0) - 1; }
};

/// What this rank receives. Rows are ordered by (source rank, token).
struct ReceivePlan {
  at::Tensor rows;         ///< int64 [ranks]: rows from each source
  at::Tensor assignments;  ///< int64 [ranks]
  at::Tensor offset;       ///< int64 [received rows + 1]: assignments of each row
  /// int64 [received assignments]: place among the experts' rows. Expert-major, then (source rank,
  /// token).
  at::Tensor position;
  at::Tensor rows_per_expert;  ///< int64 [num_local_experts]: with padding; their sum is the number
                               ///< of rows
};

/// Makes the plan. topk_ids int64 [tokens, top_k], -1 = dropped.
/// Throws InvalidArgument on an id out of range or repeated in a token.
[[nodiscard]] SendPlan make_send_plan(const at::Tensor& topk_ids, const PlanShape& shape);

/// Writes the part of the plan for `destination` as it travels: per row the number of its
/// assignments, per assignment the expert's number on that rank, then the weights. `to` holds
/// wire_bytes(rows, assignments) bytes. topk_weights [tokens, top_k], contiguous, of weight_dtype.
void write_plan(const SendPlan& plan, const PlanShape& shape, int64_t destination,
                const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                std::span<std::byte> to);

/// Reads all sources' plans; `wire[s]` is what source s wrote for this rank, rows[s] and
/// assignments[s] are what it announced. Weights go to row_weights [sum(rows_per_expert)] (made
/// here, 0 in padding), the numbers of rows without padding to tokens_per_expert.
/// Trusts nothing: throws InvalidArgument naming `source_names[s]`.
[[nodiscard]] ReceivePlan read_plans(std::span<const std::span<const std::byte>> wire,
                                     std::span<const int64_t> rows,
                                     std::span<const int64_t> assignments, const PlanShape& shape,
                                     int64_t alignment, std::span<const std::string> source_names,
                                     at::Tensor& row_weights,
                                     std::vector<int64_t>& tokens_per_expert);

/// Both halves as a list of tensors, for ops whose arguments are tensors only.
[[nodiscard]] std::vector<at::Tensor> to_tensors(const SendPlan& send, const ReceivePlan& receive);
/// The halves again (without SendPlan::row_count). Throws InvalidArgument when the list is not one
/// that to_tensors made for `ranks` ranks: sizes, dtypes and every index are checked.
void from_tensors(at::TensorList tensors, int64_t ranks, SendPlan& send, ReceivePlan& receive);

}  // namespace lshmoe
