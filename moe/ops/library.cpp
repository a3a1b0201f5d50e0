// Schemas of the ops, and the class that stands for an expert group in them.

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/ops/registration.hpp"

namespace lshmoe::ops {
namespace {

/// From Python: the expert group of a process alone.
ExchangePtr make_exchange(int64_t hidden_size, int64_t num_experts, const std::string& kind,
                          double max_error, bool codec_on_self) {
  return c10::make_intrusive<Exchange>(
      std::make_shared<ExchangeContext>(DispatcherOptions(hidden_size, num_experts)
                                            .codec_on_self(codec_on_self)
                                            .codec(CodecOptions().kind(kind).max_error(max_error)),
                                        make_self_communicator()));
}

}  // namespace

TORCH_LIBRARY(lshmoe, m) {
  m.class_<Exchange>("Exchange")
      .def(torch::init(&make_exchange), "",
           {torch::arg("hidden_size"), torch::arg("num_experts"), torch::arg("kind") = "none",
            torch::arg("max_error") = 0.1, torch::arg("codec_on_self") = false});
  constexpr const char* kSchemas[] = {
      "dispatch(Tensor x, Tensor topk_weights, Tensor topk_ids, "
      "__torch__.torch.classes.lshmoe.Exchange exchange) -> (Tensor rows, Tensor row_weights, "
      "Tensor tokens_per_expert, Tensor[] plan)",
      "dispatch_backward(Tensor grad_rows, Tensor grad_row_weights, Tensor[] plan, int top_k, "
      "__torch__.torch.classes.lshmoe.Exchange exchange) -> (Tensor grad_x, Tensor "
      "grad_topk_weights)",
      "combine(Tensor expert_output, Tensor row_weights, Tensor[] plan, "
      "__torch__.torch.classes.lshmoe.Exchange exchange) -> Tensor",
      "combine_backward(Tensor grad_output, Tensor expert_output, Tensor row_weights, Tensor[] "
      "plan, __torch__.torch.classes.lshmoe.Exchange exchange) -> (Tensor grad_expert_output, "
      "Tensor grad_row_weights)",
      "swap_rows(Tensor rows, Tensor link, Tensor rows_per_group, Tensor routed_rows, Tensor "
      "expected_rows, Tensor parcels, Tensor parcel_bytes, int direction, "
      "__torch__.torch.classes.lshmoe.Exchange exchange) -> (Tensor received, Tensor "
      "received_per_group, Tensor peers_routed_rows, Tensor link)",
      "encode(Tensor rows, int[] rows_per_group, str kind='lsh', float max_error=0.1, str "
      "restore='expert', str error_reference='', int seed=0) -> (Tensor bytes, Tensor "
      "bytes_per_group, Tensor assignment, Tensor centroids)",
      "decode(Tensor bytes, int[] bytes_per_group, int hidden_size, ScalarType dtype, str "
      "kind='lsh', float max_error=0.1, str restore='expert', str error_reference='', int seed=0) "
      "-> (Tensor rows, Tensor rows_per_group)",
  };
  for (const char* schema : kSchemas) m.def(schema);
}

namespace {
void register_all(torch::Library& m) {
  register_dispatch(m);
  register_combine(m);
  register_swap_rows(m);
  register_codec(m);
}
}  // namespace

TORCH_LIBRARY_IMPL(lshmoe, CPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(lshmoe, CUDA, m) { register_all(m); }

TORCH_LIBRARY_IMPL(lshmoe, Autograd, m) { register_autograd(m); }

}  // namespace lshmoe::ops
