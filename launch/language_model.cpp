#include "lshmoe/launch/language_model.hpp"

#include <ATen/record_function.h>

#include <cmath>
#include <string>

#include "lshmoe/moe/random.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {
namespace {
constexpr double kRotaryBase = 10000.0;
}

void validate(const LanguageModelOptions& o, int ep_size) {
  const int64_t hidden = o.moe().hidden_size();
  LSHMOE_VALIDATE(hidden >= 1, "hidden-size is ", hidden, " (must be at least 1)");
  LSHMOE_VALIDATE(o.layers() >= 1 && o.layers() <= 10000, "layers is ", o.layers(),
                  " (must be 1 to 10000)");
  LSHMOE_VALIDATE(o.heads() >= 1, "heads is ", o.heads(), " (must be at least 1)");
  LSHMOE_VALIDATE(hidden % (2 * o.heads()) == 0, "hidden-size ", hidden,
                  " is not divisible by 2 x heads ", o.heads(),
                  " (rotary positions turn pairs of a head's channels): change one of them");
  LSHMOE_VALIDATE(o.dense_ffn_hidden_size() >= 1, "dense-ffn-hidden-size is ",
                  o.dense_ffn_hidden_size(), " (must be at least 1)");
  LSHMOE_VALIDATE(o.moe_every() >= 1 && o.moe_every() <= o.layers(), "moe-every is ", o.moe_every(),
                  " (with ", o.layers(),
                  " layers it must be 1 .. layers, or there is no MoE layer): change one of them");
  LSHMOE_VALIDATE(o.dtype() == at::kFloat || o.dtype() == at::kBFloat16, "dtype ", o.dtype(),
                  " (must be float32 or bfloat16)");
  validate(o.moe(), ep_size);
}

LanguageModelImpl::LanguageModelImpl(LanguageModelOptions model_options, const ExpertGroups& groups)
    : options(std::move(model_options)) {
  validate(options, groups.expert->size());
  const int64_t hidden = options.moe().hidden_size(), ffn = options.dense_ffn_hidden_size();
  const double in_std = 1.0 / std::sqrt(static_cast<double>(hidden));
  // What a block adds to the residual stream is scaled down by the number of additions (GPT-2).
  const double depth = std::sqrt(2.0 * static_cast<double>(options.layers()));
  embedding_ = add_weight("embedding", {options.vocab_size(), hidden}, 0.02);
  for (int64_t i = 0; i < options.layers(); ++i) {
    const std::string name = "block" + std::to_string(i) + "_";
    Block& block = blocks_.emplace_back();
    block.attention_norm = register_parameter(name + "attention_norm", at::ones({hidden}));
    block.qkv = add_weight(name + "qkv", {3 * hidden, hidden}, in_std);
    block.attention_out = add_weight(name + "attention_out", {hidden, hidden}, in_std / depth);
    block.ffn_norm = register_parameter(name + "ffn_norm", at::ones({hidden}));
    if ((i + 1) % options.moe_every() == 0) {
      block.moe = register_module(
          name + "moe",
          MoELayer(MoELayerOptions(options.moe()).layer(i).seed(options.seed()), groups));
    } else {
      block.ffn_in = add_weight(name + "ffn_in", {ffn, hidden}, in_std);
      block.ffn_out = add_weight(name + "ffn_out", {hidden, ffn},
                                 1.0 / std::sqrt(static_cast<double>(ffn)) / depth);
    }
  }
  final_norm_ = register_parameter("final_norm", at::ones({hidden}));
}

at::Tensor LanguageModelImpl::add_weight(const std::string& name, at::IntArrayRef sizes,
                                         double std) {
  // A stream of its own for each weight, numbered by place; MoE layers name theirs by layer < 2^32.
  at::Generator stream = make_stream({options.seed(), uint64_t{1} << 32, parameters().size()});
  // Uniform of that deviation: torch's normal_ differs between instruction sets, uniform_ does not.
  const double bound = std::sqrt(3.0) * std;
  return register_parameter(name, at::empty(sizes).uniform_(-bound, bound, stream));
}

at::Tensor LanguageModelImpl::linear(const at::Tensor& x, const at::Tensor& weight) const {
  return at::linear(x, weight.to(x.scalar_type()));
}

at::Tensor LanguageModelImpl::norm(const at::Tensor& x, const at::Tensor& weight) const {
  return at::layer_norm(x, {x.size(-1)}, weight.to(x.scalar_type()));
}

at::Tensor LanguageModelImpl::attention(const at::Tensor& x, const Block& block) {
  RECORD_FUNCTION("lshmoe::attention", std::vector<c10::IValue>{});
  const int64_t batch = x.size(0), length = x.size(1), hidden = x.size(2), heads = options.heads();
  const int64_t head_dim = hidden / heads;
  if (!rotation_.defined() || rotation_.size(0) < length || rotation_.device() != x.device()) {
    const at::Tensor frequency = at::pow(
        kRotaryBase, at::arange(0, head_dim, 2, at::kDouble) / -static_cast<double>(head_dim));
    const at::Tensor angle = at::outer(at::arange(length, at::kDouble), frequency);
    rotation_ =
        at::polar(at::ones_like(angle), angle).to(at::kComplexFloat).unsqueeze(1).to(x.device());
  }
  const at::Tensor qkv = linear(x, block.qkv).view({batch, length, 3 * heads, head_dim});
  // Pairs of neighboring channels of q and k as complex numbers, turned by their position's angle.
  const at::Tensor qk =
      at::view_as_complex(qkv.narrow(2, 0, 2 * heads)
                              .to(at::kFloat)
                              .reshape({batch, length, 2 * heads, head_dim / 2, 2}));
  const at::Tensor turned = at::view_as_real(qk * rotation_.narrow(0, 0, length))
                                .reshape({batch, length, 2 * heads, head_dim})
                                .to(x.scalar_type());
  const auto of = [](const at::Tensor& t, int64_t first, int64_t count) {
    return t.narrow(2, first, count).transpose(1, 2);
  };
  const at::Tensor mixed = at::scaled_dot_product_attention(
      of(turned, 0, heads), of(turned, heads, heads), of(qkv, 2 * heads, heads), {}, 0.0,
      /*is_causal=*/true);
  return linear(mixed.transpose(1, 2).reshape({batch, length, hidden}), block.attention_out);
}

at::Tensor LanguageModelImpl::logits(const at::Tensor& tokens, LanguageModelOutput& out) {
  at::Tensor x = at::embedding(embedding_, tokens).to(options.dtype());
  for (Block& block : blocks_) {
    x = x + attention(norm(x, block.attention_norm), block);
    const at::Tensor in = norm(x, block.ffn_norm);
    if (block.moe.is_empty()) {
      RECORD_FUNCTION("lshmoe::dense_ffn", std::vector<c10::IValue>{});
      x = x + linear(at::gelu(linear(in, block.ffn_in)), block.ffn_out);
    } else {
      MoEOutput moe = block.moe->forward(in);
      x = x + moe.output;
      out.aux_loss = out.aux_loss + moe.aux_loss;
      out.z_loss = out.z_loss + moe.z_loss;
      out.stats.push_back(std::move(moe.stats));
    }
    // The next norm keeps it for its backward anyway.
    if (x.requires_grad()) out.blocks.push_back(x.detach());
  }
  return linear(norm(x, final_norm_), embedding_).to(at::kFloat);
}

LanguageModelOutput LanguageModelImpl::forward(const at::Tensor& windows) {
  LSHMOE_VALIDATE(windows.dim() == 2 && windows.size(0) >= 1 && windows.size(1) >= 2,
                  "the model's input is ", windows.sizes(), " (must be [batch, seq_len + 1])");
  const int64_t length = windows.size(1) - 1;
  LanguageModelOutput out;
  const at::Tensor predicted = logits(windows.narrow(1, 0, length), out);
  out.loss = at::cross_entropy_loss(predicted.view({-1, options.vocab_size()}),
                                    windows.narrow(1, 1, length).reshape({-1}));
  return out;
}

void LanguageModelImpl::refresh_codecs() {
  for (Block& block : blocks_) {
    if (!block.moe.is_empty()) block.moe->refresh_codecs();
  }
}

std::vector<StateStats> LanguageModelImpl::state_stats(Direction direction) const {
  std::vector<StateStats> stats;
  for (const Block& block : blocks_) {
    if (!block.moe.is_empty()) stats.push_back(block.moe->dispatcher().state_stats(direction));
  }
  return stats;
}

void LanguageModelImpl::update_expert_bias() {
  for (Block& block : blocks_) {
    if (!block.moe.is_empty()) block.moe->update_expert_bias();
  }
}

}  // namespace lshmoe::launch
