#include "lshmoe/runtime/abandon.hpp"

#include <atomic>

namespace lshmoe {
namespace {

std::atomic<bool> g_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // or a signal handler could not set it

const char* advice(StepAbandoned::Reason reason) {
  return reason == StepAbandoned::Reason::stop
             ? " (no rank finishes this step): discard its gradients and end the job"
             : " (the training diverged, or its input is damaged): discard the step's gradients, "
               "then lower the learning rate or clip gradients";
}

}  // namespace

StepAbandoned::StepAbandoned(Reason why, const std::string& what_happened)
    : Error(what_happened + advice(why)), reason(why), cause(what_happened) {}

void request_abandon() noexcept { g_requested.store(true, std::memory_order_relaxed); }
void withdraw_abandon() noexcept { g_requested.store(false, std::memory_order_relaxed); }
bool abandon_requested() noexcept { return g_requested.load(std::memory_order_relaxed); }

}  // namespace lshmoe
