#pragma once
// Program options: groups composed per folder, from the command line and an INI file.

#include <boost/program_options/options_description.hpp>
#include <boost/program_options/value_semantic.hpp>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// What became of one option.
struct OptionValue {
  std::string group, name;  ///< as --help has them
  std::string text;         ///< its value, the same for the same value however written
  bool on_command_line;     ///< or else in the INI file, or its default
};

/// Options of one program. Each folder adds a group that writes into variables of its own:
///
///     OptionParser parser("lshmoe-train", "Trains ...");
///     parser.group("Model").add_options()("layers", po::value(&layers)->default_value(2), "...");
///     if (!parser.parse(argc, argv)) return 0;   // --help was asked for and printed
class OptionParser {
 public:
  OptionParser(std::string program, std::string description);

  /// A new group, listed under `title` by --help; the reference stays valid until the next group().
  boost::program_options::options_description& group(const std::string& title);

  /// Options of the newest group have no effect unless one of `names`, of any group, is given
  /// (with any value): parse() refuses them without. `advice`: " (why): what to do".
  void group_needs(std::vector<std::string> names, std::string advice);

  /// Reads the command line and, if it names one with --config FILE, an INI file of the same names
  /// without dashes, in UTF-8 with or without a byte order mark; the command line wins. Sets the
  /// variables. Returns false when --help was asked for, and prints it to stdout if `print_help`.
  /// Local. Throws InvalidArgument in one line: an unknown option (with the nearest known name), a
  /// bad or missing value, an unreadable file or a section in it, an option without what its group
  /// needs. Throws Error when printing fails.
  [[nodiscard]] bool parse(int argc, const char* const* argv, bool print_help = true);

  /// What --help prints.
  [[nodiscard]] std::string help() const;
  /// Prints it to stdout. Throws Error when that fails.
  void show_help() const;

  /// Every option with what the last parse() found, in the order of --help; after a false one only
  /// that of --help counts. Local.
  [[nodiscard]] const std::vector<OptionValue>& values() const { return found_; }

 private:
  std::string program_, description_;
  std::vector<boost::program_options::options_description> groups_;
  std::vector<std::string> titles_;  // theirs
  struct Need {
    std::size_t group;
    std::vector<std::string> names;
    std::string advice;
  };
  std::vector<Need> needs_;
  std::vector<OptionValue> found_;

  [[nodiscard]] boost::program_options::options_description all() const;
  [[nodiscard]] std::string nearest(const std::string& name) const;
};

/// Throws InvalidArgument with the option's name where its number is below `least` or not finite.
template <class Number>
void check_at_least(const char* option, Number given, std::type_identity_t<Number> least) {
  LSHMOE_VALIDATE(given >= least && std::isfinite(static_cast<double>(given)), option, " is ",
                  given, " (must be at least ", least, ")");
}

}  // namespace lshmoe
