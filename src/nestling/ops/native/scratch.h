// Working memory of one thread: one block, cut off piece by piece.
#pragma once

#include <cstdint>
#include <vector>

template <class T>
struct Scratch {
    std::vector<T> data;
    size_t used = 0;

    // At least `room` numbers, all free.
    void reset(size_t room) {
        if (data.size() < room) data.resize(room);
        used = 0;
    }

    T* take(int64_t n) {
        T* p = data.data() + used;
        used += (n + 15) / 16 * 16;
        return p;
    }
};
