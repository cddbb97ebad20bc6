// Ranges of things that are counted, and how they are divided.
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t align_line(int64_t bytes) { return divide_up(bytes, kCacheLine) * kCacheLine; }

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// One of `parts` equal parts of 0 .. total.
constexpr Span part_of(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

}  // namespace
}  // namespace fused_resnet::cpu
