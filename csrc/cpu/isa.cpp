#include "cpu/isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(FUSED_RESNET_X86)
#include <cpuid.h>
#endif

namespace fused_resnet::cpu {
namespace {

#if defined(FUSED_RESNET_X86)

struct CpuidResult {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidResult cpuid(unsigned leaf, unsigned subleaf) {
  CpuidResult r;
  // Leaves everything zero where the CPU does not know the leaf.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has_bit(unsigned word, int bit) { return (word >> bit) & 1; }

// XCR0: the register states that the operating system saves. The instruction is written out because
// its intrinsic needs the whole file compiled with -mxsave.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Bit numbers: Intel SDM volume 2A, CPUID; volume 1, 13.3 (XCR0).
CpuFeatures detect() {
  CpuFeatures features{Isa::kGeneric, false, false};
  const CpuidResult leaf1 = cpuid(1, 0);
  constexpr int kFma = 12, kOsxsave = 27, kAvx = 28, kF16c = 29;
  if (!has_bit(leaf1.ecx, kOsxsave)) return features;

  constexpr uint64_t kYmmStates = 0x6;        // SSE, AVX
  constexpr uint64_t kZmmStates = 0xe6;       // and opmask, upper halves of zmm0-15, zmm16-31
  constexpr uint64_t kTileStates = 3u << 17;  // XTILECFG, XTILEDATA
  const uint64_t states = saved_states();
  const CpuidResult leaf7 = cpuid(7, 0);
  const CpuidResult leaf7_1 = cpuid(7, 1);
  constexpr int kAvx2 = 5, kAvx512F = 16, kAvx512Dq = 17, kAvx512Bw = 30, kAvx512Vl = 31;
  constexpr int kAvx512Bf16 = 5, kAmxBf16 = 22, kAmxTile = 24;

  const bool avx2 = (states & kYmmStates) == kYmmStates && has_bit(leaf1.ecx, kAvx) &&
                    has_bit(leaf1.ecx, kFma) && has_bit(leaf1.ecx, kF16c) &&
                    has_bit(leaf7.ebx, kAvx2);
  if (!avx2) return features;
  features.highest = Isa::kAvx2;

  const bool avx512 = (states & kZmmStates) == kZmmStates && has_bit(leaf7.ebx, kAvx512F) &&
                      has_bit(leaf7.ebx, kAvx512Dq) && has_bit(leaf7.ebx, kAvx512Bw) &&
                      has_bit(leaf7.ebx, kAvx512Vl);
  if (!avx512) return features;
  features.highest = Isa::kAvx512;
  features.avx512_bf16 = has_bit(leaf7_1.eax, kAvx512Bf16);
  features.amx_bf16 = (states & kTileStates) == kTileStates && has_bit(leaf7.edx, kAmxTile) &&
                      has_bit(leaf7.edx, kAmxBf16);
  return features;
}

#else

CpuFeatures detect() { return {Isa::kGeneric, false, false}; }

#endif

constexpr Isa kLevels[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512};

// The available level of that name; `source` is the setting that an error message blames.
Isa parse_isa(const std::string& name, const std::string& source) {
  std::string available;
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument(source + "=" + name + ": expected a level that this CPU can run (" +
                              available + ")");
}

Isa initial_isa() {
  const char* name = std::getenv("FUSED_RESNET_ISA");
  if (name == nullptr || *name == '\0') return cpu_features().highest;
  return parse_isa(name, "FUSED_RESNET_ISA");
}

std::atomic<Isa>& level_in_use() {
  static std::atomic<Isa> level{initial_isa()};
  return level;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kLevels) {
    if (isa <= cpu_features().highest) isas.push_back(isa);
  }
  return isas;
}

Isa current_isa() { return level_in_use().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { level_in_use() = parse_isa(name, "isa"); }

bool amx_usable() {
#if defined(__linux__) && defined(FUSED_RESNET_X86)
  // Linux lets a process use the tiles' registers, which make every thread's saved state larger,
  // once it asks: Documentation/arch/x86/xstate.rst.
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  static const bool usable = cpu_features().amx_bf16 && cpu_features().avx512_bf16 &&
                             syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
  return usable;
#else
  return false;
#endif
}

}  // namespace fused_resnet::cpu
