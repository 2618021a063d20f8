// Working memory of one thread: one block, cut off piece by piece.
#pragma once

#include <cstdint>
#include <vector>

// Pieces of a block; of none, to learn how large it must be.
template <class T>
struct Pieces {
    T* block = nullptr;
    size_t used = 0;

    T* take(int64_t n) {
        T* p = block ? block + used : nullptr;
        used += (n + 15) / 16 * 16;
        return p;
    }
};

template <class T>
struct Scratch : Pieces<T> {
    std::vector<T> data;

    // At least `room` numbers, all free.
    void reset(size_t room) {
        if (data.size() < room) data.resize(room);
        this->block = data.data(), this->used = 0;
    }
};
