// How fast this machine reads memory and multiplies, with nothing else to do: the limits that kernels are measured by.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

#if defined(__x86_64__)
#define REGISTER(sum) "v"(sum)
#else
#define REGISTER(sum) "w"(sum)
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
// Independent sums, enough to hide the latency; named, because the compiler keeps an array of them in memory.
constexpr int CHAINS = 12;
#define EACH_CHAIN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define KEEP(sum) asm volatile("" : "+" REGISTER(sum))  // not to be solved in closed form

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));

std::atomic<uint64_t> sink;  // what is computed must be used

// Runs `burst`, which returns how much work it did, on all threads for `seconds`; returns work per second of all.
template <class Burst>
double rate(int threads, double seconds, Burst burst) {
    using Clock = std::chrono::steady_clock;
    std::atomic<int> waiting{threads};
    std::vector<double> rates(threads);
    std::vector<std::thread> pool;
    for (int index = 0; index < threads; ++index) {
        pool.emplace_back([&, index] {
            burst(index);  // warm up
            --waiting;
            while (waiting > 0) std::this_thread::yield();
            const auto start = Clock::now();
            double work = 0, elapsed = 0;
            do {
                work += burst(index);
                elapsed = std::chrono::duration<double>(Clock::now() - start).count();
            } while (elapsed < seconds);
            rates[index] = work / elapsed;
        });
    }
    for (auto& thread : pool) thread.join();
    double sum = 0;
    for (double each : rates) sum += each;
    return sum;
}

#if defined(__AVX512VNNI__)
typedef __m512i Sums;
inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline Sums multiply_add(Sums sums, Sums a, Sums b) { return _mm512_dpbusd_epi32(sums, a, b); }
#elif defined(__AVXVNNI__)
typedef __m256i Sums;
inline Sums zero_sums() { return _mm256_setzero_si256(); }
inline Sums multiply_add(Sums sums, Sums a, Sums b) { return _mm256_dpbusd_avx_epi32(sums, a, b); }
#elif defined(__AVX2__)
typedef __m256i Sums;
inline Sums zero_sums() { return _mm256_setzero_si256(); }
inline Sums multiply_add(Sums sums, Sums a, Sums b) {
    const __m256i pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t Sums;
inline Sums zero_sums() { return vdupq_n_s32(0); }
inline Sums multiply_add(Sums sums, Sums a, Sums b) {
    return vdotq_s32(sums, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#else
#define NO_INT8_PRODUCTS
#endif

#ifndef NO_INT8_PRODUCTS
inline uint64_t first_of(const Sums& sums) {
    uint32_t first;
    std::memcpy(&first, &sums, sizeof first);
    return first;
}
#endif

}  // namespace

extern "C" {

// Bytes per second that all threads together read from memory, each from its own part of `bytes`, in order.
double read_bandwidth(int threads, uint64_t bytes, double seconds) {
    const size_t words = bytes / threads / sizeof(Words) / 8 * 8;
    std::vector<std::vector<Words>> parts(threads);
    std::vector<std::thread> pool;
    for (int index = 0; index < threads; ++index) {
        pool.emplace_back([&, index] { parts[index].assign(words, Words{} + 1); });
    }
    for (auto& thread : pool) thread.join();
    return rate(threads, seconds, [&](int index) {
        const Words* data = parts[index].data();
        Words sums[8] = {};
        for (size_t i = 0; i < words; i += 8) {
            for (int j = 0; j < 8; ++j) sums[j] |= data[i + j];
        }
        for (int j = 1; j < 8; ++j) sums[0] |= sums[j];
        sink += sums[0][0];
        return static_cast<double>(words * sizeof(Words));
    });
}

// Operations per second of float32 multiply-adds, each counted as two.
double float32_peak(int threads, double seconds) {
    return rate(threads, seconds, [](int index) {
        constexpr int ROUNDS = 100000;
        const Floats factor = Floats{} + 0.999f, term = Floats{} + 0.001f;
#define START(j) Floats sum##j = Floats{} + 1.0f / (index + 1);
        EACH_CHAIN(START)
#undef START
        for (int round = 0; round < ROUNDS; ++round) {
#define STEP(j) sum##j = sum##j * factor + term; KEEP(sum##j);
            EACH_CHAIN(STEP)
#undef STEP
        }
#define FINISH(j) sink += static_cast<uint64_t>(sum##j[0]);
        EACH_CHAIN(FINISH)
#undef FINISH
        return 2.0 * ROUNDS * CHAINS * (VECTOR_BYTES / sizeof(float));
    });
}

// Operations per second of the widest 8-bit dot product, a multiply-add counted as two; 0 where there is none.
double int8_peak(int threads, double seconds) {
#ifdef NO_INT8_PRODUCTS
    return 0;
#else
    return rate(threads, seconds, [](int) {
        constexpr int ROUNDS = 100000;
        Sums a, b;
        std::memset(&a, 3, sizeof a);
        std::memset(&b, 2, sizeof b);
#define START(j) Sums sum##j = zero_sums();
        EACH_CHAIN(START)
#undef START
        for (int round = 0; round < ROUNDS; ++round) {
#define STEP(j) sum##j = multiply_add(sum##j, a, b); KEEP(sum##j);
            EACH_CHAIN(STEP)
#undef STEP
        }
#define FINISH(j) sink += first_of(sum##j);
        EACH_CHAIN(FINISH)
#undef FINISH
        return 2.0 * ROUNDS * CHAINS * sizeof(Sums);
    });
#endif
}
}
