// Which accesses are ordered by synchronisation, and which only happened to be.
//
// Each byte of shared memory and each element of a writable buffer remembers its last write and its
// last read as a stamp: the time, in synchronising events, and the thread. An access is ordered
// after an earlier one if the same thread made both, if the block passed a barrier between them, or
// if they are of one warp and it passed a __syncwarp. Between blocks, only a release and an acquire
// order anything: a fence, an atomic, and on the other side an atomic on the same address, then a
// fence.
#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace emulator {
namespace {

// Low bits of a stamp. Where several threads have read a place since it was last ordered, the stamp
// says so instead of listing them.
constexpr uint32_t kThreadMask = 0x3ff;
constexpr uint32_t kWarpMask = 0x3e0;
constexpr uint32_t kSeveralLanes = 0x400;  // of the warp of the thread in the stamp
constexpr uint32_t kSeveralWarps = 0x800;
constexpr uint32_t kFieldMask = 0xfff;
constexpr int kSharedTimeShift = 12;
constexpr uint64_t kAtomic = 0x1000;
constexpr int kGlobalTimeShift = 13;

constexpr uint32_t kInFlight = ~0u;  // of a cp.async; compares as unordered with everything

// ---- Shared memory -----------------------------------------------------------------------------

constexpr size_t kChunk = 16;

struct SharedShadow {
  uint32_t write_stamps[kSharedRoom], read_stamps[kSharedRoom];
  uint32_t write_pcs[kSharedRoom], read_pcs[kSharedRoom];
  // Per 16 bytes: the cp.async that brought data here which nobody has read; else 0.
  uint32_t unread[kSharedRoom / kChunk];
};
SharedShadow shadow;

// What the current thread may take as ordered before it.
struct SharedView {
  uint32_t self, stamp;
  uint32_t block_limit, warp_limit;  // stamps below are ordered, for the block or the warp

  bool ordered(uint32_t earlier) const {
    const bool same_thread = ((earlier ^ self) & kFieldMask) == 0;
    const bool same_warp = ((earlier ^ self) & (kWarpMask | kSeveralWarps)) == 0;
    return (earlier < block_limit) | same_thread | (same_warp & (earlier < warp_limit));
  }

  // The read stamp after this thread, too, has read.
  uint32_t merged(uint32_t earlier) const {
    const bool same_warp = ((earlier ^ self) & (kWarpMask | kSeveralWarps)) == 0;
    return ordered(earlier) ? stamp : stamp | (same_warp ? kSeveralLanes : kSeveralWarps);
  }
};

std::unordered_map<uint32_t, uint64_t> unread_copies;  // of this launch, by pc

// Shared memory that cp.async filled is about to be overwritten or given up.
void discard(size_t first, size_t bytes) {
  for (size_t chunk = first / kChunk; chunk <= (first + bytes - 1) / kChunk; ++chunk) {
    if (__builtin_expect(shadow.unread[chunk] != 0, 0)) {
      ++unread_copies[shadow.unread[chunk]];
      shadow.unread[chunk] = 0;
    }
  }
}

uint32_t shared_time(uint64_t time) {
  if (time < execution.block_start) return 0;
  return static_cast<uint32_t>(time - execution.block_start + 1) << kSharedTimeShift;
}

SharedView shared_view() {
  if (execution.now - execution.block_start >= (1u << (32 - kSharedTimeShift)) - 2) {
    fail("unsupported", "over a million synchronising events in one block", here(0));
  }
  const auto self = static_cast<uint32_t>(current->number);
  return {self, shared_time(execution.now) | self, shared_time(execution.barrier_time),
          shared_time(current->warp->barrier_time)};
}

uint32_t relative_pc(uintptr_t pc) { return static_cast<uint32_t>(pc - execution.image_begin); }

Access earlier_access(uint32_t pc, uint64_t field) {
  const bool one_thread = (field & (kSeveralLanes | kSeveralWarps)) == 0;
  return {execution.image_begin + pc,
          {nullptr, 0},
          one_thread ? static_cast<int>(field & kThreadMask) : -1,
          execution.block};
}

void report_shared(const SharedView& view, size_t first, size_t bytes, bool write, uintptr_t pc) {
  for (size_t i = first; i < first + bytes; ++i) {
    const uint32_t written = shadow.write_stamps[i], read = shadow.read_stamps[i];
    const Access by_write = earlier_access(shadow.write_pcs[i], written);
    if (written == kInFlight) {
      report("in-flight",
             write
                 ? "write to shared memory where a cp.async is in flight"
                 : "read of shared memory where a cp.async is in flight: waited for too few groups",
             here(pc), {by_write.pc, {nullptr, 0}, -1, execution.block});
      return;
    }
    if (!write && written == 0) {
      report("uninitialised", "read of shared memory that this block has not written", here(pc));
      return;
    }
    if (!view.ordered(written)) {
      report("race",
             write ? "two threads write the same shared memory with no barrier between"
                   : "read of shared memory that another thread wrote, with no barrier between",
             here(pc), by_write);
      return;
    }
    if (write && !view.ordered(read)) {
      report("race", "write to shared memory that another thread read, with no barrier between",
             here(pc), earlier_access(shadow.read_pcs[i], read));
      return;
    }
  }
}

// Bytes is a constant for the usual widths, so that the loops become vector instructions.
template <size_t Bytes>
inline void order_shared_bytes(size_t first, size_t count, bool write, uintptr_t pc) {
  const size_t bytes = Bytes == 0 ? count : Bytes;
  const SharedView view = shared_view();
  uint32_t* write_stamps = shadow.write_stamps + first;
  uint32_t* read_stamps = shadow.read_stamps + first;
  uint32_t bad = 0;
  if (write) {
    for (size_t i = 0; i < bytes; ++i) {
      bad |= !view.ordered(write_stamps[i]) | !view.ordered(read_stamps[i]);
    }
  } else {
    for (size_t i = 0; i < bytes; ++i)
      bad |= !view.ordered(write_stamps[i]) | (write_stamps[i] == 0);
  }
  if (__builtin_expect(bad != 0, 0)) report_shared(view, first, bytes, write, pc);
  const uint32_t where = relative_pc(pc);
  if (write) {
    discard(first, bytes);
    for (size_t i = 0; i < bytes; ++i) write_stamps[i] = view.stamp;
    for (size_t i = 0; i < bytes; ++i) shadow.write_pcs[first + i] = where;
  } else {
    for (size_t i = 0; i < bytes; ++i) read_stamps[i] = view.merged(read_stamps[i]);
    for (size_t i = 0; i < bytes; ++i) shadow.read_pcs[first + i] = where;
    for (size_t chunk = first / kChunk; chunk <= (first + bytes - 1) / kChunk; ++chunk) {
      shadow.unread[chunk] = 0;
    }
  }
}

size_t shadow_index(const char* address) {
  return static_cast<size_t>(address - shared_memory.statics);
}

// ---- Global memory -----------------------------------------------------------------------------

// What an atomic published: accesses of its block that whoever acquires may take as ordered.
struct Release {
  uint64_t block_start;
  uint32_t thread;
  uint64_t others_before;  // accesses of any thread before this time
  uint64_t own_before;     // of the releasing thread
  uint64_t time;
};

// An atomic of this block that read what others released.
struct Acquire {
  std::vector<Release> releases;
  const Thread* thread;
  uint64_t atomic_time;
  uint64_t fence_time;  // of that thread's next fence; 0 while there is none
};

struct BlockStart {
  uint64_t time;
  int64_t block;
};

std::vector<BlockStart> block_starts;  // of this launch
std::unordered_map<const void*, std::vector<Release>> released;
std::vector<Acquire> acquires;
uint64_t fenced_before;  // every access of the block before this time was fenced by its own thread

const BlockStart& block_of(uint64_t time) {
  auto after = std::upper_bound(block_starts.begin(), block_starts.end(), time,
                                [](uint64_t t, const BlockStart& b) { return t < b.time; });
  return *--after;
}

bool visible(const Acquire& acquire) {
  const Thread& me = *current;
  if (acquire.thread == &me && me.fence_time > acquire.atomic_time) return true;
  if (acquire.fence_time != 0 && execution.barrier_time > acquire.fence_time) return true;
  return me.fence_barrier_time > acquire.atomic_time;
}

bool ordered_by_acquire(uint64_t earlier) {
  const uint64_t time = earlier >> kGlobalTimeShift;
  const uint64_t start = block_of(time).time;
  for (const Acquire& acquire : acquires) {
    if (!visible(acquire)) continue;
    for (const Release& release : acquire.releases) {
      if (release.block_start != start) continue;
      if (time < release.others_before) return true;
      if ((earlier & kFieldMask) == release.thread && time < release.own_before) return true;
    }
  }
  return false;
}

bool ordered_global(uint64_t earlier) {
  const uint64_t time = earlier >> kGlobalTimeShift;
  if (time < execution.launch_start) return true;
  if (time < execution.block_start) return ordered_by_acquire(earlier);
  if (time < execution.barrier_time) return true;
  const uint64_t difference = earlier ^ static_cast<uint64_t>(current->number);
  if ((difference & kFieldMask) == 0) return true;
  return (difference & (kWarpMask | kSeveralWarps)) == 0 && time < current->warp->barrier_time;
}

void report_global(const Buffer& buffer, const char* what, uint64_t earlier, uint32_t earlier_pc,
                   uintptr_t pc) {
  const uint64_t time = earlier >> kGlobalTimeShift;
  Access other = earlier_access(earlier_pc, earlier);
  const bool same_block = time >= execution.block_start;
  if (!same_block) other.block = block_of(time).block;
  report("global-race",
         std::string(what) + " of buffer '" + buffer.name + "', " +
             (same_block ? "with no barrier between"
                         : "with no fence and atomic between the two blocks"),
         here(pc), other);
}

void allocate_shadow(Buffer& buffer) {
  if (!buffer.write_stamps.empty()) return;
  const size_t elements = (buffer.end - buffer.begin) / buffer.element_bytes + 1;
  buffer.write_stamps.resize(elements);
  buffer.read_stamps.resize(elements);
  buffer.write_pcs.resize(elements);
  buffer.read_pcs.resize(elements);
}

uint64_t global_stamp() {
  return execution.now << kGlobalTimeShift | static_cast<uint64_t>(current->number);
}

// Keeps an unordered read of another block, which this block's write must answer for.
uint64_t merged_read(uint64_t earlier) {
  const uint64_t stamp = global_stamp();
  if (ordered_global(earlier)) return stamp;
  if (earlier >> kGlobalTimeShift < execution.block_start) return earlier;
  const bool same_warp = ((earlier ^ stamp) & (kWarpMask | kSeveralWarps)) == 0;
  return stamp | (same_warp ? kSeveralLanes : kSeveralWarps);
}

}  // namespace

void begin_launch_ordering() {
  block_starts.clear();
  released.clear();
  unread_copies.clear();
}

void begin_block_ordering() {
  execution.block_start = execution.barrier_time = ++execution.now;
  block_starts.push_back({execution.block_start, execution.block});
  acquires.clear();
  fenced_before = 0;
  forget_shared(shared_memory.dynamic, shared_memory.dynamic_end);
  for (const auto& array : shared_memory.arrays) forget_shared(array.begin, array.end);
}

void forget_shared(const char* begin, const char* end) {
  const size_t first = shadow_index(begin), count = end - begin;
  memset(shadow.write_stamps + first, 0, count * sizeof(uint32_t));
  memset(shadow.read_stamps + first, 0, count * sizeof(uint32_t));
  if (count == 0) return;
  const size_t first_chunk = first / kChunk, last_chunk = (first + count - 1) / kChunk;
  memset(shadow.unread + first_chunk, 0, (last_chunk - first_chunk + 1) * sizeof(uint32_t));
}

void end_block_ordering() {
  const auto give_up = [](const char* begin, const char* end) {
    if (begin < end) discard(shadow_index(begin), end - begin);
  };
  give_up(shared_memory.dynamic, shared_memory.dynamic_end);
  for (const auto& array : shared_memory.arrays) give_up(array.begin, array.end);
}

void append_unread_copies(std::string& json) {
  json += "\"unread_copies\":[";
  bool first = true;
  for (const auto& [pc, count] : unread_copies) {
    json += first ? "[" : ",[";
    first = false;
    json += std::to_string(pc) + "," + std::to_string(count) + "]";
  }
  json += "]";
}

void order_shared(const char* address, size_t bytes, bool write, uintptr_t pc) {
  const size_t first = shadow_index(address);
  switch (bytes) {
    case 2:
      return order_shared_bytes<2>(first, bytes, write, pc);
    case 4:
      return order_shared_bytes<4>(first, bytes, write, pc);
    case 8:
      return order_shared_bytes<8>(first, bytes, write, pc);
    case 16:
      return order_shared_bytes<16>(first, bytes, write, pc);
    default:
      return order_shared_bytes<0>(first, bytes, write, pc);
  }
}

void mark_in_flight(const char* address, size_t bytes) {
  std::fill_n(shadow.write_stamps + shadow_index(address), bytes, kInFlight);
}

void mark_landed(const char* address, size_t bytes, uintptr_t source_pc) {
  const size_t first = shadow_index(address);
  std::fill_n(shadow.write_stamps + first, bytes, shared_view().stamp);
  if (source_pc != 0) shadow.unread[first / kChunk] = relative_pc(source_pc);
}

void order_global(Buffer& buffer, const char* address, size_t bytes, bool write, uintptr_t pc) {
  if (!buffer.writable) return;
  allocate_shadow(buffer);
  const size_t first = (address - buffer.begin) / buffer.element_bytes;
  const size_t last = (address + bytes - 1 - buffer.begin) / buffer.element_bytes;
  for (size_t i = first; i <= last; ++i) {
    uint64_t& written = buffer.write_stamps[i];
    uint64_t& read = buffer.read_stamps[i];
    if (!ordered_global(written)) {
      report_global(buffer, write ? "two threads write the same element" : "read after the write",
                    written, buffer.write_pcs[i], pc);
    } else if (write && !ordered_global(read)) {
      report_global(buffer, "write after the read", read, buffer.read_pcs[i], pc);
    } else if (!write && written == 0 && !buffer.initialised) {
      report("uninitialised", "read of buffer '" + buffer.name + "' where nothing was written",
             here(pc));
    }
    if (write) {
      written = global_stamp();
      buffer.write_pcs[i] = relative_pc(pc);
    } else {
      const uint64_t merged = merged_read(read);
      if (merged != read) buffer.read_pcs[i] = relative_pc(pc);
      read = merged;
    }
  }
  if (write) current->unfenced_writes = true;
}

void order_atomic(Buffer& buffer, const char* address, size_t bytes, uintptr_t pc) {
  allocate_shadow(buffer);
  const size_t first = (address - buffer.begin) / buffer.element_bytes;
  const size_t last = (address + bytes - 1 - buffer.begin) / buffer.element_bytes;
  const uint64_t time = ++execution.now;
  for (size_t i = first; i <= last; ++i) {
    uint64_t& written = buffer.write_stamps[i];
    if ((written & kAtomic) == 0 && !ordered_global(written)) {
      report_global(buffer, "atomic on an element after a write", written, buffer.write_pcs[i], pc);
    } else if (!ordered_global(buffer.read_stamps[i])) {
      report_global(buffer, "atomic on an element after a read", buffer.read_stamps[i],
                    buffer.read_pcs[i], pc);
    } else if (written == 0 && !buffer.initialised) {
      report("uninitialised", "atomic on buffer '" + buffer.name + "' where nothing was written",
             here(pc));
    }
    written = global_stamp() | kAtomic;
    buffer.write_pcs[i] = relative_pc(pc);
  }
  std::vector<Release>& releases = released[address];
  if (!releases.empty()) acquires.push_back({releases, current, time, 0});
  // Whoever acquires this also acquires what this thread has acquired.
  std::vector<Release> passed_on;
  for (const Acquire& acquire : acquires) {
    if (!visible(acquire)) continue;
    passed_on.insert(passed_on.end(), acquire.releases.begin(), acquire.releases.end());
  }
  for (const Release& release : passed_on) {
    const bool present = std::any_of(releases.begin(), releases.end(), [&](const Release& r) {
      return r.block_start == release.block_start && r.time >= release.time;
    });
    if (!present) releases.push_back(release);
  }
  releases.push_back({execution.block_start, static_cast<uint32_t>(current->number),
                      std::max(current->fence_barrier_time, fenced_before), current->fence_time,
                      time});
  ++execution.now;  // so that what follows is later than the atomic
}

void order_fence() {
  current->fence_time = ++execution.now;
  current->fence_barrier_time = execution.barrier_time;
  current->unfenced_writes = false;
  for (Acquire& acquire : acquires) {
    if (acquire.thread == current && acquire.fence_time == 0) acquire.fence_time = execution.now;
  }
  ++execution.now;
}

void order_barrier() {
  execution.barrier_time = ++execution.now;
  const bool all_fenced = std::none_of(threads.begin(), threads.begin() + execution.thread_count,
                                       [](const Thread& t) { return t.unfenced_writes; });
  if (all_fenced) fenced_before = execution.barrier_time;
}

}  // namespace emulator
