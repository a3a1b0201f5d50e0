#include "lshmoe/runtime/signals.hpp"

#include <array>
#include <csignal>
#include <cstddef>

#include "lshmoe/runtime/abandon.hpp"

namespace lshmoe {
namespace {

constexpr std::array<int, 3> kSignals = {SIGUSR1, SIGTERM, SIGINT};
volatile std::sig_atomic_t g_requested = 0;
std::array<struct sigaction, kSignals.size()> g_former;

extern "C" void on_stop_signal(int signal) {
  g_requested = 1;
  if (signal == SIGUSR1) return;
  request_abandon();
  std::signal(signal, SIG_DFL);
}

}  // namespace

StopFlag::StopFlag() {
  g_requested = 0;
  withdraw_abandon();
  struct sigaction action {};
  action.sa_handler = on_stop_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &g_former[i]);
}

StopFlag::~StopFlag() {
  withdraw_abandon();
  for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &g_former[i], nullptr);
}

bool StopFlag::requested() const { return g_requested != 0; }

void ignore_broken_pipes() { std::signal(SIGPIPE, SIG_IGN); }

}  // namespace lshmoe
