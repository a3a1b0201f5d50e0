// Files, metrics, log, signals, trace: what a program leaves behind and how it is told to stop.

#include "lshmoe/runtime/files.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#include "lshmoe/runtime/abandon.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/log.hpp"
#include "lshmoe/runtime/metrics.hpp"
#include "lshmoe/runtime/signals.hpp"
#include "lshmoe/runtime/trace.hpp"

namespace lshmoe {
namespace {

std::string temporary(const std::string& name) {
  return ::testing::TempDir() + "files_test_" + name;
}

template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Files, RoundTripAndReplace) {
  const std::string path = temporary("round_trip");
  const std::string bytes("a\0b\n", 4);
  write_file_atomically(path, std::string("a longer first version"));
  write_file_atomically(path, bytes);
  EXPECT_EQ(read_file(path), bytes);
  std::string sum = "x";
  EXPECT_EQ(append_file(path, sum), 4u);
  EXPECT_EQ(sum, "x" + bytes);
  std::remove(path.c_str());
}

TEST(Files, ErrorsNameThePathAndTheReason) {
  const std::string missing = error_of([] { (void)read_file("/nonexistent/file"); });
  EXPECT_NE(missing.find("/nonexistent/file"), std::string::npos);
  EXPECT_NE(missing.find("No such file"), std::string::npos);
  EXPECT_NE(error_of([] { (void)read_file("/tmp"); }).find("folder"), std::string::npos);
  EXPECT_NE(error_of([] {
              write_file_atomically("/nonexistent/file", std::string("x"));
            }).find("/nonexistent/file"),
            std::string::npos);
}

/// A folder of its own for a test, removed at its end.
class Writing : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directory(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  [[nodiscard]] std::string path(const std::string& name) const { return folder_ + "/" + name; }
  static struct stat status(const std::string& path) {
    struct stat info {};
    EXPECT_EQ(::lstat(path.c_str(), &info), 0) << path;
    return info;
  }
  /// Nothing but these is in the folder: no temporary is left.
  void expect_names(std::set<std::string> names) const {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_)) {
      EXPECT_EQ(names.erase(entry.path().filename().string()), 1u) << entry.path();
    }
    EXPECT_TRUE(names.empty());
  }

 private:
  std::string folder_ = temporary("folder" + std::to_string(::getpid()));
};
constexpr mode_t kPermissions = 07777;
const std::string kText = "some text\n";

TEST_F(Writing, KeepsModeAndOwner) {
  write_file_atomically(path("new"), kText);
  const mode_t mask = ::umask(0);
  ::umask(mask);
  EXPECT_EQ(status(path("new")).st_mode & kPermissions, 0666 & ~mask);
  for (const mode_t mode : {0600u, 0640u, 0777u}) {
    ASSERT_EQ(::chmod(path("new").c_str(), mode), 0);
    write_file_atomically(path("new"), kText);
    EXPECT_EQ(status(path("new")).st_mode & kPermissions, mode);
  }
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(path("new").c_str(), 1234, 5678), 0);
    ASSERT_EQ(::chmod(path("new").c_str(), 0600), 0);
    write_file_atomically(path("new"), kText + kText);
    const struct stat info = status(path("new"));
    EXPECT_EQ(info.st_uid, 1234u);
    EXPECT_EQ(info.st_gid, 5678u);
    EXPECT_EQ(info.st_mode & kPermissions, 0600u);
  }
  EXPECT_TRUE(read_file(path("new")).starts_with(kText));
  expect_names({"new"});
}

TEST_F(Writing, FollowsLinks) {
  std::filesystem::create_directory(path("below"));
  write_file_atomically(path("below/target"), std::string("old"));
  std::filesystem::create_symlink("below/second", path("first"));
  std::filesystem::create_symlink("target", path("below/second"));
  std::filesystem::create_symlink(path("below/created"), path("dangling"));
  const auto inode = status(path("below/target")).st_ino;
  write_file_atomically(path("first"), kText);
  write_file_atomically(path("dangling"), kText);
  for (const char* link : {"first", "below/second", "dangling"}) {
    EXPECT_TRUE(S_ISLNK(status(path(link)).st_mode)) << link;
  }
  for (const char* file : {"below/target", "below/created"}) {
    EXPECT_TRUE(S_ISREG(status(path(file)).st_mode)) << file;
    EXPECT_EQ(read_file(path(file)), kText);
  }
  EXPECT_NE(status(path("below/target")).st_ino, inode);  // a new one took its place
  expect_names({"below", "target", "second", "first", "created", "dangling"});

  std::filesystem::create_symlink("round", path("round"));
  EXPECT_NE(error_of([&] { write_file_atomically(path("round"), kText); }).find("symbolic links"),
            std::string::npos);
}

TEST_F(Writing, KeepsTheOtherNamesOfAFile) {
  write_file_atomically(path("one"), std::string("old and longer than what follows"));
  std::filesystem::create_hard_link(path("one"), path("two"));
  write_file_atomically(path("one"), kText);
  EXPECT_EQ(read_file(path("two")), kText);
  EXPECT_EQ(status(path("one")).st_ino, status(path("two")).st_ino);
  expect_names({"one", "two"});
}

TEST_F(Writing, LeavesToOtherUsersWhatIsTheirs) {
  if (::geteuid() != 0) GTEST_SKIP() << "not root: cannot become another user";
  for (const char* name : {"theirs", "closed"}) write_file_atomically(path(name), kText + kText);
  ASSERT_EQ(::chmod(path("theirs").c_str(), 0666), 0);
  ASSERT_EQ(::chmod(path("closed").c_str(), 0644), 0);
  ASSERT_EQ(::chmod(path("").c_str(), 0755), 0);
  ASSERT_EQ(::seteuid(65534), 0);
  write_file_atomically(path("theirs"), kText);
  const std::string closed = error_of([&] { write_file_atomically(path("closed"), kText); });
  const std::string folder = error_of([&] { write_file_atomically(path("new"), kText); });
  ASSERT_EQ(::seteuid(0), 0);
  ASSERT_EQ(::chmod(path("").c_str(), 0777), 0);
  ASSERT_EQ(::seteuid(65534), 0);
  // Now a new file could take its place, but not with its owner.
  write_file_atomically(path("theirs"), kText);
  const std::string replaced = error_of([&] { write_file_atomically(path("closed"), kText); });
  ASSERT_EQ(::seteuid(0), 0);
  EXPECT_EQ(status(path("theirs")).st_uid, 0u);
  EXPECT_EQ(status(path("theirs")).st_mode & kPermissions, 0666u);
  EXPECT_EQ(read_file(path("theirs")), kText);
  EXPECT_EQ(read_file(path("closed")), kText + kText);
  for (const std::string& text : {closed, folder, replaced}) {
    EXPECT_NE(text.find("(Permission denied): choose a file"), std::string::npos) << text;
  }
  expect_names({"theirs", "closed"});
}

TEST_F(Writing, WritesToWhatIsNoFile) {
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  std::filesystem::create_symlink("pipe", path("link"));
  std::string got;
  std::thread reader([&] { got = read_file(path("pipe")); });
  write_file_atomically(path("link"), kText);
  reader.join();
  EXPECT_EQ(got, kText);
  EXPECT_TRUE(S_ISFIFO(status(path("pipe")).st_mode));
  std::set<std::string> names = {"pipe", "link"};
  // The machine's /dev/null as it is to a user who may replace it.
  if (::geteuid() == 0 && ::mknod(path("null").c_str(), S_IFCHR | 0666, ::makedev(1, 3)) == 0) {
    names.insert("null");
    write_file_atomically(path("null"), kText);
    EXPECT_TRUE(S_ISCHR(status(path("null")).st_mode));
    EXPECT_EQ(read_file(path("null")), "");
  }
  expect_names(names);
}

TEST_F(Writing, WaitsForAPipesReaderUntilItIsToStop) {
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  std::string got;
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    got = read_file(path("pipe"));
  });
  write_file_atomically(path("pipe"), std::string(1 << 20, 'x'));  // more than a pipe holds
  late.join();
  EXPECT_EQ(got, std::string(1 << 20, 'x'));
  // Nobody reads.
  std::thread stop([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    request_abandon();
  });
  const std::string whole = error_of([&] { write_file_atomically(path("pipe"), kText); });
  const std::string bits = error_of([&] { MetricsWriter{path("pipe")}; });
  stop.join();
  withdraw_abandon();
  for (const std::string& text : {whole, bits}) {
    EXPECT_NE(text.find("/pipe' (No such device or address): start what reads it first"),
              std::string::npos)
        << text;
  }
}

TEST_F(Writing, GoesOnWhereAnOpenFileStands) {
  for (const int append : {0, O_APPEND}) {
    const int fd = ::open(path("log").c_str(), O_WRONLY | O_CREAT | O_TRUNC | append, 0600);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(::write(fd, "before\n", 7), 7);
    const std::string number = std::to_string(fd);
    write_file_atomically("/dev/fd/" + number, kText);
    {
      MetricsWriter writer("/proc/self/fd/" + number);
      writer.write({{"step", 1}});
    }
    ASSERT_EQ(::write(fd, "after\n", 6), 6);
    ::close(fd);
    EXPECT_EQ(read_file(path("log")), "before\n" + kText + "{\"step\":1}\nafter\n");
  }
}

TEST_F(Writing, SaysWhatToDo) {
  const auto advice_for = [](const std::string& path) {
    const std::string text = error_of([&] { write_file_atomically(path, kText); });
    EXPECT_NE(text.find("'" + path + "'"), std::string::npos) << text;
    return text.substr(text.find(" ("));
  };
  EXPECT_EQ(advice_for("/dev/full"), " (No space left on device): free some disk space");
  EXPECT_EQ(advice_for(path("none/file")),
            " (No such file or directory): name a file in a folder that exists");
  EXPECT_EQ(advice_for(path(".")), " (Is a directory): name a file in it");
  EXPECT_EQ(error_of([] {
              MetricsWriter("/dev/full").write({{"step", 1}});
            }),
            "cannot write '/dev/full' (No space left on device): free some disk space");
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  const auto before = std::signal(SIGPIPE, SIG_DFL);
  ignore_broken_pipes();
  const int reader = ::open(path("pipe").c_str(), O_RDONLY | O_NONBLOCK);
  MetricsWriter writer(path("pipe"));
  ::close(reader);
  EXPECT_NE(error_of([&] {
              writer.write({{"step", 1}});
            }).find("(Broken pipe): keep what reads it running"),
            std::string::npos);
  std::signal(SIGPIPE, before);
}

TEST_F(Writing, ChecksBeforeTheWork) {
  check_writable(path("new"));
  EXPECT_EQ(read_file(path("new")), "");
  write_file_atomically(path("new"), kText);
  check_writable(path("new"));
  EXPECT_EQ(read_file(path("new")), kText);  // what it was to be replaced by may never come
  check_writable("/dev/null");
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  check_writable(path("pipe"));  // nobody reads, and nothing waits
  EXPECT_EQ(error_of([&] { check_writable(path("none/file")); }),
            "cannot write '" + path("none/file") +
                "' (No such file or directory): name a file in a folder that exists");
  EXPECT_NE(
      error_of([&] { check_writable(path(".")); }).find("(Is a directory): name a file in it"),
      std::string::npos);
}

/// Standard output and standard error lead to files of the folder until it ends.
class Redirected {
 public:
  Redirected(const std::string& out, const std::string& error) {
    std::fflush(stdout);
    for (int fd : {STDOUT_FILENO, STDERR_FILENO}) {
      former_.push_back(::dup(fd));
      const int file =
          ::open((fd == STDOUT_FILENO ? out : error).c_str(), O_WRONLY | O_CREAT, 0600);
      EXPECT_GE(file, 0);
      ::dup2(file, fd);
      ::close(file);
    }
  }
  ~Redirected() {
    std::fflush(stdout);
    for (int fd : {STDOUT_FILENO, STDERR_FILENO}) {
      ::dup2(former_[static_cast<std::size_t>(fd - STDOUT_FILENO)], fd);
      ::close(former_[static_cast<std::size_t>(fd - STDOUT_FILENO)]);
    }
  }
  Redirected(const Redirected&) = delete;
  Redirected& operator=(const Redirected&) = delete;

 private:
  std::vector<int> former_;
};

TEST_F(Writing, StandardOutputToItself) {
  EXPECT_EQ(with_stdout_to_itself(path("file")), path("file"));
  EXPECT_EQ(with_stdout_to_itself(""), "");
  for (const char* name : {"-", "/dev/stdout"}) {
    {
      const Redirected both(path("out"), path("error"));
      MetricsWriter writer(with_stdout_to_itself(name));
      std::puts("a table");
      writer.write({{"step", 1}});
    }
    EXPECT_EQ(read_file(path("out")), "{\"step\":1}\n") << name;
    EXPECT_EQ(read_file(path("error")), "a table\n") << name;
    expect_names({"out", "error"});
  }
  std::string metrics, printed;
  {
    const Redirected both("/dev/full", path("error"));
    std::puts("a table");
    printed = error_of([] { flush_stdout(); });
    EXPECT_EQ(error_of([] { flush_stdout(); }), "");        // said once
    std::fputs(std::string(100'000, 'x').c_str(), stdout);  // more than the buffer holds
    EXPECT_EQ(error_of([] { flush_stdout(); }), printed);
    std::string itself = with_stdout_to_itself("-");
    metrics = error_of([&] { MetricsWriter(itself).write({{"step", 1}}); });
  }
  for (const std::string& text : {metrics, printed}) {
    EXPECT_EQ(text, "cannot write standard output (No space left on device): free some disk space");
  }
}

TEST_F(Writing, OutputsThatAreOne) {
  const std::string here = std::filesystem::current_path();
  EXPECT_TRUE(same_output("-", "-"));
  EXPECT_TRUE(same_output("-", "/dev/stdout"));
  EXPECT_FALSE(same_output("-", path("new")));
  EXPECT_FALSE(same_output("", ""));
  EXPECT_FALSE(same_output("/dev/null", "/dev/null"));
  EXPECT_TRUE(same_output("new", here + "/./new"));
  EXPECT_FALSE(same_output(path("new"), path("newer")));
  EXPECT_FALSE(same_output(path("new"), here + "/new"));
  std::filesystem::create_symlink("new", path("link"));
  EXPECT_TRUE(same_output(path("new"), path("link")));
  write_file_atomically(path("new"), std::string("x"));
  EXPECT_TRUE(same_output(path("new"), path("link")));
  EXPECT_FALSE(same_output(path("new"), path("newer")));
  {
    const Redirected both(path("out"), path("error"));
    EXPECT_TRUE(same_output("-", path("out")));
    EXPECT_FALSE(same_output("-", path("error")));
  }
}

TEST(Metrics, WritesOneObjectALineWithAllBits) {
  const std::string path = temporary("metrics.jsonl");
  const double third = 1.0 / 3.0;
  {
    MetricsWriter writer(path);
    writer.write({{"step", 1}, {"loss", third}});
    writer.write({{"step", 2}, {"loss", std::numeric_limits<double>::quiet_NaN()}});
  }
  std::istringstream lines(read_file(path));
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(nlohmann::json::parse(line)["loss"].get<double>(), third);
  std::getline(lines, line);
  EXPECT_TRUE(nlohmann::json::parse(line)["loss"].is_null());
  EXPECT_FALSE(std::getline(lines, line));
  EXPECT_NE(error_of([] { MetricsWriter("/nonexistent/m.jsonl"); }).find("/nonexistent/m.jsonl"),
            std::string::npos);
  std::remove(path.c_str());
}

TEST(Log, EveryLineNamesTheRankAndOnlyRankZeroInforms) {
  const int before = process_rank();
  ::testing::internal::CaptureStderr();
  set_process_rank(3);
  log_info("hidden");
  log_warn("shown {}");
  log_error(Error("said once").what());
  set_process_rank(0);
  log_info("informed");
  set_process_rank(-1);
  log_error("alone");
  set_process_rank(before);
  const std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(text.find("hidden"), std::string::npos) << text;
  EXPECT_NE(text.find("[rank 3] [warning] shown {}"), std::string::npos) << text;
  EXPECT_NE(text.find("[rank 3] [error] said once"), std::string::npos) << text;
  EXPECT_NE(text.find("[rank 0] [info] informed"), std::string::npos) << text;
  // "[hh:mm:ss] [error] alone": no rank between.
  EXPECT_EQ(text.find("[error] alone") - text.find('\n', text.find("informed")), 12u) << text;
}

TEST(Error, CountsThings) {
  EXPECT_EQ(detail::counted(0, "rank"), "0 ranks");
  EXPECT_EQ(detail::counted(1, "rank"), "1 rank");
  EXPECT_EQ(detail::counted(2, "rank"), "2 ranks");
}

TEST(Error, TextCarriesTheRank) {
  const int before = process_rank();
  set_process_rank(5);
  EXPECT_STREQ(Error("boom").what(), "rank 5: boom");
  set_process_rank(before);
}

TEST(StopFlag, SignalsSetItAndHandlersComeBack) {
  {
    StopFlag flag;
    EXPECT_FALSE(flag.requested());
    std::raise(SIGUSR1);
    EXPECT_TRUE(flag.requested());
  }
  StopFlag second;
  EXPECT_FALSE(second.requested());
  std::raise(SIGTERM);
  EXPECT_TRUE(second.requested());
}

TEST(Trace, OneFileARank) {
  EXPECT_EQ(trace_path("t.json", 0, 1), "t.json");
  EXPECT_EQ(trace_path("a.b/t.json", 2, 4), "a.b/t.rank2.json");
  EXPECT_EQ(trace_path("a.b/t", 2, 4), "a.b/t.rank2");
}

TEST_F(Writing, TraceGoesWhereALinkLeads) {
  std::filesystem::create_symlink("target.json", path("trace.json"));
  {
    TraceSession trace(path("trace.json"));
    trace.write();
  }
  EXPECT_TRUE(nlohmann::json::parse(read_file(path("target.json"))).contains("traceEvents"));
  expect_names({"trace.json", "target.json"});
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  std::string got;
  std::thread reader([&] { got = read_file(path("pipe")); });
  {
    TraceSession trace(path("pipe"));
    trace.write();
  }
  reader.join();
  EXPECT_TRUE(nlohmann::json::parse(got).contains("traceEvents"));
}

TEST_F(Writing, TraceLeavesTheTemporaryFolderAsItIs) {
  std::filesystem::create_directory(path("tmp"));
  write_file_atomically(path("victim"), kText);
  std::filesystem::create_symlink("../victim",
                                  path("tmp/lshmoe-trace." + std::to_string(::getpid()) + ".json"));
  const char* before = std::getenv("TMPDIR");
  const std::string restored = before ? before : "";
  ::setenv("TMPDIR", path("tmp").c_str(), 1);
  {
    TraceSession trace(path("trace.json"));
    trace.write();
  }
  before ? ::setenv("TMPDIR", restored.c_str(), 1) : ::unsetenv("TMPDIR");
  EXPECT_EQ(read_file(path("victim")), kText);
  expect_names(
      {"tmp", "victim", "trace.json", "lshmoe-trace." + std::to_string(::getpid()) + ".json"});
}

TEST(Trace, HoldsTheNamedPhases) {
  const std::string path = temporary("trace.json");
  {
    TraceSession trace(path);
    {
      RECORD_FUNCTION("lshmoe::test_phase", std::vector<c10::IValue>{});
      (void)at::ones({4, 4}).mm(at::ones({4, 4}));
    }
    trace.write();
  }
  const auto json = nlohmann::json::parse(read_file(path));
  bool phase = false, op = false;
  for (const auto& event : json["traceEvents"]) {
    const std::string name = event.value("name", "");
    phase |= name == "lshmoe::test_phase";
    op |= name == "aten::mm";
  }
  EXPECT_TRUE(phase);
  EXPECT_TRUE(op);
  EXPECT_NE(error_of([] { TraceSession("/nonexistent/t.json"); }).find("/nonexistent/t.json"),
            std::string::npos);
  std::remove(path.c_str());
}

}  // namespace
}  // namespace lshmoe
