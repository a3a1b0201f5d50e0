#include "lshmoe/runtime/files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// Owns a POSIX file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  [[nodiscard]] int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

std::size_t append_file(const std::string& path, std::string& out) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info {};
  LSHMOE_VALIDATE(file.get() >= 0 && ::fstat(file.get(), &info) == 0, "cannot read '", path, "' (",
                  std::strerror(errno), "): check the path and its permissions");
  LSHMOE_VALIDATE(!S_ISDIR(info.st_mode), "cannot read '", path,
                  "' (it is a folder): name a file in it");
  const std::size_t before = out.size();
  std::size_t used = before;
  out.resize(before + static_cast<std::size_t>(info.st_size));
  for (;;) {
    if (used == out.size()) out.resize(used + 65536);  // grew since fstat, or has no size (a pipe)
    const ssize_t got = ::read(file.get(), out.data() + used, out.size() - used);
    if (got < 0 && errno == EINTR) continue;
    LSHMOE_VALIDATE(got >= 0, "reading '", path, "' failed part way (", std::strerror(errno),
                    "): check the disk");
    if (got == 0) break;
    used += static_cast<std::size_t>(got);
  }
  out.resize(used);
  return used - before;
}

std::string read_file(const std::string& path) {
  std::string bytes;
  append_file(path, bytes);
  return bytes;
}

void write_file_atomically(const std::string& path, std::span<const char> bytes) {
  const std::string temporary = path + ".tmp" + std::to_string(::getpid());
  const auto fail = [&](const char* what) {
    const std::string reason = std::strerror(errno);
    ::unlink(temporary.c_str());
    throw Error(detail::message(what, " '", path, "' failed (", reason,
                                "): check that its folder exists, is writable and has space"));
  };
  {
    const Descriptor file(
        ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (file.get() < 0) fail("creating");
    while (!bytes.empty()) {
      const ssize_t put = ::write(file.get(), bytes.data(), bytes.size());
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail("writing");
      bytes = bytes.subspan(static_cast<std::size_t>(put));
    }
    if (::fsync(file.get()) != 0) fail("syncing");
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) fail("renaming to");
}

}  // namespace lshmoe
