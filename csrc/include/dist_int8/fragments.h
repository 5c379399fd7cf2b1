// Which element of a matrix each lane of a warp holds in a tensor-core instruction.
//
// Source: PTX ISA, "Matrix multiply-accumulate operation using mma instruction" (figures of
// m16n8k32 for 8-bit integers, m8n8k16, m16n8k16 and m16n8k8 for 16-bit floats) and "ldmatrix".
// A is [rows, k] row-major, B is [k, columns] (stored [columns, k], as a weight is), C and D are
// [rows, columns]. Element i of a fragment is the i-th in the order of registers, lowest bits
// first.
#pragma once

#include "dist_int8/numeric.h"

namespace dist_int8 {
namespace fragments {

constexpr int kLanes = 32;

struct Place {
  int row;
  int column;
};

// Accumulators of every m16n8 instruction, 4 per lane: rows group and group + 8, two columns each.
DIST_INT8_INLINE Place m16n8_c(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// m16n8k32, 8-bit: A has 16 elements per lane in 4 registers (row group, row group + 8, both again
// 16 columns on), B has 8 in 2 registers.
DIST_INT8_INLINE Place m16n8k32_a(int lane, int i) {
  return {lane / 4 + i / 4 % 2 * 8, i / 8 * 16 + lane % 4 * 4 + i % 4};
}
DIST_INT8_INLINE Place m16n8k32_b(int lane, int i) {
  return {i / 4 * 16 + lane % 4 * 4 + i % 4, lane / 4};
}

// m8n8k16, 8-bit: one register of A and of B, two of C.
DIST_INT8_INLINE Place m8n8k16_a(int lane, int i) { return {lane / 4, lane % 4 * 4 + i}; }
DIST_INT8_INLINE Place m8n8k16_b(int lane, int i) { return {lane % 4 * 4 + i, lane / 4}; }
DIST_INT8_INLINE Place m8n8_c(int lane, int i) { return {lane / 4, lane % 4 * 2 + i}; }

// m16n8k16, 16-bit: A has 8 elements per lane in 4 registers, B has 4 in 2 registers.
DIST_INT8_INLINE Place m16n8k16_a(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2};
}
DIST_INT8_INLINE Place m16n8k16_b(int lane, int i) {
  return {i / 2 * 8 + lane % 4 * 2 + i % 2, lane / 4};
}

// m16n8k8, 16-bit: A has 4 elements per lane in 2 registers, B has 2 in 1 register.
DIST_INT8_INLINE Place m16n8k8_a(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}
DIST_INT8_INLINE Place m16n8k8_b(int lane, int i) { return {lane % 4 * 2 + i % 2, lane / 4}; }

// ldmatrix: matrix j is 8 rows of 16 bytes, whose addresses lanes 8j .. 8j + 7 give. A lane
// receives one register of every matrix: two 16-bit elements (four bytes) of one row, or,
// transposed, two 16-bit elements of one column.
DIST_INT8_INLINE Place ldmatrix(int lane, int i) { return {lane / 4, lane % 4 * 2 + i}; }
DIST_INT8_INLINE Place ldmatrix_transposed(int lane, int i) { return {lane % 4 * 2 + i, lane / 4}; }

}  // namespace fragments
}  // namespace dist_int8
