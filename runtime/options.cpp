#include "lshmoe/runtime/options.hpp"

#include <algorithm>
#include <array>
#include <boost/program_options.hpp>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <sstream>
#include <string_view>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe {
namespace po = boost::program_options;
namespace {

/// Levenshtein distance.
std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

/// An INI file without the mark that some editors put before UTF-8.
std::string config_text(const std::string& path) {
  std::string text;
  try {
    text = read_file(path);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(detail::message("--config: ", error.what()));
  }
  LSHMOE_VALIDATE(text.find('\0') == std::string::npos, "--config: '", path,
                  "' is no text in UTF-8 (it holds zero bytes, as UTF-16 does): save it as UTF-8");
  constexpr std::string_view kMark = "\xef\xbb\xbf";
  if (text.starts_with(kMark)) text.erase(0, kMark.size());
  // Boost would put a section before the names that follow it, and say nothing where none does.
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t first = line.find_first_not_of(" \t\r");
    if (first == std::string::npos || line[first] != '[') continue;
    const std::size_t end = line.find(']', first);
    throw InvalidArgument(detail::message(
        "section '", line.substr(first, end == std::string::npos ? end : end + 1 - first), "' in ",
        path, " (an INI file has no sections here): remove its line"));
  }
  return text;
}

void put(std::ostream& out, const std::string& value) { out << value; }
void put(std::ostream& out, bool value) { out << (value ? "true" : "false"); }
void put(std::ostream& out, auto number) {
  std::array<char, 32> digits{};  // as short as it is exact
  out.write(digits.data(), std::to_chars(digits.begin(), digits.end(), number).ptr - digits.data());
}

/// True if the value is a T or several.
template <class T>
bool put_if(std::ostream& out, const boost::any& value) {
  if (const auto* one = boost::any_cast<T>(&value)) {
    put(out, *one);
    return true;
  }
  const auto* list = boost::any_cast<std::vector<T>>(&value);
  if (list == nullptr) return false;
  for (std::size_t i = 0; i < list->size(); ++i) {
    if (i > 0) out << ", ";
    put(out, T((*list)[i]));
  }
  return true;
}

/// The same text for the same value, however it was written.
std::string text_of(const boost::any& value) {
  std::ostringstream text;
  LSHMOE_ASSERT(value.empty() || put_if<std::string>(text, value) || put_if<bool>(text, value) ||
                put_if<int>(text, value) || put_if<std::int64_t>(text, value) ||
                put_if<double>(text, value));
  return text.str();
}

}  // namespace

OptionParser::OptionParser(std::string program, std::string description)
    : program_(std::move(program)), description_(std::move(description)) {
  group("General").add_options()("help,h", "print this and exit")(
      "config", po::value<std::string>()->value_name("FILE"),
      "INI file with any of these options, without dashes (a switch: NAME = true); the command "
      "line wins");
}

po::options_description& OptionParser::group(const std::string& title) {
  titles_.push_back(title);
  return groups_.emplace_back(title, 110);
}

void OptionParser::group_needs(std::vector<std::string> names, std::string advice) {
  needs_.push_back({groups_.size() - 1, std::move(names), std::move(advice)});
}

po::options_description OptionParser::all() const {
  po::options_description sum;
  for (const auto& part : groups_) sum.add(part);
  return sum;
}

std::string OptionParser::nearest(const std::string& name) const {
  std::string best;
  std::size_t best_distance = std::max<std::size_t>(2, name.size() / 2) + 1;
  const po::options_description known = all();
  for (const auto& option : known.options()) {
    const std::size_t distance = edit_distance(name, option->long_name());
    if (distance < best_distance) {
      best_distance = distance;
      best = option->long_name();
    }
  }
  return best.empty() ? "" : ", did you mean --" + best + "?";
}

std::string OptionParser::help() const {
  std::ostringstream text;
  text << description_ << "\n\nusage: " << program_ << " [options]\n\n" << all();
  return text.str();
}

void OptionParser::show_help() const {
  std::fputs(help().c_str(), stdout);
  flush_stdout();
}

bool OptionParser::parse(int argc, const char* const* argv, bool print_help) {
  const po::options_description known = all();
  po::variables_map values;
  std::string source = "the command line";
  try {
    // No guessing of shortened names: a typo must not become another option.
    const int style =
        po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
    const po::parsed_options line =
        po::command_line_parser(argc, argv).options(known).style(style).positional({}).run();
    po::store(line, values);
    const auto remember = [&] {
      found_.clear();
      for (std::size_t i = 0; i < groups_.size(); ++i) {
        for (const auto& option : groups_[i].options()) {
          const std::string& name = option->long_name();
          std::string text = text_of(values[name].value());
          if (name == "help") text = values.count(name) != 0 ? "true" : "false";
          const bool on_line =
              std::any_of(line.options.begin(), line.options.end(),
                          [&](const po::option& one) { return one.string_key == name; });
          found_.push_back({titles_[i], name, std::move(text), on_line});
        }
      }
    };
    if (values.count("help") != 0) {
      remember();
      if (print_help) show_help();
      return false;
    }
    if (values.count("config") != 0) {
      source = values["config"].as<std::string>();
      std::istringstream file(config_text(source));
      po::store(po::parse_config_file(file, known), values);
    }
    remember();
    const auto given = [&](const std::string& name) {
      return values.count(name) != 0 && !values[name].defaulted();
    };
    for (const Need& need : needs_) {
      if (std::any_of(need.names.begin(), need.names.end(), given)) continue;
      for (const auto& option : groups_[need.group].options()) {
        LSHMOE_VALIDATE(!given(option->long_name()), "--", option->long_name(), " without --",
                        need.names.front(), need.advice);
      }
    }
    po::notify(values);
  } catch (const po::unknown_option& error) {
    std::string name = error.get_option_name();
    name.erase(0, name.find_first_not_of('-'));
    if (values.count("config") != 0 && known.find_nothrow(name, false) != nullptr) {
      throw InvalidArgument(detail::message("'", error.get_option_name(), "' in ", source,
                                            ": an INI file names options without dashes: write ",
                                            name));
    }
    throw InvalidArgument(detail::message("unknown option '", name, "' in ", source, nearest(name),
                                          " (see ", program_, " --help)"));
  } catch (const po::too_many_positional_options_error&) {
    throw InvalidArgument(
        detail::message("a value without an option on the command line (every "
                        "value belongs to a --name): see ",
                        program_, " --help"));
  } catch (const po::error& error) {
    throw InvalidArgument(
        detail::message(error.what(), " (in ", source, "): see ", program_, " --help"));
  }
  return true;
}

}  // namespace lshmoe
