// The dispatch plan: known answers, and wire bytes that must not be trusted.

#include "lshmoe/moe/plan.hpp"

#include <gtest/gtest.h>

#include <set>

#include "tests/support/errors.hpp"

namespace lshmoe {
namespace {
using testing::expect_error;

std::vector<int64_t> values(const at::Tensor& t) {
  return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()};
}
using Ints = std::vector<int64_t>;

at::Tensor ids(std::vector<int64_t> flat, int64_t k) {
  return at::tensor(flat, at::kLong).view({-1, k});
}

// 2 ranks with 2 experts each.
constexpr PlanShape kShape{4, 2, 2, 2, at::kFloat};

TEST(SendPlan, KnownAnswer) {
  // Token 0: experts 3 and 2, both on rank 1: one row. Token 1: one on each rank. Token 2: dropped
  // altogether. Token 3: expert 0 only.
  const SendPlan plan = make_send_plan(ids({3, 2, 1, 2, -1, -1, -1, 0}, 2), kShape);
  EXPECT_EQ(values(plan.rows), (Ints{2, 2}));
  EXPECT_EQ(values(plan.assignments), (Ints{2, 3}));
  EXPECT_EQ(values(plan.token), (Ints{1, 3, 0, 1}));
  EXPECT_EQ(values(plan.slot), (Ints{2, 7, 0, 1, 3}));
  EXPECT_EQ(plan.row_count, (Ints{1, 1, 2, 1}));
  EXPECT_EQ(values(plan.token_offset), (Ints{0, 1, 3, 3, 4}));
  EXPECT_EQ(values(plan.token_row), (Ints{2, 0, 3, 1}));
}

TEST(SendPlan, NoTokens) {
  const SendPlan plan = make_send_plan(at::empty({0, 2}, at::kLong), kShape);
  EXPECT_EQ(values(plan.rows), (Ints{0, 0}));
  EXPECT_EQ(plan.token.numel(), 0);
  EXPECT_EQ(plan.tokens(), 0);
}

TEST(SendPlan, RefusesBadIds) {
  EXPECT_THROW((void)make_send_plan(ids({0, 4}, 2), kShape), InvalidArgument);
  EXPECT_THROW((void)make_send_plan(ids({-2, 1}, 2), kShape), InvalidArgument);
  EXPECT_THROW((void)make_send_plan(ids({3, 3}, 2), kShape), InvalidArgument);
}

/// What the two ranks tell rank 1 in the known answer above (source 0), and source 1: token 0 to
/// its experts 1, 0.
struct Wires {
  std::vector<std::byte> bytes[2];
  Ints rows{2, 1}, assignments{3, 2};

  Wires() {
    const at::Tensor ids0 = ids({3, 2, 1, 2, -1, -1, -1, 0}, 2);
    const at::Tensor w0 = at::arange(8, at::kFloat).view({4, 2});
    const at::Tensor ids1 = ids({3, 2}, 2), w1 = at::tensor({0.5F, 0.25F}).view({1, 2});
    write(0, ids0, w0);
    write(1, ids1, w1);
  }
  void write(int source, const at::Tensor& ids, const at::Tensor& weights) {
    const SendPlan plan = make_send_plan(ids, kShape);
    bytes[source].resize(static_cast<std::size_t>(
        kShape.wire_bytes(values(plan.rows)[1], values(plan.assignments)[1])));
    write_plan(plan, kShape, 1, ids, weights, bytes[source]);
  }
  ReceivePlan read(int64_t alignment = 1) {
    const std::span<const std::byte> spans[] = {bytes[0], bytes[1]};
    const std::string names[] = {"rank 40", "rank 41"};
    return read_plans(spans, rows, assignments, kShape, alignment, names, weights, tokens);
  }
  at::Tensor weights;
  Ints tokens;
};

TEST(ReceivePlan, KnownAnswer) {
  Wires wires;
  EXPECT_EQ(wires.bytes[0].size(), 2U * 1 + 3U * (1 + 4));
  const ReceivePlan plan = wires.read();
  // Rows: source 0 token 0 (experts 1, 0), source 0 token 1 (expert 0), source 1 token 0 (1, 0).
  EXPECT_EQ(wires.tokens, (Ints{3, 2}));
  EXPECT_EQ(values(plan.offset), (Ints{0, 2, 3, 5}));
  EXPECT_EQ(values(plan.position), (Ints{3, 0, 1, 4, 2}));
  EXPECT_TRUE(at::equal(wires.weights, at::tensor({1.F, 3.F, 0.25F, 0.F, 0.5F})));
}

TEST(ReceivePlan, PadsBlocks) {
  Wires wires;
  const ReceivePlan plan = wires.read(4);
  EXPECT_EQ(values(plan.rows_per_expert), (Ints{4, 4}));
  EXPECT_EQ(wires.tokens, (Ints{3, 2}));
  EXPECT_EQ(values(plan.position), (Ints{4, 0, 1, 5, 2}));
  EXPECT_EQ(wires.weights[3].item<float>(), 0.F);
}

void expect_refused(Wires& wires, const char* peer) {
  expect_error(std::string("the plan from ") + peer, [&] { (void)wires.read(); });
}

TEST(ReceivePlan, RefusesDamage) {
  {
    Wires w;  // a row with more experts than the rank has
    w.bytes[0][0] = std::byte{7};
    expect_refused(w, "rank 40");
  }
  {
    Wires w;  // counts that do not add up
    w.bytes[0][0] = std::byte{0};
    expect_refused(w, "rank 40");
  }
  {
    Wires w;  // an expert that is not there
    w.bytes[1][1] = std::byte{2};
    expect_refused(w, "rank 41");
  }
  {
    Wires w;  // an expert twice in a row
    w.bytes[1][1] = w.bytes[1][2];
    expect_refused(w, "rank 41");
  }
  {
    Wires w;  // cut short
    w.bytes[1].pop_back();
    expect_refused(w, "rank 41");
  }
  {
    Wires w;  // more rows than assignments
    w.rows[1] = 3;
    expect_refused(w, "rank 41");
  }
  {
    Wires w;  // negative
    w.rows[1] = w.assignments[1] = -1;
    expect_refused(w, "rank 41");
  }
}

TEST(ReceivePlan, EverySingleByteOfDamageIsRefusedOrHarmless) {
  for (std::size_t i = 0; i < Wires().bytes[0].size(); ++i) {
    for (const int value : {0, 1, 2, 128, 255}) {
      Wires w;
      w.bytes[0][i] = static_cast<std::byte>(value);
      try {
        const ReceivePlan plan = w.read();
        const Ints position = values(plan.position);
        EXPECT_EQ(std::set<int64_t>(position.begin(), position.end()).size(), position.size());
      } catch (const InvalidArgument&) {
      }
    }
  }
}

TEST(Plan, TensorsAreChecked) {
  Wires wires;
  const SendPlan send = make_send_plan(ids({3, 2, 1, 2, -1, -1, -1, 0}, 2), kShape);
  const ReceivePlan receive = wires.read();
  const auto good = to_tensors(send, receive);
  SendPlan s;
  ReceivePlan r;
  EXPECT_NO_THROW(from_tensors(good, 2, s, r));
  EXPECT_EQ(values(s.token_row), values(send.token_row));
  EXPECT_THROW(from_tensors(good, 3, s, r), InvalidArgument);
  for (std::size_t i = 0; i < good.size(); ++i) {
    auto bad = good;
    bad[i] = good[i].clone();
    bad[i][0] = -5;
    EXPECT_THROW(from_tensors(bad, 2, s, r), InvalidArgument) << "tensor " << i;
    bad[i] = good[i].to(at::kInt);
    EXPECT_THROW(from_tensors(bad, 2, s, r), InvalidArgument) << "tensor " << i;
  }
}

}  // namespace
}  // namespace lshmoe
