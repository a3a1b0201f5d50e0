// Parcels of every kind, of both states: rows of the right shape, or InvalidArgument.

#include <cstdio>
#include <cstdlib>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/parcels.hpp"
#include "tests/fuzz/target.hpp"

namespace lshmoe::fuzz {
namespace {

// First byte of an input: the setting; second: what to do with the rest, a parcel.
constexpr std::uint8_t kReseal = 1, kInto = 2, kTwoGroups = 4;

void decode(const Codec& codec, const at::Tensor& bytes, const std::vector<std::int64_t>& sizes,
            bool into) {
  const std::int64_t hidden = codec.context().hidden_size;
  try {
    if (into) {
      // What a receiver expects comes from elsewhere; here, the number in the first header.
      std::vector<std::int64_t> rows(sizes.size(), 0);
      std::int64_t first = 0, sum = 0;
      for (std::size_t g = 0; g < sizes.size(); first += sizes[g++]) {
        if (sizes[g] < 12) continue;
        rows[g] =
            testing::field<std::uint32_t>(bytes.const_data_ptr<std::uint8_t>() + first, 8) % 5000;
        sum += rows[g];
      }
      at::Tensor out = at::empty({sum + 1, hidden}, codec.context().dtype);
      codec.decode_into(out, at::arange(sum, 0, -1, at::kLong), bytes, sizes, rows);
    } else {
      const Decoded decoded = codec.decode(bytes, sizes);
      std::int64_t sum = 0;
      for (const std::int64_t rows : decoded.rows_per_group) sum += rows;
      LSHMOE_FUZZ_CHECK(decoded.rows_per_group.size() == sizes.size());
      LSHMOE_FUZZ_CHECK(decoded.rows.dim() == 2 && decoded.rows.size(0) == sum &&
                        decoded.rows.size(1) == hidden &&
                        decoded.rows.scalar_type() == codec.context().dtype);
    }
  } catch (const InvalidArgument&) {
  }
}

}  // namespace

std::vector<Input> seeds() {
  std::vector<Input> inputs;
  const auto& settings = testing::parcel_settings();
  for (std::size_t i = 0; i < settings.size(); ++i) {
    for (const auto& parcel : settings[i].parcels) {
      for (const int how : {+kReseal, kReseal | kInto}) {
        inputs.push_back({static_cast<std::uint8_t>(i), static_cast<std::uint8_t>(how)});
        inputs.back().insert(inputs.back().end(), parcel.begin(), parcel.end());
      }
    }
  }
  return inputs;
}

}  // namespace lshmoe::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lshmoe;
  fuzz::Reader in(data, size);
  const auto& settings = testing::parcel_settings();
  const auto& setting = settings[in.take<std::uint8_t>() % settings.size()];
  const auto how = in.take<std::uint8_t>();
  fuzz::Input parcel = in.rest();
  if ((how & fuzz::kReseal) != 0) testing::reseal(parcel.data(), parcel.size());
  std::vector<std::int64_t> sizes(1, static_cast<std::int64_t>(parcel.size()));
  if ((how & fuzz::kTwoGroups) != 0) {
    // A good parcel in front.
    const auto& good = setting.parcels.front();
    parcel.insert(parcel.begin(), good.begin(), good.end());
    sizes.insert(sizes.begin(), static_cast<std::int64_t>(good.size()));
  }
  fuzz::decode(*setting.codec, testing::to_tensor(parcel), sizes, (how & fuzz::kInto) != 0);
  return 0;
}
