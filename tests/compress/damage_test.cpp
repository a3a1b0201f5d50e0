// Many damaged parcels, by a random number each: InvalidArgument, or rows of the right shape.
//
//   LSHMOE_DAMAGED_INPUTS   how many (default 20,000)

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <set>

#include "lshmoe/runtime/error.hpp"
#include "tests/compress/parcels.hpp"

namespace lshmoe {
namespace {
using testing::ParcelSetting;
using Bytes = std::vector<uint8_t>;

constexpr std::size_t kHeader = 40;

class Damage {
 public:
  explicit Damage(uint64_t number) : random_(number) {}

  const ParcelSetting& pick() {
    const auto& all = testing::parcel_settings();
    return all[below(all.size())];
  }
  /// One of the setting's parcels, damaged; in most cases the checksum fits.
  Bytes parcel_of(const ParcelSetting& setting) {
    Bytes parcel = any(setting);
    for (std::size_t times = below(3) + 1; times > 0; --times) {
      switch (below(6)) {
        case 0:
          flip_bits(parcel);
          break;
        case 1:
          cut(parcel);
          break;
        case 2:
          splice(parcel, any(below(2) == 0 ? setting : pick()));
          break;
        case 3:
          header_number(parcel);
          break;
        case 4:
          noise(parcel);
          break;
        default:
          number_behind_header(parcel);
      }
    }
    if (below(4) > 0) lengths_that_fit(parcel);
    if (below(8) > 0) testing::reseal(parcel.data(), parcel.size());
    return parcel;
  }
  std::size_t below(std::size_t end) { return end == 0 ? 0 : random_() % end; }

 private:
  std::mt19937_64 random_;

  const Bytes& any(const ParcelSetting& setting) {
    return setting.parcels[below(setting.parcels.size())];
  }
  void flip_bits(Bytes& parcel) {
    for (std::size_t n = below(8) + 1; n > 0 && !parcel.empty(); --n) {
      parcel[below(parcel.size())] ^= static_cast<uint8_t>(1U << below(8));
    }
  }
  void cut(Bytes& parcel) {
    if (below(4) == 0) {
      parcel.resize(below(parcel.size() + 1));
    } else {  // out of its middle, or a little more
      const auto at = static_cast<std::ptrdiff_t>(below(parcel.size()));
      const auto bytes = std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(below(16)),
                                                  static_cast<std::ptrdiff_t>(parcel.size()) - at);
      if (below(2) == 0) {
        parcel.erase(parcel.begin() + at, parcel.begin() + at + bytes);
      } else {
        parcel.insert(parcel.begin() + at, static_cast<std::size_t>(bytes), uint8_t{0});
      }
    }
  }
  void splice(Bytes& parcel, const Bytes& other) {
    const auto from = static_cast<std::ptrdiff_t>(below(other.size()));
    const auto at = static_cast<std::ptrdiff_t>(below(parcel.size() + 1));
    parcel.resize(static_cast<std::size_t>(at));
    parcel.insert(parcel.end(), other.begin() + from, other.end());
  }
  uint64_t odd_number(std::size_t bytes) {
    const uint64_t edge[] = {
        0,           1, 2, 127, 255, 256, 65535, 65536, 0x7FFFFFFF, 0xFFFFFFFF, uint64_t{1} << 40,
        ~uint64_t{0}};
    switch (below(3)) {
      case 0:
        return edge[below(std::size(edge))];
      case 1:
        return below(300);
      default:
        return random_() >> below(8 * bytes);
    }
  }
  void header_number(Bytes& parcel) {
    const std::pair<std::size_t, std::size_t> fields[] = {{7, 1},  {8, 4},  {16, 4},
                                                          {20, 4}, {24, 8}, {32, 4}};
    const auto [at, bytes] = fields[below(std::size(fields))];
    if (parcel.size() < kHeader) return;
    const uint64_t number = odd_number(bytes);
    std::memcpy(parcel.data() + at, &number, bytes);
  }
  void number_behind_header(Bytes& parcel) {
    if (parcel.size() < kHeader + 4) return;
    const uint64_t number = odd_number(4);
    // Steps, keys, means and directory stand in front.
    const std::size_t end = below(2) == 0 ? parcel.size() : std::min(parcel.size(), kHeader + 150);
    std::memcpy(parcel.data() + kHeader + below(end - kHeader - 3), &number, 1 + below(4));
  }
  void noise(Bytes& parcel) {
    if (parcel.size() <= kHeader) return;
    const std::size_t at = kHeader + below(parcel.size() - kHeader);
    const std::size_t end = std::min(parcel.size(), at + below(64));
    for (std::size_t i = at; i < end; ++i) parcel[i] = static_cast<uint8_t>(random_());
  }
  // So that what is behind them is reached.
  static void lengths_that_fit(Bytes& parcel) {
    if (parcel.size() < kHeader) return;
    const uint64_t after = parcel.size() - kHeader;
    const auto shared = std::min<uint64_t>(testing::field<uint32_t>(parcel.data(), 32), after);
    const uint64_t body = after - shared;
    std::memcpy(parcel.data() + 24, &body, 8);
    std::memcpy(parcel.data() + 32, &shared, 4);
  }
};

// Rows decoded; -1: refused. What goes wrong is reported with the input's number.
int64_t decode(const ParcelSetting& setting, const Bytes& parcel, uint64_t number) {
  const auto size = static_cast<int64_t>(parcel.size());
  try {
    const Decoded decoded = setting.codec->decode(testing::to_tensor(parcel), {size});
    const CodecContext& context = setting.codec->context();
    EXPECT_EQ(decoded.rows.dim(), 2) << number;
    EXPECT_EQ(decoded.rows.size(1), context.hidden_size) << number;
    EXPECT_EQ(decoded.rows.scalar_type(), context.dtype) << number;
    EXPECT_EQ(decoded.rows_per_group, std::vector<int64_t>{decoded.rows.size(0)}) << number;
    EXPECT_EQ(decoded.rows.size(0), size == 0 ? 0 : testing::field<uint32_t>(parcel.data(), 8))
        << number;
    return decoded.rows.size(0);
  } catch (const InvalidArgument&) {
    return -1;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "input " << number << ", " << setting.name << ": " << error.what();
    return -1;
  }
}

TEST(DamagedParcels, TheSettingsHaveEveryKindAndState) {
  std::set<std::string> kinds;
  bool basis = false, without_state = false, first_version = false, second_version = false;
  for (const ParcelSetting& setting : testing::parcel_settings()) {
    kinds.insert(setting.codec->options().kind());
    for (const Bytes& parcel : setting.parcels) {
      EXPECT_GT(decode(setting, parcel, 0), 0) << setting.name;
      if (setting.codec->options().state() != "learned") continue;
      const auto version = testing::field<uint32_t>(parcel.data(), 20);
      first_version |= version == 1;
      second_version |= version == 2;
      without_state |= version == 0;
      basis |= version > 0 && (testing::field<uint8_t>(parcel.data(), 7) & 16) != 0;
    }
  }
  EXPECT_EQ(kinds, (std::set<std::string>{"none", "bf16", "fp8", "int8", "int4", "lsh"}));
  EXPECT_TRUE(basis);
  EXPECT_TRUE(without_state);
  EXPECT_TRUE(first_version);
  EXPECT_TRUE(second_version);
}

TEST(DamagedParcels, AreRefusedOrRows) {
  const char* wanted = std::getenv("LSHMOE_DAMAGED_INPUTS");
  const int64_t inputs = wanted != nullptr ? std::atoll(wanted) : 20000;
  ASSERT_GT(inputs, 0) << "LSHMOE_DAMAGED_INPUTS=" << wanted;
  int64_t refused = 0, decoded = 0;
  for (int64_t i = 0; i < inputs && !HasFailure(); ++i) {
    const auto number = static_cast<uint64_t>(i);
    Damage damage(number);
    const ParcelSetting& setting = damage.pick();
    (decode(setting, damage.parcel_of(setting), number) < 0 ? refused : decoded) += 1;
  }
  std::printf("%lld damaged parcels: %lld refused, %lld decoded to rows\n",
              static_cast<long long>(inputs), static_cast<long long>(refused),
              static_cast<long long>(decoded));
  // Neither is rare, or the damage would be too coarse to reach the checks, or too fine.
  EXPECT_GT(refused, inputs / 3);
  EXPECT_GT(decoded, inputs / 50);
}

}  // namespace
}  // namespace lshmoe
