// One chunk of the one rule on a CPU: the closed form of nestling/ops/chunk_rule.py, whose torch version is the
// specification. Every problem (row, head, memory) runs in the cache of one core from end to end, which is what it gains:
// the torch version moves every intermediate through memory and pays for a hundred small calls. Row-major. C tokens, K
// inputs, V outputs.

#include "chunk.h"
#include "chunk_backward.h"
#include "chunk_forward.h"

namespace {

template <class T>
void run(const ChunkArguments<T>& s, bool back) {
    const size_t room = chunk_room(s.C, s.K, s.V);
#pragma omp parallel num_threads(s.threads) if (s.problems * s.memories > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems * s.memories; i++) {
            mem.reset(room);
            if (back) {
                Backward<T>(s, i, mem).run();
            } else {
                chunk_forward(s, i, mem);
            }
        }
    }
}

}  // namespace

extern "C" void nestling_chunk(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const ChunkArguments<double>*>(given), back)
              : run(*static_cast<const ChunkArguments<float>*>(given), back);
}
NESTLING_BYTES(ChunkArguments)
