// The MoE layer as a torch class, so that the Python reference can run it beside its own in one
// process: torch.classes.lshmoe_reference.Layer.

#include <torch/custom_class.h>
#include <torch/torch.h>

#include <memory>

#include "lshmoe/comm/session.hpp"
#include "lshmoe/moe/layer.hpp"
#include "lshmoe/runtime/memory.hpp"

namespace {

/// Owns the process's Session: make one, and drop it before the process ends.
class Layer : public torch::CustomClassHolder {
 public:
  Layer(int64_t hidden_size, int64_t ffn_hidden_size, int64_t num_experts, int64_t top_k)
      : layer_(lshmoe::MoELayerOptions(hidden_size, ffn_hidden_size, num_experts).top_k(top_k),
               lshmoe::make_expert_groups(session_.world())) {}

  at::Tensor forward(const at::Tensor& x) { return layer_->forward(x).output; }
  at::Tensor experts(const at::Tensor& rows, std::vector<int64_t> rows_per_expert) {
    return layer_->experts->forward(rows, rows_per_expert);
  }
  /// gate.weight, experts.w1, experts.b1, experts.w2, experts.b2
  [[nodiscard]] std::vector<at::Tensor> parameters() const { return layer_->parameters(); }

 private:
  lshmoe::Session session_;
  lshmoe::MoELayer layer_;
};

TORCH_LIBRARY(lshmoe_reference, m) {
  lshmoe::tune_allocator();  // for both layers alike
  m.class_<Layer>("Layer")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t>())
      .def("forward", &Layer::forward)
      .def("experts", &Layer::experts)
      .def("parameters", &Layer::parameters);
}

}  // namespace
