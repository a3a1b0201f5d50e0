#include "lshmoe/moe/gradients.hpp"

#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <sstream>
#include <string_view>
#include <unordered_set>

#include "lshmoe/comm/keep_buffer.hpp"
#include "lshmoe/moe/device_rows.hpp"
#include "lshmoe/moe/layer.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// FNV-1a.
class Hash {
 public:
  void add(uint64_t value) { hash_ = (hash_ ^ value) * 1099511628211u; }
  [[nodiscard]] uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 1469598103934665603u;
};

/// A number that differs, but for a rare accident, when the parameters' number or sizes do.
uint64_t fingerprint(const std::vector<at::Tensor>& parameters) {
  Hash hash;
  hash.add(parameters.size());
  for (const at::Tensor& parameter : parameters) {
    hash.add(static_cast<uint64_t>(parameter.scalar_type()));
    for (const int64_t size : parameter.sizes()) hash.add(static_cast<uint64_t>(size));
    hash.add(0xffff);
  }
  return hash.value();
}
uint64_t fingerprint(std::string_view text) {
  Hash hash;
  for (const char c : text) hash.add(static_cast<unsigned char>(c));
  return hash.value();
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

/// Numbers that layers drew differ where some ranks made other layers before them.
void check_numbers_equal(Communicator& world, const std::vector<MoELayerImpl*>& layers) {
  Hash hash;
  for (const MoELayerImpl* layer : layers) hash.add(static_cast<uint64_t>(*layer->options.layer()));
  const auto all = all_gather(world, hash.value(), Purpose::control);
  for (std::size_t r = 1; r < all.size(); ++r) {
    LSHMOE_VALIDATE(all[r] == all[0], "the MoE layers of rank ", r,
                    " have other numbers than rank 0's (each replica would start from other "
                    "weights): make the same layers in the same order on every rank, or give "
                    "them numbers by MoELayerOptions::layer");
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
    // Zeros also in a world of one, or the optimizer's step would depend on the layout.
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
    : groups_(std::move(groups)), model_(&model) {
  std::unordered_set<const void*> is_expert;
  const auto mark = [&](const std::vector<at::Tensor>& parameters) {
    for (const at::Tensor& parameter : parameters)
      is_expert.insert(parameter.unsafeGetTensorImpl());
  };
  mark(more_expert_parameters);
  const std::vector<MoELayerImpl*> layers = moe_layers(model);
  for (const MoELayerImpl* layer : layers) mark(layer->expert_parameters());
  std::unordered_set<const void*> seen;  // a tied parameter is listed twice
  const auto add = [&](const Named& parameter) {
    const auto* tensor = parameter.tensor.unsafeGetTensorImpl();
    if (seen.insert(tensor).second) {
      (is_expert.count(tensor) != 0 ? expert_ : shared_).push_back(parameter);
    }
  };
  for (const auto& item : model.named_parameters()) {
    all_.push_back({item.key(), item.value()});
    add(all_.back());
  }
  for (std::size_t i = 0; i < more_expert_parameters.size(); ++i) {
    add({detail::message("more_expert_parameters[", i, "]"), more_expert_parameters[i]});
  }
  for (const auto& parameters : {trained(shared_), trained(expert_)}) {
    for (const at::Tensor& parameter : parameters) {
      LSHMOE_VALIDATE(parameter.device() == parameters.front().device(), "parameters on ",
                      parameter.device(), " and on ", parameters.front().device(),
                      " (their gradients go in one buffer): put the model on one device");
    }
  }
  check_equal(*groups_.world, tensors(shared_), 1, "shared");
  check_equal(*groups_.world, tensors(expert_), groups_.expert->size(), "expert");
  check_numbers_equal(*groups_.world, layers);
}

std::vector<at::Tensor> GradientReducer::tensors(const std::vector<Named>& parameters) {
  std::vector<at::Tensor> all;
  for (const Named& parameter : parameters) all.push_back(parameter.tensor);
  return all;
}
std::vector<at::Tensor> GradientReducer::trained(const std::vector<Named>& parameters) {
  std::vector<at::Tensor> some;
  for (const Named& parameter : parameters) {
    if (parameter.tensor.requires_grad()) some.push_back(parameter.tensor);
  }
  return some;
}
std::vector<at::Tensor> GradientReducer::shared_parameters() const { return trained(shared_); }
std::vector<at::Tensor> GradientReducer::expert_parameters() const { return trained(expert_); }

// The first parameter that was added to the model, removed or replaced; empty: none.
std::string GradientReducer::changed_parameter() const {
  std::size_t i = 0;
  for (const auto& item : model_->named_parameters()) {
    const auto is_this = [&](const Named& known) { return item.value().is_same(known.tensor); };
    if (i == all_.size() || !is_this(all_[i])) {
      const bool known = std::any_of(all_.begin(), all_.end(), is_this);
      return known && i < all_.size() ? all_[i].name : item.key();
    }
    ++i;
  }
  return i < all_.size() ? all_[i].name : "";
}

// Each rank's word is a few bytes; what is wrong is asked for only where something is.
void GradientReducer::check_ranks_agree() const {
  const std::string changed = changed_parameter();
  std::string flags;  // of shared and expert parameters
  for (const auto* parameters : {&shared_, &expert_}) {
    for (const Named& parameter : *parameters) {
      flags.push_back(parameter.tensor.requires_grad() ? '1' : '0');
    }
  }
  struct Word {
    std::uint64_t shared, expert;
    std::int64_t changed;
  };
  const std::string_view all = flags;
  const Word mine{fingerprint(all.substr(0, shared_.size())),
                  fingerprint(all.substr(shared_.size())), changed.empty() ? 0 : 1};
  Communicator& world = *groups_.world;
  const std::vector<Word> words = all_gather(world, mine, Purpose::control);
  const auto ep_size = static_cast<std::size_t>(groups_.expert->size());
  bool agreed = true;
  for (std::size_t r = 0; r < words.size(); ++r) {
    agreed &= words[r].changed == 0 && words[r].shared == words[0].shared &&
              words[r].expert == words[r % ep_size].expert;
  }
  if (agreed) return;
  std::string told = "!" + changed;
  if (changed.empty()) {
    told.clear();
    std::size_t i = 0;
    for (const auto* parameters : {&shared_, &expert_}) {
      for (const Named& parameter : *parameters) told += flags[i++] + parameter.name + '\0';
    }
  }
  std::vector<std::string> ranks;
  for (const auto& bytes :
       world.gather(std::as_bytes(std::span(told)), /*root=*/0, Purpose::control)) {
    const auto* text = reinterpret_cast<const char*>(bytes.data());
    ranks.emplace_back(text, bytes.size());
  }
  std::string text = world.rank() == 0 ? disagreement(ranks) : "";
  std::uint64_t size = text.size();
  world.broadcast(&size, sizeof size, /*root=*/0, Purpose::control);
  text.resize(size);
  world.broadcast(text.data(), size, /*root=*/0, Purpose::control);
  throw InvalidArgument(text);
}

// What rank 0 makes of what all ranks told it: flag and name of each parameter, each with a zero
// behind it (experts have other names on other ranks); or '!' and a name.
std::string GradientReducer::disagreement(const std::vector<std::string>& ranks) const {
  const auto ep_size = static_cast<std::size_t>(groups_.expert->size());
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].starts_with('!')) {
      return detail::message("parameter '", ranks[r].substr(1), "' of rank ", r,
                             " is no longer what it was when the GradientReducer was made (it was "
                             "replaced, added or removed; its gradient would not be reduced): make "
                             "a new GradientReducer, on all ranks");
    }
  }
  const auto word = [](char flag) { return flag == '1' ? "requires a gradient" : "is frozen"; };
  std::vector<std::vector<std::string>> told(ranks.size());  // flag and name
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    std::istringstream words(ranks[r]);
    for (std::string one; std::getline(words, one, '\0');) told[r].push_back(one);
    for (std::size_t i = 0; i < told[r].size(); ++i) {
      const std::size_t first = i < shared_.size() ? 0 : r % ep_size;
      const std::string &here = told[r][i], &there = told[first][i];
      if (here[0] == there[0]) continue;
      return detail::message("parameter '", here.substr(1), "' ", word(here[0]), " on rank ", r,
                             ", but ", word(there[0]), " on rank ", first,
                             " (their gradients could not be added): call requires_grad_() on all "
                             "ranks alike");
    }
  }
  return "the ranks disagree about which parameters require a gradient";
}

void GradientReducer::reduce() {
  RECORD_FUNCTION("lshmoe::reduce_gradients", std::vector<c10::IValue>{});
  const at::NoGradGuard no_grad;
  check_ranks_agree();
  const double world_size = groups_.world->size();
  reduce_all(*groups_.world, shared_parameters(), world_size);
  reduce_all(*groups_.replica, expert_parameters(), world_size);
}

double GradientReducer::clip_grad_norm(double max_norm) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> shared = shared_parameters(), expert = expert_parameters();
  double experts = squared_norm(expert);
  groups_.expert->all_reduce(std::span(&experts, 1), ReduceOp::sum, Purpose::gradients);
  const double norm = std::sqrt(squared_norm(shared) + experts);
  if (max_norm > 0 && norm > max_norm) {
    const double scale = max_norm / norm;
    for (const auto* parameters : {&shared, &expert}) {
      for (const at::Tensor& parameter : *parameters) {
        if (parameter.grad().defined()) parameter.grad().mul_(scale);
      }
    }
  }
  return norm;
}

}  // namespace lshmoe
