#include "lshmoe/runtime/options.hpp"

#include <gtest/gtest.h>

#include <boost/program_options/value_semantic.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe {
namespace {
namespace po = boost::program_options;

struct Program {
  OptionParser parser{"prog", "Does things."};
  int layers = 0;
  double rate = 0;
  std::vector<std::string> data;

  Program() {
    parser.group("Model").add_options()("layers", po::value<int>(&layers)->default_value(2), "n");
    parser.group("Optimiser")
        .add_options()("rate", po::value<double>(&rate)->default_value(0.5), "r")(
            "data", po::value<std::vector<std::string>>(&data)->multitoken(), "paths");
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
  EXPECT_LT(help.find("Model"), help.find("Optimiser"));
}

}  // namespace
}  // namespace lshmoe
