// Instruction sets that a build is made for, and kernel tables for each.
//
// A vector body (cpu/<op>_simd.cpp) is compiled once per instruction set, each time inside the
// namespace fastfuse::FASTFUSE_ISA with that set's flags. Nothing in it may have external weak
// linkage (no std:: templates, everything in anonymous namespaces), or the linker could pick the
// AVX-512 copy of a shared inline function for every processor.
#pragma once

#include "fastfuse_isas.h"  // FASTFUSE_FOR_EACH_ISA(DO, ...), slowest first; CMakeLists.txt writes it

namespace fastfuse {

// Tables have an entry for every dtype, by KERNEL(S, ...). AVX-512's bfloat16 instructions serve
// bfloat16 alone: the other types' entries of that set are empty, and plain AVX-512's are taken.
#if defined(__AVX512BF16__)
#define FASTFUSE_FOR_EACH_DTYPE(KERNEL, ...) \
  {}, {}, KERNEL(bfloat16, ##__VA_ARGS__), {}
#else
#define FASTFUSE_FOR_EACH_DTYPE(KERNEL, ...)                                                    \
  KERNEL(double, ##__VA_ARGS__), KERNEL(float, ##__VA_ARGS__), KERNEL(bfloat16, ##__VA_ARGS__), \
      KERNEL(float16, ##__VA_ARGS__)
#endif

#define FASTFUSE_ISA_NAME(isa) isa,
enum class Isa { FASTFUSE_FOR_EACH_ISA(FASTFUSE_ISA_NAME) };
#undef FASTFUSE_ISA_NAME

// Declares the table `name` that every instruction set's vector body defines, and name_of(isa).
#define FASTFUSE_DECLARE_KERNELS(Type, name)                        \
  FASTFUSE_FOR_EACH_ISA(FASTFUSE_DECLARE_TABLE, Type, name)         \
  [[maybe_unused]] static const Type& name##_of(Isa wanted) {       \
    switch (wanted) { FASTFUSE_FOR_EACH_ISA(FASTFUSE_TABLE, name) } \
    __builtin_unreachable();                                        \
  }
#define FASTFUSE_DECLARE_TABLE(isa, Type, name) \
  namespace isa {                               \
  extern const Type name;                       \
  }
#define FASTFUSE_TABLE(isa, name) \
  case Isa::isa:                  \
    return isa::name;

}  // namespace fastfuse
