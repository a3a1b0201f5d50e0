// The mpi backend where ranks disagree, and where messages are cut into chunks. Each test uses its
// own communicator, because an error kills it; the session's world lives on.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "lshmoe/comm/keep_buffer.hpp"
#include "lshmoe/comm/mpi/adopt.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::world;

std::shared_ptr<Communicator> fresh(double timeout_seconds = 20,
                                    std::size_t chunk_bytes = std::size_t{1} << 30) {
  return adopt_mpi(
      MPI_COMM_WORLD,
      {.name = "adopted", .timeout_seconds = timeout_seconds, .chunk_bytes = chunk_bytes});
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// The text of the CommError that `body` throws, "" if it throws none.
template <class E = CommError>
std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

std::vector<std::int64_t> sizes(const Communicator& comm, std::int64_t bytes) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(comm.size()), bytes);
}

// After an error on a communicator: it is dead at once, and the world still works.
void expect_dead(Communicator& comm) {
  const auto start = std::chrono::steady_clock::now();
  const std::string text = error_of([&] { comm.barrier(); });
  EXPECT_TRUE(has(text, "is dead since an earlier error")) << text;
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  world()->barrier();
}

TEST(Chunks, LargeBlocksArriveWholeInSmallMessages) {
  for (const std::size_t chunk : {7, 1024, 3000}) {
    const auto comm = fresh(20, chunk);
    const auto ranks = static_cast<std::size_t>(comm->size());
    for (const std::int64_t bytes : {1024, 1025, 3000, 20'011}) {
      std::vector<unsigned char> send(ranks * static_cast<std::size_t>(bytes)), recv(send.size());
      for (std::size_t i = 0; i < send.size(); ++i) {
        send[i] = static_cast<unsigned char>(i % 253 + static_cast<std::size_t>(comm->rank()));
      }
      comm->all_to_all_v(send.data(), sizes(*comm, bytes), recv.data(), sizes(*comm, bytes),
                         Purpose::dispatch);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < recv.size(); ++i) {
        const std::size_t from = i / static_cast<std::size_t>(bytes);
        const std::size_t at =
            static_cast<std::size_t>(comm->rank() * bytes) + i % static_cast<std::size_t>(bytes);
        wrong += recv[i] != static_cast<unsigned char>(at % 253 + from);
      }
      EXPECT_EQ(wrong, 0u) << bytes << " B in chunks of " << chunk;
    }
  }
}

TEST(Chunks, SplitKeepsTheChunkSize) {
  const auto comm = fresh(20, 64)->split(0, 0, "all");
  std::vector<double> data(5000, comm->rank() + 1.0);
  comm->all_reduce(std::span(data), ReduceOp::sum, Purpose::gradients);
  const double expected = comm->size() * (comm->size() + 1) / 2.0;
  EXPECT_EQ(std::count(data.begin(), data.end(), expected), 5000);
}

TEST(Chunks, BadSizesAreRefused) {
  EXPECT_THROW((void)fresh(20, 0), InvalidArgument);
  EXPECT_THROW((void)fresh(20, std::size_t{1} << 31), InvalidArgument);
  EXPECT_THROW((void)fresh(0), InvalidArgument);
}

TEST(Mismatch, DifferentCollectivesNameBoth) {
  const auto comm = fresh();
  const std::string text = error_of([&] {
    if (comm->rank() == 0) {
      comm->barrier();
    } else {
      const auto none = sizes(*comm, 0);
      comm->all_to_all_v(nullptr, none, nullptr, none, Purpose::dispatch);
      comm->barrier();  // with 4 ranks, 1 to 3 may agree until they hear from rank 0
    }
  });
  EXPECT_FALSE(text.empty());
  EXPECT_TRUE(has(text, "barrier for control")) << text;
  EXPECT_TRUE(has(text, "all_to_all_v for dispatch")) << text;
  EXPECT_TRUE(has(text, "'adopted'")) << text;
  expect_dead(*comm);
}

TEST(Mismatch, PurposesCountAsDifferent) {
  const auto comm = fresh();
  const std::string text = error_of([&] {
    comm->barrier(comm->rank() == 0 ? Purpose::plan : Purpose::gradients);
    comm->barrier();
  });
  EXPECT_TRUE(has(text, "barrier for plan") && has(text, "barrier for gradients")) << text;
  expect_dead(*comm);
}

TEST(Mismatch, ReductionsOfDifferentCounts) {
  for (const std::size_t count : {3, 3000}) {
    const auto comm = fresh();
    std::vector<float> data(count + (comm->rank() == 0 ? 1 : 0));
    const std::string text = error_of([&] {
      comm->all_reduce(std::span(data), ReduceOp::sum, Purpose::gradients);
      comm->barrier();
    });
    EXPECT_TRUE(has(text, "all_reduce for gradients (sum of f32) of " +
                              std::to_string(count * sizeof(float)) + " B"))
        << text;
    expect_dead(*comm);
  }
}

// Rank 0 sends 10 B (or more than an envelope takes) more, or fewer, than the others expect.
TEST(Mismatch, SizesNameThePeerAndBoth) {
  for (const std::int64_t expected : {100, 50'000}) {
    for (const std::int64_t sent : {expected - 10, expected + 10}) {
      const auto comm = fresh();
      const auto bytes = static_cast<std::size_t>(60'000 * comm->size());
      std::vector<std::byte> send(bytes), recv(bytes);
      auto send_bytes = sizes(*comm, expected);
      if (comm->rank() == 0) {
        for (std::size_t r = 1; r < send_bytes.size(); ++r) send_bytes[r] = sent;
      }
      const std::string text = error_of([&] {
        comm->all_to_all_v(send.data(), send_bytes, recv.data(), sizes(*comm, expected),
                           Purpose::combine);
        comm->barrier();
      });
      EXPECT_TRUE(has(text, "sends " + std::to_string(sent) + " B but this rank expects " +
                                std::to_string(expected) + " B"))
          << text;
      EXPECT_TRUE(has(text, "all_to_all_v for combine")) << text;
      EXPECT_TRUE(has(text, "rank 0")) << text;
      expect_dead(*comm);
    }
  }
}

TEST(Deadline, NamesTheRankThatDoesNotComeAndTheSizes) {
  const auto comm = fresh(0.3);
  const int missing = comm->size() - 1;
  if (comm->rank() == missing) {
    // Comes when all others gave up: it hears of it at once.
    world()->barrier();
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::byte> send(static_cast<std::size_t>(5000 * comm->size())), recv(send.size());
    const std::string text = error_of<Timeout>([&] {
      comm->all_to_all_v(send.data(), sizes(*comm, 5000), recv.data(), sizes(*comm, 5000),
                         Purpose::dispatch);
      comm->barrier();
    });
    EXPECT_TRUE(has(text, "gave up")) << text;
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  } else {
    std::vector<std::byte> send(static_cast<std::size_t>(5000 * comm->size())), recv(send.size());
    const std::string text = error_of<Timeout>([&] {
      comm->all_to_all_v(send.data(), sizes(*comm, 5000), recv.data(), sizes(*comm, 5000),
                         Purpose::dispatch);
    });
    EXPECT_TRUE(
        has(text, "no answer for 0.3 s in all_to_all_v for dispatch on 'adopted', exchange"))
        << text;
    EXPECT_TRUE(has(text, "waited for rank " + std::to_string(missing) + " on " +
                              comm->host(missing) + " (has not come)"))
        << text;
    EXPECT_TRUE(has(text, "this rank sends " + std::to_string(5000 * (comm->size() - 1)) + " B ["))
        << text;
    EXPECT_TRUE(has(error_of([&] { comm->barrier(); }), "is dead since"));
    world()->barrier();
  }
}

// A rank in other work is late, not lost.
TEST(Deadline, LateIsNotLost) {
  const auto comm = fresh(10);
  if (comm->rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(300));
  comm->barrier();
  EXPECT_EQ(comm->traffic(Purpose::control).calls, 1u);
}

TEST(KeepBuffer, OutlivesAFailedSendAlone) {
  const auto alive_after = [](const std::function<void()>& call) {
    auto memory = std::make_shared<int>(7);
    const std::weak_ptr<int> watch = memory;
    try {
      keep_buffer_on_error(memory, call);
    } catch (const Error&) {
    }
    memory.reset();
    return !watch.expired();
  };
  EXPECT_FALSE(alive_after([] {}));
  EXPECT_FALSE(alive_after([] { throw InvalidArgument("nothing was sent"); }));
  EXPECT_TRUE(alive_after([] { throw CommError("sent, not taken"); }));
  EXPECT_TRUE(alive_after([] { throw Timeout("sent, not taken"); }));
}

TEST(Adopt, IsApartFromTheCallersMessages) {
  const auto comm = fresh();
  const int rank = comm->rank();
  const int next = (rank + 1) % comm->size();
  const int before = (rank + comm->size() - 1) % comm->size();
  int sent = rank, received = -1;
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Isend(&sent, 1, MPI_INT, next, 1, MPI_COMM_WORLD, &request);
  comm->barrier();
  MPI_Recv(&received, 1, MPI_INT, before, MPI_ANY_TAG, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  EXPECT_EQ(received, before);
}

}  // namespace
}  // namespace lshmoe
