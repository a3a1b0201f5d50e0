#include "lshmoe/runtime/files.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

#include "lshmoe/runtime/abandon.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

std::string g_stdout = "/dev/stdout";  // or what with_stdout_to_itself returned for it

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

/// Everything before the last slash, or the folder that a name without one is in.
std::string folder_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr),
                                                         &std::free);
  return real ? real.get() : path;
}

/// Where a path leads to.
struct Target {
  std::string path;                   // no symbolic link; perhaps not there
  std::optional<int> own_descriptor;  // /dev/stdout, /dev/fd/3: opened by this process already
};

/// Follows the links that the last name of a path is. Throws Error where they do not end.
Target follow(const std::string& path) {
  static const std::string own_descriptors = real_path("/proc/self/fd");
  Target target{path, std::nullopt};
  for (int links = 0; links < 40; ++links) {
    const std::string name = target.path.substr(target.path.find_last_of('/') + 1);
    if (real_path(folder_of(target.path)) == own_descriptors) {
      int descriptor = 0;
      const auto end = std::from_chars(name.data(), name.data() + name.size(), descriptor);
      if (end.ec == std::errc{} && end.ptr == name.data() + name.size()) {
        target.own_descriptor = descriptor;
        return target;
      }
    }
    std::array<char, PATH_MAX> link{};
    const ssize_t length = ::readlink(target.path.c_str(), link.data(), link.size());
    if (length < 0) return target;
    const std::string next(link.data(), static_cast<std::size_t>(length));
    target.path = next.starts_with('/') ? next : folder_of(target.path) + "/" + next;
  }
  throw Error(not_written(path, ELOOP));
}

/// Opens to write; -1 with errno. A pipe without a reader (ENXIO) is tried again, but not by an
/// open() that waits: the signal that asks to stop would not end it.
int open_when_read(const std::string& path, int flags) {
  constexpr int kMostMs = 60'000, kPauseMs = 20;
  struct stat info {};
  flags |= O_WRONLY | O_CLOEXEC | O_NOCTTY;
  if (::stat(path.c_str(), &info) != 0 || !S_ISFIFO(info.st_mode)) {
    return ::open(path.c_str(), flags, 0666);
  }
  for (int waited = 0;; waited += kPauseMs) {
    const int fd = ::open(path.c_str(), flags | O_NONBLOCK);
    if (fd >= 0) {
      ::fcntl(fd, F_SETFL, 0);  // from now on a full pipe is waited for
      return fd;
    }
    if (errno != ENXIO || waited >= kMostMs || abandon_requested()) return -1;
    ::poll(nullptr, 0, kPauseMs);
  }
}

/// Writes everything; false with errno.
bool write_all(int fd, std::span<const char> bytes) {
  while (!bytes.empty()) {
    const ssize_t put = ::write(fd, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return false;
    bytes = bytes.subspan(static_cast<std::size_t>(put));
  }
  return true;
}

/// To a temporary beside it, which gets the mode and the owner of what it replaces (`old`; null: a
/// new file). False with errno: nothing is changed.
bool replace(const std::string& path, const struct stat* old, std::span<const char> bytes) {
  const std::string temporary = path + ".tmp" + std::to_string(::getpid());
  ::unlink(temporary.c_str());  // of a process of that number that was killed
  const Descriptor file(
      ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, old ? 0600 : 0666));
  if (file.get() < 0) return false;
  // The mode last: a change of owner takes bits from it.
  if ((old == nullptr || (::fchown(file.get(), old->st_uid, old->st_gid) == 0 &&
                          ::fchmod(file.get(), old->st_mode & 07777) == 0)) &&
      write_all(file.get(), bytes) && ::fsync(file.get()) == 0 &&
      ::rename(temporary.c_str(), path.c_str()) == 0) {
    return true;
  }
  const int error = errno;
  ::unlink(temporary.c_str());
  errno = error;
  return false;
}

}  // namespace

std::string not_written(const std::string& path, int error) {
  const char* advice = "check the path and the disk";
  if (error == ENOSPC || error == EDQUOT) advice = "free some disk space";
  if (error == ENOENT || error == ENOTDIR) advice = "name a file in a folder that exists";
  if (error == EACCES || error == EPERM || error == EROFS) {
    advice = "choose a file and a folder that you may write to";
  }
  if (error == EISDIR) advice = "name a file in it";
  if (error == EPIPE) advice = "keep what reads it running";
  if (error == ENXIO) advice = "start what reads it first";
  const std::string name = path == g_stdout ? "standard output" : "'" + path + "'";
  return detail::message("cannot write ", name, " (", std::strerror(error), "): ", advice);
}

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
  const Target target = follow(path);
  const auto fail = [&](int error) { throw Error(not_written(path, error)); };
  if (target.own_descriptor) {
    if (!write_all(*target.own_descriptor, bytes)) fail(errno);
    return;
  }
  struct stat old {};
  const bool exists = ::stat(target.path.c_str(), &old) == 0;
  if (!exists || S_ISREG(old.st_mode)) {
    // Renaming would go past a file's own permissions, and would part it from its other names.
    if (exists && ::faccessat(AT_FDCWD, target.path.c_str(), W_OK, AT_EACCESS) != 0) fail(errno);
    if ((!exists || old.st_nlink == 1) && replace(target.path, exists ? &old : nullptr, bytes)) {
      return;
    }
    // Another user's file or folder: in place, or not at all.
    if (!exists || (old.st_nlink == 1 && errno != EPERM && errno != EACCES)) fail(errno);
  }
  const Descriptor file(open_when_read(target.path, S_ISREG(old.st_mode) ? O_TRUNC : 0));
  if (file.get() < 0 || !write_all(file.get(), bytes)) fail(errno);
  if (S_ISREG(old.st_mode) && ::fsync(file.get()) != 0) fail(errno);
}

std::FILE* open_to_write(const std::string& path) {
  const Target target = follow(path);
  const int fd = target.own_descriptor ? ::fcntl(*target.own_descriptor, F_DUPFD_CLOEXEC, 0)
                                       : open_when_read(target.path, O_CREAT | O_TRUNC);
  std::FILE* file = fd < 0 ? nullptr : ::fdopen(fd, "w");
  if (file == nullptr) throw InvalidArgument(not_written(path, errno));
  return file;
}

void check_writable(const std::string& path) {
  const Target target = follow(path);
  struct stat info {};
  const bool exists = ::stat(target.path.c_str(), &info) == 0;
  if (target.own_descriptor || (exists && S_ISFIFO(info.st_mode))) return;
  const Descriptor file(
      ::open(target.path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY, 0666));
  if (file.get() < 0) throw InvalidArgument(not_written(path, errno));
}

bool same_output(const std::string& a, const std::string& b) {
  if (a.empty() || b.empty()) return false;
  const Target x = follow(a == "-" ? "/dev/stdout" : a), y = follow(b == "-" ? "/dev/stdout" : b);
  if (x.own_descriptor && x.own_descriptor == y.own_descriptor) return true;
  struct stat one {};
  struct stat other {};
  const bool there = ::stat(x.path.c_str(), &one) == 0;
  if (there != (::stat(y.path.c_str(), &other) == 0)) return false;
  if (there) {
    return one.st_dev == other.st_dev && one.st_ino == other.st_ino && !S_ISCHR(one.st_mode);
  }
  const auto name = [](const Target& file) {
    return file.path.substr(file.path.find_last_of('/') + 1);
  };
  return name(x) == name(y) && real_path(folder_of(x.path)) == real_path(folder_of(y.path));
}

void flush_stdout() {
  const bool failed = std::ferror(stdout) != 0;  // of an earlier print, whose errno is gone
  if (std::fflush(stdout) == 0 && !failed) return;
  std::clearerr(stdout);
  // Another byte fails for the same reason.
  throw Error(not_written(g_stdout, ::write(STDOUT_FILENO, "\n", 1) < 0 ? errno : EIO));
}

std::string with_stdout_to_itself(const std::string& path) {
  if (path.empty() || (path != "-" && follow(path).own_descriptor != STDOUT_FILENO)) return path;
  std::fflush(stdout);
  const int copy = ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  if (copy < 0 || ::dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
    throw Error(not_written(g_stdout, errno));
  }
  return g_stdout = "/proc/self/fd/" + std::to_string(copy);
}

}  // namespace lshmoe
