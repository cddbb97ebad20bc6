// The C functions that the Python driver calls. Reports are JSON.
#include <deque>

#include "runtime.h"

namespace emulator {
namespace {

std::deque<Kernel>& kernels() {
  static std::deque<Kernel> all;
  return all;
}

void append_counters(std::string& json) {
  const auto add = [&](const char* name, uint64_t value) {
    json += ",\"" + std::string(name) + "\":" + std::to_string(value);
  };
  json += "{\"blocks\":" + std::to_string(counters.blocks);
  add("mma_f16", counters.mma[0]);
  add("mma_bf16", counters.mma[1]);
  add("mma_tf32", counters.mma[2]);
  add("ldmatrix", counters.ldmatrix);
  add("ldmatrix_wavefronts", counters.ldmatrix_wavefronts);
  add("ldmatrix_matrices", counters.ldmatrix_matrices);
  add("cp_async", counters.cp_async);
  add("barriers", counters.barriers);
  add("warp_collectives", counters.warp_collectives);
  add("context_switches", counters.switches);
  add("static_shared_bytes", shared_memory.static_bytes);
  json += "}";
}

std::string answer;  // outlives the call that returns it

}  // namespace

void register_kernel(const Kernel& kernel) { kernels().push_back(kernel); }

}  // namespace emulator

using namespace emulator;

extern "C" {

// [{"name": ..., "checked": ..., "parameters": [["r", 8], ...]}, ...] in the order of their
// numbers.
const char* emulator_kernels() {
  answer = "[";
  for (const Kernel& kernel : kernels()) {
    if (answer.size() > 1) answer += ",";
    answer += "{\"name\":";
    append_quoted(answer, kernel.name);
    answer += kernel.checked ? ",\"checked\":true" : ",\"checked\":false";
    answer += ",\"parameters\":[";
    for (size_t i = 0; i < kernel.parameter_count; ++i) {
      if (i > 0) answer += ",";
      answer += std::string("[\"") + kernel.parameters[i].kind + "\"," +
                std::to_string(kernel.parameters[i].bytes) + "]";
    }
    answer += "]}";
  }
  answer += "]";
  return answer.c_str();
}

Buffer* emulator_create_buffer(const char* name, const void* source, size_t bytes,
                               int element_bytes, size_t alignment, int left, int writable) {
  return create_buffer(name, source, bytes, element_bytes, alignment,
                       left != 0 ? Placement::left : Placement::right, writable != 0);
}
void emulator_destroy_buffer(Buffer* buffer) { destroy_buffer(buffer); }
void emulator_protect_buffer(Buffer* buffer, int writable) {
  protect_buffer(*buffer, writable != 0);
}
void* emulator_buffer_address(const Buffer* buffer) { return buffer->begin; }

const char* emulator_launch(int kernel, void** arguments, const unsigned* grid,
                            const unsigned* block, size_t shared_bytes, int schedule, uint64_t seed,
                            int left, double cpu_seconds) {
  const LaunchOptions options = {{grid[0], grid[1], grid[2]},
                                 {block[0], block[1], block[2]},
                                 shared_bytes,
                                 static_cast<Schedule>(schedule),
                                 seed,
                                 left != 0 ? Placement::left : Placement::right,
                                 cpu_seconds};
  launch(kernels()[kernel], arguments, options);
  answer = "{\"findings\":";
  append_findings(answer);
  answer += ",\"counters\":";
  append_counters(answer);
  if (execution.checked) {
    answer += ",";
    append_traffic(answer);
    answer += ",";
    append_unread_copies(answer);
  }
  answer += "}";
  return answer.c_str();
}

}  // extern "C"
