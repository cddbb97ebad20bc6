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

void Meeting::wait(int size) {
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

// Threads between the same two passages see the same generation. What an earlier one has left
// behind is not of these units: whoever comes first, owner or not, puts the whole share in its
// place. Data is handed over at the barrier, so claims need no order of their own.
int64_t Meeting::claim_from(int owner, bool own, int64_t units, int size) {
  constexpr int kBits = 24;
  constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  const auto generation = static_cast<uint16_t>(generation_.load(std::memory_order_relaxed));
  std::atomic<uint64_t>& packed = left_[static_cast<size_t>(owner)].packed;
  uint64_t seen = packed.load(std::memory_order_relaxed);
  while (true) {
    auto begin = static_cast<int64_t>(seen >> kBits & kMask);
    auto end = static_cast<int64_t>(seen & kMask);
    if (seen >> (2 * kBits) != generation) {
      begin = units * owner / size;
      end = units * (owner + 1) / size;
    }
    if (begin >= end) return -1;
    const int64_t unit = own ? begin++ : --end;
    const uint64_t left = uint64_t{generation} << (2 * kBits) |
                          static_cast<uint64_t>(begin) << kBits | static_cast<uint64_t>(end);
    if (packed.compare_exchange_weak(seen, left, std::memory_order_relaxed)) return unit;
  }
}

int64_t Meeting::claim(int64_t units, int rank, int size) {
  for (int i = 0; i < size; ++i) {
    const int64_t unit = claim_from((rank + i) % size, i == 0, units, size);
    if (unit >= 0) return unit;
  }
  return -1;
}

}  // namespace fused_resnet::cpu
