// Threads that persist between calls: those of torch's OpenMP where it has some, else a small pool of our own.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Runs task(data, i, worker) for i in 0 .. num_tasks - 1 on up to `threads` threads, the caller among them, and returns
// when all are done. `worker` is below `threads`, and one thread's for the length of the call. Threads take tasks in
// ascending order, each the next one as soon as it is free. Tasks must not throw.
//
// They run with the caller's rounding mode and treatment of denormal numbers. A call from inside a task, or while
// another thread's call is under way, runs on the calling thread alone. Safe after fork(): a child starts its own threads.
void moesaic_parallel(int threads, int64_t num_tasks, void (*task)(void* data, int64_t index, int worker), void* data);

#ifdef __cplusplus
}
#endif
