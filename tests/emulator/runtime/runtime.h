// The emulator's inside: threads, warps, the block being executed, and what its parts call each
// other.
//
//   launch.cpp       executes a grid: fibers, schedules, barriers, failure
//   collectives.cpp  warp shuffles, votes, ldmatrix, mma
//   copies.cpp       cp.async
//   buffers.cpp      global memory between guard pages, shared memory
//   faults.cpp       SIGSEGV and the time limit, turned into findings
//   ordering.cpp     races, in-flight and uninitialised reads (checked build)
//   traffic.cpp      bytes, sectors and bank conflicts (checked build)
//   callbacks.cpp    the __tsan_* functions that feed both
//   interface.cpp    the C functions that Python calls
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../emulator.h"
#include "registry.h"

namespace emulator {

constexpr int kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kMaxDynamicShared = 228 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kStaticRoom = 2 * kMaxStaticShared;  // red zones included
constexpr size_t kSharedRoom = kStaticRoom + kPage + kMaxDynamicShared;
constexpr size_t kStackBytes = 64 << 10;

// Address of the instruction that called into the runtime.
#define EMULATOR_CALLER (reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1)

// ---- Findings ----------------------------------------------------------------------------------

// One side of a finding. `pc` is resolved to a line by the reader; `site`, where known, needs no
// debug information. `thread` is -1 where it is not one thread.
struct Access {
  uintptr_t pc = 0;
  Site site = {nullptr, 0};
  int thread = -1;
  int64_t block = -1;
};

inline bool same_site(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}
std::string place(Site site);  // "conv.cuh:12"

// Records a finding, once per kind and pair of places, and goes on.
void report(const char* kind, const std::string& message, Access access, Access other = {});
// Records a finding and ends the launch: never returns to the kernel.
[[noreturn]] void fail(const char* kind, std::string message, Access access);

void clear_findings();
bool failed();
void append_findings(std::string& json);
void append_quoted(std::string& json, const std::string& text);

// ---- Execution ---------------------------------------------------------------------------------

enum class Operation : uint8_t { none, barrier, warp_barrier, shuffle, vote, ldmatrix, mma };
const char* operation_name(Operation operation);

struct PendingCopy {
  char* shared;
  const char* global;
  int bytes;
  bool valid;
  uintptr_t pc;
};

struct Warp;

struct Thread {
  void* stack_pointer;
  uintptr_t stack_low;
  uint3 index;
  int number;  // within the block
  int lane;
  Warp* warp;
  bool finished;

  // What it waits for.
  Operation operation;
  unsigned mask;
  Site site;
  void* operands;

  // cp.async: closed groups, oldest first, as counts of entries at the front of `copies`.
  std::vector<PendingCopy> copies;
  std::vector<int> groups;
  int open_copies;

  // Memory order between blocks: when it last fenced, the last barrier before that, and whether it
  // has written global memory since.
  uint64_t fence_time;
  uint64_t fence_barrier_time;
  bool unfenced_writes;
};

struct Warp {
  Thread* lanes[kWarpSize];
  unsigned alive;
  unsigned waiting;       // lanes at a collective
  uint64_t barrier_time;  // last __syncwarp of all lanes
};

enum class Schedule { depth_first, fifo, random };
enum class Placement { right, left };

struct LaunchOptions {
  dim3 grid, block;
  size_t shared_bytes;
  Schedule schedule;
  uint64_t seed;
  Placement placement;
  double cpu_seconds;
};

// The launch in progress. `now` counts synchronising events and never restarts, so that a time
// stamp also tells the block and the launch.
struct Execution {
  const Kernel* kernel;
  void** arguments;
  LaunchOptions options;
  uint64_t launch;  // its number
  bool checked;

  uint3 block_index;
  int64_t block;  // linear
  int thread_count, alive, at_barrier;
  Site barrier_site;

  uint64_t now = 1;
  uint64_t launch_start, block_start;
  uint64_t barrier_time;  // last barrier of this block

  uintptr_t image_begin, image_end;  // the kernel library in memory
  uintptr_t caller;                  // who called the runtime function that touches memory
  volatile bool out_of_time;

  bool in_image(uintptr_t pc) const { return pc >= image_begin && pc < image_end; }
  // Whether all these bytes are of one argument of the launch.
  bool in_argument(const char* p, size_t bytes) const;
};

extern Thread* current;
extern Execution execution;
extern std::vector<Thread> threads;
extern std::vector<Warp> warps;

void launch(const Kernel& kernel, void** arguments, const LaunchOptions& options);
void make_ready(Thread& thread);
void wait();
Access here(uintptr_t pc, Site site = {nullptr, 0});
// Ends the block from a place that is not a call of the kernel's, such as a signal.
[[noreturn]] void leave_block();
[[noreturn]] void fail_timeout(uintptr_t pc);

// ---- Memory ------------------------------------------------------------------------------------

// Global memory of one launch argument: [begin, end) against a guard on the side of its placement,
// and guards of many megabytes around that.
struct Buffer {
  int64_t id;
  std::string name;
  char *mapping, *mapping_end;
  char *begin, *end;
  bool writable;
  bool initialised;
  int element_bytes;

  // Checked build, allocated at first use: one entry per element, see ordering.cpp.
  std::vector<uint64_t> write_stamps, read_stamps;
  std::vector<uint32_t> write_pcs, read_pcs;

  // Traffic of the launch `traffic_launch`.
  uint64_t traffic_launch = 0;
  std::vector<uint8_t> touched;  // per byte: bit 0 read, bit 1 written
  uint64_t bytes[2];             // read, written
  uint64_t accesses[2][6];       // by width: 1, 2, 4, 8, 16 bytes, other
};

// `alignment` holds for `begin`; contents are undefined unless `source` is given.
Buffer* create_buffer(const char* name, const void* source, size_t bytes, int element_bytes,
                      size_t alignment, Placement placement, bool writable);
void destroy_buffer(Buffer* buffer);
// Makes a buffer writable or not, for the kernel.
void protect_buffer(Buffer& buffer, bool writable);
// Looks for writes between a buffer and its guard.
void check_margins();

// The buffer whose mapping, guards included, holds the address; else null.
Buffer* find_buffer(const void* address);
const std::vector<Buffer*>& all_buffers();
std::string describe_address(const void* address);

// Shared memory of the running block: `dynamic` and the static arrays lie in one arena.
struct SharedMemory {
  char *arena, *arena_end;  // guards included
  char *dynamic, *dynamic_end;
  char* statics;
  size_t static_bytes;
  struct Array {
    char *begin, *end;
  };
  std::vector<Array> arrays;
};
extern SharedMemory shared_memory;

void place_shared_memory(const LaunchOptions& options);
void poison_shared_memory();
inline bool in_shared_arena(const void* address) {
  const char* p = static_cast<const char*>(address);
  return p >= shared_memory.arena && p < shared_memory.arena_end;
}
// Whether [address, address + bytes) lies in one shared object of this kernel.
bool in_shared_object(const void* address, size_t bytes);

void check_copies_awaited(Thread& thread);

// ---- Faults ------------------------------------------------------------------------------------

void catch_faults(double cpu_seconds);
void release_faults();

// ---- Checked build -----------------------------------------------------------------------------

// Every access of the kernel to memory goes through here before it happens.
void check_access(const void* address, size_t bytes, bool write, uintptr_t pc);

// ordering.cpp
void begin_launch_ordering();
void begin_block_ordering();
void end_block_ordering();
void append_unread_copies(std::string& json);
void forget_shared(const char* begin, const char* end);
void order_shared(const char* address, size_t bytes, bool write, uintptr_t pc);
void mark_in_flight(const char* address, size_t bytes);
// `source_pc` is the copy's, or 0 if it brought zeros, which nobody has to read.
void mark_landed(const char* address, size_t bytes, uintptr_t source_pc);
void order_global(Buffer& buffer, const char* address, size_t bytes, bool write, uintptr_t pc);
void order_atomic(Buffer& buffer, const char* address, size_t bytes, uintptr_t pc);
void order_fence();
void order_barrier();

// traffic.cpp
enum class Traffic : uint8_t {
  shared_load,
  shared_store,
  cp_async,
  ldmatrix,
  global_load,
  global_store,
};
void begin_launch_traffic();
// One lane's part of a warp instruction; the runtime puts the lanes together.
void count_lane(Traffic kind, const char* address, size_t bytes, uintptr_t pc);
void count_bytes(Buffer& buffer, const char* address, size_t bytes, bool write);
void count_ldmatrix(const char* const (&rows)[kWarpSize], int matrices, uintptr_t pc);
// Counts what the warp has done since the last flush; all its lanes must have done it.
void flush_traffic(const Warp& warp);
void append_traffic(std::string& json);

// Totals that both builds keep.
struct Counters {
  uint64_t mma[3], ldmatrix, ldmatrix_wavefronts, ldmatrix_matrices;
  uint64_t cp_async, barriers, warp_collectives, switches, blocks;
};
extern Counters counters;

}  // namespace emulator
