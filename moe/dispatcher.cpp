#include "lshmoe/moe/dispatcher.hpp"

#include "lshmoe/moe/exchange.hpp"
#include "lshmoe/moe/layer_number.hpp"
#include "lshmoe/moe/ops/common.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/source.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

DispatcherOptions& DispatcherOptions::codec(const CodecOptions& c) {
  const bool source = sends_centroids(c);
  for (CodecOptions& exchange : codecs_) exchange = source ? CodecOptions().kind("none") : c;
  return codec_dispatch(c);
}
DispatcherOptions& DispatcherOptions::codec_dispatch(const CodecOptions& c) {
  codecs_[static_cast<int>(Direction::dispatch)] = c;
  return *this;
}
DispatcherOptions& DispatcherOptions::codec_combine(const CodecOptions& c) {
  codecs_[static_cast<int>(Direction::combine)] = c;
  return *this;
}
DispatcherOptions& DispatcherOptions::codec_backward(const CodecOptions& c) {
  codecs_[static_cast<int>(Direction::combine_backward)] = c;
  codecs_[static_cast<int>(Direction::dispatch_backward)] = c;
  return *this;
}
const CodecOptions& DispatcherOptions::codec(Direction direction) const {
  return codecs_[static_cast<int>(direction)];
}

void validate(const DispatcherOptions& o, int ep_size) {
  LSHMOE_VALIDATE(o.hidden_size() >= 1 && o.hidden_size() <= 1 << 24, "hidden_size is ",
                  o.hidden_size(), " (must be 1 to 2^24)");
  LSHMOE_VALIDATE(o.num_experts() >= 1 && o.num_experts() <= 1 << 24, "num_experts is ",
                  o.num_experts(), " (must be 1 to 2^24)");
  LSHMOE_VALIDATE(ep_size >= 1 && o.num_experts() % ep_size == 0, "num_experts ", o.num_experts(),
                  " is not divisible by ep_size ", ep_size,
                  " (each rank holds the same number of experts): change one of them");
  LSHMOE_VALIDATE(o.alignment() >= 1 && o.alignment() <= 1 << 20, "alignment is ", o.alignment(),
                  " (must be 1 to 2^20)");
  validate_layer_number(o.layer());
  const auto source = [&](Direction direction) { return sends_centroids(o.codec(direction)); };
  for (const Direction direction : {Direction::dispatch, Direction::combine,
                                    Direction::combine_backward, Direction::dispatch_backward}) {
    validate(o.codec(direction));
    LSHMOE_VALIDATE(direction == Direction::dispatch || !source(direction),
                    "restore=source is set for ", name_of(direction),
                    " (only the dispatch sends centroids in place of tokens): use restore=expert "
                    "there, or kind none");
  }
}

namespace {

Dispatched dispatch_rows(const at::Tensor& x, const at::Tensor& topk_ids,
                         const at::Tensor& topk_weights, const ops::ExchangePtr& exchange) {
  Dispatched d;
  at::Tensor tokens_per_expert;
  std::tie(d.rows, d.row_weights, tokens_per_expert, d.plan) =
      ops::dispatch(x, topk_weights, topk_ids, exchange);
  d.tokens_per_expert = ops::to_vector(tokens_per_expert);
  d.rows_per_expert = ops::to_vector(d.plan.back());
  d.stats = exchange->stats;
  return d;
}

}  // namespace

struct Dispatcher::Impl {
  std::shared_ptr<ExchangeContext> context;
};

Dispatcher::Dispatcher(DispatcherOptions options, const ExpertGroups& groups)
    : impl_(std::make_shared<Impl>()) {
  impl_->context = std::make_shared<ExchangeContext>(std::move(options), groups.expert);
}
Dispatcher::~Dispatcher() = default;

Dispatched Dispatcher::dispatch(const at::Tensor& x, const at::Tensor& topk_ids,
                                const at::Tensor& topk_weights, const at::Tensor& counts) const {
  const auto sums = counts.defined() ? counts_to_sum(counts) : nullptr;
  const auto exchange = c10::make_intrusive<Exchange>(
      impl_->context, std::make_shared<ExchangeStats>(), /*requires_grad=*/false, sums);
  Dispatched d = impl_->context->restores_at_source()
                     ? dispatch_centroids(x, topk_ids, topk_weights, exchange)
                     : dispatch_rows(x, topk_ids, topk_weights, exchange);
  if (sums != nullptr) d.counts = at::tensor(*sums, at::kLong);
  return d;
}

at::Tensor Dispatcher::combine(const at::Tensor& expert_output, const Dispatched& d) const {
  LSHMOE_VALIDATE(d.stats != nullptr, "combine needs what dispatch of this Dispatcher returned");
  const auto exchange = c10::make_intrusive<Exchange>(impl_->context, d.stats);
  if (impl_->context->restores_at_source()) return combine_centroids(expert_output, d, exchange);
  return ops::combine(expert_output, d.row_weights, d.plan, exchange);
}

void Dispatcher::refresh_codecs() const { impl_->context->refresh_codecs(); }
StateStats Dispatcher::state_stats(Direction direction) const {
  return impl_->context->state_stats(direction);
}

const std::shared_ptr<ExchangeContext>& Dispatcher::context() const { return impl_->context; }
const DispatcherOptions& Dispatcher::options() const { return impl_->context->options; }
int64_t Dispatcher::num_local_experts() const { return impl_->context->num_local_experts(); }
int64_t Dispatcher::first_local_expert() const {
  return num_local_experts() * impl_->context->comm->rank();
}

}  // namespace lshmoe
