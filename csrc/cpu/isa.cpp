#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastfuse {
namespace {

namespace processor_has {
[[maybe_unused]] bool portable() { return true; }
#ifdef FASTFUSE_X86
[[maybe_unused]] bool avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#ifdef FASTFUSE_EMULATE_AVX512
[[maybe_unused]] bool avx512() { return avx2(); }
[[maybe_unused]] bool avx512_bf16() { return avx2(); }
#else
[[maybe_unused]] bool avx512() {
  return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif
}  // namespace processor_has

Isa parse(const std::string& name, const char* who) {
  std::string names;
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument(std::string(who) +
                              ": expected an instruction set of this processor and build (" +
                              names + "); got '" + name + "'");
}

Isa initial_isa() {
  const char* forced = std::getenv("FASTFUSE_ISA");
  if (forced && *forced) return parse(forced, "FASTFUSE_ISA");
  const std::vector<Isa> isas = supported_isas();
  if (isas.empty()) throw std::runtime_error("built for none of this processor's instruction sets");
  return isas.back();
}

std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
#define FASTFUSE_ISA_NAME(isa) \
  case Isa::isa:               \
    return #isa;
    FASTFUSE_FOR_EACH_ISA(FASTFUSE_ISA_NAME)
#undef FASTFUSE_ISA_NAME
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
#define FASTFUSE_ADD_SUPPORTED(isa) \
  if (processor_has::isa()) isas.push_back(Isa::isa);
  FASTFUSE_FOR_EACH_ISA(FASTFUSE_ADD_SUPPORTED)
#undef FASTFUSE_ADD_SUPPORTED
  return isas;
}

Isa current_isa() { return chosen_isa().load(std::memory_order_relaxed); }

Isa isa_of([[maybe_unused]] Dtype dtype) {
  const Isa isa = current_isa();
#ifdef FASTFUSE_HAS_AVX512_BF16
  if (isa == Isa::avx512_bf16 && dtype != kBFloat16) return Isa::avx512;
#endif
  return isa;
}

void set_isa(const std::string& name) {
  chosen_isa().store(parse(name, "set_isa"), std::memory_order_relaxed);
}

}  // namespace fastfuse
