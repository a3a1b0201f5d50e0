// One MoE layer learns a function; runs alone or under mpirun, with the same program.
//
//   ./minimal            one process
//   mpirun -n 2 ./minimal

#include <torch/torch.h>

#include <cstdio>
#include <exception>

#include "lshmoe/comm/session.hpp"
#include "lshmoe/moe/gradients.hpp"
#include "lshmoe/moe/layer.hpp"

namespace {

void train(const lshmoe::Session& session) {
  const auto groups = lshmoe::make_expert_groups(session.world());
  const auto codec = lshmoe::CodecOptions().kind("lsh").max_error(0.1);
  lshmoe::MoELayer layer(
      lshmoe::MoELayerOptions(/*hidden_size=*/64, /*ffn_hidden_size=*/128, /*num_experts=*/4)
          .top_k(2)
          .aux_loss_coeff(0.01)
          .codec(codec),
      groups);
  lshmoe::GradientReducer reducer(groups, *layer);
  torch::optim::AdamW optimizer(layer->parameters(), torch::optim::AdamWOptions(1e-2));

  // Each rank has its own tokens: here, random rows and their sines.
  torch::manual_seed(1 + session.world()->rank());
  const torch::Tensor x = torch::randn({256, 64});
  const torch::Tensor target = torch::sin(x);

  for (int step = 0; step <= 100; ++step) {
    const lshmoe::MoEOutput out = layer->forward(x);
    const torch::Tensor loss = torch::mse_loss(out.output, target);
    optimizer.zero_grad();
    (loss + out.aux_loss).backward();
    reducer.reduce();
    reducer.clip_grad_norm(1.0);
    optimizer.step();
    lshmoe::end_step(*layer);
    if (step % 50 == 0 && session.world()->rank() == 0) {
      int64_t sent = 0, raw = 0;
      for (const auto& direction : out.stats.exchange->direction) {
        sent += direction.codec_bytes + direction.plan_bytes;
        raw += direction.bytes_raw;
      }
      std::printf("step %3d  loss %.4f  bytes sent %lld of %lld\n", step, loss.item<double>(),
                  static_cast<long long>(sent), static_cast<long long>(raw));
    }
  }
}

}  // namespace

int main(int argc, char** argv) try {
  lshmoe::Session session(argc, argv);
  try {
    train(session);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "minimal: %s\n", error.what());
    session.abort();
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "minimal: %s\n", error.what());
  return 1;
}
