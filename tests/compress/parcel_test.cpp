// Parcels that come from a wire: damaged ones never do worse than InvalidArgument, and those of
// earlier builds keep decoding to the same rows.

#include "lshmoe/compress/parcel.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdio>
#include <fstream>
#include <random>
#include <set>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe {
namespace {
using testing::bytes_of;
using testing::field;
using testing::reseal;
using testing::to_tensor;
using Bytes = std::vector<uint8_t>;

// While it lives, memory beyond `more` bytes is refused: a huge allocation throws bad_alloc, which
// no test here expects.
class MemoryLimit {
 public:
  explicit MemoryLimit(rlim_t more) {
    getrlimit(RLIMIT_AS, &before_);
    rlim_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit = before_;
    limit.rlim_cur = pages * 4096 + more;
    setrlimit(RLIMIT_AS, &limit);
  }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;
  ~MemoryLimit() { setrlimit(RLIMIT_AS, &before_); }

 private:
  rlimit before_{};
};
constexpr rlim_t kMemory = rlim_t{256} << 20;

struct Sample {
  std::string name;
  CodecOptions options;
  CodecContext context;
  Bytes parcel;
  int64_t rows;
};

Sample make_sample(std::string name, const CodecOptions& options, const CodecContext& context,
                   const at::Tensor& x) {
  const Encoded encoded = make_codec(options, context)->encode(x.to(context.dtype), {x.size(0)});
  const bool source = options.kind() == "lsh" && options.restore() == "source";
  return {std::move(name), options, context, bytes_of(encoded.bytes),
          source ? encoded.centroids.size(0) : x.size(0)};
}

// Parcels of every kind, with every part a parcel can have.
const std::vector<Sample>& samples() {
  static const std::vector<Sample> all = [] {
    const CodecContext f32{40, 0, Direction::dispatch, at::kFloat};
    const CodecContext b16{40, 0, Direction::combine, at::kBFloat16};
    const at::Tensor rows = testing::clustered(45, 40, 3, 0.1, 1) + 2;
    at::Tensor some_whole = testing::gaussian(12, 40, 2);
    some_whole.select(0, 3).zero_();
    some_whole.select(0, 4).mul_(1e-36);  // steps below kMinStep
    return std::vector<Sample>{
        make_sample("none", CodecOptions().kind("none"), {5}, rows.narrow(0, 0, 3).narrow(1, 0, 5)),
        make_sample("bf16", CodecOptions().kind("bf16"), {5}, rows.narrow(0, 0, 3).narrow(1, 0, 5)),
        make_sample("fp8", CodecOptions().kind("fp8"), f32, some_whole),
        make_sample("int8", CodecOptions().kind("int8"), b16, some_whole),
        make_sample("int4", CodecOptions().kind("int4"), {7}, some_whole.narrow(1, 0, 7)),
        make_sample("row", CodecOptions(), f32, rows),
        make_sample("group", CodecOptions(), b16, rows),
        make_sample("whole rows", CodecOptions().max_error(0.03), f32, some_whole),
        make_sample("fine", CodecOptions().max_error(1e-4), f32, some_whole),
        make_sample("all whole", CodecOptions().max_error(0), f32, rows.narrow(0, 0, 4)),
        make_sample("source", CodecOptions().restore("source"), f32, rows),
    };
  }();
  return all;
}

// "" when the parcel decodes (to rows of a sane number), else the text of InvalidArgument. Both
// ways to decode must agree.
std::string decode(const Sample& sample, const Bytes& parcel) {
  const auto codec = make_codec(sample.options, sample.context);
  const at::Tensor bytes = to_tensor(parcel);
  std::string text;
  int64_t rows = sample.rows;
  try {
    const Decoded decoded = codec->decode(bytes, {bytes.numel()});
    EXPECT_EQ(decoded.rows.size(1), sample.context.hidden_size);
    rows = decoded.rows.size(0);
  } catch (const InvalidArgument& error) {
    text = error.what();
  }
  at::Tensor out = at::empty({rows, sample.context.hidden_size}, sample.context.dtype);
  try {
    codec->decode_into(out, at::arange(rows), bytes, {bytes.numel()}, {rows});
    EXPECT_EQ(text, "");
  } catch (const InvalidArgument& error) {
    EXPECT_NE(text, "") << error.what();
  }
  return text;
}

TEST(Damage, SamplesHaveEveryPart) {
  bool mean = false, order = false, group_step = false, centroids = false, whole = false;
  for (const Sample& sample : samples()) {
    EXPECT_EQ(decode(sample, sample.parcel), "") << sample.name;
    if (sample.options.kind() != "lsh" || sample.options.restore() == "source") continue;
    const testing::Directory directory = testing::read_directory(sample.parcel.data());
    mean |= directory.has_mean;
    order |= directory.has_order;
    group_step |= directory.group_step;
    centroids |= directory.centroids > 0;
    const auto count = std::count(directory.whole.begin(), directory.whole.end(), true);
    whole |= count > 0 && !directory.all_whole;
  }
  EXPECT_TRUE(mean);
  EXPECT_TRUE(order);
  EXPECT_TRUE(group_step);
  EXPECT_TRUE(centroids);
  EXPECT_TRUE(whole);
}

TEST(Damage, EveryFlippedBitIsFound) {
  for (const Sample& sample : samples()) {
    const auto codec = make_codec(sample.options, sample.context);
    at::Tensor bytes = to_tensor(sample.parcel);
    auto* at = bytes.mutable_data_ptr<uint8_t>();
    int64_t missed = 0;
    for (int64_t bit = 0; bit < 8 * bytes.numel(); ++bit) {
      const auto mask = static_cast<uint8_t>(1 << bit % 8);
      at[bit / 8] ^= mask;
      try {
        static_cast<void>(codec->decode(bytes, {bytes.numel()}));
        ++missed;
      } catch (const InvalidArgument&) {
      }
      at[bit / 8] ^= mask;
    }
    EXPECT_EQ(missed, 0) << sample.name;
  }
}

TEST(Damage, EveryTruncation) {
  const MemoryLimit limit(kMemory);
  for (const Sample& sample : samples()) {
    for (std::size_t size = 1; size < sample.parcel.size(); ++size) {
      Bytes cut(sample.parcel.begin(), sample.parcel.begin() + static_cast<std::ptrdiff_t>(size));
      EXPECT_NE(decode(sample, cut), "") << sample.name << " cut to " << size;
      if (size < 40) continue;
      // The same with a header that agrees: the body shorter, or the shared part.
      const uint64_t after = size - 40;
      const auto shared = std::min<uint64_t>(field<uint32_t>(sample.parcel.data(), 32), after);
      const uint64_t body = after - shared;
      std::memcpy(cut.data() + 24, &body, 8);
      std::memcpy(cut.data() + 32, &shared, 4);
      reseal(cut.data(), cut.size());
      EXPECT_NE(decode(sample, cut), "") << sample.name << " cut to " << size << ", sealed";
    }
    Bytes longer = sample.parcel;
    longer.push_back(0);
    EXPECT_NE(decode(sample, longer), "");
    const uint64_t body = field<uint64_t>(longer.data(), 24) + 1;
    std::memcpy(longer.data() + 24, &body, 8);
    reseal(longer.data(), longer.size());
    EXPECT_NE(decode(sample, longer), "") << sample.name;
  }
}

TEST(Damage, EveryChangedByteBehindAGoodChecksum) {
  const MemoryLimit limit(kMemory);
  std::string texts;
  int64_t decoded = 0;
  for (const Sample& sample : samples()) {
    for (std::size_t i = 0; i < sample.parcel.size(); ++i) {
      const uint8_t old = sample.parcel[i];
      const auto changed = [&](int value) { return static_cast<uint8_t>(value); };
      const std::set<uint8_t> values{changed(old ^ 1), changed(old ^ 16), changed(old ^ 128),
                                     changed(old + 1), changed(old - 1),  changed(0),
                                     changed(0x7F),    changed(255)};
      for (const uint8_t value : values) {
        if (value == old) continue;
        Bytes parcel = sample.parcel;
        parcel[i] = value;
        reseal(parcel.data(), parcel.size());
        const std::string text = decode(sample, parcel);
        texts += text + "\n";
        decoded += text.empty();
        // Magic, format, kind, dtype, hidden size, state version and lengths allow no other value.
        const bool fixed = i < 7 || (i >= 12 && i < 16) || (i >= 20 && i < 36);
        if (fixed) {
          EXPECT_NE(text, "") << sample.name << " byte " << i;
        }
      }
    }
  }
  EXPECT_GT(decoded, 100);  // payload bits may say something else, and still be a parcel
  for (const char* reached : {"magic number",
                              "has format",
                              "has kind",
                              "has dtype code",
                              "holds no rows",
                              "hidden size",
                              "of the learned state, this rank has",
                              "kind without learned state",
                              "after its header",
                              "unknown flags",
                              "step is out of range",
                              "band does not exist",
                              "too many channels",
                              "too short for",
                              "step code",
                              "bits set in its padding",
                              "has band indices",
                              "out of its range",
                              "goes beyond its parcel",
                              "names centroid",
                              "left over after the last row",
                              "left over in the shared part",
                              "bytes short",
                              "whole rows has",
                              "of kind fp8 has",
                              "of kind int8 has",
                              "of kind int4 has"}) {
    EXPECT_NE(texts.find(reached), std::string::npos) << "no change led to: " << reached;
  }
}

TEST(Damage, RandomBytes) {
  const MemoryLimit limit(kMemory);
  std::mt19937 random(3);
  const auto draw = [&](std::size_t below) { return random() % below; };
  for (const Sample& sample : samples()) {
    for (int i = 0; i < 400; ++i) {
      Bytes parcel = sample.parcel;
      if (i % 2 == 0) {  // several bytes anywhere after the fixed fields
        for (int changes = 0; changes < 4; ++changes) {
          parcel[40 + draw(parcel.size() - 40)] = static_cast<uint8_t>(random());
        }
        parcel[7] = static_cast<uint8_t>(draw(16));
        parcel[16] = static_cast<uint8_t>(draw(8));
      } else {  // a header with random counts, and noise behind it
        for (std::size_t j = 40; j < parcel.size(); ++j) parcel[j] = static_cast<uint8_t>(random());
        for (std::size_t j : {7, 8, 9, 16, 17}) parcel[j] = static_cast<uint8_t>(draw(4));
      }
      reseal(parcel.data(), parcel.size());
      decode(sample, parcel);
      for (uint8_t& byte : parcel) byte = static_cast<uint8_t>(random());
      EXPECT_NE(decode(sample, parcel), "");
    }
  }
}

TEST(Damage, HugeCountsCostNoMemory) {
  const MemoryLimit limit(kMemory);
  for (const Sample& sample : samples()) {
    // A body long enough for a byte a row.
    for (const std::size_t more : {std::size_t{0}, std::size_t{1} << 20}) {
      Bytes longer = sample.parcel;
      longer.resize(longer.size() + more, 0);
      const uint64_t body = field<uint64_t>(longer.data(), 24) + more;
      std::memcpy(longer.data() + 24, &body, 8);
      for (const std::size_t offset : {8, 16}) {
        for (const uint32_t count : {uint32_t{255}, uint32_t{256}, uint32_t{65535}, uint32_t{65536},
                                     uint32_t{1000000}, uint32_t{1} << 31, ~uint32_t{0}}) {
          Bytes parcel = longer;
          std::memcpy(parcel.data() + offset, &count, 4);
          reseal(parcel.data(), parcel.size());
          EXPECT_NE(decode(sample, parcel), "") << sample.name << " " << count << " at " << offset;
        }
      }
    }
    for (const uint64_t length : {~uint64_t{0}, uint64_t{1} << 63, uint64_t{1} << 32}) {
      Bytes parcel = sample.parcel;
      std::memcpy(parcel.data() + 24, &length, 8);
      reseal(parcel.data(), parcel.size());
      EXPECT_NE(decode(sample, parcel), "") << sample.name;
    }
  }
  // Wide rows: what a row takes once decoded is far above what it must take in the parcel.
  Sample wide = make_sample("wide", CodecOptions(), {4096}, testing::gaussian(2, 4096, 1));
  wide.parcel.resize(wide.parcel.size() + (1 << 20), 0);
  const uint64_t body = field<uint64_t>(wide.parcel.data(), 24) + (1 << 20);
  const uint32_t rows = 1 << 20;
  std::memcpy(wide.parcel.data() + 24, &body, 8);
  std::memcpy(wide.parcel.data() + 8, &rows, 4);
  reseal(wide.parcel.data(), wide.parcel.size());
  EXPECT_NE(decode(wide, wide.parcel), "");
}

TEST(Damage, OtherSettingsAreRefused) {
  for (const Sample& writer : samples()) {
    for (const Sample& reader : samples()) {
      const bool same_kind = writer.options.kind() == reader.options.kind() &&
                             writer.options.restore() == reader.options.restore() &&
                             writer.context.dtype == reader.context.dtype &&
                             writer.context.hidden_size == reader.context.hidden_size;
      EXPECT_EQ(
          decode({reader.name, reader.options, reader.context, {}, writer.rows}, writer.parcel)
              .empty(),
          same_kind)
          << writer.name << " read by " << reader.name;
    }
  }
}

TEST(Damage, GroupsThatDoNotFit) {
  const Sample& sample = samples()[5];
  const auto codec = make_codec(sample.options, sample.context);
  const at::Tensor bytes = to_tensor(sample.parcel);
  const int64_t size = bytes.numel(), rows = sample.rows;
  at::Tensor out = at::zeros({rows, 40});
  const auto text = [&](const std::vector<int64_t>& sizes, const std::vector<int64_t>& counts) {
    try {
      int64_t sum = 0;
      for (const int64_t count : counts) sum += count;
      codec->decode_into(out, at::arange(sum), bytes, sizes, counts);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(text({0, size}, {0, rows}), "");
  EXPECT_NE(text({size}, {rows - 1}).find("the parcel of group 0 holds 45 rows, expected 44"),
            std::string::npos);
  EXPECT_NE(text({0, size}, {1, rows - 1}).find("group 0 has no parcel, but 1 rows are expected"),
            std::string::npos);
  EXPECT_NE(text({size - 1}, {rows}).find("leaves 1 of"), std::string::npos);
  EXPECT_NE(text({size + 1}, {rows}).find("does not fit"), std::string::npos);
  EXPECT_NE(text({-1, size + 1}, {0, rows}).find("does not fit"), std::string::npos);
  EXPECT_NE(text({size}, {rows, 0}).find("2 groups of rows, but 1 groups of bytes"),
            std::string::npos);
}

// Golden parcels --------------------------------------------------------------------------------
//
// golden.inc holds parcels written by an earlier build, in hex. Parcels of the format's version 1
// must decode to these rows for ever; what encode writes may change (a better choice of clusters),
// and then the old parcels stay and new ones are added. To print an entry for each case below:
//   test_compress_parcel --gtest_also_run_disabled_tests --gtest_filter=Golden.DISABLED_Print

struct GoldenCase {
  std::string name;
  CodecOptions options;
  CodecContext context;
  at::Tensor x;
};

// Rows from integers alone, near three centers.
at::Tensor golden_rows(int64_t rows, int64_t hidden, float nearness = 16) {
  const at::Tensor x = at::empty({rows, hidden});
  auto access = x.accessor<float, 2>();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < hidden; ++j) {
      const auto center = static_cast<float>(((i % 3 + 2) * (j + 3) * 13) % 23 - 11);
      const auto own = static_cast<float>((i * 7 + j * 3 + i * j) % 9 - 4);
      access[i][j] = center / 4 + own / nearness;
    }
  }
  // One row of zeros, and one that is too small for steps and travels whole.
  if (rows > 20) {
    x.select(0, 7).zero_();
    x.select(0, 8).mul_(0x1p-110);
  }
  return x;
}

std::vector<GoldenCase> golden_cases() {
  const auto f32 = [](int64_t hidden) {
    return CodecContext{hidden, 0, Direction::dispatch, at::kFloat};
  };
  return {
      {"none", CodecOptions().kind("none"), f32(3), golden_rows(2, 3)},
      {"bf16", CodecOptions().kind("bf16"), f32(3), golden_rows(2, 3)},
      {"fp8", CodecOptions().kind("fp8"), f32(20), golden_rows(3, 20)},
      {"int8", CodecOptions().kind("int8"), f32(20), golden_rows(3, 20)},
      {"int4", CodecOptions().kind("int4"), f32(37), golden_rows(3, 37)},
      {"whole", CodecOptions().max_error(0), f32(3), golden_rows(2, 3)},
      {"row", CodecOptions(), f32(20), golden_rows(36, 20)},
      {"fine", CodecOptions().max_error(1e-4), f32(20), golden_rows(3, 20)},
      {"clusters", CodecOptions().max_error(0.02), f32(20), golden_rows(36, 20, 32)},
      {"group bf16",
       CodecOptions(),
       {37, 0, Direction::combine, at::kBFloat16},
       golden_rows(24, 37).to(at::kBFloat16)},
      {"source", CodecOptions().restore("source").refine(0), f32(20), golden_rows(12, 20)},
  };
}

struct GoldenParcel {
  const char* name;
  const char* hex;
  uint32_t rows_checksum;  // of the decoded rows' bytes
};
const GoldenParcel kGoldenParcels[] = {
#include "tests/compress/golden.inc"
};

TEST(Golden, ParcelsKeepDecoding) {
  std::set<std::string> seen;
  for (const GoldenParcel& golden : kGoldenParcels) {
    SCOPED_TRACE(golden.name);
    const auto cases = golden_cases();
    const auto it = std::find_if(cases.begin(), cases.end(),
                                 [&](const GoldenCase& c) { return c.name == golden.name; });
    ASSERT_NE(it, cases.end());
    seen.insert(golden.name);
    Bytes parcel;
    for (const char* hex = golden.hex; *hex != '\0'; hex += 2) {
      unsigned byte = 0;
      ASSERT_EQ(std::sscanf(hex, "%2x", &byte), 1);
      parcel.push_back(static_cast<uint8_t>(byte));
    }
    const auto codec = make_codec(it->options, it->context);
    const at::Tensor rows =
        codec->decode(to_tensor(parcel), {static_cast<int64_t>(parcel.size())}).rows;
    const Bytes bytes = bytes_of(rows);
    EXPECT_EQ(kernels::checksum(bytes.data(), bytes.size()), golden.rows_checksum);
    if (it->options.restore() == "source") continue;
    // What they were made from, within the bound: a golden parcel is no random one.
    ASSERT_EQ(rows.sizes(), it->x.sizes());
    const at::Tensor exact = it->x.to(at::kDouble);
    const at::Tensor error = (rows.to(at::kDouble) - exact).norm(2, 1);
    const bool by_group = it->context.direction == Direction::combine;
    const double max_error = it->options.kind() == "none"   ? 0
                             : it->options.kind() == "bf16" ? 1.0 / 256
                             : it->options.kind() == "fp8"  ? 1.0 / 16
                             : it->options.kind() == "int8" ? 0.02
                             : it->options.kind() == "int4" ? 0.15
                                                            : it->options.max_error();
    const at::Tensor bound = max_error * testing::references(it->x, {it->x.size(0)}, by_group);
    EXPECT_TRUE((error <= bound).all().item<bool>());
  }
  EXPECT_EQ(seen.size(), golden_cases().size());
}

TEST(Golden, DISABLED_Print) {
  for (const GoldenCase& golden : golden_cases()) {
    const auto codec = make_codec(golden.options, golden.context);
    const Encoded encoded = codec->encode(golden.x, {golden.x.size(0)});
    const Bytes parcel = bytes_of(encoded.bytes),
                rows = bytes_of(codec->decode(encoded.bytes, encoded.bytes_per_group).rows);
    std::printf("{\"%s\",", golden.name.c_str());
    for (std::size_t i = 0; i < parcel.size(); ++i) {
      std::printf("%s%02x", i % 44 != 0 ? "" : i == 0 ? "\n \"" : "\"\n \"", unsigned{parcel[i]});
    }
    std::printf("\",\n 0x%08xu},\n", kernels::checksum(rows.data(), rows.size()));
  }
}

}  // namespace
}  // namespace lshmoe
