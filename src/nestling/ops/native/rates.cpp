// Rates of all rows and heads.

#include "rates.h"

namespace {

template <class T>
void run(const RatesArguments<T>& s, bool back) {
    for (int64_t row = 0; row < s.rows; row++)
        for (int64_t head = 0; head < s.heads; head++)
            back ? rates::backward(s, row, head) : rates::forward(s, row, head);
}

}  // namespace

extern "C" void nestling_rates(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const RatesArguments<double>*>(given), back)
              : run(*static_cast<const RatesArguments<float>*>(given), back);
}
NESTLING_BYTES(RatesArguments)
