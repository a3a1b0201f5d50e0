// Forward and backward of a dispatch with a peer that says anything: sizes, plan, gradients and
// parcels are refused with an error of ours, or the rows have the right shape.

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/moe/dispatcher.hpp"
#include "lshmoe/runtime/abandon.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/fuzz/target.hpp"
#include "tests/support/echo_peer.hpp"

// Sizes that fit each other but no memory are refused by a failing allocation; sanitizers end the
// process instead, unless told so here.
extern "C" const char* __asan_default_options() {
  return "allocator_may_return_null=1:max_allocation_size_mb=1024";
}

namespace lshmoe::fuzz {
namespace {
using testing::EchoPeer;
constexpr std::int64_t kTokens = 3, kHidden = 20, kExperts = 4;

CodecOptions codec_of(std::uint8_t choice) {
  switch (choice % 5) {
    case 0:
      return CodecOptions().kind("none");
    case 1:
      return CodecOptions().kind("int4");
    case 2:
      return CodecOptions().max_error(0.2);
    case 3:
      return CodecOptions().restore("source");
    default:
      return CodecOptions().restore("source").estimate_alpha(true);
  }
}

// An input: codec, rank, then changes of what the peer answers, each {u8 collective, u8 how, u16
// where, i64 value}, in the order of the collectives.
enum How : std::uint8_t { kByte = 0, kNumber = 1, kAdd = 2, kSize = 3, kHows = 4 };

class Changes {
 public:
  explicit Changes(Reader in) : in_(in) { next(); }

  void apply(int call, std::vector<std::byte>& answer) {
    for (; more_ && call_ == call; next()) {
      const std::size_t at = answer.empty() ? 0 : where_ % answer.size();
      if (how_ == kSize) {
        answer.resize(static_cast<std::uint64_t>(value_) % 4096);
      } else if (how_ == kByte && !answer.empty()) {
        answer[at] = static_cast<std::byte>(value_);
      } else if (answer.size() >= 8) {
        const std::size_t word = at / 8 * 8 + 8 <= answer.size() ? at / 8 * 8 : 0;
        std::uint64_t number = 0;
        std::memcpy(&number, answer.data() + word, 8);
        number = static_cast<std::uint64_t>(value_) + (how_ == kAdd ? number : 0);
        std::memcpy(answer.data() + word, &number, 8);
      }
    }
  }

 private:
  Reader in_;
  bool more_ = false;
  int call_ = 0;
  std::uint8_t how_ = 0;
  std::uint16_t where_ = 0;
  std::int64_t value_ = 0;

  void next() {
    more_ = in_.left() > 0;
    call_ = in_.take<std::uint8_t>() % 8;
    how_ = in_.take<std::uint8_t>() % kHows;
    where_ = in_.take<std::uint16_t>();
    value_ = in_.take<std::int64_t>();
  }
};

}  // namespace

std::vector<Input> seeds() {
  std::vector<Input> inputs;
  const auto add = [&](std::uint8_t codec, std::uint8_t rank,
                       std::initializer_list<std::array<std::int64_t, 4>> changes) {
    Input input{codec, rank};
    for (const auto& [call, how, where, value] : changes) {
      input.push_back(static_cast<std::uint8_t>(call));
      input.push_back(static_cast<std::uint8_t>(how));
      input.push_back(static_cast<std::uint8_t>(where));
      input.push_back(static_cast<std::uint8_t>(where >> 8));
      for (int shift = 0; shift < 64; shift += 8) {
        input.push_back(static_cast<std::uint8_t>(value >> shift));
      }
    }
    inputs.push_back(std::move(input));
  };
  for (std::uint8_t codec = 0; codec < 5; ++codec) {
    for (const std::uint8_t rank : {0, 1}) {
      add(codec, rank, {});
      for (const std::int64_t call : {0, 2, 4, 6}) {
        // Assignments, attachment, rows, bytes.
        for (const std::int64_t where : {32, 40, 48, 56}) {
          add(codec, rank, {{call, kAdd, where, -1}});
          add(codec, rank, {{call, kNumber, where, std::int64_t{1} << 40}});
        }
        // Bytes of rows that the rows' own bytes deny.
        add(codec, rank, {{call, kAdd, 56, 8}, {call + 1, kSize, 0, 200}});
        add(codec, rank, {{call + 1, kByte, 0, 1}});
        add(codec, rank, {{call + 1, kByte, 9, 77}});
      }
    }
  }
  // A row less, everywhere; and all that fits into an int64.
  add(0, 0, {{0, kAdd, 32, -1}, {0, kAdd, 40, -6}, {0, kAdd, 48, -1}, {0, kAdd, 56, -80}});
  add(0, 0,
      {{0, kNumber, 32, 1LL << 32}, {0, kNumber, 40, 6LL << 32}, {0, kNumber, 48, 1LL << 32}});
  return inputs;
}

}  // namespace lshmoe::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lshmoe;
  using namespace lshmoe::fuzz;
  Reader in(data, size);
  const CodecOptions codec = codec_of(in.take<std::uint8_t>());
  const int rank = in.take<std::uint8_t>() % 2;
  Changes changes(in);
  ExpertGroups groups;
  groups.expert = std::make_shared<EchoPeer>(
      [&](int call, Purpose, std::vector<std::byte>& answer) { changes.apply(call, answer); },
      rank);
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts).layer(0).codec(codec), groups);
  // The same tokens for the experts of both ranks.
  const at::Tensor id = at::arange(kTokens) % 2;
  const at::Tensor ids = at::stack({id, id + 2}, 1).contiguous();
  const at::Tensor x = at::sin(at::arange(kTokens * kHidden).to(at::kFloat))
                           .view({kTokens, kHidden})
                           .set_requires_grad(true);
  const at::Tensor weights = at::full({kTokens, 2}, 0.5F).set_requires_grad(true);
  try {
    const Dispatched d = dispatcher.dispatch(x, ids, weights);
    std::int64_t tokens = 0;
    for (const std::int64_t count : d.tokens_per_expert) tokens += count;
    LSHMOE_FUZZ_CHECK(d.rows.size(0) == tokens && d.rows.size(1) == kHidden);
    const at::Tensor y = dispatcher.combine(2 * d.rows, d);
    LSHMOE_FUZZ_CHECK(y.sizes() == x.sizes());
    y.backward(at::ones_like(y));
    LSHMOE_FUZZ_CHECK(x.grad().sizes() == x.sizes() && weights.grad().sizes() == weights.sizes());
  } catch (const CommError&) {
  } catch (const InvalidArgument&) {
  } catch (const StepAbandoned&) {  // the flag in a header
  }
  return 0;
}
