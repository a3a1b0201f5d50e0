// A job that ends badly in the way argv[1] says; victims.sh starts it and looks at what it leaves.

#include <csignal>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "lshmoe/comm/session.hpp"
#include "lshmoe/runtime/error.hpp"

namespace {

using lshmoe::Purpose;

constexpr int kVictim = 2;
constexpr int kSteps = 20;

void step(lshmoe::Communicator& world) {
  const auto ranks = static_cast<std::size_t>(world.size());
  const std::vector<std::int64_t> bytes(ranks, 100'000);
  std::vector<std::byte> send(100'000 * ranks), recv(send.size());
  world.all_to_all_v(send.data(), bytes, recv.data(), bytes, Purpose::dispatch);
}

int train(lshmoe::Communicator& world, const std::string& how) {
  const bool victim = world.rank() == kVictim % world.size();
  for (int i = 0; i < kSteps; ++i) {
    if (victim && i == kSteps / 2) {
      if (how == "throw") throw std::runtime_error("the victim's own error\nand its second line");
      if (how == "killed") std::raise(SIGKILL);
      if (how == "frozen") std::raise(SIGSTOP);
      if (how == "order") world.barrier();
    }
    step(world);
  }
  if (victim && how == "frozen_at_end") std::raise(SIGSTOP);
  if (world.rank() == 0) {
    std::printf("finished: %d ranks on %s\n", world.size(), std::string(world.backend()).c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string how = argc > 1 ? argv[1] : "finish";
  try {
    lshmoe::Session session(argc, argv, {.timeout_seconds = 2});
    // Without run() the exception unwinds through the Session.
    if (how == "unwind") return train(*session.world(), "throw");
    return session.run([&] { return train(*session.world(), how); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "caught in main: %s\n", error.what());
    return 3;
  }
}
