// A learned state as it travels: what came is what was sent, and damage is found before memory is
// asked for or anything is computed with it.

#include "lshmoe/compress/learned_state.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "lshmoe/compress/lsh_codec.hpp"
#include "tests/compress/rows.hpp"
#include "tests/support/echo_peer.hpp"
#include "tests/support/errors.hpp"

namespace lshmoe {
namespace {
using testing::EchoPeer;
using testing::expect_error;
using Bytes = std::vector<uint8_t>;

constexpr int64_t kHidden = 40;

CodecOptions options(const std::string& transform) {
  return CodecOptions().state("learned").transform(transform).codebook_size(20).sample_rows(400);
}
at::Tensor rows() { return testing::clustered(400, kHidden, 5, 0.2, 1); }
std::vector<float> projection() { return projection_matrix(options("basis"), kHidden, 0); }

LearnedState fitted(const std::string& transform) {
  return fit_state(rows(), resolved(options(transform), Direction::dispatch), false, projection(),
                   1);
}
LearnedState read(const Bytes& bytes, const std::string& transform) {
  return state_from_bytes(bytes, kHidden, options(transform), projection());
}
void reseal_state(Bytes& bytes) {
  const uint32_t sum = kernels::checksum(bytes.data() + 8, bytes.size() - 8);
  std::memcpy(bytes.data() + 4, &sum, 4);
}
template <class T>
void change(Bytes& bytes, std::size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
  reseal_state(bytes);
}

TEST(LearnedState, ComesAsItWasSent) {
  for (const std::string transform : {"channels", "basis"}) {
    const LearnedState state = fitted(transform);
    EXPECT_EQ(state.basis.defined(), transform == "basis");
    const Bytes bytes = to_bytes(state);
    EXPECT_LE(bytes.size(), most_state_bytes(kHidden, options(transform)));
    const LearnedState came = read(bytes, transform);
    EXPECT_EQ(came.checksum(), state.checksum());
    EXPECT_EQ(came.version, 1U);
  }
}

TEST(LearnedState, EveryFlippedBitIsFound) {
  const Bytes good = to_bytes(fitted("channels"));
  for (std::size_t i = 0; i < good.size(); ++i) {
    Bytes bad = good;
    bad[i] ^= static_cast<uint8_t>(1U << (i % 8));
    EXPECT_THROW(static_cast<void>(read(bad, "channels")), InvalidArgument) << i;
    bad.resize(i);
    EXPECT_THROW(static_cast<void>(read(bad, "channels")), InvalidArgument) << i;
  }
}

// Behind a checksum that fits. Head: u32 magic, checksum, version, hidden, centroids, bytes of the
// parcel, 1 with a basis; then the parcel, u16 order [hidden], bfloat16 basis [hidden, hidden].
TEST(LearnedState, EveryPartIsChecked) {
  const LearnedState state = fitted("basis");
  const Bytes good = to_bytes(state);
  const std::size_t parcel = 28, order = parcel + state.parcel.size(), basis = order + 2 * kHidden;
  ASSERT_EQ(good.size(), basis + 2 * kHidden * kHidden);
  const auto refused = [&](const std::string& text, auto damage) {
    Bytes bad = good;
    damage(bad);
    expect_error(text, [&] { static_cast<void>(read(bad, "basis")); });
  };
  refused("is not one of this codec", [](Bytes& b) { change(b, 8, uint32_t{0}); });
  refused("is not one of this codec", [](Bytes& b) { change(b, 12, uint32_t{41}); });
  refused("is not one of this codec", [](Bytes& b) { change(b, 16, uint32_t{21}); });
  refused("is not one of this codec", [](Bytes& b) { change(b, 24, uint32_t{2}); });
  refused("a learned state has", [](Bytes& b) { change(b, 20, ~uint32_t{0}); });
  refused("a learned state has", [](Bytes& b) { change(b, 24, uint32_t{0}); });
  refused("(one more is expected)",
          [&](Bytes& b) { change(b, 16, static_cast<uint32_t>(state.centroids - 1)); });
  refused("checksum", [&](Bytes& b) { change(b, parcel + 60, uint32_t{12345}); });
  // The order: a channel twice, one that is none.
  refused("channel order is none",
          [&](Bytes& b) { change(b, order, static_cast<uint16_t>(state.order[1])); });
  refused("channel order is none", [&](Bytes& b) { change(b, order, uint16_t{kHidden}); });
  // The basis: NaN, Inf, far too large, a direction twice, one that is zero.
  for (const uint16_t bits : {0x7FC0, 0x7F80, 0xFF7F, 0x4000}) {
    refused("a learned basis has an element of", [&](Bytes& b) { change(b, basis + 6, bits); });
  }
  const auto repeat = [&](Bytes& b, auto first, std::size_t to) {
    std::copy_n(first, 2 * kHidden, b.begin() + static_cast<std::ptrdiff_t>(to));
    reseal_state(b);
  };
  refused("far from orthonormal", [&](Bytes& b) {
    repeat(b, good.begin() + static_cast<std::ptrdiff_t>(basis), basis + 2 * kHidden);
  });
  refused("far from orthonormal",
          [&](Bytes& b) { repeat(b, Bytes(2 * kHidden, 0).begin(), basis); });
  // A basis where none is asked for.
  expect_error("is not one of this codec", [&] { static_cast<void>(read(good, "channels")); });
}

TEST(LearnedState, CentroidsAreFinite) {
  LearnedState state = fitted("channels");
  // As bases of another codec, which passes Inf on, would travel: whole rows.
  at::Tensor bases = at::ones({1 + state.centroids, kHidden});
  const auto whole = make_codec(CodecOptions().max_error(0), {kHidden});
  const Encoded encoded = whole->encode(bases, {bases.size(0)});
  state.parcel = testing::bytes_of(encoded.bytes);
  EXPECT_EQ(read(to_bytes(state), "channels").bases[5], 1.0F);
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(state.parcel.data() + 40 + 4 * kHidden, &infinity, 4);
  testing::reseal(state.parcel.data(), state.parcel.size());
  expect_error("centroids hold NaN or Inf",
               [&] { static_cast<void>(read(to_bytes(state), "channels")); });
}

/// A refresh on rank 1 of 2 whose root broadcasts this size and these bytes.
void refresh_from_root(Codec& codec, uint64_t size, const Bytes& state) {
  EchoPeer peer(
      [&](int call, Purpose, std::vector<std::byte>& answer) {
        if (call == 0) {
          std::memcpy(answer.data(), &size, sizeof size);
        } else {
          const auto* bytes = reinterpret_cast<const std::byte*>(state.data());
          answer.assign(bytes, bytes + state.size());
        }
      },
      /*rank=*/1);
  static_cast<void>(codec.refresh(peer));
}

TEST(LearnedState, AnAnnouncedSizeIsNotBelieved) {
  const Bytes good = to_bytes(fitted("channels"));
  const auto codec = make_codec(options("channels"), {kHidden});
  for (const uint64_t size : {uint64_t{most_state_bytes(kHidden, options("channels"))} + 1,
                              uint64_t{1} << 39, ~uint64_t{0}}) {
    const auto fresh = make_codec(options("channels"), {kHidden});
    expect_error("bytes is announced", [&] { refresh_from_root(*fresh, size, good); });
  }
  refresh_from_root(*codec, good.size(), good);
  EXPECT_EQ(codec->state_stats().version, 1);
  // The same again is not the next version.
  expect_error("version 1 of a learned state came, this rank expects 2",
               [&] { refresh_from_root(*codec, good.size(), good); });
  EXPECT_EQ(codec->state_stats().version, 1);
}

TEST(LearnedState, SamplesAreChecked) {
  const auto gather = [](auto damage) {
    const auto codec = make_codec(options("channels").max_error(1e-7), {kHidden});
    codec->observe(rows(), {});
    EchoPeer peer([&](int, Purpose, std::vector<std::byte>& answer) { damage(answer); });
    return codec->refresh(peer);
  };
  EXPECT_TRUE(gather([](auto&) {}));
  EXPECT_TRUE(gather([](auto& answer) { answer.clear(); }));
  expect_error("checksum", [&] { gather([](auto& answer) { answer[60] ^= std::byte{1}; }); });
  expect_error("rank 1 gives a learned state hold NaN or Inf", [&] {
    gather([](auto& answer) {
      // Rows so finely coded travel whole; the last bytes are the last row's last element.
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::memcpy(answer.data() + answer.size() - 4, &nan, 4);
      testing::reseal(reinterpret_cast<uint8_t*>(answer.data()), answer.size());
    });
  });
}

}  // namespace
}  // namespace lshmoe
