// Rows spread over OpenMP threads, each with its own scratch.
// Writes nothing but the scratch, which the calling thread keeps for its next call.
// Rows are handed out by a counter: ignored rows cost nothing, so equal shares of rows are not equal shares
// of work.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fastloss {

// Below this many elements a second thread (and giving up the GIL) costs more than it brings.
constexpr int64_t kSmallWork = 32768;

// Denormal results are flushed to 0 while rows run (p < 1e-38, where Intel cores would trap to microcode);
// the caller's floating-point state is put back.
class FlushDenormals {
#if defined(__SSE2__)
  unsigned saved_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// A buffer that grows and is kept; 64-byte aligned.
class Buffer {
  void* data_ = nullptr;
  int64_t size_ = 0;

 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr, size_ = 0;
      if (posix_memalign(&data_, 4096, bytes) != 0) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<char*>(data_);
  }
};

// One per calling thread, whatever function asks (a local of the template below would be one for each).
inline Buffer& thread_buffer() {
  static thread_local Buffer buffer;
  return buffer;
}

// run(begin, end, scratch) over all of [0, rows).
template <class Run>
void for_rows(int64_t rows, int64_t row_elements, int64_t threads, int64_t scratch_bytes, Run&& run) {
  if (rows <= 0) return;
  if (threads > rows) threads = rows;
  if (threads <= 1 || rows * row_elements < kSmallWork) {
    char* const scratch = thread_buffer().at_least(scratch_bytes);
    FlushDenormals flush;
    run(int64_t(0), rows, scratch);
    return;
  }
  // A page between two threads' scratch, so that no line is shared and the sets of the cache differ.
  const int64_t stride = (scratch_bytes + 4095) / 4096 * 4096 + 4096;
  char* const scratch = thread_buffer().at_least(stride * threads);
  // Few enough grabs that the counter costs nothing, many enough that no thread waits long at the end.
  int64_t step = kSmallWork / (row_elements + 1) + 1;
  if (step > rows / (threads * 4) + 1) step = rows / (threads * 4) + 1;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> slot{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    FlushDenormals flush;
    char* const mine = scratch + stride * slot.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = next.fetch_add(step, std::memory_order_relaxed);
      if (begin >= rows) break;
      run(begin, begin + step < rows ? begin + step : rows, mine);
    }
  }
}

}  // namespace fastloss
