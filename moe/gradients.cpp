#include "lshmoe/moe/gradients.hpp"

#include <ATen/record_function.h>

#include <algorithm>
#include <span>
#include <unordered_set>

#include "lshmoe/comm/keep_buffer.hpp"
#include "lshmoe/moe/device_rows.hpp"
#include "lshmoe/moe/layer.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// A number that differs, but for a rare accident, when the parameters' number or sizes do.
int64_t fingerprint(const std::vector<at::Tensor>& parameters) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  add(parameters.size());
  for (const at::Tensor& parameter : parameters) {
    add(static_cast<uint64_t>(parameter.scalar_type()));
    for (const int64_t size : parameter.sizes()) add(static_cast<uint64_t>(size));
    add(0xffff);
  }
  return static_cast<int64_t>(hash);
}

/// All ranks see all fingerprints and throw together, or some would wait for the others.
void check_equal(Communicator& world, const std::vector<at::Tensor>& parameters, int ep_size,
                 const char* what) {
  const auto all = all_gather(world, fingerprint(parameters), Purpose::control);
  for (std::size_t r = 0; r < all.size(); ++r) {
    const std::size_t first = r % static_cast<std::size_t>(ep_size);
    LSHMOE_VALIDATE(all[r] == all[first], "the ", what, " parameters of rank ", r,
                    " differ in number, size or dtype from rank ", first,
                    "'s (their gradients could not be added): build the same "
                    "model on every rank");
  }
}

/// Sums the gradients of `parameters` over `comm`, divides them by `divisor`. One flat buffer on
/// their device: fp32, or double for double parameters.
template <class Element>
void reduce_flat(Communicator& comm, const std::vector<at::Tensor>& parameters, double divisor) {
  const at::ScalarType dtype = c10::CppTypeToScalarType<Element>::value;
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters) count += parameter.numel();
  if (count == 0) return;
  const at::Device device = parameters[0].device();
  at::Tensor flat = at::empty({count}, at::dtype(dtype).device(device));
  int64_t at_element = 0;
  for (const at::Tensor& parameter : parameters) {
    flat.narrow(0, at_element, parameter.numel()).copy_(parameter.grad().reshape({-1}));
    at_element += parameter.numel();
  }
  const std::span elements(flat.data_ptr<Element>(), static_cast<std::size_t>(count));
  if (device.is_cpu()) {
    keep_buffer_on_error(flat,
                         [&] { comm.all_reduce(elements, ReduceOp::sum, Purpose::gradients); });
  } else if (comm.size() > 1) {
    const c10::DeviceGuard guard(device);
    comm.all_reduce(elements, Purpose::gradients, current_stream(device));
  }
  flat.div_(divisor);
  at_element = 0;
  for (const at::Tensor& parameter : parameters) {
    parameter.grad().copy_(flat.narrow(0, at_element, parameter.numel()).view(parameter.sizes()));
    at_element += parameter.numel();
  }
}

void reduce_all(Communicator& comm, const std::vector<at::Tensor>& parameters, double divisor) {
  std::vector<at::Tensor> singles, doubles;
  for (const at::Tensor& parameter : parameters) {
    // Zeros also in a world of one, or the optimiser's step would depend on the layout.
    if (!parameter.grad().defined()) {
      const_cast<at::Tensor&>(parameter).mutable_grad() = at::zeros_like(parameter);
    }
    (parameter.scalar_type() == at::kDouble ? doubles : singles).push_back(parameter);
  }
  if (divisor == 1) return;
  reduce_flat<float>(comm, singles, divisor);
  reduce_flat<double>(comm, doubles, divisor);
}

double squared_norm(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> norms;
  for (const at::Tensor& parameter : parameters) {
    if (!parameter.grad().defined()) continue;
    norms.push_back(at::linalg_vector_norm(parameter.grad(), 2, {}, false, at::kDouble));
  }
  if (norms.empty()) return 0;
  const at::Tensor all = at::stack(norms).cpu();  // one wait for a GPU
  double sum = 0;
  for (int64_t i = 0; i < all.numel(); ++i) {
    const double norm = all.const_data_ptr<double>()[i];
    sum += norm * norm;
  }
  return sum;
}

}  // namespace

GradientReducer::GradientReducer(ExpertGroups groups, torch::nn::Module& model,
                                 const std::vector<at::Tensor>& more_expert_parameters)
    : groups_(std::move(groups)) {
  std::unordered_set<const void*> is_expert;
  const auto mark = [&](const std::vector<at::Tensor>& parameters) {
    for (const at::Tensor& parameter : parameters)
      is_expert.insert(parameter.unsafeGetTensorImpl());
  };
  mark(more_expert_parameters);
  if (const auto* layer = dynamic_cast<const MoELayerImpl*>(&model))
    mark(layer->expert_parameters());
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (const auto* layer = dynamic_cast<const MoELayerImpl*>(module.get())) {
      mark(layer->expert_parameters());
    }
  }
  std::unordered_set<const void*> seen;  // a tied parameter is listed twice
  const auto add = [&](const at::Tensor& parameter) {
    if (!parameter.requires_grad() || !seen.insert(parameter.unsafeGetTensorImpl()).second) return;
    (is_expert.count(parameter.unsafeGetTensorImpl()) != 0 ? expert_ : shared_)
        .push_back(parameter);
  };
  for (const at::Tensor& parameter : model.parameters()) add(parameter);
  for (const at::Tensor& parameter : more_expert_parameters) add(parameter);
  for (const auto* parameters : {&shared_, &expert_}) {
    for (const at::Tensor& parameter : *parameters) {
      LSHMOE_VALIDATE(parameter.device() == parameters->front().device(), "parameters on ",
                      parameter.device(), " and on ", parameters->front().device(),
                      " (their gradients go in one buffer): put the model on one device");
    }
  }
  check_equal(*groups_.world, shared_, 1, "shared");
  check_equal(*groups_.world, expert_, groups_.expert->size(), "expert");
}

void GradientReducer::reduce() {
  RECORD_FUNCTION("lshmoe::reduce_gradients", std::vector<c10::IValue>{});
  const at::NoGradGuard no_grad;
  const double world_size = groups_.world->size();
  reduce_all(*groups_.world, shared_, world_size);
  reduce_all(*groups_.replica, expert_, world_size);
}

double GradientReducer::clip_grad_norm(double max_norm) {
  const at::NoGradGuard no_grad;
  double experts = squared_norm(expert_);
  groups_.expert->all_reduce(std::span(&experts, 1), ReduceOp::sum, Purpose::gradients);
  const double norm = std::sqrt(squared_norm(shared_) + experts);
  if (max_norm > 0 && norm > max_norm) {
    const double scale = max_norm / norm;
    for (const auto* parameters : {&shared_, &expert_}) {
      for (const at::Tensor& parameter : *parameters) {
        if (parameter.grad().defined()) parameter.grad().mul_(scale);
      }
    }
  }
  return norm;
}

}  // namespace lshmoe
