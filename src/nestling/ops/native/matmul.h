// Matrix products and triangular solves of the sizes of a chunk (tens to hundreds), row-major, one core, all in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

// A left factor: element (i, k) at data[i * row + k * column], so that a transposed matrix needs no copy.
template <class T>
struct Left {
    const T* data;
    int64_t row, column;
};

template <class T>
struct Right {
    const T* data;
    int64_t row;
};

struct Form {
    bool lower = false;      // left[i, k] = 0 for k > i
    bool upper = false;      // left[i, k] = 0 for k < i
    bool out_lower = false;  // only entries (i, j <= i) are wanted; others may hold anything
    bool negate = false;
    bool add = false;  // to what `out` holds
};

template <class T>
using Vec __attribute__((vector_size(32), aligned(alignof(T)), may_alias)) = T;

template <class T>
constexpr int width = 32 / sizeof(T);

// ROWS rows by two vectors of `out`, in registers over the whole inner dimension.
template <class T, int ROWS>
inline void tile(Left<T> a, const T* b, int64_t b_row, T* out, int64_t out_row, int64_t k0, int64_t k1, Form f) {
    Vec<T> sum[ROWS][2] = {};
    const T* ap = a.data + k0 * a.column;
    const T* bp = b + k0 * b_row;
#pragma GCC unroll 4
    for (int64_t k = k0; k < k1; k++, ap += a.column, bp += b_row) {
        const Vec<T> b0 = *reinterpret_cast<const Vec<T>*>(bp);
        const Vec<T> b1 = *reinterpret_cast<const Vec<T>*>(bp + width<T>);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const T x = ap[i * a.row];
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        Vec<T>* o = reinterpret_cast<Vec<T>*>(out + i * out_row);
        for (int j = 0; j < 2; j++) {
            const Vec<T> value = f.negate ? -sum[i][j] : sum[i][j];
            o[j] = f.add ? o[j] + value : value;
        }
    }
}

template <class T>
void tiles(Left<T> a, const T* b, int64_t b_row, T* out, int64_t out_row, int64_t k0, int64_t k1, Form f, int64_t rows) {
    switch (rows) {
        case 1: return tile<T, 1>(a, b, b_row, out, out_row, k0, k1, f);
        case 2: return tile<T, 2>(a, b, b_row, out, out_row, k0, k1, f);
        case 3: return tile<T, 3>(a, b, b_row, out, out_row, k0, k1, f);
        case 4: return tile<T, 4>(a, b, b_row, out, out_row, k0, k1, f);
        case 5: return tile<T, 5>(a, b, b_row, out, out_row, k0, k1, f);
        default: return tile<T, 6>(a, b, b_row, out, out_row, k0, k1, f);
    }
}

constexpr int64_t most_inner = 1024;  // the callers' limit on `inner`

// out [rows, columns] = a [rows, inner] b [inner, columns].
template <class T>
void matmul(Left<T> a, Right<T> b, T* out, int64_t out_row, int64_t rows, int64_t columns, int64_t inner, Form f) {
    constexpr int64_t step = 2 * width<T>;
    alignas(64) T pack[most_inner * step], corner[6 * step];
    for (int64_t j = 0; j < columns; j += step) {
        const int64_t there = std::min(step, columns - j);
        // Columns that do not fill two vectors, and rows that lie across cache lines, go through a packed copy.
        const bool packed = there < step || b.row % width<T>;
        const T* panel = packed ? pack : b.data + j;
        const int64_t panel_row = packed ? step : b.row;
        if (there == step) {
            for (int64_t k = 0; packed && k < inner; k++)
                std::memcpy(pack + k * step, b.data + k * b.row + j, step * sizeof(T));
        } else {
            std::memset(pack, 0, inner * step * sizeof(T));
            for (int64_t k = 0; k < inner; k++)
                for (int64_t c = 0; c < there; c++) pack[k * step + c] = b.data[k * b.row + j + c];
        }
        for (int64_t i = 0; i < rows; i += 6) {
            const int64_t n = std::min<int64_t>(6, rows - i);
            if (f.out_lower && j > i + n - 1) continue;
            const int64_t k0 = f.upper ? i : 0, k1 = f.lower ? std::min(inner, i + n) : inner;
            const Left<T> part{a.data + i * a.row, a.row, a.column};
            T* o = out + i * out_row + j;
            if (there == step) {
                tiles(part, panel, panel_row, o, out_row, k0, k1, f, n);
                continue;
            }
            for (int64_t r = 0; r < n; r++)
                for (int64_t c = 0; c < step; c++)
                    corner[r * step + c] = f.add && c < there ? o[r * out_row + c] : T(0);
            tiles(part, panel, panel_row, corner, step, k0, k1, f, n);
            for (int64_t r = 0; r < n; r++) std::memcpy(o + r * out_row, corner + r * step, there * sizeof(T));
        }
    }
}

// Lane j of the upper (HIGH) or lower of two rows after their blocks of H lanes have changed places.
template <int W, int H, bool HIGH>
constexpr int swapped(int j) {
    return HIGH ? ((j & H) ? W + j : j + H) : ((j & H) ? W + j - H : j);
}

template <class T, int H, size_t... J>
inline void swap_blocks(Vec<T>& a, Vec<T>& b, std::index_sequence<J...>) {
    constexpr int W = width<T>;
    const Vec<T> low = __builtin_shufflevector(a, b, swapped<W, H, false>(J)...);
    b = __builtin_shufflevector(a, b, swapped<W, H, true>(J)...);
    a = low;
}

template <class T, int H>
inline void swap_rows(Vec<T>* rows) {
    if constexpr (H < width<T>) {
#pragma GCC unroll 8
        for (int i = 0; i < width<T>; i++)
            if (!(i & H)) swap_blocks<T, H>(rows[i], rows[i + H], std::make_index_sequence<width<T>>());
        swap_rows<T, 2 * H>(rows);
    }
}

// out [columns, rows] of a [rows, columns], whose rows lie `row` apart; whole squares of a vector's width in registers.
template <class T>
void transpose(const T* a, int64_t row, int64_t rows, int64_t columns, T* out) {
    constexpr int64_t side = width<T>;
    for (int64_t i = 0; i < rows; i += side)
        for (int64_t j = 0; j < columns; j += side) {
            if (i + side > rows || j + side > columns) {
                for (int64_t c = j; c < std::min(j + side, columns); c++)
                    for (int64_t r = i; r < std::min(i + side, rows); r++) out[c * rows + r] = a[r * row + c];
                continue;
            }
            Vec<T> square[side];
#pragma GCC unroll 8
            for (int64_t r = 0; r < side; r++) square[r] = *reinterpret_cast<const Vec<T>*>(a + (i + r) * row + j);
            swap_rows<T, 1>(square);
#pragma GCC unroll 8
            for (int64_t c = 0; c < side; c++) *reinterpret_cast<Vec<T>*>(out + (j + c) * rows + i) = square[c];
        }
}

// right = (I + N)^{-1} right for strictly lower N [n, n], right [n, columns], row by row in blocks of rows: what earlier
// blocks contribute is a matrix product.
template <class T>
void solve_unit_lower(const T* N, T* right, int64_t n, int64_t columns) {
    constexpr int64_t block = 6;
    for (int64_t i = 0; i < n; i += block) {
        const int64_t here = std::min(block, n - i);
        if (i)
            matmul<T>({N + i * n, n, 1}, {right, columns}, right + i * columns, columns, here, columns, i,
                      {.negate = true, .add = true});
        for (int64_t t = i + 1; t < i + here; t++)
            for (int64_t r = i; r < t; r++) {
                const T c = N[t * n + r];
#pragma omp simd
                for (int64_t v = 0; v < columns; v++) right[t * columns + v] -= c * right[r * columns + v];
            }
    }
}

// right = (I + N^T)^{-1} right.
template <class T>
void solve_unit_lower_transposed(const T* N, T* right, int64_t n, int64_t columns) {
    constexpr int64_t block = 6;
    for (int64_t end = n; end > 0; end -= std::min(block, end)) {
        const int64_t i = std::max<int64_t>(0, end - block);
        if (end < n)
            matmul<T>({N + end * n + i, 1, n}, {right + end * columns, columns}, right + i * columns, columns, end - i,
                      columns, n - end, {.negate = true, .add = true});
        for (int64_t t = end - 2; t >= i; t--)
            for (int64_t r = t + 1; r < end; r++) {
                const T c = N[r * n + t];
#pragma omp simd
                for (int64_t v = 0; v < columns; v++) right[t * columns + v] -= c * right[r * columns + v];
            }
    }
}
