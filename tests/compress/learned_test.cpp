// state=learned: fits shared by the ranks, versions, the bound of every row, what it saves.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::bytes_of;
using testing::clustered;
using testing::expect_error;
using testing::field;
using testing::gaussian;
using testing::make_rows;

CodecOptions learned_options(const std::string& transform = "channels") {
  return CodecOptions().state("learned").transform(transform).codebook_size(64).sample_rows(4096);
}

std::shared_ptr<Codec> fitted(const CodecOptions& options, const CodecContext& context,
                              const at::Tensor& rows) {
  auto codec = make_codec(options, context);
  codec->observe(rows, {});
  EXPECT_TRUE(codec->refresh(*make_self_communicator()));
  return codec;
}

/// Largest error over its bound, rows of one group.
double error_ratio(const at::Tensor& x, const at::Tensor& decoded, double max_error,
                   bool by_group) {
  const at::Tensor difference = decoded.to(at::kDouble) - x.to(at::kDouble);
  const at::Tensor error = (difference * difference).sum(1).sqrt();
  const at::Tensor bound = testing::references(x, {x.size(0)}, by_group);
  // A zero row comes back zero: 0 / 0 counts as kept.
  return at::where(error == 0, at::zeros_like(error), error / (max_error * bound))
      .max()
      .item<double>();
}

TEST(Learned, BoundOfEveryRow) {
  for (const int64_t hidden : {1, 7, 16, 64, 100, 200}) {
    for (const std::string transform : {"channels", "basis"}) {
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        for (const std::string reference : {"row", "group"}) {
          for (const auto& [max_error, rounding] :
               {std::pair(0.004, "nearest"), std::pair(0.1, "nearest"), std::pair(0.1, "dithered"),
                std::pair(0.5, "nearest"), std::pair(0.5, "dithered")}) {
            const auto options =
                learned_options(transform).error_reference(reference).max_error(max_error).rounding(
                    rounding);
            const CodecContext context{hidden, 0, Direction::dispatch, dtype};
            const auto codec =
                fitted(options, context, clustered(900, hidden, 20, 0.3, 1).to(dtype));
            ASSERT_EQ(codec->state_stats().version, 1);
            for (const std::string& kind : testing::row_kinds()) {
              const at::Tensor x = make_rows(kind, 70, hidden, 2).to(dtype);
              const Encoded encoded = codec->encode(x, {70});
              const Decoded decoded = codec->decode(encoded.bytes, encoded.bytes_per_group);
              const double ratio = error_ratio(x, decoded.rows, max_error, reference == "group");
              EXPECT_LE(ratio, 1.0) << kind << " " << hidden << " " << transform << " " << dtype
                                    << " " << reference << " " << max_error << " " << rounding;
              EXPECT_LE(encoded.stats.max_error_ratio, 1.0);
              EXPECT_GE(encoded.stats.max_error_ratio, ratio * (1 - 1e-6)) << kind;
            }
          }
        }
      }
    }
  }
}

// A row's bytes depend on the rows of the call, not on its group: outliers elsewhere do not matter.
TEST(Learned, ARowIsTheSameInEveryGroup) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  at::Tensor x = clustered(200, 64, 20, 0.3, 1);
  x.slice(0, 0, 5).mul_(50);
  const auto codec = fitted(learned_options(), context, clustered(900, 64, 20, 0.3, 1));
  const at::Tensor all = at::arange(200, at::kLong);
  const at::Tensor index = at::cat({all.slice(0, 0, 40), all, all.slice(0, 20)});
  const Encoded encoded = codec->encode(x, index, {40, 200, 180});
  for (int64_t g = 0, begin = 0; g < 3; begin += encoded.bytes_per_group[g++]) {
    EXPECT_NE(field<uint32_t>(encoded.bytes.const_data_ptr<uint8_t>() + begin, 20), 0U) << g;
  }
  const at::Tensor rows = codec->decode(encoded.bytes, encoded.bytes_per_group).rows;
  EXPECT_EQ(bytes_of(rows.slice(0, 0, 40)), bytes_of(rows.slice(0, 40, 80)));
  EXPECT_EQ(bytes_of(rows.slice(0, 60, 240)), bytes_of(rows.slice(0, 240, 420)));
  const at::Tensor error = at::linalg_vector_norm((rows - x.index_select(0, index)), 2, {1});
  // The median of the call has the rows as often as they are sent.
  const at::Tensor bound = 0.1 * testing::references(x.index_select(0, index), {}, false);
  EXPECT_TRUE((error.to(at::kDouble) <= bound * (1 + 1e-6)).all().item<bool>());
}

// Also what torch computes in a fit, and products of sizes that a BLAS would share among threads.
TEST(Learned, EqualBytesForAnyNumberOfThreads) {
  struct Threads {
    int before = at::get_num_threads();
    ~Threads() { at::set_num_threads(before); }
  } const restore;
  for (const std::string transform : {"channels", "basis"}) {
    const CodecContext context{192, 0, Direction::dispatch, at::kFloat};
    const at::Tensor seen = clustered(1600, 192, 20, 0.3, 1), x = clustered(700, 192, 20, 0.3, 1);
    std::vector<uint8_t> bytes, rows;
    std::uint32_t checksum = 0;
    for (const int threads : {1, 2, 4}) {
      at::set_num_threads(threads);
      const auto codec = fitted(learned_options(transform), context, seen);
      const Encoded encoded = codec->encode(x, {600, 100});
      EXPECT_NE(field<uint32_t>(encoded.bytes.const_data_ptr<uint8_t>(), 20), 0U);
      const at::Tensor decoded = codec->decode(encoded.bytes, encoded.bytes_per_group).rows;
      if (threads == 1) {
        bytes = bytes_of(encoded.bytes);
        rows = bytes_of(decoded);
        checksum = codec->state_stats().checksum;
      }
      EXPECT_EQ(codec->state_stats().checksum, checksum) << transform << " " << threads;
      EXPECT_EQ(bytes_of(encoded.bytes), bytes) << transform << " " << threads;
      EXPECT_EQ(bytes_of(decoded), rows) << transform << " " << threads;
    }
  }
}

TEST(Learned, BeforeTheFirstFitParcelsExplainThemselves) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  const at::Tensor x = clustered(300, 64, 10, 0.2, 3);
  const auto learned = make_codec(learned_options(), context);
  const auto batch = make_codec(CodecOptions(), context);
  EXPECT_EQ(bytes_of(learned->encode(x, {300}).bytes), bytes_of(batch->encode(x, {300}).bytes));
  // Nothing observed: nothing to fit.
  EXPECT_FALSE(learned->refresh(*make_self_communicator()));
  EXPECT_EQ(learned->state_stats().version, 0);
}

TEST(Learned, SavesBytesOnRowsLikeThoseItSaw) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  // 30 clusters whose residuals lie in few directions that no channel order shows.
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(4);
  const at::Tensor center = at::randn({30, 64}, generator);
  const at::Tensor directions = 0.3 * at::randn({6, 64}, generator);
  const auto draw = [&](int64_t rows) {
    const at::Tensor id = at::randint(30, {rows}, generator, at::kLong);
    return center.index_select(0, id) + at::randn({rows, 6}, generator).matmul(directions) +
           0.01 * at::randn({rows, 64}, generator);
  };
  const at::Tensor seen = draw(2000), x = draw(512);
  const auto size = [&](const CodecOptions& options) {
    const auto codec = options.state() == "learned" ? fitted(options, context, seen)
                                                    : make_codec(options, context);
    return codec->encode(x, {512}).stats.sent_bytes;
  };
  const int64_t batch = size(CodecOptions()), plain = size(learned_options().codebook_size(0)),
                channels = size(learned_options()), basis = size(learned_options("basis"));
  EXPECT_LT(channels, 0.9 * static_cast<double>(batch));
  EXPECT_LT(channels, 0.9 * static_cast<double>(plain));
  EXPECT_LT(basis, 0.7 * static_cast<double>(channels));
}

TEST(Learned, AGroupThatItsOwnParcelExplainsInLessDoesSo) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  const auto codec = fitted(learned_options(), context, clustered(2000, 64, 30, 0.1, 5));
  // All rows equal, and like nothing seen: one mean and no residuals.
  const at::Tensor x = gaussian(1, 64, 6).expand({256, 64}).contiguous();
  const Encoded encoded = codec->encode(x, {256});
  EXPECT_EQ(field<uint32_t>(encoded.bytes.const_data_ptr<uint8_t>(), 20), 0U);
  EXPECT_LE(encoded.stats.sent_bytes,
            make_codec(CodecOptions(), context)->encode(x, {256}).stats.sent_bytes);
  // Beside it, in the same call, rows like those seen use the state.
  const at::Tensor both = at::cat({x, clustered(256, 64, 30, 0.1, 5)});
  const Encoded two = codec->encode(both, {256, 256});
  const auto* second = two.bytes.const_data_ptr<uint8_t>() + two.bytes_per_group[0];
  EXPECT_EQ(field<uint32_t>(second, 20), 1U);
  EXPECT_LE(error_ratio(both, codec->decode(two.bytes, two.bytes_per_group).rows, 0.1, false), 1.0);
}

TEST(Learned, ATokensBytesAreTheSameForEveryDestination) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  for (const std::string transform : {"channels", "basis"}) {
    const auto codec = fitted(learned_options(transform), context, clustered(2000, 64, 30, 0.2, 7));
    const at::Tensor x = clustered(40, 64, 30, 0.2, 7);
    const at::Tensor one = at::arange(40);
    const Encoded encoded = codec->encode(x, at::cat({one, one}), {40, 40});
    const auto bytes = bytes_of(encoded.bytes);
    const auto half = static_cast<std::ptrdiff_t>(bytes.size() / 2);
    EXPECT_EQ(encoded.bytes_per_group[0], encoded.bytes_per_group[1]);
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.begin() + half, bytes.begin() + half));
    // Every row apart decodes to the same: a relay may pick rows out.
    EXPECT_EQ(field<uint32_t>(bytes.data(), 20), 1U) << "coded without the state";
  }
}

// A mean of such rows would not be finite, and the root alone would throw in the fit.
TEST(Learned, RowsNearTheEndOfFp32AreNotFitted) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const CodecContext context{64, 0, Direction::dispatch, dtype};
    at::Tensor x = clustered(900, 64, 20, 0.3, 1);
    x.slice(0, 0, 20).fill_(3e38);
    x = x.to(dtype);
    const auto codec = fitted(learned_options(), context, x);
    EXPECT_EQ(codec->state_stats().version, 1);
    const Encoded encoded = codec->encode(x, {900});
    EXPECT_EQ(field<uint32_t>(encoded.bytes.const_data_ptr<uint8_t>(), 20), 1U);
    const at::Tensor rows = codec->decode(encoded.bytes, encoded.bytes_per_group).rows;
    EXPECT_LE(error_ratio(x, rows, 0.1, false), 1.0);
    const auto nothing = make_codec(learned_options(), context);
    nothing->observe(x.slice(0, 0, 20), {});
    EXPECT_FALSE(nothing->refresh(*make_self_communicator()));
  }
}

TEST(Learned, FitsAreDueAtPowersOfTwoThenRegularly) {
  const CodecContext context{16, 0, Direction::dispatch, at::kFloat};
  const auto codec = make_codec(learned_options().refresh_every(10), context);
  const auto alone = make_self_communicator();
  std::vector<int> due;
  for (int call = 1; call <= 31; ++call) {
    codec->observe(gaussian(100, 16, static_cast<uint64_t>(call)), {});
    if (codec->refresh(*alone)) due.push_back(call);
  }
  EXPECT_EQ(due, (std::vector<int>{1, 2, 4, 8, 10, 20, 30}));
  EXPECT_EQ(codec->state_stats().version, 7);
}

TEST(Learned, TheFormerVersionStillDecodesOlderOnesAreRefused) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  const auto codec = fitted(learned_options(), context, clustered(900, 64, 20, 0.2, 8));
  const at::Tensor x = clustered(100, 64, 20, 0.2, 8);
  const Encoded first = codec->encode(x, {100});
  const at::Tensor rows = codec->decode(first.bytes, first.bytes_per_group).rows;
  const auto alone = make_self_communicator();
  codec->observe(clustered(900, 64, 20, 0.2, 9), {});
  ASSERT_TRUE(codec->refresh(*alone));
  EXPECT_TRUE(at::equal(codec->decode(first.bytes, first.bytes_per_group).rows, rows));
  while (codec->state_stats().version == 2) {
    codec->observe(clustered(900, 64, 20, 0.2, 10), {});
    static_cast<void>(codec->refresh(*alone));
  }
  expect_error("version 1 of the learned state, this rank has 3",
               [&] { static_cast<void>(codec->decode(first.bytes, first.bytes_per_group)); });
  // A codec without any state, and one of another kind.
  for (const CodecOptions& options : {learned_options(), CodecOptions()}) {
    const auto other = make_codec(options, context);
    expect_error("version 1 of the learned state, this rank has 0",
                 [&] { static_cast<void>(other->decode(first.bytes, first.bytes_per_group)); });
  }
}

TEST(Learned, DamagedParcelsAreRefused) {
  for (const std::string transform : {"channels", "basis"}) {
    const CodecContext context{32, 0, Direction::dispatch, at::kFloat};
    const auto codec = fitted(learned_options(transform), context, clustered(900, 32, 20, 0.2, 11));
    const Encoded encoded = codec->encode(clustered(20, 32, 20, 0.2, 12), {20});
    const auto good = bytes_of(encoded.bytes);
    ASSERT_EQ(field<uint32_t>(good.data(), 20), 1U);
    int refused = 0;
    for (std::size_t i = 0; i < good.size(); ++i) {
      for (const int change : {1, 0x80, 0xFF}) {
        auto bad = good;
        bad[i] = static_cast<uint8_t>(bad[i] ^ change);
        const auto size = static_cast<int64_t>(bad.size());
        EXPECT_THROW(static_cast<void>(codec->decode(testing::to_tensor(bad), {size})),
                     InvalidArgument);
        // With a checksum that fits, either a check behind it, or rows like any others.
        testing::reseal(bad.data(), bad.size());
        try {
          const Decoded decoded = codec->decode(testing::to_tensor(bad), {size});
          EXPECT_EQ(decoded.rows.size(0), 20);
        } catch (const InvalidArgument&) {
          ++refused;
        }
      }
    }
    EXPECT_GT(refused, 100);
  }
}

TEST(Learned, OptionsThatDoNotFit) {
  const CodecContext context{16, 0, Direction::dispatch, at::kFloat};
  expect_error("unknown state 'lerned': use batch or learned",
               [&] { static_cast<void>(make_codec(CodecOptions().state("lerned"), context)); });
  expect_error("transform basis needs state learned",
               [&] { static_cast<void>(make_codec(CodecOptions().transform("basis"), context)); });
  expect_error("unknown transform",
               [&] { static_cast<void>(make_codec(CodecOptions().transform("dct"), context)); });
  expect_error("refresh_every 0",
               [&] { static_cast<void>(make_codec(learned_options().refresh_every(0), context)); });
}

// Every rank sees other rows; after each fit all hold the same state, bit for bit.
TEST(Learned, RanksHoldEqualStates) {
  const auto shared = testing::world();
  Communicator& world = *shared;
  for (const std::string transform : {"channels", "basis"}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const CodecContext context{48, 0, Direction::dispatch, dtype};
      const auto codec = make_codec(learned_options(transform), context);
      const at::Tensor all = clustered(5000, 48, 20, 0.2, 13).to(dtype);
      const at::Tensor probe = all.slice(0, 0, 200);
      for (int fit = 1; fit <= 3;) {
        // One rank has nothing to show.
        const int64_t first = 200 + (4 * fit + world.rank()) * 250;
        const int64_t rows = world.size() > 1 && world.rank() == 1 ? 0 : 250;
        codec->observe(all.slice(0, first, first + rows), {});
        if (!codec->refresh(world)) continue;
        EXPECT_EQ(codec->state_stats().version, fit);
        const Encoded encoded = codec->encode(probe, {200});
        EXPECT_EQ(field<uint32_t>(encoded.bytes.const_data_ptr<uint8_t>(), 20),
                  static_cast<uint32_t>(fit));
        const auto sum = kernels::checksum(encoded.bytes.const_data_ptr(), encoded.bytes.nbytes());
        for (const auto other : all_gather(world, sum, Purpose::control)) EXPECT_EQ(other, sum);
        ++fit;
      }
      const StateStats stats = codec->state_stats();
      EXPECT_GT(stats.state_bytes, 0);
      EXPECT_GT(stats.memory_bytes, 0);
      if (world.size() > 1 && world.rank() == 0) {
        EXPECT_GE(stats.bytes_sent, 3 * stats.state_bytes * (world.size() - 1) / 2);
      }
    }
  }
}

}  // namespace
}  // namespace lshmoe
