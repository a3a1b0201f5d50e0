// Runs a fuzz target without libFuzzer: its seeds, the files of a corpus, and each of them damaged
// in a few places.
//
//   corpus_TARGET FOLDER...               run
//   corpus_TARGET --make-corpus FOLDER    write the seeds, one file each

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "tests/fuzz/target.hpp"

namespace fs = std::filesystem;
using lshmoe::fuzz::Input;

namespace {

void run(Input input) {
  LLVMFuzzerTestOneInput(input.data(), input.size());
  std::uint32_t random = 1;
  for (int i = 0; i < 8 && !input.empty(); ++i) {
    random = random * 1664525 + 1013904223;
    const std::size_t at = (random >> 8) % input.size();
    input[at] = static_cast<std::uint8_t>(input[at] ^ (1U << (i % 8)));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  LLVMFuzzerTestOneInput(input.data(), input.size() / 2);
}

int make_corpus(const fs::path& folder) {
  fs::create_directories(folder);
  const auto seeds = lshmoe::fuzz::seeds();
  for (std::size_t i = 0; i < seeds.size(); ++i) {
    std::ofstream file(folder / ("seed" + std::to_string(i)), std::ios::binary);
    file.write(reinterpret_cast<const char*>(seeds[i].data()),
               static_cast<std::streamsize>(seeds[i].size()));
    if (!file) throw std::runtime_error("cannot write to " + folder.string());
  }
  std::printf("%zu seeds\n", seeds.size());
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc == 3 && std::string(argv[1]) == "--make-corpus") return make_corpus(argv[2]);
  const auto seeds = lshmoe::fuzz::seeds();
  for (const Input& seed : seeds) run(seed);
  std::size_t files = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : fs::directory_iterator(argv[i])) {
      std::ifstream file(entry.path(), std::ios::binary);
      const std::string bytes{std::istreambuf_iterator<char>(file), {}};
      run({bytes.begin(), bytes.end()});
      ++files;
    }
  }
  std::printf("%zu seeds, %zu files\n", seeds.size(), files);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
