// One Dispatcher used by several threads of a rank.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include "lshmoe/moe/dispatcher.hpp"
#include "lshmoe/moe/exchange.hpp"
#include "lshmoe/moe/gate.hpp"
#include "tests/support/echo_peer.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::EchoPeer;
using testing::expect_error;
using testing::world;

constexpr int64_t kHidden = 64, kExperts = 8;
constexpr int kThreads = 4, kCalls = 60;

struct Result {
  at::Tensor y, grad;
};
/// Forward and backward of the call's own rows; the experts double them.
Result run(const Dispatcher& dispatcher, int thread, int call) {
  at::Generator stream =
      at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(1000 * thread + call));
  const int64_t tokens = at::randint(1, 200, {1}, stream, at::kLong).item<int64_t>();
  const at::Tensor x = at::randn({tokens, kHidden}, stream).set_requires_grad(call % 2 == 0);
  const at::Tensor first = at::randint(kExperts, {tokens}, stream, at::kLong);
  const at::Tensor ids = at::stack({first, (first + 3) % kExperts}, 1);
  const Dispatched d = dispatcher.dispatch(x, ids, at::full({tokens, 2}, 0.5F));
  Result result;
  result.y = dispatcher.combine(2 * d.rows, d);
  if (x.requires_grad()) result.grad = torch::autograd::grad({result.y}, {x}, {x.detach()})[0];
  result.y = result.y.detach();
  EXPECT_EQ(result.y.sizes(), x.sizes());
  EXPECT_LE((result.y - 2 * x.detach()).norm().item<double>(), 0.25 * x.norm().item<double>());
  return result;
}

template <class Work>
void in_threads(Work work) {
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back([&work, t] { work(t); });
  for (std::thread& thread : threads) thread.join();
}

// Each thread chooses its own expert as often as the others do, so that the bias stays where it is.
TEST(Threads, OneGateCountsTheLoadOfAll) {
  Gate gate(GateOptions(kHidden, kThreads)
                .top_k(1)
                .score_function("sigmoid")
                .expert_bias_rate(1)
                .layer(0));
  const at::Tensor x = at::ones({3, kHidden});
  in_threads([&](int t) {
    const at::Tensor ids = at::full({3, 1}, t, at::kLong);
    for (int call = 0; call < 10 * kCalls; ++call) (void)gate->forward(x, ids);
  });
  gate->update_expert_bias(*world());
  EXPECT_TRUE(at::equal(gate->expert_bias, at::zeros({kThreads}))) << gate->expert_bias;
  (void)gate->forward(x, at::zeros({3, 1}, at::kLong));
  gate->update_expert_bias(*world());
  EXPECT_TRUE(at::equal(gate->expert_bias, at::tensor({-1.F, 1.F, 1.F, 1.F}))) << gate->expert_bias;
}

// Each rank is its own expert group. The results are those of one thread, to the bit.
TEST(Threads, OneDispatcherGivesTheResultsOfOneThread) {
  const ExpertGroups groups = make_expert_groups(world(), 1);
  const std::vector<CodecOptions> codecs{CodecOptions().kind("none"), CodecOptions().kind("int8"),
                                         CodecOptions().max_error(0.05),
                                         CodecOptions().max_error(0.05).state("learned")};
  for (const CodecOptions& codec : codecs) {
    for (const bool codec_on_self : {false, true}) {
      SCOPED_TRACE(::testing::Message() << codec.kind() << " " << codec.state() << codec_on_self);
      const Dispatcher dispatcher(
          DispatcherOptions(kHidden, kExperts).codec(codec).codec_on_self(codec_on_self), groups);
      std::vector<std::vector<Result>> want(kThreads);
      for (int t = 0; t < kThreads; ++t)
        for (int call = 0; call < kCalls; ++call) want[t].push_back(run(dispatcher, t, call));
      std::atomic<int> different = 0;
      in_threads([&](int t) {
        for (int call = 0; call < kCalls; ++call) {
          const Result got = run(dispatcher, t, call);
          const Result& expected = want[t][static_cast<std::size_t>(call)];
          different += at::equal(got.y, expected.y) ? 0 : 1;
          if (expected.grad.defined()) different += at::equal(got.grad, expected.grad) ? 0 : 1;
        }
      });
      EXPECT_EQ(different, 0);
    }
  }
}

// The learned state changes between calls, not within one.
TEST(Threads, StatesMayBeRefreshedMeanwhile) {
  const ExpertGroups groups = make_expert_groups(world(), 1);
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts)
                                  .codec(CodecOptions()
                                             .max_error(0.05)
                                             .state("learned")
                                             .codebook_size(16)
                                             .sample_rows(64)
                                             .refresh_every(2))
                                  .codec_on_self(true),
                              groups);
  std::atomic<int> running = kThreads;
  std::thread refresher([&] {
    for (int i = 0; running > 0 && i < 100000; ++i) {
      dispatcher.refresh_codecs();
      static_cast<void>(dispatcher.state_stats(Direction::dispatch));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  std::atomic<int> unknown_version = 0;
  in_threads([&](int t) {
    for (int call = 0; call < kCalls; ++call) {
      try {
        static_cast<void>(run(dispatcher, t, call));
      } catch (const InvalidArgument& error) {
        // Two refreshes between an encode and its decode: its state is known no more.
        EXPECT_NE(std::string(error.what()).find("refresh"), std::string::npos) << error.what();
        ++unknown_version;
      }
    }
    --running;
  });
  refresher.join();
  EXPECT_GT(dispatcher.state_stats(Direction::dispatch).version, 1);
}

TEST(Threads, CommunicatorsOfOneRankTakeTurns) {
  const ExpertGroups groups = make_expert_groups(world(), 1);
  std::atomic<int> wrong = 0;
  in_threads([&](int t) {
    for (int i = 0; i < 200; ++i) {
      std::vector<double> values(static_cast<std::size_t>(1 + (i + t) % 7), t);
      groups.expert->all_reduce(std::span(values), ReduceOp::sum, Purpose::control);
      for (const double value : values) wrong += value == t ? 0 : 1;
    }
  });
  EXPECT_EQ(wrong, 0);
}

// In a group of several ranks a second thread is refused while one is in a collective; the first
// goes on.
TEST(Threads, OfSeveralRanksASecondOneIsRefused) {
  ExpertGroups groups;
  const Dispatcher* used = nullptr;
  const at::Tensor ids = at::tensor({0, 4}, at::kLong).expand({3, 2}).contiguous();
  const at::Tensor x = at::ones({3, kHidden}), weights = at::full({3, 2}, 0.5F);
  std::set<int> calls;
  groups.expert = std::make_shared<EchoPeer>([&](int call, Purpose, std::vector<std::byte>&) {
    calls.insert(call);
    std::thread([&] {
      expect_error(
          "two threads of this rank are in collectives of several ranks at a time, one of "
          "them of 'echo'",
          [&] { (void)used->dispatch(x, ids, weights); });
      expect_error("two threads", [&] { groups.expert->barrier(); });
    }).join();
  });
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts), groups);
  used = &dispatcher;
  const Dispatched d = dispatcher.dispatch(x, ids, weights);
  EXPECT_TRUE(at::equal(dispatcher.combine(d.rows, d), x));
  EXPECT_EQ(calls, (std::set<int>{0, 1, 2, 3}));
}

TEST(ByteBuffers, AreGivenOnceAtATime) {
  ByteBuffers buffers;
  at::Tensor a = buffers.take(100);
  const void* first = a.data_ptr();
  EXPECT_GE(a.numel(), 100);
  at::Tensor b = buffers.take(10);
  EXPECT_NE(b.data_ptr(), first);
  const at::Tensor view = a.narrow(0, 3, 5);
  a = at::Tensor();
  EXPECT_NE(buffers.take(100).data_ptr(), first) << "a view refers to it";
  a = view;
}

TEST(ByteBuffers, AreUsedAgain) {
  ByteBuffers buffers;
  at::Tensor large = buffers.take(1000), small = buffers.take(10);
  const void *of_large = large.data_ptr(), *of_small = small.data_ptr();
  large = small = at::Tensor();
  small = buffers.take(7);
  EXPECT_EQ(small.data_ptr(), of_small);
  EXPECT_EQ(buffers.take(8).data_ptr(), of_large);
  EXPECT_EQ(buffers.take(1000).data_ptr(), of_large);
}

}  // namespace
}  // namespace lshmoe
