#pragma once
// Training and evaluation text as windows of token ids.

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

/// Where the trainer takes its sequences from. The same on every rank; all functions are local and
/// depend on their arguments only, so the global batch is the same whatever rank draws which part.
class DataSource {
 public:
  virtual ~DataSource() = default;

  /// Token ids are 0 .. vocab_size()-1.
  [[nodiscard]] virtual int64_t vocab_size() const = 0;
  /// Sequences first .. first+count-1 of the global batch of `step`: int64 [count, seq_len + 1],
  /// CPU.
  [[nodiscard]] virtual at::Tensor train_windows(int64_t step, int64_t first,
                                                 int64_t count) const = 0;
  /// Number of held-out windows.
  [[nodiscard]] virtual int64_t num_eval_windows() const = 0;
  /// Held-out windows first .. first+count-1: int64 [count, seq_len + 1], CPU.
  [[nodiscard]] virtual at::Tensor eval_windows(int64_t first, int64_t count) const = 0;
  /// Equal on ranks that see the same data.
  [[nodiscard]] virtual int64_t fingerprint() const = 0;
};

struct TextOptions {
  /// Files or folders; empty: default_text_path().
  std::vector<std::string> paths;
  /// 0: the bytes of all files are the tokens (vocabulary of 256). Else the files are *.bin:
  /// little- endian uint16 ids, uint32 where vocab_size > 65536.
  int64_t vocab_size = 0;
  int64_t seq_len = 128;
  int64_t eval_sequences = 256;
  std::uint64_t seed = 0;
};

/// Folder of the C++ headers of the LibTorch this was built with: real text on every machine that
/// can build this.
[[nodiscard]] std::string default_text_path();

/// Text in files. Only the files' sizes are read at the start; each window is read from its file
/// when it is drawn, so start-up takes milliseconds, and memory does not grow with the data.
///
/// Files are taken in sorted path order (folders recursively, without hidden and empty files).
/// Every 50th file is held out for evaluation. Of fewer than 50 files, blocks are held out instead,
/// at a fixed stride: all tokens are cut into up to 1,000 blocks of equal length, and every 50th of
/// them (every n-th of n < 50) is held out. Either way both parts come from the same domain.
/// Between the pieces of text stands a zero byte; between pieces of *.bin nothing.
class TextFiles final : public DataSource {
 public:
  /// Throws InvalidArgument: a path that is missing or unreadable, no text, text too short for one
  /// training and one evaluation window, a *.bin whose size is not a whole number of ids.
  explicit TextFiles(TextOptions options);

  [[nodiscard]] int64_t vocab_size() const override;
  /// Window starts are uniform over the training text, by (seed, step, sequence number) only.
  /// Throws InvalidArgument when a file changed, or holds an id >= vocab_size.
  [[nodiscard]] at::Tensor train_windows(int64_t step, int64_t first, int64_t count) const override;
  [[nodiscard]] int64_t num_eval_windows() const override { return num_eval_windows_; }
  /// Windows spread evenly over the held-out text.
  [[nodiscard]] at::Tensor eval_windows(int64_t first, int64_t count) const override;
  [[nodiscard]] int64_t fingerprint() const override { return fingerprint_; }

  /// Tokens of the two parts, separators included.
  [[nodiscard]] int64_t train_tokens() const { return train_.tokens; }
  [[nodiscard]] int64_t eval_tokens() const { return eval_.tokens; }
  [[nodiscard]] int64_t num_files() const { return static_cast<int64_t>(files_.size()); }

 private:
  struct File {
    std::string path;
    int64_t tokens;
  };
  /// `tokens` tokens of a file, from token `first` on; `start`: their place in the stream.
  struct Piece {
    int64_t file, first, tokens, start;
  };
  struct Stream {
    std::vector<Piece> pieces;
    int64_t tokens = 0;
  };

  void find_files();
  void split();
  void append(Stream& stream, int64_t file, int64_t first, int64_t tokens) const;
  void read_window(const Stream& stream, int64_t start, int64_t* out) const;
  void read_tokens(const File& file, int64_t first, int64_t count, int64_t* out) const;

  TextOptions options_;
  int64_t bytes_per_token_ = 1;
  std::vector<File> files_;
  Stream train_, eval_;
  int64_t num_eval_windows_ = 0;
  int64_t fingerprint_ = 0;
};

}  // namespace lshmoe::launch
