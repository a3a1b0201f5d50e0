// lshmoe-train with data that does harm: in step 5 the rank LSHMOE_VICTIM_RANK throws, is killed or
// freezes, as LSHMOE_VICTIM says. train_test.py starts it.

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "lshmoe/launch/train_program.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {
namespace {

constexpr int64_t kStep = 5;

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

class HarmfulText final : public DataSource {
 public:
  explicit HarmfulText(TextOptions options) : text_(std::move(options)) {}

  at::Tensor train_windows(int64_t step, int64_t first, int64_t count) const override {
    const bool victim =
        std::to_string(std::max(0, process_rank())) == setting("LSHMOE_VICTIM_RANK");
    if (victim && step == kStep) {
      const std::string how = setting("LSHMOE_VICTIM");
      if (how == "throw") throw std::runtime_error("no more text\nand a second line");
      if (how == "kill") std::raise(SIGKILL);
      if (how == "freeze") std::raise(SIGSTOP);
    }
    return text_.train_windows(step, first, count);
  }
  int64_t vocab_size() const override { return text_.vocab_size(); }
  int64_t num_eval_windows() const override { return text_.num_eval_windows(); }
  at::Tensor eval_windows(int64_t first, int64_t count) const override {
    return text_.eval_windows(first, count);
  }
  int64_t fingerprint() const override { return text_.fingerprint(); }

 private:
  TextFiles text_;
};

}  // namespace
}  // namespace lshmoe::launch

int main(int argc, char** argv) {
  using namespace lshmoe::launch;
  return train_program(argc, argv, [](const TrainOptions& options) {
    return std::make_unique<HarmfulText>(text_options(options));
  });
}
