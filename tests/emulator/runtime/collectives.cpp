// Warp collectives: each lane leaves its operands and waits; the last one to arrive does the work
// for all, so that what the lanes exchange cannot depend on their order.
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "runtime.h"

namespace emulator {
namespace {

typedef float Float8 __attribute__((vector_size(32)));

// Waits for all lanes of `mask` at the same place. True for the lane that came last: it works, then
// calls depart().
bool arrive(Operation operation, unsigned mask, void* operands, Site site) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  me.operation = operation;
  me.mask = mask;
  me.site = site;
  me.operands = operands;
  if ((mask >> me.lane & 1u) == 0) {
    fail("divergent-collective",
         std::string("a lane that its mask leaves out executes ") + operation_name(operation),
         here(0, site));
  }
  if ((mask & ~warp.alive) != 0) {
    fail("divergent-collective",
         std::string(operation_name(operation)) +
             " waits for lanes that have returned or do not exist: the mask has " +
             std::to_string(__builtin_popcount(mask)) + " lanes, the warp " +
             std::to_string(__builtin_popcount(warp.alive)),
         here(0, site));
  }
  if (const unsigned there = warp.waiting & mask) {
    const Thread& first = *warp.lanes[__builtin_ctz(there)];
    if (first.operation != operation || first.mask != mask || !same_site(first.site, site)) {
      fail("divergent-collective",
           "thread " + std::to_string(me.number) + " is at " + operation_name(operation) +
               " while thread " + std::to_string(first.number) + " of its warp is at " +
               operation_name(first.operation) + " (" + place(first.site) + ")",
           here(0, site));
    }
  }
  warp.waiting |= 1u << me.lane;
  if ((warp.waiting & mask) != mask) {
    wait();
    return false;
  }
  warp.waiting &= ~mask;
  ++counters.warp_collectives;
  return true;
}

void depart(unsigned mask) {
  Warp& warp = *current->warp;
  // Last to first, so that the depth-first schedule begins with lane 0.
  for (unsigned lanes = mask & ~(1u << current->lane); lanes != 0;) {
    const int lane = 31 - __builtin_clz(lanes);
    lanes &= ~(1u << lane);
    make_ready(*warp.lanes[lane]);
  }
  // All accesses before a collective of the whole warp are done, so their lanes can be put
  // together.
  if (execution.checked && mask == ~0u) flush_traffic(warp);
}

// ---- Shuffles and votes ------------------------------------------------------------------------

struct ShuffleOperands {
  uint32_t value;
  unsigned lane;  // index, delta or lane mask, by kind
  uint32_t result;
};

struct VoteOperands {
  bool predicate;
  unsigned result;
};

int source_lane(Shuffle kind, int lane, unsigned operand) {
  switch (kind) {
    case Shuffle::index:
      return static_cast<int>(operand % kWarpSize);
    case Shuffle::up:
      return lane >= static_cast<int>(operand) ? lane - static_cast<int>(operand) : lane;
    case Shuffle::down:
      return lane + static_cast<int>(operand) < kWarpSize ? lane + static_cast<int>(operand) : lane;
    case Shuffle::exclusive_or:
      return (lane ^ static_cast<int>(operand)) % kWarpSize;
  }
  return lane;
}

// ---- mma ---------------------------------------------------------------------------------------

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

void widen_half(const uint16_t* from, float* to, int count) {
#ifdef __F16C__
  for (int i = 0; i < count; i += 8) {
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#else
  for (int i = 0; i < count; ++i) to[i] = to_float(__half{from[i]});
#endif
}

void widen(MmaType type, const uint16_t* from, float* to, int count) {
  if (type == MmaType::f16) {
    widen_half(from, to, count);
  } else {
    for (int i = 0; i < count; ++i) to[i] = bit_cast<float>(uint32_t{from[i]} << 16);
  }
}

// The tensor core ignores the 13 low bits of a tf32 operand.
float truncate_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

// Row fragment i of the warp as a matrix a[16][K]; see device.h for the layout of the registers.
template <int K>
void gather_a(MmaType type, const Warp& warp, int i, float (&a)[16][K]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const uint32_t* r = static_cast<MmaOperands*>(warp.lanes[lane]->operands)->a + 4 * i;
    const int g = lane / 4, t = lane % 4;
    if constexpr (K == 8) {
      for (int q = 0; q < 4; ++q) a[g + 8 * (q % 2)][t + 4 * (q / 2)] = truncate_tf32(r[q]);
    } else {
      float wide[8];
      uint16_t narrow[8];
      memcpy(narrow, r, sizeof narrow);
      widen(type, narrow, wide, 8);
      for (int q = 0; q < 4; ++q) {
        memcpy(&a[g + 8 * (q % 2)][2 * t + 8 * (q / 2)], wide + 2 * q, 2 * sizeof(float));
      }
    }
  }
}

// Column fragment j of the warp as a matrix b[K][8].
template <int K>
void gather_b(MmaType type, const Warp& warp, int j, float (&b)[K][8]) {
  alignas(32) uint16_t narrow[K][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const uint32_t* r = static_cast<MmaOperands*>(warp.lanes[lane]->operands)->b + 2 * j;
    const int g = lane / 4, t = lane % 4;
    for (int q = 0; q < 2; ++q) {
      if constexpr (K == 8) {
        b[t + 4 * q][g] = truncate_tf32(r[q]);
      } else {
        narrow[2 * t + 8 * q][g] = static_cast<uint16_t>(r[q]);
        narrow[2 * t + 8 * q + 1][g] = static_cast<uint16_t>(r[q] >> 16);
      }
    }
  }
  if constexpr (K == 16) widen(type, &narrow[0][0], &b[0][0], K * 8);
}

// d[16][8] += a[16][K] b[K][8]: the K products are summed first, in fp32, then added to d.
template <int K>
void multiply(const Warp& warp, int tile, const float (&a)[16][K], const float (&b)[K][8]) {
  Float8 sum[16] = {};
  for (int k = 0; k < K; ++k) {
    Float8 row;
    memcpy(&row, b[k], sizeof row);
    for (int m = 0; m < 16; ++m) sum[m] += a[m][k] * row;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* d = static_cast<MmaOperands*>(warp.lanes[lane]->operands)->d + 4 * tile;
    const float* low = reinterpret_cast<const float*>(&sum[lane / 4]) + lane % 4 * 2;
    const float* high = reinterpret_cast<const float*>(&sum[lane / 4 + 8]) + lane % 4 * 2;
    d[0] += low[0];
    d[1] += low[1];
    d[2] += high[0];
    d[3] += high[1];
  }
}

constexpr int kMaxColumnFragments = 32;

template <int K>
void multiply_tiles(MmaType type, const Warp& warp, int mt, int nt) {
  alignas(32) float a[16][K];
  alignas(32) float b[kMaxColumnFragments][K][8];
  for (int j = 0; j < nt; ++j) gather_b<K>(type, warp, j, b[j]);
  for (int i = 0; i < mt; ++i) {
    gather_a<K>(type, warp, i, a);
    for (int j = 0; j < nt; ++j) multiply<K>(warp, i * nt + j, a, b[j]);
  }
}

// ---- ldmatrix ----------------------------------------------------------------------------------

struct MatrixOperands {
  uint32_t* registers;
  const char* row;
  uintptr_t pc;
};

void read_matrices(const Warp& warp, int count, bool transposed, Site site) {
  const char* rows[kWarpSize] = {};
  for (int lane = 0; lane < 8 * count; ++lane) {
    const auto& operands = *static_cast<MatrixOperands*>(warp.lanes[lane]->operands);
    rows[lane] = operands.row;
    if (reinterpret_cast<uintptr_t>(operands.row) % 16 != 0) {
      fail("misaligned",
           "ldmatrix row of thread " + std::to_string(warp.lanes[lane]->number) +
               " is not 16-byte aligned",
           {operands.pc, site, warp.lanes[lane]->number, execution.block});
    }
    if (!in_shared_object(operands.row, 16)) {
      fail("out-of-bounds",
           "ldmatrix row of thread " + std::to_string(warp.lanes[lane]->number) + ": " +
               describe_address(operands.row),
           {operands.pc, site, warp.lanes[lane]->number, execution.block});
    }
  }
  if (execution.checked) {
    Thread* last = current;
    for (int lane = 0; lane < 8 * count; ++lane) {
      const auto& operands = *static_cast<MatrixOperands*>(warp.lanes[lane]->operands);
      current = warp.lanes[lane];
      order_shared(operands.row, 16, false, operands.pc);
    }
    current = last;
  }
  count_ldmatrix(rows, count, static_cast<MatrixOperands*>(current->operands)->pc);
  for (int m = 0; m < count; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) memcpy(matrix[row], rows[m * 8 + row], 16);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<MatrixOperands*>(warp.lanes[lane]->operands)->registers[m] = low | high << 16;
    }
  }
}

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  if (!arrive(Operation::warp_barrier, mask, nullptr, site)) return;
  if (mask == ~0u) current->warp->barrier_time = ++execution.now;
  depart(mask);
}

uint32_t shuffle(Shuffle kind, unsigned mask, uint32_t value, unsigned lane, Site site) {
  ShuffleOperands operands{value, lane, value};
  if (arrive(Operation::shuffle, mask, &operands, site)) {
    const Warp& warp = *current->warp;
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int to = __builtin_ctz(lanes);
      auto& receiver = *static_cast<ShuffleOperands*>(warp.lanes[to]->operands);
      const int from = source_lane(kind, to, receiver.lane);
      if ((mask >> from & 1u) == 0) {
        fail("divergent-collective", "a shuffle reads a lane that its mask leaves out",
             here(0, site));
      }
      receiver.result = static_cast<ShuffleOperands*>(warp.lanes[from]->operands)->value;
    }
    depart(mask);
  }
  return operands.result;
}

unsigned vote(Vote kind, unsigned mask, bool predicate, Site site) {
  VoteOperands operands{predicate, 0};
  if (arrive(Operation::vote, mask, &operands, site)) {
    const Warp& warp = *current->warp;
    unsigned ballot = 0;
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (static_cast<VoteOperands*>(warp.lanes[lane]->operands)->predicate) ballot |= 1u << lane;
    }
    const unsigned result = kind == Vote::ballot ? ballot
                            : kind == Vote::any  ? ballot != 0
                                                 : ballot == mask;
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
      static_cast<VoteOperands*>(warp.lanes[__builtin_ctz(lanes)]->operands)->result = result;
    }
    depart(mask);
  }
  return operands.result;
}

void load_matrices(uint32_t* registers, const void* shared, int count, bool transposed, Site site) {
  MatrixOperands operands{registers, static_cast<const char*>(shared), EMULATOR_CALLER};
  if (!arrive(Operation::ldmatrix, ~0u, &operands, site)) return;
  read_matrices(*current->warp, count, transposed, site);
  depart(~0u);
}

void mma(MmaType type, int mt, int nt, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaOperands operands{d, a, b};
  if (!arrive(Operation::mma, ~0u, &operands, site)) return;
  if (nt > kMaxColumnFragments) fail("unsupported", "mma_tile with over 32 columns", here(0, site));
  counters.mma[static_cast<int>(type)] += static_cast<uint64_t>(mt) * nt;
  if (type == MmaType::tf32) {
    multiply_tiles<8>(type, *current->warp, mt, nt);
  } else {
    multiply_tiles<16>(type, *current->warp, mt, nt);
  }
  depart(~0u);
}

}  // namespace emulator
