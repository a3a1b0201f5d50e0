// Files, metrics, log, signals, trace: what a program leaves behind and how it is told to stop.

#include "lshmoe/runtime/files.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <csignal>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

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
