// lshmoe-train: trains a decoder-only transformer language model with MoE layers.

#include "lshmoe/launch/data.hpp"
#include "lshmoe/launch/train_program.hpp"

int main(int argc, char** argv) {
  using namespace lshmoe::launch;
  return train_program(argc, argv, [](const TrainOptions& options) {
    return std::make_unique<TextFiles>(text_options(options));
  });
}
