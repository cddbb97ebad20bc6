// What `make sanitize` runs: each function draws so many problems for each kernel of one level,
// prints a line for each kernel, and returns how many results were wrong.
#pragma once

#include "cpu/isa.h"

namespace fused_resnet::sanitize {

int run_convs(cpu::Isa isa, int problems);
int run_stems(cpu::Isa isa, int problems);
int run_pools(cpu::Isa isa, int problems);
int run_elementwise(cpu::Isa isa, int problems);
int run_programs(cpu::Isa isa, int problems);

}  // namespace fused_resnet::sanitize
