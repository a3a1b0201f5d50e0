// Learned states as they come from a root, and the samples that a root is sent: refused, or a state
// that keeps the bound of every row.

#include "lshmoe/compress/learned_state.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "lshmoe/compress/lsh_codec.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"
#include "tests/fuzz/target.hpp"
#include "tests/support/echo_peer.hpp"

namespace lshmoe::fuzz {
namespace {
using testing::bytes_of;
using testing::EchoPeer;

// Bytes of an input: setting, way, then a state or a parcel of sampled rows.
enum Way : std::uint8_t { kFromRoot = 0, kFromRootAnySize = 1, kToRoot = 2, kWays = 3 };

struct Setting {
  CodecOptions options;
  CodecContext context;
  at::Tensor rows;  // to fit, and to code
};

const std::vector<Setting>& settings() {
  static const std::vector<Setting> all = [] {
    const at::Tensor rows = testing::clustered(120, 24, 3, 0.2, 1) + 1;
    const auto learned =
        CodecOptions().state("learned").codebook_size(12).projection(24).sample_rows(120);
    const auto basis = CodecOptions(learned).transform("basis");
    return std::vector<Setting>{
        {learned, {24, 0, Direction::dispatch, at::kFloat}, rows},
        {basis, {24, 0, Direction::dispatch, at::kFloat}, rows},
        {basis, {24, 0, Direction::dispatch, at::kBFloat16}, rows.to(at::kBFloat16)},
        {basis, {7, 0, Direction::dispatch, at::kFloat}, rows.narrow(1, 0, 7).contiguous()},
    };
  }();
  return all;
}

Input good_state(const Setting& setting) {
  const auto projection = projection_matrix(setting.options, setting.context.hidden_size, 0);
  return to_bytes(
      fit_state(setting.rows.to(at::kFloat), resolved(setting.options, {}), false, projection, 1));
}

/// Writes the checksum that fits the rest of a state.
void reseal_state(Input& state) {
  if (state.size() < 8) return;
  const std::uint32_t sum = kernels::checksum(state.data() + 8, state.size() - 8);
  std::memcpy(state.data() + 4, &sum, 4);
}

void check_bound(const Codec& codec, const at::Tensor& rows) {
  const Encoded encoded = codec.encode(rows, {rows.size(0)});
  const at::Tensor decoded = codec.decode(encoded.bytes, encoded.bytes_per_group).rows;
  const at::Tensor exact = rows.to(at::kDouble);
  const at::Tensor error = (decoded.to(at::kDouble) - exact).square().sum(1).sqrt();
  const at::Tensor bound = codec.options().max_error() * exact.square().sum(1).sqrt();
  LSHMOE_FUZZ_CHECK((error <= bound).all().item<bool>());
}

}  // namespace

std::vector<Input> seeds() {
  std::vector<Input> inputs;
  for (std::size_t i = 0; i < settings().size(); ++i) {
    const Setting& setting = settings()[i];
    const auto add = [&](std::uint8_t way, const Input& bytes) {
      inputs.push_back({static_cast<std::uint8_t>(i), way});
      inputs.back().insert(inputs.back().end(), bytes.begin(), bytes.end());
    };
    const Input state = good_state(setting);
    add(kFromRoot, state);
    Input sized(8);
    const std::uint64_t size = state.size();
    std::memcpy(sized.data(), &size, 8);
    sized.insert(sized.end(), state.begin(), state.end());
    add(kFromRootAnySize, sized);
    // A sample as this rank would send it.
    const auto codec = make_codec(setting.options, setting.context);
    codec->observe(setting.rows, {});
    EchoPeer peer([&](int, Purpose, std::vector<std::byte>& answer) {
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(answer.data());
      add(kToRoot, {bytes, bytes + answer.size()});
    });
    static_cast<void>(codec->refresh(peer));
  }
  return inputs;
}

}  // namespace lshmoe::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lshmoe;
  using namespace lshmoe::fuzz;
  Reader in(data, size);
  const Setting& setting = settings()[in.take<std::uint8_t>() % settings().size()];
  const auto way = in.take<std::uint8_t>() % kWays;
  std::uint64_t announced = way == kFromRootAnySize ? in.take<std::uint64_t>() : 0;
  Input bytes = in.rest();
  if (way == kToRoot) {
    testing::reseal(bytes.data(), bytes.size());
  } else {
    reseal_state(bytes);
    if (way == kFromRoot) announced = bytes.size();
  }
  const auto codec = make_codec(setting.options, setting.context);
  codec->observe(setting.rows, {});
  const auto answer = [&](int call, Purpose, std::vector<std::byte>& to) {
    if (way != kToRoot && call == 0) {
      std::memcpy(to.data(), &announced, sizeof announced);
    } else {
      const auto* from = reinterpret_cast<const std::byte*>(bytes.data());
      to.assign(from, from + bytes.size());
    }
  };
  try {
    EchoPeer peer(answer, way == kToRoot ? 0 : 1);
    const bool fitted = codec->refresh(peer);
    LSHMOE_FUZZ_CHECK(fitted == (codec->state_stats().version == 1));
  } catch (const InvalidArgument&) {
    // What was there before stays.
    LSHMOE_FUZZ_CHECK(codec->state_stats().version == 0);
  }
  check_bound(*codec, setting.rows.slice(0, 0, 20));
  return 0;
}
