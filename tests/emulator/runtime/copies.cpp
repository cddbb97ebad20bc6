// cp.async: the destination holds NaN from the issue on; the data lands when the issuing thread
// waits for its group, never before. Hardware may be earlier, so a kernel must not depend on
// either.
#include "runtime.h"

namespace emulator {
namespace {

void land(const PendingCopy& copy) {
  execution.caller = copy.pc;
  if (copy.valid) {
    memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    memset(copy.shared, 0, copy.bytes);
  }
  if (execution.checked) mark_landed(copy.shared, copy.bytes, copy.valid ? copy.pc : 0);
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  const uintptr_t pc = EMULATOR_CALLER;
  execution.caller = pc;
  ++counters.cp_async;
  char* destination = static_cast<char*>(shared);
  const char* source = static_cast<const char*>(global);
  // Alignment is required of the source even where nothing is read from it.
  if (reinterpret_cast<uintptr_t>(destination) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    fail("misaligned",
         "cp.async of " + std::to_string(bytes) + " bytes: the " +
             (reinterpret_cast<uintptr_t>(destination) % bytes != 0 ? "destination" : "source") +
             " is not aligned to its size",
         here(pc));
  }
  if (!in_shared_object(destination, bytes)) {
    fail("out-of-bounds", "cp.async destination: " + describe_address(destination), here(pc));
  }
  if (execution.checked) {
    if (valid) check_access(source, bytes, false, pc);
    order_shared(destination, bytes, true, pc);
    mark_in_flight(destination, bytes);
    count_lane(Traffic::cp_async, destination, bytes, pc);
  } else if (valid) {
    // Reads the source now too, so that a fault belongs to this call and not to the wait.
    static_cast<void>(*static_cast<const volatile char*>(source));
    static_cast<void>(*static_cast<const volatile char*>(source + bytes - 1));
  }
  memset(destination, 0xff, bytes);
  current->copies.push_back({destination, source, bytes, valid, pc});
  ++current->open_copies;
}

void copy_async_commit() {
  current->groups.push_back(current->open_copies);
  current->open_copies = 0;
}

void copy_async_wait(int pending) {
  Thread& me = *current;
  if (me.groups.size() <= static_cast<size_t>(pending)) return;
  const size_t landing = me.groups.size() - pending;
  int copies = 0;
  for (size_t g = 0; g < landing; ++g) copies += me.groups[g];
  for (int i = 0; i < copies; ++i) land(me.copies[i]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + copies);
  me.groups.erase(me.groups.begin(), me.groups.begin() + landing);
}

void check_copies_awaited(Thread& thread) {
  report("copy-not-awaited",
         "the kernel ended with " + std::to_string(thread.copies.size()) +
             " cp.async of this thread in flight",
         here(thread.copies.front().pc));
}

}  // namespace emulator
