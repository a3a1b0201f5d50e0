#include "lshmoe/launch/data.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "lshmoe/launch/random.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kHoldOutEvery = 50;
constexpr int64_t kMaxBlocks = 1000;

/// Regular files at or under `path`, without hidden ones, sorted by path.
std::vector<fs::path> files_at(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  LSHMOE_VALIDATE(fs::exists(status), "no data at '", path.string(), "' (",
                  error ? error.message() : "no such file or directory",
                  "): give --data an existing file or folder");
  if (!fs::is_directory(status)) return {path};
  std::vector<fs::path> found;
  fs::recursive_directory_iterator walk(path, error);
  for (; !error && walk != fs::recursive_directory_iterator(); walk.increment(error)) {
    const bool hidden = walk->path().filename().string().starts_with('.');
    if (hidden && walk->is_directory()) walk.disable_recursion_pending();
    if (!hidden && walk->is_regular_file()) found.push_back(walk->path());
  }
  LSHMOE_VALIDATE(!error, "cannot list the folder '", path.string(), "' (", error.message(),
                  "): check its permissions");
  std::sort(found.begin(), found.end());
  return found;
}

struct Descriptor {
  explicit Descriptor(const std::string& path) : fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    LSHMOE_VALIDATE(fd >= 0, "cannot read the data file '", path, "' (", std::strerror(errno),
                    "): check its permissions");
  }
  ~Descriptor() { ::close(fd); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  const int fd;
};

}  // namespace

std::string default_text_path() { return LSHMOE_DEFAULT_TEXT; }

TextFiles::TextFiles(TextOptions options) : options_(std::move(options)) {
  LSHMOE_VALIDATE(options_.seq_len >= 1, "seq-len ", options_.seq_len,
                  " (a sequence has at least one token): give --seq-len 1 or more");
  LSHMOE_VALIDATE(options_.eval_sequences >= 1, "eval-sequences ", options_.eval_sequences,
                  " (an evaluation needs a sequence): give --eval-sequences 1 or more");
  LSHMOE_VALIDATE(options_.vocab_size == 0 ||
                      (options_.vocab_size >= 2 && options_.vocab_size <= (int64_t{1} << 32)),
                  "vocab-size ", options_.vocab_size,
                  " (ids are uint16 or uint32): give --vocab-size 2 .. 4294967296, or leave it out "
                  "to train on bytes");
  if (options_.paths.empty()) options_.paths = {default_text_path()};
  if (options_.vocab_size > 0) bytes_per_token_ = options_.vocab_size > 65536 ? 4 : 2;
  find_files();
  split();
}

int64_t TextFiles::vocab_size() const {
  return options_.vocab_size > 0 ? options_.vocab_size : 256;
}

void TextFiles::find_files() {
  const bool ids = options_.vocab_size > 0;
  std::uint64_t hash = mix64(static_cast<std::uint64_t>(options_.vocab_size));
  for (const std::string& path : options_.paths) {
    std::error_code error;
    const bool folder = fs::is_directory(path, error);
    for (const fs::path& file : files_at(path)) {
      const bool bin = file.extension() == ".bin";
      if (folder && bin != ids) continue;
      LSHMOE_VALIDATE(bin || !ids, "data file '", file.string(),
                      "' is not a *.bin of token ids (--vocab-size was given): leave --vocab-size "
                      "out to train on bytes");
      LSHMOE_VALIDATE(ids || !bin, "data file '", file.string(),
                      "' holds token ids (*.bin): say how many there are with --vocab-size");
      const auto bytes = static_cast<int64_t>(fs::file_size(file, error));
      LSHMOE_VALIDATE(!error, "cannot read the data file '", file.string(), "' (", error.message(),
                      "): give --data a regular file or a folder");
      LSHMOE_VALIDATE(bytes % bytes_per_token_ == 0, "data file '", file.string(), "' has ",
                      detail::counted(bytes, "byte"), " (ids of a vocabulary of ",
                      options_.vocab_size, " take ", bytes_per_token_,
                      " bytes each): check --vocab-size and the file");
      LSHMOE_VALIDATE(folder || bytes > 0, "data file '", file.string(),
                      "' is empty: give --data a file with text");
      if (bytes == 0) continue;
      files_.push_back({file.string(), bytes / bytes_per_token_});
      hash = mix64(hash ^ static_cast<std::uint64_t>(bytes));
    }
  }
  LSHMOE_VALIDATE(!files_.empty(), "no ", ids ? "*.bin files" : "text", " in '", options_.paths[0],
                  "' (only empty, hidden or ", ids ? "other" : "*.bin",
                  " files there): give --data a file or folder with text");
  // A unit test's and a user's eye see it in hexadecimal; int64 is what a collective compares.
  fingerprint_ = static_cast<int64_t>(hash >> 1);
}

void TextFiles::append(Stream& stream, int64_t file, int64_t first, int64_t tokens) const {
  if (tokens == 0) return;
  if (!stream.pieces.empty() && options_.vocab_size == 0) ++stream.tokens;  // the zero byte
  stream.pieces.push_back({file, first, tokens, stream.tokens});
  stream.tokens += tokens;
}

void TextFiles::split() {
  const int64_t window = options_.seq_len + 1;
  const int64_t num = num_files();
  if (num >= kHoldOutEvery) {
    for (int64_t i = 0; i < num; ++i) {
      append(i % kHoldOutEvery == kHoldOutEvery - 1 ? eval_ : train_, i, 0, files_[i].tokens);
    }
  } else {
    int64_t all = 0;
    for (const File& file : files_) all += file.tokens;
    // Blocks of several windows where the text is long enough for that.
    const int64_t blocks = std::clamp<int64_t>(all / (8 * window), 2, kMaxBlocks);
    const int64_t stride = std::min(blocks, kHoldOutEvery);
    int64_t before = 0;  // tokens before this file
    for (int64_t i = 0; i < num; ++i) {
      const int64_t end = before + files_[i].tokens;
      for (int64_t at = before; at < end;) {
        // The block of token `at`, and the first token of the next one: block b is [all b / blocks,
        // all (b + 1) / blocks).
        const int64_t block = ((at + 1) * blocks - 1) / all;
        const int64_t next = std::min(end, all * (block + 1) / blocks);
        append(block % stride == stride - 1 ? eval_ : train_, i, at - before, next - at);
        at = next;
      }
      before = end;
    }
  }
  LSHMOE_VALIDATE(train_.tokens >= window && eval_.tokens >= window, "the text has ",
                  detail::counted(train_.tokens, "token"), " for training and ", eval_.tokens,
                  " for evaluation (each needs ", window, ", one sequence of seq-len ",
                  options_.seq_len, " and its next token): give more text or a smaller --seq-len");
  num_eval_windows_ =
      std::clamp<int64_t>((eval_.tokens - 1) / options_.seq_len, 1, options_.eval_sequences);
}

void TextFiles::read_tokens(const File& file, int64_t first, int64_t count, int64_t* out) const {
  const Descriptor in(file.path);
  std::vector<unsigned char> bytes(static_cast<std::size_t>(count * bytes_per_token_));
  std::size_t have = 0;
  while (have < bytes.size()) {
    const ssize_t got = ::pread(in.fd, bytes.data() + have, bytes.size() - have,
                                first * bytes_per_token_ + static_cast<int64_t>(have));
    if (got < 0 && errno == EINTR) continue;
    LSHMOE_VALIDATE(got > 0, "reading the data file '", file.path, "' failed (",
                    got < 0 ? std::strerror(errno) : "it became shorter since the start",
                    "): leave the data alone during a run");
    have += static_cast<std::size_t>(got);
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t id = 0;
    for (int64_t b = 0; b < bytes_per_token_; ++b) {
      id |= static_cast<int64_t>(bytes[i * bytes_per_token_ + b]) << (8 * b);
    }
    LSHMOE_VALIDATE(id < vocab_size(), "token id ", id, " at place ", first + i, " of '", file.path,
                    "' (vocab-size is ", vocab_size(), "): check --vocab-size and the file");
    out[i] = id;
  }
}

void TextFiles::read_window(const Stream& stream, int64_t start, int64_t* out) const {
  const int64_t end = start + options_.seq_len + 1;
  auto piece = std::upper_bound(stream.pieces.begin(), stream.pieces.end(), start,
                                [](int64_t place, const Piece& p) { return place < p.start; });
  std::fill(out, out + (end - start), 0);  // the separators
  for (--piece; piece != stream.pieces.end() && piece->start < end; ++piece) {
    const int64_t from = std::max(start, piece->start);
    const int64_t to = std::min(end, piece->start + piece->tokens);
    if (from >= to) continue;  // the window starts on the separator after this piece
    read_tokens(files_[piece->file], piece->first + from - piece->start, to - from,
                out + (from - start));
  }
}

at::Tensor TextFiles::train_windows(int64_t step, int64_t first, int64_t count) const {
  const int64_t window = options_.seq_len + 1;
  at::Tensor out = torch::empty({count, window}, torch::kInt64);
  for (int64_t i = 0; i < count; ++i) {
    const std::uint64_t bits = random_bits(options_.seed, static_cast<std::uint64_t>(step),
                                           static_cast<std::uint64_t>(first + i));
    read_window(train_, random_below(bits, train_.tokens - window + 1),
                out.data_ptr<int64_t>() + i * window);
  }
  return out;
}

at::Tensor TextFiles::eval_windows(int64_t first, int64_t count) const {
  LSHMOE_VALIDATE(first >= 0 && count >= 0 && first + count <= num_eval_windows_,
                  "evaluation windows ", first, " .. ", first + count, " of ", num_eval_windows_);
  const int64_t window = options_.seq_len + 1;
  at::Tensor out = torch::empty({count, window}, torch::kInt64);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t last = std::max<int64_t>(1, num_eval_windows_ - 1);
    const auto start =
        static_cast<int64_t>(static_cast<__int128>(first + i) * (eval_.tokens - window) / last);
    read_window(eval_, start, out.data_ptr<int64_t>() + i * window);
  }
  return out;
}

}  // namespace lshmoe::launch
