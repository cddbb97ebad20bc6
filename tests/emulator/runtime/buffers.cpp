// Global memory between guard pages, and the shared memory of the running block.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "runtime.h"

namespace emulator {

SharedMemory shared_memory;

namespace {

// Reserved address space costs nothing. This much on each side of a buffer stops any stray offset
// within the sizes that a test uses.
constexpr size_t kGuard = size_t{256} << 20;
constexpr size_t kRedZone = 128;  // between static arrays
constexpr unsigned char kMargin = 0xa5;

std::vector<Buffer*> buffers;  // by address
int64_t next_id = 1;

constexpr size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

char* reserve(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return static_cast<char*>(memory);
}

char* usable_begin(const Buffer& buffer) { return buffer.mapping + kGuard; }
char* usable_end(const Buffer& buffer) { return buffer.mapping_end - kGuard; }

bool margin_intact(const char* from, const char* to) {
  return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kMargin; });
}

}  // namespace

Buffer* create_buffer(const char* name, const void* source, size_t bytes, int element_bytes,
                      size_t alignment, Placement placement, bool writable) {
  Buffer* buffer = new Buffer;
  const size_t usable = round_up(std::max<size_t>(bytes, 1), kPage);
  buffer->id = next_id++;
  buffer->name = name;
  buffer->mapping = reserve(usable + 2 * kGuard);
  buffer->mapping_end = buffer->mapping + usable + 2 * kGuard;
  char* low = usable_begin(*buffer);
  char* high = usable_end(*buffer);
  mprotect(low, usable, PROT_READ | PROT_WRITE);
  memset(low, kMargin, usable);
  buffer->begin = placement == Placement::left ? low : high - round_up(bytes, alignment);
  buffer->end = buffer->begin + bytes;
  buffer->element_bytes = element_bytes;
  buffer->writable = true;
  buffer->initialised = source != nullptr;
  if (source != nullptr) {
    memcpy(buffer->begin, source, bytes);
  } else {
    memset(buffer->begin, 0xff, bytes);
  }
  protect_buffer(*buffer, writable);
  const auto place =
      std::lower_bound(buffers.begin(), buffers.end(), buffer,
                       [](const Buffer* a, const Buffer* b) { return a->mapping < b->mapping; });
  buffers.insert(place, buffer);
  return buffer;
}

void destroy_buffer(Buffer* buffer) {
  buffers.erase(std::find(buffers.begin(), buffers.end(), buffer));
  munmap(buffer->mapping, buffer->mapping_end - buffer->mapping);
  delete buffer;
}

void protect_buffer(Buffer& buffer, bool writable) {
  if (buffer.writable == writable) return;
  mprotect(usable_begin(buffer), usable_end(buffer) - usable_begin(buffer),
           writable ? PROT_READ | PROT_WRITE : PROT_READ);
  buffer.writable = writable;
}

void check_margins() {
  for (Buffer* buffer : buffers) {
    if (margin_intact(usable_begin(*buffer), buffer->begin) &&
        margin_intact(buffer->end, usable_end(*buffer))) {
      continue;
    }
    report("out-of-bounds", "bytes next to buffer '" + buffer->name + "' were overwritten", {});
    memset(usable_begin(*buffer), kMargin, buffer->begin - usable_begin(*buffer));
    memset(buffer->end, kMargin, usable_end(*buffer) - buffer->end);
  }
}

const std::vector<Buffer*>& all_buffers() { return buffers; }

Buffer* find_buffer(const void* address) {
  const char* p = static_cast<const char*>(address);
  auto after = std::upper_bound(buffers.begin(), buffers.end(), p,
                                [](const char* a, const Buffer* b) { return a < b->mapping; });
  if (after == buffers.begin()) return nullptr;
  Buffer* buffer = *--after;
  return p < buffer->mapping_end ? buffer : nullptr;
}

namespace {

std::string bytes_from(const char* p, const char* begin, const char* end, const std::string& name) {
  const std::string object = name + " (" + std::to_string(end - begin) + " bytes)";
  if (p < begin) return std::to_string(begin - p) + " bytes before the beginning of " + object;
  if (p >= end) return std::to_string(p - end) + " bytes past the end of " + object;
  return "offset " + std::to_string(p - begin) + " of " + object;
}

std::string describe_shared(const char* p) {
  if (p >= shared_memory.statics + kStaticRoom) {
    return bytes_from(p, shared_memory.dynamic, shared_memory.dynamic_end, "dynamic shared memory");
  }
  // The red zone after an array is told as past its end, which is the likelier mistake.
  for (size_t i = shared_memory.arrays.size(); i-- > 0;) {
    const auto& array = shared_memory.arrays[i];
    if (p < array.begin && i > 0) continue;
    return bytes_from(p, array.begin, array.end, "static shared array " + std::to_string(i));
  }
  return "shared memory, of which the kernel has none here";
}

}  // namespace

std::string describe_address(const void* address) {
  const char* p = static_cast<const char*>(address);
  if (in_shared_arena(p)) return describe_shared(p);
  if (const Buffer* buffer = find_buffer(p)) {
    return bytes_from(p, buffer->begin, buffer->end, "buffer '" + buffer->name + "'");
  }
  return reinterpret_cast<uintptr_t>(p) < kPage ? "null pointer" : "an address in no buffer";
}

// ---- Shared memory -----------------------------------------------------------------------------

// The arena: guard, static arrays, guard page, dynamic memory, guard. Dynamic memory lies against
// the guard on the side of the placement, as far as its 128-byte alignment allows.
void place_shared_memory(const LaunchOptions& options) {
  if (shared_memory.arena == nullptr) {
    shared_memory.arena = reserve(2 * kGuard + kSharedRoom);
    shared_memory.arena_end = shared_memory.arena + 2 * kGuard + kSharedRoom;
    shared_memory.statics = shared_memory.arena + kGuard;
    mprotect(shared_memory.statics, kStaticRoom, PROT_READ | PROT_WRITE);
  }
  char* room = shared_memory.statics + kStaticRoom + kPage;
  mprotect(room, kMaxDynamicShared, PROT_NONE);
  const size_t pages = round_up(options.shared_bytes, kPage);
  if (pages > 0) mprotect(room, pages, PROT_READ | PROT_WRITE);
  shared_memory.dynamic = options.placement == Placement::left
                              ? room
                              : room + pages - round_up(options.shared_bytes, 128);
  shared_memory.dynamic_end = shared_memory.dynamic + options.shared_bytes;
  shared_memory.static_bytes = 0;
  shared_memory.arrays.clear();
}

// Every block starts with NaN in its shared memory.
void poison_shared_memory() {
  memset(shared_memory.dynamic, 0xff, shared_memory.dynamic_end - shared_memory.dynamic);
  for (const auto& array : shared_memory.arrays) memset(array.begin, 0xff, array.end - array.begin);
}

void* dynamic_shared_memory() { return shared_memory.dynamic; }

void* shared_array(SharedKey& key, size_t bytes) {
  if (key.launch == execution.launch) return key.place;
  char* begin = shared_memory.arrays.empty()
                    ? shared_memory.statics
                    : shared_memory.statics + round_up(shared_memory.arrays.back().end + kRedZone -
                                                           shared_memory.statics,
                                                       kRedZone);
  shared_memory.static_bytes += bytes;
  if (shared_memory.static_bytes > kMaxStaticShared ||
      begin + bytes > shared_memory.statics + kStaticRoom) {
    fail("invalid-launch", "over 48 KiB of static shared memory", here(EMULATOR_CALLER));
  }
  memset(begin, 0xff, bytes);
  if (execution.checked) forget_shared(begin, begin + bytes);
  shared_memory.arrays.push_back({begin, begin + bytes});
  key = {execution.launch, begin};
  return begin;
}

bool in_shared_object(const void* address, size_t bytes) {
  const char* p = static_cast<const char*>(address);
  if (p >= shared_memory.dynamic && p + bytes <= shared_memory.dynamic_end) return true;
  for (const auto& array : shared_memory.arrays) {
    if (p >= array.begin && p + bytes <= array.end) return true;
  }
  return false;
}

uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_memory.statics);
}

}  // namespace emulator
