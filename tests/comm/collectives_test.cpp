// Every collective against what it must give, on however many ranks this runs. Messages cut
// into chunks: mpi_errors_test.cpp.

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "lshmoe/runtime/error.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::world;

// The byte at place i of what rank `from` sends to rank `to`.
std::byte pattern(int from, int to, std::size_t i) {
  return static_cast<std::byte>(31 * from + 7 * to + 3 * static_cast<int>(i % 251) + 1);
}

// Sends size_of(from, to) bytes between all ranks and checks every byte that comes.
template <class SizeOf>
void check_all_to_all_v(Communicator& comm, SizeOf size_of) {
  const int ranks = comm.size();
  std::vector<std::int64_t> send_bytes, recv_bytes;
  std::vector<std::byte> send, expected;
  for (int r = 0; r < ranks; ++r) {
    send_bytes.push_back(size_of(comm.rank(), r));
    recv_bytes.push_back(size_of(r, comm.rank()));
    for (std::int64_t i = 0; i < send_bytes.back(); ++i) {
      send.push_back(pattern(comm.rank(), r, static_cast<std::size_t>(i)));
    }
    for (std::int64_t i = 0; i < recv_bytes.back(); ++i) {
      expected.push_back(pattern(r, comm.rank(), static_cast<std::size_t>(i)));
    }
  }
  std::vector<std::byte> recv(expected.size(), std::byte{0xee});
  const Traffic before = comm.traffic(Purpose::dispatch);
  comm.all_to_all_v(send.data(), send_bytes, recv.data(), recv_bytes, Purpose::dispatch);
  EXPECT_TRUE(recv == expected);
  const Traffic after = comm.traffic(Purpose::dispatch);
  const auto own = static_cast<std::size_t>(comm.rank());
  const auto stays = static_cast<std::uint64_t>(send_bytes[own]);
  EXPECT_EQ(after.bytes_sent - before.bytes_sent, send.size() - stays);
  EXPECT_EQ(after.bytes_received - before.bytes_received, recv.size() - stays);
  EXPECT_EQ(after.calls - before.calls, ranks > 1 ? 1u : 0u);
}

TEST(Collectives, AllToAllVOfUnevenSizes) {
  check_all_to_all_v(*world(), [](int from, int to) { return 5 * from + 3 * to + 1; });
}

TEST(Collectives, AllToAllVOfNothing) {
  check_all_to_all_v(*world(), [](int, int) { return 0; });
}

TEST(Collectives, AllToAllVWithSilentRanks) {
  check_all_to_all_v(*world(), [](int from, int to) { return from == 0 && to != 0 ? 4000 : 0; });
  check_all_to_all_v(*world(), [](int from, int to) { return from != 0 && to == 0 ? 4000 : 0; });
}

// 1024 B is the largest block that travels inside its envelope.
TEST(Collectives, AllToAllVAroundTheSizeOfAnEnvelope) {
  for (const int bytes : {1, 1023, 1024, 1025, 4096, 70'000, 1'000'003}) {
    check_all_to_all_v(*world(), [=](int, int) { return bytes; });
  }
}

TEST(Collectives, AllToAllVManyTimesWithoutABarrier) {
  std::mt19937 random(7);  // the same on all ranks
  for (int round = 0; round < 200; ++round) {
    std::vector<std::int64_t> sizes(static_cast<std::size_t>(world()->size() * world()->size()));
    for (std::int64_t& size : sizes) size = random() % 3 == 0 ? 0 : random() % 5000;
    check_all_to_all_v(*world(), [&](int from, int to) {
      return sizes[static_cast<std::size_t>(from * world()->size() + to)];
    });
  }
}

TEST(Collectives, AllToAllMovesBlocks) {
  const int ranks = world()->size();
  std::vector<std::int64_t> send, recv(static_cast<std::size_t>(ranks), -1);
  for (int r = 0; r < ranks; ++r) send.push_back(100 * world()->rank() + r);
  world()->all_to_all(send.data(), recv.data(), sizeof(std::int64_t), Purpose::plan);
  for (int r = 0; r < ranks; ++r) {
    EXPECT_EQ(recv[static_cast<std::size_t>(r)], 100 * r + world()->rank());
  }
}

TEST(Collectives, AllGatherGivesOneValueOfEachRank) {
  const auto values = all_gather(*world(), world()->rank() * 2 + 1, Purpose::control);
  EXPECT_EQ(values.size(), static_cast<std::size_t>(world()->size()));
  for (std::size_t r = 0; r < values.size(); ++r) EXPECT_EQ(values[r], static_cast<int>(2 * r + 1));
}

TEST(Collectives, BroadcastFromEachRoot) {
  for (int root = 0; root < world()->size(); ++root) {
    for (const std::size_t bytes : {0, 8, 1024, 5000, 300'000}) {
      std::vector<std::byte> data(bytes, std::byte{0});
      for (std::size_t i = 0; i < bytes && world()->rank() == root; ++i) {
        data[i] = pattern(root, 0, i);
      }
      world()->broadcast(data.data(), bytes, root, Purpose::checkpoint);
      for (std::size_t i = 0; i < bytes; ++i) {
        if (data[i] != pattern(root, 0, i)) {
          ADD_FAILURE() << "byte " << i << " of " << bytes << " from root " << root;
          break;
        }
      }
    }
  }
}

TEST(Collectives, GatherOfUnevenSizesToEachRoot) {
  for (int root = 0; root < world()->size(); ++root) {
    const auto size_of = [](int rank) { return static_cast<std::size_t>(rank) * 2500; };
    std::vector<std::byte> mine(size_of(world()->rank()));
    for (std::size_t i = 0; i < mine.size(); ++i) mine[i] = pattern(world()->rank(), root, i);
    const auto blocks = world()->gather(mine, root, Purpose::control);
    if (world()->rank() != root) {
      EXPECT_TRUE(blocks.empty());
      continue;
    }
    EXPECT_EQ(blocks.size(), static_cast<std::size_t>(world()->size()));
    for (int r = 0; r < world()->size(); ++r) {
      const auto& block = blocks.at(static_cast<std::size_t>(r));
      EXPECT_EQ(block.size(), size_of(r));
      for (std::size_t i = 0; i < block.size(); ++i) {
        if (block[i] != pattern(r, root, i)) {
          ADD_FAILURE() << "byte " << i << " from rank " << r;
          break;
        }
      }
    }
  }
}

// What rank r puts in element i: values whose float sum depends on the order of summing.
template <class T>
T term(int rank, std::size_t i) {
  std::mt19937 random(static_cast<unsigned>(1000 * rank + static_cast<int>(i)));
  const double value = std::uniform_real_distribution<double>(-1.0, 1.0)(random);
  return static_cast<T>(value * std::pow(10.0, static_cast<double>(random() % 9)));
}

template <class T>
void check_all_reduce(std::size_t count, ReduceOp op) {
  std::vector<T> data(count), expected(count);
  for (std::size_t i = 0; i < count; ++i) {
    data[i] = term<T>(world()->rank(), i);
    expected[i] = term<T>(0, i);
    for (int r = 1; r < world()->size(); ++r) {
      const T next = term<T>(r, i);
      expected[i] = op == ReduceOp::sum   ? expected[i] + next
                    : op == ReduceOp::min ? std::min(expected[i], next)
                                          : std::max(expected[i], next);
    }
  }
  world()->all_reduce(std::span<T>(data), op, Purpose::gradients);
  // Bits, not values: the order of summing is promised.
  EXPECT_EQ(count == 0 ? 0 : std::memcmp(data.data(), expected.data(), count * sizeof(T)), 0)
      << count << " elements";
}

TEST(Collectives, AllReduceIsTheSumInRankOrderBitForBit) {
  // Around the change from whole rows to slices (1024 B), and counts no rank number divides.
  for (const std::size_t count : {0, 1, 3, 127, 128, 129, 255, 256, 257, 1001, 40'003}) {
    for (const ReduceOp op : {ReduceOp::sum, ReduceOp::min, ReduceOp::max}) {
      check_all_reduce<float>(count, op);
      check_all_reduce<double>(count, op);
      check_all_reduce<std::int64_t>(count, op);
    }
  }
}

TEST(Collectives, AllReduceKeepsNaN) {
  for (const std::size_t count : {2, 1000}) {
    for (const ReduceOp op : {ReduceOp::sum, ReduceOp::min, ReduceOp::max}) {
      for (int bad = 0; bad < world()->size(); ++bad) {
        std::vector<float> data(count, 1.0f);
        if (world()->rank() == bad) data.back() = std::numeric_limits<float>::quiet_NaN();
        world()->all_reduce(std::span<float>(data), op, Purpose::gradients);
        EXPECT_TRUE(std::isnan(data.back())) << "NaN of rank " << bad << " was lost";
        EXPECT_FALSE(std::isnan(data.front()));
      }
    }
  }
}

TEST(Collectives, AllReduceCountsWhatItSends) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const std::uint64_t peers = static_cast<std::uint64_t>(world()->size() - 1);
  const std::size_t count = static_cast<std::size_t>(world()->size()) * 1000;  // even slices
  std::vector<float> data(count, 1.0f);
  const Traffic before = world()->traffic(Purpose::gradients);
  world()->all_reduce(std::span<float>(data), ReduceOp::sum, Purpose::gradients);
  const Traffic after = world()->traffic(Purpose::gradients);
  EXPECT_EQ(after.bytes_sent - before.bytes_sent, 2 * peers * 1000 * sizeof(float));
  EXPECT_EQ(after.bytes_received - before.bytes_received, 2 * peers * 1000 * sizeof(float));
  EXPECT_EQ(after.calls - before.calls, 1u);
}

TEST(Collectives, BarrierWaitsForTheLastRank) {
  // Time is the witness: nobody may leave before the last one entered.
  using Clock = std::chrono::steady_clock;
  world()->barrier();
  const auto start = Clock::now();
  if (world()->rank() == world()->size() - 1) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  world()->barrier();
  EXPECT_GE(Clock::now() - start, std::chrono::milliseconds(world()->size() > 1 ? 50 : 100));
}

TEST(Collectives, CountersAreApartForEachPurpose) {
  const Traffic plan = world()->traffic(Purpose::plan);
  const Traffic total = world()->traffic();
  check_all_to_all_v(*world(), [](int, int) { return 10; });
  EXPECT_EQ(world()->traffic(Purpose::plan).calls, plan.calls);
  EXPECT_EQ(world()->traffic(Purpose::plan).bytes_sent, plan.bytes_sent);
  const std::uint64_t peers = static_cast<std::uint64_t>(world()->size() - 1);
  EXPECT_EQ(world()->traffic().bytes_sent - total.bytes_sent, 10 * peers);
  EXPECT_EQ(name_of(Purpose::dispatch_backward), "dispatch_backward");
}

// Arguments that are wrong on this rank alone are refused before anything is sent: the communicator
// works on.
TEST(Collectives, BadArgumentsAreRefusedAndHarmNothing) {
  const auto ranks = static_cast<std::size_t>(world()->size());
  const std::vector<std::int64_t> right(ranks, 0), short_one(ranks + 1, 0), negative(ranks, -1);
  const auto exchange = [&](const std::vector<std::int64_t>& send,
                            const std::vector<std::int64_t>& recv) {
    world()->all_to_all_v(nullptr, send, nullptr, recv, Purpose::dispatch);
  };
  EXPECT_THROW(exchange(short_one, right), InvalidArgument);
  EXPECT_THROW(exchange(negative, right), InvalidArgument);
  std::vector<std::int64_t> unequal(right);
  unequal[static_cast<std::size_t>(world()->rank())] = 4;
  EXPECT_THROW(exchange(unequal, right), InvalidArgument);
  EXPECT_THROW(world()->broadcast(nullptr, 0, world()->size(), Purpose::control), InvalidArgument);
  EXPECT_THROW((void)world()->gather({}, -1, Purpose::control), InvalidArgument);
  EXPECT_THROW((void)world()->split(-1, 0, "x"), InvalidArgument);
  EXPECT_THROW((void)world()->traffic(Purpose::count_), InvalidArgument);
  exchange(right, right);
}

}  // namespace
}  // namespace lshmoe
