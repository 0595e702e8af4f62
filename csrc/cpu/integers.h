// Integer functions of host functions and vector bodies. Bodies may not use std::min and std::max:
// these are templates, of weak linkage (see isa_list.h).
#pragma once

#include <cstdint>

namespace fastfuse {
namespace {

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace
}  // namespace fastfuse
