// Which instructions the CPU offers, and the level of them that the kernels use.
#pragma once

#include <string>
#include <vector>

// Defined where the kernels of the levels above generic are compiled, see setup.py.
#if defined(__x86_64__)
#define FUSED_RESNET_X86 1
#endif

namespace fused_resnet::cpu {

// Each level includes those below it.
enum class Isa {
  kGeneric,  // what the compiler assumes of every CPU of this architecture
  kAvx2,     // AVX2, FMA, F16C
  kAvx512,   // AVX-512 F, BW, VL, DQ
};

struct CpuFeatures {
  Isa highest;
  // Extensions that single kernels ask for beyond their level.
  bool avx512_bf16;
  bool amx_bf16;
};

// What both the CPU and the operating system (which saves the registers) support.
const CpuFeatures& cpu_features();

// Whether kernels may use AMX for bf16: the CPU has it, and the system lets this process.
bool amx_usable();

const char* isa_name(Isa isa);

// The levels this CPU can run, lowest first.
std::vector<Isa> available_isas();

// The level in use: the highest available, or the one that FUSED_RESNET_ISA names.
// Throws std::invalid_argument if that names no level, or one that this CPU cannot run.
Isa current_isa();

// Makes `name` the level in use. Throws as current_isa() does.
void set_isa(const std::string& name);

}  // namespace fused_resnet::cpu
