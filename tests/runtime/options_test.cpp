#include "lshmoe/runtime/options.hpp"

#include <gtest/gtest.h>

#include <boost/program_options/value_semantic.hpp>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe {
namespace {
namespace po = boost::program_options;

struct Program {
  OptionParser parser{"prog", "Does things."};
  int layers = 0, noise = 0, width = 0;
  bool flat = false;
  double rate = 0;
  std::vector<std::string> data;

  Program() {
    parser.group("Model").add_options()("layers", po::value<int>(&layers)->default_value(2), "n");
    parser.group("Optimizer")
        .add_options()("rate", po::value<double>(&rate)->default_value(0.5), "r")(
            "data", po::value<std::vector<std::string>>(&data)->multitoken(), "paths");
    parser.group("Noise").add_options()("noise", po::value<int>(&noise)->default_value(0), "n")(
        "other-noise", po::value<int>(&noise), "o")("width",
                                                    po::value<int>(&width)->default_value(1),
                                                    "w")("flat", po::bool_switch(&flat), "f");
    parser.group_needs({"noise", "other-noise"}, " (there is none): add --noise");
  }
  bool parse(std::vector<const char*> args) {
    args.insert(args.begin(), "prog");
    return parser.parse(static_cast<int>(args.size()), args.data(), /*print_help=*/false);
  }
  std::string error_of(const std::vector<const char*>& args) {
    const int rank = process_rank();
    set_process_rank(-1);
    std::string text;
    try {
      (void)parse(args);
    } catch (const InvalidArgument& error) {
      text = error.what();
    }
    set_process_rank(rank);
    return text;
  }
};

TEST(Options, DefaultsAndCommandLine) {
  Program program;
  EXPECT_TRUE(program.parse({"--rate", "0.25", "--data", "a", "b"}));
  EXPECT_EQ(program.layers, 2);
  EXPECT_EQ(program.rate, 0.25);
  EXPECT_EQ(program.data, (std::vector<std::string>{"a", "b"}));
}

TEST(Options, CommandLineWinsOverFile) {
  const std::string path = ::testing::TempDir() + "options_test.ini";
  write_file_atomically(path, std::string("# comment\nlayers = 7\nrate = 0.125\n"));
  Program program;
  EXPECT_TRUE(program.parse({"--config", path.c_str(), "--rate", "3"}));
  EXPECT_EQ(program.layers, 7);
  EXPECT_EQ(program.rate, 3);
  write_file_atomically(path, std::string("layer = 7\n"));
  EXPECT_NE(Program().error_of({"--config", path.c_str()}).find("did you mean --layers"),
            std::string::npos);
  write_file_atomically(path, std::string("--layers = 7\n"));
  EXPECT_EQ(Program().error_of({"--config", path.c_str()}),
            "'--layers' in " + path + ": an INI file names options without dashes: write layers");
  EXPECT_NE(Program().error_of({"---layers", "7"}).find("in the command line"), std::string::npos);
  std::remove(path.c_str());
}

TEST(Options, GroupsThatNeedAnOption) {
  const std::string path = ::testing::TempDir() + "options_test_needs.ini";
  const std::string refused = "--width without --noise (there is none): add --noise";
  EXPECT_EQ(Program().error_of({"--width", "1"}), refused);  // its default, but given
  EXPECT_EQ(Program().error_of({"--flat"}), "--flat without --noise (there is none): add --noise");
  write_file_atomically(path, std::string("#noise = 3\nwidth = 2\n"));
  EXPECT_EQ(Program().error_of({"--config", path.c_str()}), refused);
  for (const auto& more : std::vector<std::vector<const char*>>{
           {"--noise", "0"}, {"--noise", "3"}, {"--other-noise", "3"}}) {
    std::vector<const char*> args = {"--config", path.c_str(), "--flat"};
    args.insert(args.end(), more.begin(), more.end());
    EXPECT_EQ(Program().error_of(args), "");
  }
  write_file_atomically(path, std::string("noise = 0\n"));
  EXPECT_EQ(Program().error_of({"--config", path.c_str(), "--width", "2"}), "");
  std::remove(path.c_str());
}

TEST(Options, FilesWithSections) {
  const std::string path = ::testing::TempDir() + "options_test_sections.ini";
  for (const std::string after : {"layers = 7\n", "nonsense = 7\n", "", "[b]\nlayers = 7\n"}) {
    write_file_atomically(path, "rate = 1\n \t[the model] # one\n" + after);
    EXPECT_EQ(Program().error_of({"--config", path.c_str()}),
              "section '[the model]' in " + path +
                  " (an INI file has no sections here): remove its line");
  }
  write_file_atomically(path, std::string("#[the model]\nlayers = 7\n"));
  EXPECT_EQ(Program().error_of({"--config", path.c_str()}), "");
  EXPECT_EQ(Program().error_of({"--a.layers", "7"}).find("section"), std::string::npos);
  std::remove(path.c_str());
}

TEST(Options, ValuesAndWhereTheyAreFrom) {
  const std::string path = ::testing::TempDir() + "options_test_values.ini";
  write_file_atomically(path, std::string("layers = 7\nrate = 3\n"));
  Program program;
  ASSERT_TRUE(program.parse({"--config", path.c_str(), "--rate=0.10", "--data", "a", "b"}));
  std::string all;
  for (const OptionValue& one : program.parser.values()) {
    if (one.name == "config") continue;
    all += one.group + ": " + one.name + "=" + one.text + (one.on_command_line ? " given\n" : "\n");
  }
  EXPECT_EQ(all,
            "General: help=false\nModel: layers=7\nOptimizer: rate=0.1 given\n"
            "Optimizer: data=a, b given\nNoise: noise=0\nNoise: other-noise=\n"
            "Noise: width=1\nNoise: flat=false\n");
  ASSERT_FALSE(program.parse({"--help"}));
  EXPECT_EQ(program.parser.values()[0].text, "true");
  std::remove(path.c_str());
}

TEST(Options, NumbersBelowTheLeast) {
  const auto error = [](auto given, auto least) -> std::string {
    try {
      check_at_least("size", given, least);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(error(int64_t{1}, 1), "");
  EXPECT_NE(error(int64_t{0}, 1).find("size is 0 (must be at least 1)"), std::string::npos);
  EXPECT_NE(error(-0.5, 0), "");
  EXPECT_NE(error(std::numeric_limits<double>::infinity(), 0), "");
}

TEST(Options, FilesOfOtherEditors) {
  const std::string path = ::testing::TempDir() + "options_test_other.ini";
  for (const char* text :
       {"\xef\xbb\xbflayers = 7\n", "\xef\xbb\xbf# comment\r\nlayers = 7\r\n", "layers = 7"}) {
    write_file_atomically(path, std::string(text));
    Program program;
    EXPECT_TRUE(program.parse({"--config", path.c_str()}));
    EXPECT_EQ(program.layers, 7);
  }
  write_file_atomically(path, std::string("\xff\xfel\0a\0", 6));  // UTF-16
  EXPECT_NE(Program().error_of({"--config", path.c_str()}).find("save it as UTF-8"),
            std::string::npos);
  std::remove(path.c_str());
  EXPECT_EQ(Program().error_of({"--config", "/tmp"}),
            "--config: cannot read '/tmp' (it is a folder): name a file in it");
}

TEST(Options, ErrorsAreOneLineAndSayWhatToDo) {
  EXPECT_EQ(Program().error_of({"--layer", "3"}),
            "unknown option 'layer' in the command line, did you mean --layers? (see prog --help)");
  EXPECT_NE(Program().error_of({"--layers", "three"}).find("three"), std::string::npos);
  EXPECT_NE(Program().error_of({"--layers"}).find("--layers"), std::string::npos);
  EXPECT_NE(Program().error_of({"3"}).find("without an option"), std::string::npos);
  EXPECT_NE(Program().error_of({"--config", "/nonexistent.ini"}).find("/nonexistent.ini"),
            std::string::npos);
  for (const auto& args : std::vector<std::vector<const char*>>{{"--layer", "3"}, {"3"}}) {
    EXPECT_EQ(Program().error_of(args).find('\n'), std::string::npos);
  }
}

TEST(Options, HelpIsGroupedAndEndsTheProgram) {
  Program program;
  EXPECT_FALSE(program.parse({"--help"}));
  const std::string help = program.parser.help();
  EXPECT_LT(help.find("General"), help.find("Model"));
  EXPECT_LT(help.find("Model"), help.find("Optimizer"));
}

}  // namespace
}  // namespace lshmoe
