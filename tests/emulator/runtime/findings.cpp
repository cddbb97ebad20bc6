// What went wrong in a launch.
#include <algorithm>
#include <map>
#include <tuple>

#include "runtime.h"

namespace emulator {
namespace {

struct Finding {
  std::string kind, message;
  Access access, other;
  int64_t count;
  bool fatal;
};

std::vector<Finding> findings;

// A finding is told once for each pair of places.
using Key = std::tuple<std::string, uintptr_t, uintptr_t, int, int>;
std::map<Key, size_t> known;

bool any_fatal;

Key key_of(const char* kind, const Access& access, const Access& other) {
  return {kind, access.pc, other.pc, access.site.line, other.site.line};
}

bool is_known(const Access& access) { return access.pc != 0 || access.site.file != nullptr; }

void append_access(std::string& json, const Access& access) {
  json +=
      "{\"thread\":" + std::to_string(access.thread) + ",\"block\":" + std::to_string(access.block);
  if (execution.in_image(access.pc)) {
    json += ",\"pc\":" + std::to_string(access.pc - execution.image_begin);
  }
  if (access.site.file != nullptr) {
    json += ",\"file\":";
    append_quoted(json, access.site.file);
    json += ",\"line\":" + std::to_string(access.site.line);
  }
  json += "}";
}

}  // namespace

std::string place(Site site) {
  return site.file == nullptr ? "?" : std::string(site.file) + ":" + std::to_string(site.line);
}

void report(const char* kind, const std::string& message, Access access, Access other) {
  const auto [entry, is_new] = known.try_emplace(key_of(kind, access, other), findings.size());
  if (is_new) {
    findings.push_back({kind, message, access, other, 1, false});
  } else {
    ++findings[entry->second].count;
  }
}

void fail(const char* kind, std::string message, Access access) {
  any_fatal = true;
  // The checked build may have announced what now ends the launch.
  const auto announced = known.find(key_of(kind, access, {}));
  if (announced != known.end()) {
    findings[announced->second].fatal = true;
  } else {
    findings.push_back({kind, std::move(message), access, {}, 1, true});
  }
  leave_block();
}

void clear_findings() {
  findings.clear();
  known.clear();
  any_fatal = false;
}

bool failed() { return any_fatal; }

void append_quoted(std::string& json, const std::string& text) {
  json += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    json += c;
  }
  json += '"';
}

void append_findings(std::string& json) {
  json += "[";
  for (size_t i = 0; i < findings.size(); ++i) {
    const Finding& finding = findings[i];
    json += i == 0 ? "{" : ",{";
    json += "\"kind\":";
    append_quoted(json, finding.kind);
    json += ",\"message\":";
    append_quoted(json, finding.message);
    json += ",\"count\":" + std::to_string(finding.count);
    json += finding.fatal ? ",\"fatal\":true" : ",\"fatal\":false";
    json += ",\"accesses\":[";
    append_access(json, finding.access);
    if (is_known(finding.other)) {
      json += ",";
      append_access(json, finding.other);
    }
    json += "]}";
  }
  json += "]";
}

}  // namespace emulator
