// Instruction sets: which exist in this build, which this processor has, which one runs.
//
// A vector body (cpu/<op>_simd.cpp) is compiled once per instruction set, each time inside the
// namespace fastfuse::FASTFUSE_ISA with that set's flags. Nothing in it may have external weak
// linkage (no std:: templates, everything in anonymous namespaces), or the linker could pick the
// AVX-512 copy of a shared inline function for every processor.
#pragma once

#include <string>
#include <vector>

namespace fastfuse {

enum class Isa { portable, avx2, avx512 };

// Compiled in and supported by this processor, slowest first.
std::vector<Isa> supported_isas();

// The one in force: the fastest supported one, unless set_isa or FASTFUSE_ISA chose another.
Isa current_isa();

// Throws std::invalid_argument for an unknown or unsupported name.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace fastfuse
