#include "lshmoe/launch/bench_formats.hpp"

#include <algorithm>
#include <cmath>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {
namespace {
constexpr double kE2m1Max = 6.0, kE4m3Max = 448.0;

at::Generator noise() { return at::make_generator<at::CPUGeneratorImpl>(0); }

std::int64_t blocks_of(const at::Tensor& x, std::int64_t block) {
  return (x.size(1) + block - 1) / block;
}
// [rows, blocks, block] in double, the last block filled up with zeros.
at::Tensor in_blocks(const at::Tensor& x, std::int64_t block) {
  const std::int64_t blocks = blocks_of(x, block);
  const at::Tensor padded = at::constant_pad_nd(x.to(at::kDouble), {0, blocks * block - x.size(1)});
  return padded.reshape({x.size(0), blocks, block});
}
at::Tensor from_blocks(const at::Tensor& blocks, const at::Tensor& like) {
  return blocks.flatten(1).slice(1, 0, like.size(1)).to(like.scalar_type());
}

// Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, ties to the even code, beyond 6 saturating.
at::Tensor round_to_e2m1(const at::Tensor& x) {
  const at::Tensor size = x.abs();
  const at::Tensor step = at::where(size < 2, 0.5, at::where(size < 4, 1.0, 2.0)).to(x.dtype());
  return at::sign(x) * at::clamp_max((size / step).round() * step, kE2m1Max);
}

// Zeros divide to zeros.
at::Tensor quotient(const at::Tensor& x, const at::Tensor& scale) {
  return x / at::where(scale > 0, scale, at::ones_like(scale));
}

std::int64_t e2m1_bytes(const at::Tensor& x, std::int64_t block) {
  return x.size(0) * ((x.size(1) + 1) / 2 + blocks_of(x, block));
}

RoundTrip mxfp4(const at::Tensor& x) {
  constexpr std::int64_t kBlock = 32;
  const at::Tensor blocks = in_blocks(x, kBlock), most = blocks.abs().amax(2, true);
  // Of the largest element; 4 is e2m1's largest power of two.
  const at::Tensor exponent = most.clamp_min(0x1p-125).log2().floor() - 2;
  const at::Tensor scale = at::exp2(exponent.clamp(-127, 127));
  return {from_blocks(round_to_e2m1(blocks / scale) * scale, x), e2m1_bytes(x, kBlock)};
}

RoundTrip nvfp4(const at::Tensor& x) {
  constexpr std::int64_t kBlock = 16;
  const at::Tensor blocks = in_blocks(x, kBlock);
  const at::Tensor whole =
      (blocks.abs().amax() / (kE2m1Max * kE4m3Max)).to(at::kFloat).to(at::kDouble);
  const at::Tensor wanted = quotient(blocks.abs().amax(2, true) / kE2m1Max, whole);
  const at::Tensor scale =
      wanted.clamp_max(kE4m3Max).to(at::kFloat).to(at::kFloat8_e4m3fn).to(at::kDouble) * whole;
  return {from_blocks(round_to_e2m1(quotient(blocks, scale)) * scale, x),
          e2m1_bytes(x, kBlock) + 4};
}

RoundTrip rcmoe(const at::Tensor& x, int bits) {
  const double most = std::exp2(bits - 1) - 1;
  const at::Tensor exact = x.to(at::kDouble), scale = exact.abs().amax(1, true) / most;
  auto generator = noise();
  const at::Tensor chance = at::rand(x.sizes(), generator, at::dtype(at::kDouble));
  const at::Tensor q = (quotient(exact, scale) + chance).floor().clamp(-most, most);
  return {(q * scale).to(x.scalar_type()), x.size(0) * (4 + (x.size(1) * bits + 7) / 8)};
}

RoundTrip drop(const at::Tensor& x, double rate) {
  const auto kept = static_cast<std::int64_t>(std::llround(rate * static_cast<double>(x.size(0))));
  auto generator = noise();
  const at::Tensor index = at::randperm(x.size(0), generator, at::kLong).slice(0, 0, kept);
  const at::Tensor rows = at::zeros_like(x).index_copy(0, index, x.index_select(0, index));
  return {rows, kept * static_cast<std::int64_t>(x.size(1) * x.element_size())};
}

RoundTrip kmeans(const at::Tensor& x, double rate) {
  constexpr int kIterations = 10;
  const auto clusters =
      std::clamp<std::int64_t>(std::llround(rate * static_cast<double>(x.size(0))), 1, x.size(0));
  const at::Tensor rows = x.to(at::kFloat);
  auto generator = noise();
  at::Tensor means =
      rows.index_select(0, at::randperm(x.size(0), generator, at::kLong).slice(0, 0, clusters));
  const auto nearest = [&] {
    return (means.square().sum(1).unsqueeze(0) - 2 * at::mm(rows, means.t())).argmin(1);
  };
  for (int i = 0; i < kIterations; ++i) {
    const at::Tensor id = nearest();
    const at::Tensor count = at::bincount(id, {}, clusters).to(at::kFloat).unsqueeze(1);
    const at::Tensor sums = at::zeros_like(means).index_add(0, id, rows);
    means = at::where(count > 0, sums / count.clamp_min(1), means);
  }
  means = means.to(x.scalar_type()).to(at::kFloat);  // as they travel
  return {means.index_select(0, nearest()).to(x.scalar_type()),
          clusters * static_cast<std::int64_t>(x.size(1) * x.element_size()), clusters};
}

}  // namespace

const std::vector<std::string>& bench_format_names() {
  static const std::vector<std::string> names{"mxfp4",  "nvfp4", "rcmoe8",
                                              "rcmoe4", "drop",  "kmeans"};
  return names;
}

bool has_rate(const std::string& kind) { return kind == "drop" || kind == "kmeans"; }

RoundTrip round_trip(const std::string& kind, const at::Tensor& x, double rate) {
  if (kind == "mxfp4") return mxfp4(x);
  if (kind == "nvfp4") return nvfp4(x);
  if (kind == "rcmoe8") return rcmoe(x, 8);
  if (kind == "rcmoe4") return rcmoe(x, 4);
  if (kind == "drop") return drop(x, rate);
  LSHMOE_VALIDATE(kind == "kmeans", "unknown format '", kind, "'");
  return kmeans(x, rate);
}

}  // namespace lshmoe::launch
