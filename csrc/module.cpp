// fastfuse._C: what Python asks of the compiled module besides the ops, which register themselves
// with PyTorch's dispatcher (STABLE_TORCH_LIBRARY_IMPL in every host file) when it loads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/sizes.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastfuse's compiled kernels";
  m.attr("version") = FASTFUSE_VERSION;
  m.attr("compiler") = FASTFUSE_COMPILER;
  m.attr("build_type") = FASTFUSE_BUILD_TYPE;
  m.attr("torch_build_version") = FASTFUSE_TORCH_VERSION;
  m.attr("torch_target_version") = "2.10";

  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (fastfuse::Isa isa : fastfuse::supported_isas())
          names.emplace_back(fastfuse::isa_name(isa));
        return names;
      },
      "Instruction sets of this build that this processor has, slowest first.");
  m.def(
      "isa", [] { return std::string(fastfuse::isa_name(fastfuse::current_isa())); },
      "The instruction set in force; raises ValueError for a FASTFUSE_ISA that cannot run here.");
  m.def("set_isa", &fastfuse::set_isa, pybind11::arg("name"),
        "Choose the instruction set; raises ValueError for one that cannot run here.");
  m.def(
      "set_sizes",
      [](int64_t ring_bytes, int64_t depthwise_ring_bytes, int64_t stream_bytes, int64_t grain,
         int64_t depthwise_grain, int64_t mlp_bytes, int64_t mlp_parts) {
        fastfuse::sizes() = {ring_bytes, depthwise_ring_bytes, stream_bytes,
                             grain,      depthwise_grain,      mlp_bytes,
                             mlp_parts};
      },
      pybind11::kw_only(), pybind11::arg("ring_bytes"), pybind11::arg("depthwise_ring_bytes"),
      pybind11::arg("stream_bytes"), pybind11::arg("grain"), pybind11::arg("depthwise_grain"),
      pybind11::arg("mlp_bytes"), pybind11::arg("mlp_parts"),
      "Sizes of the kernels that depend on the machine; fastfuse/ops/policy.py explains them.");
  m.def(
      "sizes",
      [] {
        const fastfuse::Sizes& s = fastfuse::sizes();
        pybind11::dict found;
        found["ring_bytes"] = s.ring_bytes;
        found["depthwise_ring_bytes"] = s.depthwise_ring_bytes;
        found["stream_bytes"] = s.stream_bytes;
        found["grain"] = s.grain;
        found["depthwise_grain"] = s.depthwise_grain;
        found["mlp_bytes"] = s.mlp_bytes;
        found["mlp_parts"] = s.mlp_parts;
        return found;
      },
      "The sizes in force.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, int64_t bytes) {
        fastfuse::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      pybind11::arg("address"), pybind11::arg("bytes"),
      "Ask for huge pages for fresh memory that was not touched yet; only a hint.");
}
