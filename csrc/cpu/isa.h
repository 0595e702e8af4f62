// Instruction sets: which this processor has and which one runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// Compiled in and supported by this processor, slowest first.
std::vector<Isa> supported_isas();

// The one in force: the fastest supported one, unless set_isa or FASTFUSE_ISA chose another.
Isa current_isa();

// The one whose kernels a dtype takes when that is in force (see FASTFUSE_FOR_EACH_DTYPE).
Isa isa_of(Dtype dtype);

// Throws std::invalid_argument for an unknown or unsupported name.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace fastfuse
