// What a peer announces and sends is not believed: a damaged number or byte is an error that names
// the peer, before memory is asked for.

#include "lshmoe/moe/exchange.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "lshmoe/comm/groups.hpp"
#include "tests/support/echo_peer.hpp"
#include "tests/support/errors.hpp"

// Sanitizers end the process where an allocation fails, unless told so here.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace lshmoe {
namespace {
using testing::EchoPeer;
using testing::expect_error;

constexpr int64_t kTokens = 5, kHidden = 40, kExperts = 4;

/// Forward and backward of one dispatch and combine: eight collectives, in pairs of sizes and rows.
void exchange(const CodecOptions& codec, EchoPeer::Tamper tamper, const at::Tensor& counts = {}) {
  ExpertGroups groups;
  groups.expert = std::make_shared<EchoPeer>(std::move(tamper));
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts).layer(0).codec(codec), groups);
  // The same tokens for the experts of both ranks.
  const at::Tensor id = at::arange(kTokens) % 2;
  const at::Tensor ids = at::stack({id, id + 2}, 1).contiguous();
  const at::Tensor x = at::sin(at::arange(kTokens * kHidden).to(at::kFloat))
                           .view({kTokens, kHidden})
                           .set_requires_grad(true);
  const at::Tensor weights = at::full({kTokens, 2}, 0.5F).set_requires_grad(true);
  const Dispatched d = dispatcher.dispatch(x, ids, weights, counts);
  ASSERT_EQ(d.rows.size(1), kHidden);
  if (counts.defined()) {
    EXPECT_TRUE(at::equal(d.counts, 2 * counts));
  }
  const at::Tensor y = dispatcher.combine(2 * d.rows, d);
  y.backward(at::ones_like(y));
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(x.grad().sizes(), x.sizes());
}

std::vector<std::pair<std::string, CodecOptions>> codecs() {
  return {{"none", CodecOptions().kind("none")},
          {"fp8", CodecOptions().kind("fp8")},
          {"lsh", CodecOptions()},
          {"source", CodecOptions().restore("source")}};
}

// The first collective's answer: u8 version, direction, dtype, backward; i32 object; i64 layer; i32
// hidden size, experts, top_k, forward; i64 assignments, bytes of attachment; for each group i64
// rows, bytes.
constexpr std::size_t kAssignments = 32, kAttachment = 40, kRows = 48, kParcel = 56;
void change(std::vector<std::byte>& answer, std::size_t offset, int64_t value) {
  std::memcpy(answer.data() + offset, &value, sizeof value);
}
int64_t number(const std::vector<std::byte>& answer, std::size_t offset) {
  int64_t value = 0;
  std::memcpy(&value, answer.data() + offset, sizeof value);
  return value;
}

TEST(Exchange, AnEchoIsAGoodPeer) {
  for (const auto& [name, codec] : codecs()) {
    SCOPED_TRACE(name);
    int calls = 0;
    exchange(codec, [&](int call, Purpose, auto&) { calls = call + 1; });
    EXPECT_EQ(calls, 8);
  }
}

TEST(Exchange, AnnouncedNumbersAreChecked) {
  constexpr int64_t kTiB = int64_t{1} << 40;
  for (const auto& [name, codec] : codecs()) {
    for (const int call : {0, 2, 4, 6}) {
      for (const std::size_t offset : {kAssignments, kAttachment, kRows, kParcel}) {
        for (const int64_t value :
             {int64_t{-1}, int64_t{1} << 20, kTiB, int64_t{1} << 43,
              std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
          // restore=source announces, as assignments, a number for the statistics only.
          if (offset == kAssignments && value > 0 && (name == "source" || call == 2 || call == 4))
            continue;
          SCOPED_TRACE(name + ", call " + std::to_string(call) + ", offset " +
                       std::to_string(offset) + ": " + std::to_string(value));
          expect_error<CommError>("rank 1 ", [&] {
            exchange(codec, [&](int at, Purpose, auto& answer) {
              ASSERT_LE(at, call);  // refused before the next collective
              if (at == call) change(answer, offset, value);
            });
          });
        }
      }
    }
  }
}

TEST(Exchange, CountsAreChecked) {
  for (const auto& [name, codec] : codecs()) {
    SCOPED_TRACE(name);
    const at::Tensor counts = at::tensor({3, 0, 5}, at::kLong);
    exchange(codec, {}, counts);
    expect_error<CommError>("rank 1 counts -1 choices in dispatch", [&] {
      exchange(
          codec,
          [](int call, Purpose, auto& answer) {
            if (call == 1) std::fill_n(answer.begin() + 8, 4, std::byte{0xff});
          },
          counts);
    });
    // Told of counts that do not come, and the other way round.
    for (const bool own : {false, true}) {
      expect_error<CommError>("rank 1 disagrees about the world's load", [&] {
        exchange(
            codec,
            [](int call, Purpose, auto& answer) { answer[3] ^= std::byte(call == 0 ? 16 : 0); },
            own ? counts : at::Tensor());
      });
    }
  }
}

// Sizes that fit each other, and are more than there is memory for.
TEST(Exchange, RowsBeyondTheMemoryAreACommError) {
  expect_error<CommError>("bytes, which this machine has no memory for", [] {
    exchange(CodecOptions().kind("none"), [](int call, Purpose, auto& answer) {
      if (call != 0) return;
      const int64_t rows = int64_t{1} << 32;
      ASSERT_EQ(number(answer, kRows), kTokens);
      change(answer, kRows, rows - 1);
      change(answer, kParcel, (rows - 1) * 4 * kHidden * 2);
      change(answer, kAssignments, rows - 1);
      change(answer, kAttachment, (rows - 1) * 6);
    });
  });
}

// A peer that announces one row less and sends as much: what the rows' bytes say counts.
TEST(Exchange, SizesThatFitEachOtherButNotTheRows) {
  for (const auto& [name, codec] : codecs()) {
    SCOPED_TRACE(name);
    const auto one_less = [&, source = name == "source"](int call, Purpose, auto& answer) {
      if (call == 0) {
        change(answer, kRows, number(answer, kRows) - 1);
        if (source) return;
        change(answer, kAssignments, number(answer, kAssignments) - 1);
        change(answer, kAttachment, number(answer, kAttachment) - 6);
      } else if (call == 1 && !source) {
        answer.erase(answer.begin(), answer.begin() + 1);
        answer.erase(answer.begin() + kTokens, answer.begin() + kTokens + 5);
      }
    };
    EXPECT_THROW(exchange(codec, one_less), Error);
  }
}

TEST(Exchange, EveryByteOfTheAnswers) {
  for (const auto& [name, codec] : codecs()) {
    std::vector<std::size_t> sizes;
    exchange(codec, [&](int, Purpose, auto& answer) { sizes.push_back(answer.size()); });
    int refused = 0, taken = 0;
    for (int call = 0; call < 8; ++call) {
      const std::size_t size = sizes[static_cast<std::size_t>(call)];
      for (std::size_t i = 0; i<size; i += size> 200 ? 7 : 1) {
        for (const int flip : {1, 0x80}) {
          try {
            exchange(codec, [&](int at, Purpose, auto& answer) {
              if (at == call) answer[i] ^= static_cast<std::byte>(flip);
            });
            ++taken;
          } catch (const Error&) {  // one of ours, and nothing else
            ++refused;
          }
        }
      }
    }
    EXPECT_GT(refused, 4 * taken) << name << " " << taken;
  }
}

}  // namespace
}  // namespace lshmoe
