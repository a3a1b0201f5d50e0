// Text files as windows: what is held out, what stands between, what a window depends on, errors.

#include "lshmoe/launch/data.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe::launch {
namespace {
namespace fs = std::filesystem;

/// A folder of its own for each test, removed at the end.
class Data : public ::testing::Test {
 protected:
  const fs::path root =
      fs::path(::testing::TempDir()) / ("lshmoe_data_" + std::to_string(::getpid()));
  void SetUp() override { fs::create_directories(root); }
  void TearDown() override { fs::remove_all(root); }

  std::string write(const fs::path& name, const std::string& bytes) const {
    const fs::path path = root / name;
    fs::create_directories(path.parent_path());
    write_file_atomically(path.string(), bytes);
    return path.string();
  }
  /// Token ids 0, 1, 2, ... as a *.bin, little-endian.
  std::string write_ids(const fs::path& name, int64_t count, int bytes_each) const {
    std::string bytes;
    for (int64_t id = 0; id < count; ++id) {
      for (int b = 0; b < bytes_each; ++b) bytes += static_cast<char>(id >> (8 * b));
    }
    return write(name, bytes);
  }
};

TextOptions text(std::vector<std::string> paths, int64_t seq_len, int64_t vocab_size = 0) {
  TextOptions options;
  options.paths = std::move(paths);
  options.seq_len = seq_len;
  options.vocab_size = vocab_size;
  options.eval_sequences = 1'000'000;
  return options;
}

std::vector<int64_t> ids_of(const at::Tensor& windows) {
  const at::Tensor flat = windows.contiguous().view({-1});
  return {flat.data_ptr<int64_t>(), flat.data_ptr<int64_t>() + flat.numel()};
}
std::set<int64_t> distinct(const at::Tensor& windows) {
  const auto ids = ids_of(windows);
  return {ids.begin(), ids.end()};
}
at::Tensor all_eval(const DataSource& data) {
  return data.eval_windows(0, data.num_eval_windows());
}

std::string error_of(const TextOptions& options) {
  try {
    const TextFiles data(options);
    (void)data.train_windows(1, 0, 200);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no error";
}

TEST_F(Data, EveryFiftiethFileIsHeldOutAndAZeroByteStandsBetween) {
  // File number n (from 1, in path order) is forty bytes of value n; nos. 50 and 100 are held out.
  for (int n = 100; n >= 1; --n) {
    char name[16];
    std::snprintf(name, sizeof name, "%s/%03d.h", n <= 30 ? "a/deep" : "b", n);
    write(name, std::string(40, static_cast<char>(n)));
  }
  write("a/.hidden/x.h", std::string(40, '\xF0'));
  write("b/.hidden.h", std::string(40, '\xF1'));
  write("b/ids.bin", std::string(40, '\xF2'));
  write("b/000_empty.h", "");
  const TextFiles data(text({root.string()}, 8));
  EXPECT_EQ(data.num_files(), 100);
  EXPECT_EQ(data.vocab_size(), 256);
  EXPECT_EQ(data.train_tokens(), 98 * 40 + 97);
  EXPECT_EQ(data.eval_tokens(), 2 * 40 + 1);

  // 81 held-out tokens are 10 windows of 8 and the next token each, at 0, 8, ... 72.
  std::vector<int64_t> stream(40, 50);
  stream.push_back(0);
  stream.insert(stream.end(), 40, 100);
  ASSERT_EQ(data.num_eval_windows(), 10);
  const auto windows = ids_of(all_eval(data));
  for (std::size_t w = 0; w < 10; ++w) {
    for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(windows[9 * w + i], stream[8 * w + i]) << w;
  }

  const auto train = ids_of(data.train_windows(7, 0, 3000));
  std::set<int64_t> expected = {0};
  for (int n = 1; n < 100; ++n) {
    if (n != 50) expected.insert(n);
  }
  EXPECT_EQ(std::set<int64_t>(train.begin(), train.end()), expected);
  // In a window a file's bytes go on, or the separator and then the next file of the training part.
  for (std::size_t i = 1; i < train.size(); ++i) {
    if (i % 9 == 0 || train[i] == train[i - 1] || train[i] == 0) continue;
    ASSERT_EQ(train[i - 1], 0) << "at " << i;
    if (i % 9 < 2) continue;  // the separator is the window's first token
    const int64_t before = train[i - 2];
    ASSERT_EQ(train[i], before == 49 ? 51 : before + 1) << "at " << i;
  }
}

TEST_F(Data, OfFewFilesEveryFiftiethBlockIsHeldOut) {
  // 50,000 ids, each its own position: 1,000 blocks of 50.
  for (const int files : {1, 3}) {
    std::vector<std::string> paths = {write_ids("ids.bin", 50'000, 2)};
    if (files == 3) {
      const std::string all = read_file(paths[0]);
      paths = {write("1.bin", all.substr(0, 246)), write("2.bin", all.substr(246, 60'000)),
               write("3.bin", all.substr(60'246))};
    }
    const TextFiles data(text(paths, 4, 50'000));
    std::set<int64_t> held_out;
    for (int64_t id = 0; id < 50'000; ++id) {
      if (id / 50 % 50 == 49) held_out.insert(id);
    }
    EXPECT_EQ(distinct(all_eval(data)), held_out);
    EXPECT_EQ(data.eval_tokens(), 1'000);
    EXPECT_EQ(data.train_tokens(), 49'000);  // ids have no separators

    // Uniform over the training text: a tenth of the windows starts in each tenth of it.
    const at::Tensor train = data.train_windows(1, 0, 4000);
    for (const int64_t id : distinct(train)) ASSERT_FALSE(held_out.contains(id)) << id;
    std::vector<int> tenth(10, 0);
    for (int64_t w = 0; w < train.size(0); ++w) ++tenth[train[w][0].item<int64_t>() / 5'000];
    for (const int count : tenth) EXPECT_NEAR(count, 400, 5 * std::sqrt(360.0));
  }
}

TEST_F(Data, ShortTextStillHasBothParts) {
  // Too short for 50 blocks: as many as there is text for, the last one held out.
  const TextFiles data(text({write_ids("ids.bin", 100, 2)}, 4, 100));
  EXPECT_EQ(data.train_tokens() + data.eval_tokens(), 100);
  const auto eval = distinct(all_eval(data)), train = distinct(data.train_windows(1, 0, 500));
  for (const int64_t id : eval) EXPECT_FALSE(train.contains(id)) << id;
  EXPECT_TRUE(eval.contains(99));
}

TEST_F(Data, AWindowDependsOnSeedStepAndSequenceOnly) {
  TextOptions options = text({write_ids("ids.bin", 60'000, 2)}, 16, 60'000);
  options.seed = 3;
  const TextFiles data(options), again(options);
  const at::Tensor batch = data.train_windows(5, 0, 16);
  EXPECT_EQ(batch.sizes(), (std::vector<int64_t>{16, 17}));
  EXPECT_EQ(batch.scalar_type(), at::kLong);
  // As four ranks draw it, after other draws, from another object.
  (void)again.train_windows(4, 9, 3);
  for (int64_t rank = 3; rank >= 0; --rank) {
    EXPECT_TRUE(at::equal(again.train_windows(5, 4 * rank, 4), batch.narrow(0, 4 * rank, 4)));
  }
  options.seed = 4;
  const TextFiles other(options);
  for (int64_t i = 0; i < 16; ++i) {
    EXPECT_FALSE(at::equal(batch[i], data.train_windows(6, i, 1)[0]));
    EXPECT_FALSE(at::equal(batch[i], other.train_windows(5, i, 1)[0]));
    for (int64_t j = 0; j < i; ++j) EXPECT_FALSE(at::equal(batch[i], batch[j]));
  }
  EXPECT_TRUE(at::equal(all_eval(data), all_eval(other)));  // the measure is the same for all seeds
  EXPECT_EQ(data.fingerprint(), other.fingerprint());
}

TEST_F(Data, IdsAreLittleEndianOfTwoOrFourBytes) {
  for (const auto& [vocab, bytes] : {std::pair<int64_t, int>{65'536, 2}, {65'537, 4}}) {
    const TextFiles data(text({write_ids("ids.bin", 3'000, bytes)}, 4, vocab));
    EXPECT_EQ(data.vocab_size(), vocab);
    EXPECT_EQ(data.train_tokens() + data.eval_tokens(), 3'000);
    const at::Tensor windows = data.train_windows(1, 0, 50);
    int64_t in_order = 0;  // all but those that go on behind a held-out block
    for (int64_t w = 0; w < 50; ++w) {
      in_order += windows[w][4].item<int64_t>() == windows[w][0].item<int64_t>() + 4;
    }
    EXPECT_GT(in_order, 45);
  }
  EXPECT_NE(error_of(text({write_ids("ids.bin", 3'000, 2)}, 4, 1'000)).find("token id 1"),
            std::string::npos);
}

TEST_F(Data, EvaluationTakesAtMostTheSequencesAskedFor) {
  TextOptions options = text({write_ids("ids.bin", 60'000, 2)}, 4, 60'000);
  options.eval_sequences = 7;
  const TextFiles data(options);
  ASSERT_EQ(data.num_eval_windows(), 7);
  // Spread over all of the held-out text: from its first block to its last.
  const at::Tensor windows = all_eval(data);
  EXPECT_LT(windows[0][0].item<int64_t>(), 3'000);
  EXPECT_GT(windows[6][4].item<int64_t>(), 57'000);
  EXPECT_THROW((void)data.eval_windows(6, 2), InvalidArgument);
}

TEST_F(Data, ErrorsSayWhatIsWrongAndWhatToDo) {
  const auto expect_error = [](const TextOptions& options, const std::string& what,
                               const std::string& what_to_do) {
    const std::string error = error_of(options);
    EXPECT_NE(error.find(what), std::string::npos) << error;
    EXPECT_NE(error.find(what_to_do), std::string::npos) << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  };
  const std::string missing = (root / "missing.txt").string();
  expect_error(text({missing}, 8), "no data at '" + missing + "'", "give --data an existing file");
  const std::string empty = write("empty.txt", "");
  expect_error(text({empty}, 8), "'" + empty + "' is empty", "give --data a file with text");
  fs::create_directories(root / "nothing");
  expect_error(text({(root / "nothing").string()}, 8), "no text in", "give --data");
  const std::string some = write("some.txt", std::string(40, 'x'));
  expect_error(text({some}, 64), "each needs 65", "a smaller --seq-len");
  const std::string ids = write_ids("ids.bin", 500, 2);
  expect_error(text({ids}, 8), "holds token ids", "--vocab-size");
  expect_error(text({some}, 8, 1000), "is not a *.bin", "leave --vocab-size out");
  expect_error(text({write("odd.bin", std::string(101, 'x'))}, 8, 1000), "has 101 bytes",
               "check --vocab-size");
  expect_error(text({some}, 0), "seq-len 0", "--seq-len 1 or more");
  expect_error(text({some}, 8, 1), "vocab-size 1 ", "--vocab-size 2");
  expect_error(text({some, missing}, 8), "no data at", "give --data");
}

TEST_F(Data, AFileThatShrinksDuringTheRunIsNamed) {
  const std::string path = write("text.txt", std::string(10'000, 'x'));
  const TextFiles data(text({path}, 8));
  fs::resize_file(path, 10);
  try {
    (void)data.train_windows(1, 0, 50);
    ADD_FAILURE() << "no error";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'" + path + "' failed (it became shorter"),
              std::string::npos)
        << error.what();
  }
}

TEST_F(Data, RanksThatSeeOtherFilesHaveAnotherFingerprint) {
  const std::string a = write("a.txt", std::string(500, 'x')), b = write("b.txt", "and more");
  const int64_t both = TextFiles(text({a, b}, 8)).fingerprint();
  EXPECT_NE(TextFiles(text({a}, 8)).fingerprint(), both);
  EXPECT_NE(TextFiles(text({b, a}, 8)).fingerprint(), both);
  EXPECT_EQ(TextFiles(text({a, b}, 4)).fingerprint(), both);
}

TEST_F(Data, TheDefaultTextIsThere) {
  const TextFiles data({});
  EXPECT_GE(data.num_files(), 50);
  EXPECT_GT(data.train_tokens(), 10'000'000);
  EXPECT_EQ(data.num_eval_windows(), TextOptions().eval_sequences);
  const auto ids = ids_of(data.train_windows(1, 0, 64));
  const auto printable = std::count_if(ids.begin(), ids.end(), [](int64_t id) {
    return id == '\n' || id == '\t' || (id >= ' ' && id < 127);
  });
  EXPECT_GT(printable, static_cast<int64_t>(ids.size()) * 99 / 100);
}

}  // namespace
}  // namespace lshmoe::launch
