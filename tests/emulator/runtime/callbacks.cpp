// The checked build's eyes: g++ -fsanitize=thread calls these functions around every access of the
// kernel to memory. They are ours; libtsan is not linked.
#include "runtime.h"

namespace emulator {

void check_access(const void* address, size_t bytes, bool write, uintptr_t pc) {
  if (current == nullptr) return;
  const auto number = reinterpret_cast<uintptr_t>(address);
  if (number - current->stack_low < kStackBytes) return;  // registers and local memory
  const char* p = static_cast<const char*>(address);
  execution.caller = pc;

  const bool is_vector = bytes <= 16 && (bytes & (bytes - 1)) == 0;
  if (is_vector && number % bytes != 0) {
    report("misaligned",
           std::string(write ? "write of " : "read of ") + std::to_string(bytes) +
               " bytes that is not aligned to its size: " + describe_address(p),
           here(pc));
  }
  if (in_shared_arena(p)) {
    if (!in_shared_object(p, bytes)) {
      report("out-of-bounds", (write ? "write: " : "read: ") + describe_address(p), here(pc));
      return;
    }
    order_shared(p, bytes, write, pc);
    count_lane(write ? Traffic::shared_store : Traffic::shared_load, p, bytes, pc);
    return;
  }
  if (Buffer* buffer = find_buffer(p)) {
    if (p < buffer->begin || p + bytes > buffer->end) {
      const char* reached = p < buffer->begin ? p : std::max<const char*>(p, buffer->end);
      report("out-of-bounds",
             std::string(write ? "write of " : "read of ") + std::to_string(bytes) + " bytes at " +
                 describe_address(reached),
             here(pc));
      return;
    }
    if (write && !buffer->writable) return;  // the page protection tells
    order_global(*buffer, p, bytes, write, pc);
    count_bytes(*buffer, p, bytes, write);
    count_lane(write ? Traffic::global_store : Traffic::global_load, p, bytes, pc);
    return;
  }
  // No buffers, and not to be written: constants of the kernel library, and the arguments, which
  // the launch copies to each thread, large structures by a call of memcpy.
  if (!write && (execution.in_image(number) || execution.in_argument(p, bytes))) return;
  report("out-of-bounds", (write ? "write: " : "read: ") + describe_address(p), here(pc));
}

void checked_load(Space space, const void* source, void* value, size_t bytes) {
  const uintptr_t pc = EMULATOR_CALLER;
  if ((space == Space::shared) != in_shared_arena(source)) {
    report("wrong-space", "a load from one memory is given an address in the other", here(pc));
  }
  check_access(source, bytes, false, pc);
  memcpy(value, source, bytes);
}

void checked_store(Space space, void* destination, const void* value, size_t bytes) {
  const uintptr_t pc = EMULATOR_CALLER;
  if ((space == Space::shared) != in_shared_arena(destination)) {
    report("wrong-space", "a store to one memory is given an address in the other", here(pc));
  }
  check_access(destination, bytes, true, pc);
  memcpy(destination, value, bytes);
}

void misaligned(const void* address, size_t bytes) {
  fail("misaligned",
       "access of " + std::to_string(bytes) +
           " bytes that is not aligned to its size: " + describe_address(address),
       here(EMULATOR_CALLER));
}

void fence() {
  if (execution.checked) order_fence();
}

uint32_t atomic_add(uint32_t* address, uint32_t value, bool is_float) {
  const uintptr_t pc = EMULATOR_CALLER;
  execution.caller = pc;
  if (execution.out_of_time) fail_timeout(pc);
  if (reinterpret_cast<uintptr_t>(address) % sizeof *address != 0) {
    fail("misaligned", "atomicAdd: " + describe_address(address), here(pc));
  }
  const char* p = reinterpret_cast<const char*>(address);
  Buffer* buffer = find_buffer(p);
  if (buffer == nullptr || p < buffer->begin || p + sizeof *address > buffer->end) {
    fail("out-of-bounds", "atomicAdd: " + describe_address(address), here(pc));
  }
  if (execution.checked) {
    order_atomic(*buffer, p, sizeof *address, pc);
    count_bytes(*buffer, p, sizeof *address, false);
    count_bytes(*buffer, p, sizeof *address, true);
  }
  const uint32_t old = *address;
  *address =
      is_float ? bit_cast<uint32_t>(bit_cast<float>(old) + bit_cast<float>(value)) : old + value;
  return old;
}

}  // namespace emulator

extern "C" {

#define EMULATOR_CALLBACKS(bytes)                                                                \
  void __tsan_read##bytes(void* p) { emulator::check_access(p, bytes, false, EMULATOR_CALLER); } \
  void __tsan_write##bytes(void* p) { emulator::check_access(p, bytes, true, EMULATOR_CALLER); }
EMULATOR_CALLBACKS(1)
EMULATOR_CALLBACKS(2)
EMULATOR_CALLBACKS(4)
EMULATOR_CALLBACKS(8)
EMULATOR_CALLBACKS(16)

// A packed field: for the GPU, so many single bytes.
#define EMULATOR_UNALIGNED_CALLBACKS(bytes)                   \
  void __tsan_unaligned_read##bytes(void* p) {                \
    emulator::check_access(p, bytes, false, EMULATOR_CALLER); \
  }                                                           \
  void __tsan_unaligned_write##bytes(void* p) {               \
    emulator::check_access(p, bytes, true, EMULATOR_CALLER);  \
  }
EMULATOR_UNALIGNED_CALLBACKS(2)
EMULATOR_UNALIGNED_CALLBACKS(4)
EMULATOR_UNALIGNED_CALLBACKS(8)
EMULATOR_UNALIGNED_CALLBACKS(16)

void __tsan_read_range(void* p, size_t n) { emulator::check_access(p, n, false, EMULATOR_CALLER); }
void __tsan_write_range(void* p, size_t n) { emulator::check_access(p, n, true, EMULATOR_CALLER); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}

// The checked libraries are linked with --wrap for these: the compiler turns block copies into
// calls that it does not instrument.
void* __wrap_memcpy(void* to, const void* from, size_t n) {
  emulator::check_access(from, n, false, EMULATOR_CALLER);
  emulator::check_access(to, n, true, EMULATOR_CALLER);
  return memcpy(to, from, n);
}
void* __wrap_memmove(void* to, const void* from, size_t n) {
  emulator::check_access(from, n, false, EMULATOR_CALLER);
  emulator::check_access(to, n, true, EMULATOR_CALLER);
  return memmove(to, from, n);
}
void* __wrap_memset(void* to, int value, size_t n) {
  emulator::check_access(to, n, true, EMULATOR_CALLER);
  return memset(to, value, n);
}

}  // extern "C"
