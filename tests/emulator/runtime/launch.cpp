// Executes a grid: blocks one after another, the threads of a block as fibers that hand over to
// each other where CUDA threads would wait.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>

#include "context_switch.h"
#include "runtime.h"

#ifndef EMULATOR_UCONTEXT
// The System V ABI's callee-saved registers; the kernel code and this runtime leave the
// floating-point control words alone.
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

Thread* current;
Execution execution;
std::vector<Thread> threads;
std::vector<Warp> warps;
Counters counters;

bool Execution::in_argument(const char* p, size_t bytes) const {
  for (size_t i = 0; i < kernel->parameter_count; ++i) {
    const char* begin = static_cast<const char*>(arguments[i]);
    if (p >= begin && p + bytes <= begin + kernel->parameters[i].bytes) return true;
  }
  return false;
}

namespace {

void* main_context;
std::mt19937_64 random_bits;

// Threads that can run. A ring, so that both ends and, for the random schedule, any place are
// cheap.
class ReadyQueue {
 public:
  void clear() { begin_ = end_ = 0; }
  bool empty() const { return begin_ == end_; }
  void push(Thread* thread) { ring_[end_++ % kCapacity] = thread; }
  Thread* pop(Schedule schedule) {
    switch (schedule) {
      case Schedule::depth_first:
        return ring_[--end_ % kCapacity];
      case Schedule::fifo:
        return ring_[begin_++ % kCapacity];
      case Schedule::random:
        break;
    }
    const size_t chosen = begin_ + random_bits() % (end_ - begin_);
    std::swap(ring_[chosen % kCapacity], ring_[(end_ - 1) % kCapacity]);
    return ring_[--end_ % kCapacity];
  }

 private:
  static constexpr size_t kCapacity = 2 * kMaxThreads;
  Thread* ring_[kCapacity];
  size_t begin_ = 0, end_ = 0;
};
ReadyQueue ready;

// Stacks lie a guard page apart. Their tops are spread over the sets of the first-level cache: with
// the tops at one offset in a page, the threads of a warp would evict each other.
class Stacks {
 public:
  char* low(int thread) { return base() + thread * kStride + kGuard; }
  char* top(int thread) { return low(thread) + kStackBytes - thread * 1536 % 4096; }

 private:
  static constexpr size_t kGuard = 4096, kStride = kStackBytes + kGuard;
  char* base() {
    if (base_ != nullptr) return base_;
    void* memory = mmap(nullptr, kMaxThreads * kStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    base_ = static_cast<char*>(memory);
    for (unsigned t = 0; t < kMaxThreads; ++t) mprotect(base_ + t * kStride, kGuard, PROT_NONE);
    return base_;
  }
  char* base_ = nullptr;
};
Stacks stacks;

// "threads 0-4, 6-31"
std::string thread_list(const std::vector<int>& numbers) {
  std::string text = numbers.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    if (i > 0) text += ", ";
    text += std::to_string(numbers[i]);
    if (j > i) text += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return text;
}

[[noreturn]] void fail_deadlock() {
  std::map<std::pair<Operation, std::string>, std::vector<int>> waiting;
  for (int t = 0; t < execution.thread_count; ++t) {
    const Thread& thread = threads[t];
    if (!thread.finished) waiting[{thread.operation, place(thread.site)}].push_back(t);
  }
  std::string message = "no thread can go on:";
  for (const auto& [what, numbers] : waiting) {
    message += " " + thread_list(numbers) + " at " + operation_name(what.first) + " (" +
               what.second + ");";
  }
  message.back() = '.';
  fail("deadlock", message, {});
}

void release_barrier() {
  execution.at_barrier = 0;
  ++counters.barriers;
  if (execution.checked) {
    for (const Warp& warp : warps) flush_traffic(warp);
    order_barrier();
  }
  // Last to first, so that the depth-first schedule begins with thread 0.
  for (int t = execution.thread_count - 1; t >= 0; --t) {
    if (!threads[t].finished && &threads[t] != current) make_ready(threads[t]);
  }
}

// What follows the kernel's last instruction, on the fiber of that thread.
[[noreturn]] void finish_thread() {
  Thread& me = *current;
  if (!me.copies.empty()) check_copies_awaited(me);
  me.finished = true;
  --execution.alive;
  me.warp->alive &= ~(1u << me.lane);
  for (unsigned waiting = me.warp->waiting; waiting != 0; waiting &= waiting - 1) {
    const Thread& other = *me.warp->lanes[__builtin_ctz(waiting)];
    if (other.mask >> me.lane & 1u) {
      fail("divergent-collective",
           "thread " + std::to_string(me.number) + " returned from the kernel, but thread " +
               std::to_string(other.number) + " of its warp waits for it at " +
               operation_name(other.operation),
           {0, other.site, other.number, execution.block});
    }
  }
  if (execution.at_barrier > 0) {
    report("exit-before-barrier",
           "a thread returned from the kernel while others of its block wait at __syncthreads",
           {0, execution.barrier_site, me.number, execution.block});
    if (execution.at_barrier == execution.alive) release_barrier();
  }
  if (execution.alive == 0) leave_block();
  if (ready.empty()) fail_deadlock();
  current = ready.pop(execution.options.schedule);
  abandon_context(current->stack_pointer);
}

void thread_main() {
  execution.kernel->invoke(execution.arguments);
  finish_thread();
}

void begin_block(int64_t block) {
  const dim3 grid = execution.options.grid, extent = execution.options.block;
  execution.block = block;
  execution.block_index = {static_cast<unsigned>(block % grid.x),
                           static_cast<unsigned>(block / grid.x % grid.y),
                           static_cast<unsigned>(block / grid.x / grid.y)};
  execution.alive = execution.thread_count;
  execution.at_barrier = 0;
  ++counters.blocks;
  poison_shared_memory();
  if (execution.checked) begin_block_ordering();
  ready.clear();
  for (int t = execution.thread_count - 1; t >= 0; --t) {
    Thread& thread = threads[t];
    Warp& warp = warps[t / kWarpSize];
    if (t % kWarpSize == 0) warp.waiting = 0;
    thread.number = t;
    thread.lane = t % kWarpSize;
    thread.warp = &warp;
    thread.index = {t % extent.x, t / extent.x % extent.y, t / extent.x / extent.y};
    thread.stack_low = reinterpret_cast<uintptr_t>(stacks.low(t));
    thread.stack_pointer = make_context(stacks.low(t), stacks.top(t), thread_main);
    thread.finished = false;
    thread.operation = Operation::none;
    thread.copies.clear();
    thread.groups.clear();
    thread.open_copies = 0;
    thread.fence_time = thread.fence_barrier_time = 0;
    thread.unfenced_writes = false;
    warp.lanes[thread.lane] = &thread;
    make_ready(thread);
  }
  for (int w = 0; w < static_cast<int>(warps.size()); ++w) {
    const int lanes = std::min(kWarpSize, execution.thread_count - w * kWarpSize);
    warps[w].alive = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    warps[w].barrier_time = 0;
  }
}

}  // namespace

const char* operation_name(Operation operation) {
  switch (operation) {
    case Operation::barrier:
      return "__syncthreads";
    case Operation::warp_barrier:
      return "__syncwarp";
    case Operation::shuffle:
      return "a shuffle";
    case Operation::vote:
      return "a vote";
    case Operation::ldmatrix:
      return "ldmatrix";
    case Operation::mma:
      return "mma";
    case Operation::none:
      break;
  }
  return "nothing";
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return execution.block_index; }
dim3 block_extent() { return execution.options.block; }
dim3 grid_extent() { return execution.options.grid; }

Access here(uintptr_t pc, Site site) {
  return {pc, site, current == nullptr ? -1 : current->number, execution.block};
}

void make_ready(Thread& thread) { ready.push(&thread); }

// Hands over until somebody makes this thread ready and the schedule picks it.
void wait() {
  if (execution.out_of_time) fail_timeout(0);
  if (ready.empty()) fail_deadlock();
  Thread* me = current;
  Thread* next = ready.pop(execution.options.schedule);
  if (next == me) return;
  ++counters.switches;
  current = next;
  switch_context(&me->stack_pointer, next->stack_pointer);
}

void leave_block() { abandon_context(main_context); }

void barrier(Site site) {
  Thread& me = *current;
  me.operation = Operation::barrier;
  me.site = site;
  if (execution.at_barrier == 0) {
    execution.barrier_site = site;
  } else if (!same_site(site, execution.barrier_site)) {
    fail("divergent-barrier",
         "thread " + std::to_string(me.number) + " is at the __syncthreads of " + place(site) +
             " while others of its block wait at that of " + place(execution.barrier_site),
         here(0, site));
  }
  if (execution.at_barrier == 0 && execution.alive < execution.thread_count) {
    report("barrier-after-exit", "__syncthreads after threads of the block have returned",
           here(0, site));
  }
  if (++execution.at_barrier == execution.alive) {
    release_barrier();
  } else {
    wait();
  }
}

void launch(const Kernel& kernel, void** arguments, const LaunchOptions& options) {
  clear_findings();
  counters = {};
  execution.kernel = &kernel;
  execution.arguments = arguments;
  execution.options = options;
  ++execution.launch;
  execution.launch_start = execution.now;
  execution.checked = kernel.checked;
  execution.out_of_time = false;
  execution.block = -1;
  execution.thread_count = static_cast<int>(options.block.x * options.block.y * options.block.z);
  threads.resize(std::max<size_t>(threads.size(), execution.thread_count));
  warps.resize((execution.thread_count + kWarpSize - 1) / kWarpSize);
  random_bits.seed(options.seed);
  place_shared_memory(options);
  if (execution.checked) {
    begin_launch_ordering();
    begin_launch_traffic();
  }

  // Blocks run in ascending order, descending for fifo: kernels must not care.
  std::vector<int64_t> order(static_cast<size_t>(options.grid.x) * options.grid.y * options.grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (options.schedule == Schedule::fifo) std::reverse(order.begin(), order.end());
  if (options.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random_bits);

  catch_faults(options.cpu_seconds);
  for (const int64_t block : order) {
    begin_block(block);
    current = ready.pop(options.schedule);
    switch_context(&main_context, current->stack_pointer);
    current = nullptr;
    if (execution.checked) {
      for (const Warp& warp : warps) flush_traffic(warp);
      if (!failed()) end_block_ordering();
    }
    if (failed()) break;
  }
  release_faults();
  check_margins();
}

}  // namespace emulator
