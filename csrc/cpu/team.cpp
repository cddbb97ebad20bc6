#include "cpu/team.h"

#include <thread>

#include "cpu/isa.h"

#ifdef FUSED_RESNET_X86
#include <immintrin.h>
#endif

namespace fused_resnet::cpu {

namespace {

// Polls before a waiting thread offers its core to others: a few tens of microseconds, longer than
// a team waits where every thread has a core of its own.
constexpr int kPolls = 4096;

void relax() {
#ifdef FUSED_RESNET_X86
  _mm_pause();
#endif
}

}  // namespace

void Barrier::wait(int size) {
  const int generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int polls = 0; generation_.load(std::memory_order_acquire) == generation; ++polls) {
    if (polls < kPolls) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace fused_resnet::cpu
