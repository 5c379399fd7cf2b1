// The threads that kernels run in.
//
// Every thread that calls kernels has helpers of its own, which end with it. Tasks are claimed:
//
//   tasks   [ 0  1  2  3 | 4  5  6  7 | 8  9 10 11 ]     each thread has a range of its own and
//             ->        <- ->        <- ->        <-      claims from its front; one that has no
//             caller       helper 1     helper 2          more claims from the back of another's
//
// so the caller waits only for tasks that a helper has begun, never for a helper that has not woken
// up or waits for its core. Waiting is spinning for some microseconds, then sleeping, which frees
// the core for whoever is waited for. While threads lose their cores to other processes, fewer are
// used (contention_cpu.h). Which thread runs a task changes no result: kernels split rows or
// output features only.
#pragma once

#include <cstdint>

namespace dist_int8 {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body(begin, end, context) for ranges that cover [begin, end), of `grain` items or more but
// for the last ones, in the calling thread and num_threads - 1 helpers. Within a body it runs in
// the calling thread alone. The first exception of a body is thrown again, after all have ended.
void run_parallel(int64_t num_threads, int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                  void* context);

}  // namespace dist_int8
