// The linear head of head.h, on every thread of a team. Statistics: a chapter of the vocabulary a thread, all
// rows, Z = H Wᵀ of a stripe of rows at a time. Gradients: all threads share a block of the vocabulary. Its
// weights are packed; every stripe's dZ is made, and dH += dZ W while it is hot; then dW = dZᵀ H of the
// block, finished at once. dZ is rounded to the weight's dtype, as PyTorch's would be; logits and sums over K
// are float32.

#ifndef FASTLOSS_ISA
#error "head.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "head.h"

#include <sched.h>

#include "block.h"
#include "head_scratch.h"

namespace fastloss {
namespace FASTLOSS_ISA {

namespace {

struct NoTiles {};

template <class Op>
struct TilesOf {
  typedef NoTiles type;
};
template <class T>
struct TilesOf<AmxTiles<T>> {
  typedef T type;
};

template <class T>
void to_float(const T* x, int64_t n, float* out) {
  write_block(out, n, [=](int64_t i, int64_t count) { return load_upto(x + i, count); });
}
template <class T>
void from_float(const float* x, int64_t n, T* out) {
  write_block(out, n, [=](int64_t i, int64_t count) { return load_upto(x + i, count); });
}

template <bool is_first, class A, class B>
struct Choose {
  typedef A type;
};
template <class A, class B>
struct Choose<false, A, B> {
  typedef B type;
};

template <class P>
struct Element;
template <class E>
struct Element<const E*> {
  typedef E type;
};

// T: of the weight, its gradient and the logits.
template <class Op, class T>
class Worker {
  typedef typename Op::Unit Unit;
  static constexpr bool kTiles = IsTiles<Op>::value, kFloats = Same<T, float>::value;
  static constexpr bool kNarrow = Op::kElements == 1 && !kFloats;  // bfloat16 that becomes floats
  static constexpr int64_t P = Op::kPanel, kRows = Op::kStripe;
  // Columns of a task: of a stripe that is divided, and of the packing.
  static constexpr int64_t kTaskColumns = P > 128 ? P : 128, kTaskWeights = 64;

  const HeadCall& c_;
  const Areas a_;
  const int64_t thread_, threads_, rows_, dim_, vocab_, stripes_, units_of_dim_;
  char *const shared_, *const mine_;
  int64_t phase_ = 0;
  int64_t start_ = 0, width_ = 0;  // the block's columns
  const int32_t* list_ = nullptr;  // its rows, or null: all
  int64_t count_;                  // how many
  typename TilesOf<Op>::type tiles_;

 public:
  Worker(const HeadCall& c, char* scratch, int64_t thread, int64_t threads)
      : c_(c),
        a_(areas_of<Op, T>(c, threads)),
        thread_(thread),
        threads_(threads),
        rows_(c.logits.rows),
        dim_(c.dim),
        vocab_(c.logits.vocab),
        stripes_(stripes_of(c.logits.rows, kRows)),
        units_of_dim_(units_of<Op>(c.dim)),
        shared_(scratch),
        mine_(scratch + a_.threads + thread * a_.thread_bytes),
        count_(c.logits.rows) {}

  void run() {
    if (is_d_hidden_alone(c_)) return make_d_hidden_alone();
    if (is_backward(c_)) {
      share_rows([&](int64_t begin, int64_t end) { vocab_kernels.set_coefficients(c_, begin, end); });
    } else {
      const int64_t chapters = stripes_of(vocab_, kChapter);
      share(chapters, [&](int64_t chapter) { add_chapter(chapter); });
      share_rows([&](int64_t begin, int64_t end) {
        for (int64_t k = 0; k < chapters; ++k) vocab_kernels.merge(c_, sums_of(k), k == 0, begin, end);
        vocab_kernels.finish(c_, begin, end);
        if (!c_.mass) return;
        vocab_kernels.leave_out(c_, begin, end);
        for (int64_t i = begin; c_.d_hidden && i < end; ++i) memset(d_hidden(i), 0, dim_ * sizeof(float));
      });
    }
    if (wants_gradients(c_)) make_gradients();
  }

 private:
  // --- threads

  // Of all threads. Not OpenMP's: that one spins for long where another process has the core that is waited
  // for.
  void barrier() {
    int64_t* const arrived = shared<int64_t>(a_.counters + 3 * threads_ * 64);
    __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
    for (int spin = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < phase_ * threads_; ++spin) {
      if (spin < 4000) {
        pause();
      } else {
        sched_yield();
      }
    }
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  // Tasks 0 to n - 1: a thread's own run of them first, then what others have left; then all wait. The
  // counters of three phases take turns: those that nobody can still be using are set back.
  template <class F>
  void share(int64_t n, F&& task) {
    const auto counter = [&](int64_t phase, int64_t thread) {
      return reinterpret_cast<int64_t*>(shared_ + a_.counters) + (phase % 3 * threads_ + thread) * 8;
    };
    __atomic_store_n(counter(phase_ + 2, thread_), 0, __ATOMIC_RELAXED);
    for (int64_t k = 0; k < threads_; ++k) {
      const int64_t owner = (thread_ + k) % threads_;
      const int64_t begin = n * owner / threads_, end = n * (owner + 1) / threads_;
      int64_t* const next = counter(phase_, owner);
      while (__atomic_load_n(next, __ATOMIC_RELAXED) < end - begin) {
        const int64_t i = begin + __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= end) break;
        task(i);
      }
    }
    ++phase_;
    barrier();
  }
  template <class F>
  void share_rows(F&& f) {
    constexpr int64_t kTask = 64;
    share(stripes_of(rows_, kTask), [&](int64_t i) { f(i * kTask, least(rows_, (i + 1) * kTask)); });
  }

  // --- memory

  template <class E>
  E* mine(int64_t area) const {
    return reinterpret_cast<E*>(mine_ + area);
  }
  template <class E>
  E* shared(int64_t area) const {
    return reinterpret_cast<E*>(shared_ + area);
  }
  ChapterSums sums_of(int64_t chapter) const { return vocab_kernels.sums_of(c_, shared_ + a_.sums, chapter); }
  const T* weight(int64_t column) const {
    return static_cast<const T*>(c_.weight) + in_weight(column) * c_.weight_stride;
  }
  int64_t in_weight(int64_t column) const { return c_.order ? c_.order[column] : column; }
  // Of the block's row i: which one it is, and where it lies.
  int64_t row_of(int64_t i) const { return list_ ? list_[i] : i; }
  int64_t place(int64_t i) const { return c_.keep ? c_.keep[row_of(i)] : row_of(i); }
  int64_t stripe_end(int64_t stripe) const { return least(count_, (stripe + 1) * kRows); }

  template <class F>
  void with_hidden(F&& f) const {
    if constexpr (Op::kElements == 2) {
      f(static_cast<const BF16*>(c_.hidden));
    } else if (c_.hidden_dtype == kBFloat16) {
      f(static_cast<const BF16*>(c_.hidden));
    } else {
      f(static_cast<const float*>(c_.hidden));
    }
  }

  // The row as dH has it.
  float* d_hidden(int64_t row) const {
    if (c_.spread) return c_.d_hidden + (c_.keep ? c_.keep[row] : row) * dim_;
    return row < c_.split ? c_.d_hidden + row * dim_ : c_.d_hidden_rest + (row - c_.split) * dim_;
  }

  // --- logits

  // z = H Wᵀ of rows [row, end) and n columns, whose weights are packed.
  void make_logits(int64_t row, int64_t end, const Unit* packed, int64_t n, float* z, int64_t stride) {
    if constexpr (kTiles) {
      const int64_t bytes = units_of_dim_ * 4;
      const char* a = static_cast<const char*>(c_.hidden);
      TileRows from{a + row * c_.hidden_stride * 2, c_.hidden_stride * 2, 64};
      if (c_.keep || list_ || dim_ * 2 != bytes || (end - row) % 32 != 0) {
        char* const dense = mine<char>(a_.stripe);
        for (int64_t i = row; i < end; ++i) {
          char* const to = dense + (i - row) * bytes;
          memcpy(to, a + place(i) * c_.hidden_stride * 2, dim_ * 2);
          memset(to + dim_ * 2, 0, bytes - dim_ * 2);
        }
        from = {dense, bytes, 64};
      }
      multiply_tiles(
          tiles_, end - row, n, units_of_dim_ / Op::kStep, from, packed, units_of_dim_ * P,
          [&](int64_t i) { return z + i * stride; }, true, false);
    } else {
      const Unit* dense = nullptr;  // the rows' units, where they had to be converted
      if (Op::kElements == 1 && c_.hidden_dtype != kFloat32) {
        with_hidden([&](auto* x) {
          float* const to = mine<float>(a_.stripe);
          for (int64_t i = row; i < end; ++i)
            to_float(x + place(i) * c_.hidden_stride, dim_, to + (i - row) * dim_);
        });
        dense = mine<Unit>(a_.stripe);
      }
      const char* const hidden = static_cast<const char*>(c_.hidden);
      const int64_t bytes = c_.hidden_stride * (Op::kElements == 2 ? 2 : 4);
      const auto a = [&](int64_t i) {
        return dense ? dense + i * dim_ : reinterpret_cast<const Unit*>(hidden + place(row + i) * bytes);
      };
      const int64_t units = units_of_dim_;
      for (int64_t k = 0; k < units; k += kDepth) {
        multiply<Op, false>(
            end - row, n, least(kDepth, units - k), [&](int64_t i) { return a(i) + k; }, 1, packed + k * P,
            units * P, [&](int64_t i) { return z + i * stride; }, k > 0);
      }
    }
  }

  void pack_for_logits(int64_t column, int64_t n, Unit* out) const {
    for (int64_t j = 0; j < n; j += P, out += units_of_dim_ * P) {
      const auto row = [&](int64_t i) { return weight(least(column + j + i, vocab_ - 1)); };
      pack_transposed<Op, T>(row, least(P, n - j), dim_, out);
    }
  }

  void add_chapter(int64_t chapter) {
    const ChapterSums sums = sums_of(chapter);
    const int64_t end = least(vocab_, (chapter + 1) * kChapter), stride = block_stride<float>(kSegment);
    Unit* const packed = shared<Unit>(a_.segment + thread_ * a_.segment_bytes);
    float* const z = mine<float>(a_.columns);
    for (int64_t start = chapter * kChapter; start < end; start += kSegment) {
      const int64_t n = least(kSegment, end - start);
      pack_for_logits(start, n, packed);
      for (int64_t stripe = 0; stripe < stripes_; ++stripe) {
        const StripeOfLogits l{z, stride, start, n, stripe * kRows, stripe_end(stripe)};
        make_logits(l.begin, l.end, packed, n, z, stride);
        vocab_kernels.add(c_, sums, l, mine<void>(a_.kernel));
      }
    }
  }

  // --- gradients

  // dZ of a stripe as dH reads it, in elements of ZRow.
  typedef typename Choose<Op::kElements == 1, float, T>::type ZRow;
  int64_t z_stride() const { return block_stride<ZRow>(width_of(c_)); }
  ZRow* z_rows(int64_t stripe, int64_t slot) const {
    if (kFloats && sums_rows(c_)) return shared<ZRow>(a_.z_columns) + stripe * kRows * z_stride();
    return reinterpret_cast<ZRow*>(shared_ + a_.z_rows + slot * a_.z_rows_bytes);
  }
  // And as dW does: floats and narrow ones in rows, pairs of rows, lines of 32 rows.
  T* narrow_rows(int64_t row) const { return shared<T>(a_.z_columns) + row * block_stride<T>(width_of(c_)); }
  int64_t pairs_stride() const { return block_stride<uint32_t>(width_of(c_)); }
  uint32_t* pairs(int64_t stripe) const {
    return shared<uint32_t>(a_.z_columns) + stripe * (kRows / 2) * pairs_stride();
  }
  uint16_t* lines(int64_t row) const {  // a multiple of 32
    return shared<uint16_t>(a_.z_columns) + row * width_of(c_);
  }

  bool needs_logits() const { return c_.stored + c_.more < rows_; }

  void make_gradients() {
    const int64_t task = columns_of_task<Op, T>(c_, threads_);
    const int64_t d_weight_tasks = c_.d_weight ? stripes_of(dim_, task) : 0;
    const int64_t column_tasks = sums_rows(c_) ? d_weight_tasks + (c_.d_bias != nullptr) : 0;
    start_ = 0, width_ = least(c_.width, vocab_);
    prepare(start_, width_);
    while (start_ < vocab_) {
      take_rows();
      const int64_t stripes = stripes_of(count_, kRows);
      if (is_split(c_, stripes, threads_)) {
        const int64_t parts = stripes_of(width_, kTaskColumns), dims = stripes_of(dim_, kTaskColumns);
        share(stripes * parts, [&](int64_t i) {
          const int64_t begin = i % parts * kTaskColumns;
          make_dz(i / parts, begin, least(width_, begin + kTaskColumns), i / parts);
        });
        if (c_.d_hidden) {
          share(stripes * dims, [&](int64_t i) {
            const int64_t begin = i % dims * kTaskColumns;
            add_d_hidden(i / dims, begin, least(dim_, begin + kTaskColumns), i / dims, adds_d_hidden());
          });
        }
      } else {
        share(stripes, [&](int64_t i) {
          make_dz(i, 0, width_, thread_);
          if (c_.d_hidden) add_d_hidden(i, 0, dim_, thread_, adds_d_hidden());
        });
      }
      const int64_t next = start_ + width_, next_width = least(c_.width, vocab_ - next);
      share(column_tasks + (next_width > 0 ? prepare_tasks() : 0), [&](int64_t i) {
        if (i >= column_tasks) return prepare(next, next_width, i - column_tasks);
        if (i == d_weight_tasks) return add_bias();
        make_d_weight(i * task, least(dim_, (i + 1) * task));
      });
      start_ = next, width_ = next_width;
    }
    if (is_in_blocks() && !c_.keeps_order && c_.d_weight && !c_.d_weight_sum) put_in_order();
  }

  // What a block needs before its rows are taken.
  int64_t prepare_tasks() const { return pack_tasks() + (c_.mass != nullptr); }
  void prepare(int64_t start, int64_t n, int64_t i) {
    if (i == pack_tasks()) return list_rows(start);
    pack(start, n, i);
  }
  void prepare(int64_t start, int64_t n) {
    share(prepare_tasks(), [&](int64_t i) { prepare(start, n, i); });
  }

  // The rows whose gradients do not leave out the block at `start`: their number, and they.
  int64_t* listed(int64_t start) const {
    return shared<int64_t>(a_.lists + start / kSegment % 2 * a_.list_bytes);
  }
  void list_rows(int64_t start) const {
    int64_t* const number = listed(start);
    int32_t* const out = reinterpret_cast<int32_t*>(number + 1);
    const float* const mass = c_.mass + start / kSegment * rows_;
    int64_t n = 0;
    for (int64_t row = 0; row < rows_; ++row) out[n] = int32_t(row), n += mass[row] != kLeftOut;
    *number = n;
  }
  void take_rows() {
    if (!c_.mass) return;
    count_ = *listed(start_), list_ = reinterpret_cast<const int32_t*>(listed(start_) + 1);
  }
  // Where blocks leave rows out, no block begins the sum for all of them.
  bool adds_d_hidden() const { return start_ > 0 || c_.mass; }

  // Logits that wait in d weight lie where the blocks are that read them, so that d weight does, too: its
  // rows go to their places when all are done. Without any, each goes there at once.
  bool is_in_blocks() const { return c_.order && (c_.stored > 0 || c_.keeps_order); }
  T* d_weight(int64_t column) const {
    return static_cast<T*>(c_.d_weight) + (is_in_blocks() ? column : in_weight(column)) * dim_;
  }
  // Some columns of it along the cycles of the order: row `from` belongs to place order[from].
  void put_in_order() {
    constexpr int64_t most = 4096 / sizeof(T), line = 64 / sizeof(T);
    const int64_t columns = least(most, round_up(stripes_of(dim_, threads_), line));
    share(stripes_of(dim_, columns), [&](int64_t task) {
      const int64_t begin = task * columns, n = least(dim_, begin + columns) - begin;
      char* const done = mine<char>(a_.done);
      memset(done, 0, vocab_);
      T buffers[2][most];
      for (int64_t start = 0; start < vocab_; ++start) {
        if (done[start]) continue;
        T *carried = buffers[0], *found = buffers[1];
        memcpy(carried, d_weight(start) + begin, n * sizeof(T));
        for (int64_t from = start; !done[from];) {
          done[from] = 1;
          const int64_t to = c_.order[from];
          const T* const later = d_weight(c_.order[c_.order[to]]) + begin;
          for (int64_t i = 0; i < n; i += line) __builtin_prefetch(later + i, 1);
          T* const place = d_weight(to) + begin;
          memcpy(found, place, n * sizeof(T)), memcpy(place, carried, n * sizeof(T));
          T* const freed = carried;
          carried = found, found = freed, from = to;
        }
      }
    });
  }

  // Parts of the block of n columns from `start` on, for both products: their weights are read once.
  int64_t pack_tasks() const {
    const bool nothing = !c_.d_hidden && !needs_logits() && !is_d_hidden_alone(c_);
    return nothing ? 0 : stripes_of(width_of(c_), kTaskWeights);
  }
  void pack(int64_t start, int64_t n, int64_t i) {
    const int64_t from = i * kTaskWeights, count = least(kTaskWeights, n - from);
    if (count <= 0) return;
    if (needs_logits() || is_d_hidden_alone(c_)) {
      pack_for_logits(start + from, count, shared<Unit>(a_.packed) + from * units_of_dim_);
    }
    if (!c_.d_hidden) return;
    const int64_t end = from + count < n ? (from + count) / Op::kElements : units_of<Op>(n);
    pack_matrix<Op, T>([&](int64_t k) { return weight(start + k); }, dim_, n, from / Op::kElements, end,
                       shared<Unit>(a_.packed_other), units_of<Op>(width_of(c_)) * P);
  }

  // The columns [begin, end) of the block.
  void make_dz(int64_t stripe, int64_t begin, int64_t end, int64_t slot) {
    ZRow* const rows = z_rows(stripe, slot) + begin;
    float* z = mine<float>(a_.columns);
    int64_t stride = block_stride<float>(width_of(c_));
    if constexpr (kFloats) z = rows;
    const StripeOfLogits l{z, stride, start_ + begin, end - begin, stripe * kRows, stripe_end(stripe), list_};
    const bool kept = row_of(l.end - 1) < c_.stored + c_.more;
    if (!kept) {
      make_logits(l.begin, l.end, shared<Unit>(a_.packed) + begin * units_of_dim_, l.width, z, stride);
    }
    void* const kernel = mine<void>(a_.kernel);
    if constexpr (kNarrow) {
      const bool sums = sums_rows(c_);
      T* const out = sums ? narrow_rows(l.begin) + begin : reinterpret_cast<T*>(z);  // or over the logits
      const int64_t out_stride = sums ? block_stride<T>(width_of(c_)) : 2 * stride;
      vocab_kernels.gradient(c_, l, kept, out, out_stride, kernel);
      for (int64_t i = 0; i < l.end - l.begin; ++i) {
        to_float(out + i * out_stride, l.width, rows + i * z_stride());
      }
    } else {
      vocab_kernels.gradient(c_, l, kept, rows, z_stride(), kernel);
      if constexpr (Op::kElements == 2) {
        if (!sums_rows(c_)) return;
        const auto row = [&](int64_t i) { return rows + i * z_stride(); };
        if constexpr (kTiles) {
          for (int64_t i = 0; i < kRows; i += 32) {
            pack_lines([&](int64_t r) { return row(i + r); }, l.width, l.end - l.begin - i,
                       lines(l.begin + i) + begin * 32);
          }
        } else {
          pack_rows<Op, T>(row, l.width, l.end - l.begin, pairs(stripe) + begin, round_up(l.width, W),
                           pairs_stride());
        }
      }
    }
  }

  // dH (+)= dZ W of the columns [begin, end) of dH; the first block of the vocabulary begins the sum.
  void add_d_hidden(int64_t stripe, int64_t begin, int64_t end, int64_t slot, bool accumulate) {
    const int64_t row = stripe * kRows, count = stripe_end(stripe) - row;
    const int64_t panel = units_of<Op>(width_of(c_)) * P;
    const Unit* const packed = shared<Unit>(a_.packed_other) + begin / P * panel;
    const ZRow* const z = z_rows(stripe, slot);
    const auto c = [&](int64_t i) { return d_hidden(row_of(row + i)) + begin; };
    if constexpr (kTiles) {
      const TileRows a{reinterpret_cast<const char*>(z), z_stride() * 2, 64};
      const bool even = !list_ && !(c_.spread && c_.keep) && (row >= c_.split || row + count <= c_.split);
      multiply_tiles(tiles_, count, end - begin, (width_ + 31) / 32, a, packed, panel, c, even, accumulate);
    } else {
      const int64_t stride = z_stride() / Op::kElements, units = units_of<Op>(width_);
      const auto a = [&](int64_t i) { return reinterpret_cast<const Unit*>(z) + i * stride; };
      multiply<Op, false>(count, end - begin, units, a, 1, packed, panel, c, accumulate);
    }
  }

  // dW of the columns [begin, end) of hidden: a sum over all rows.
  void make_d_weight(int64_t begin, int64_t end) {
    constexpr int64_t chunk = rows_of_sum<Op>();
    const int64_t stride = columns_of_task<Op, T>(c_, threads_);
    const auto out = [&](int64_t j) { return d_weight(start_ + j) + begin; };
    float* const sum = mine<float>(a_.d_weight);
    Unit* const packed = mine<Unit>(a_.stripe);
    const int64_t n = end - begin;
    const auto give = [&](const float* from, int64_t j) {  // the block's row j
      if (!c_.d_weight_sum) return from_float(from, n, out(j));
      float* const to = c_.d_weight_sum + in_weight(start_ + j) * dim_ + begin;
      if (!c_.adds_to_sum) return from_float(from, n, to);
      write_block(to, n, [=](int64_t i, int64_t count) {
        return load_upto(to + i, count) + load_upto(from + i, count);
      });
    };
    if (count_ == 0) {  // all rows leave the block out
      for (int64_t j = 0; j < width_; ++j) {
        if constexpr (kFloats) {
          memset(out(j), 0, n * sizeof(float));
        } else {
          memset(sum, 0, n * sizeof(float));
          give(sum, j);
        }
      }
      return;
    }
    for (int64_t row = 0; row < count_; row += chunk) {
      const int64_t count = least(chunk, count_ - row), units = units_of<Op>(count);
      with_hidden([&](auto* x) {
        typedef typename Element<decltype(x)>::type E;
        pack_matrix<Op, E>([&](int64_t i) { return x + place(row + i) * c_.hidden_stride + begin; }, n, count,
                           0, units, packed, units * P);
      });
      if constexpr (kTiles) {
        // A block of columns at a time. Its sums wait only where there are more rows.
        const bool once = count_ <= chunk, last = row + chunk >= count_;
        for (int64_t j = 0; j < width_; j += 32) {
          float* const mine = sum + (once ? 0 : j * stride);
          const int64_t m = least(32, width_ - j);
          const TileRows a{reinterpret_cast<const char*>(lines(row) + j * 32), 64, width_of(c_) * 64};
          multiply_tiles(
              tiles_, m, n, units / Op::kStep, a, packed, units * P,
              [&](int64_t i) { return mine + i * stride; }, true, row > 0);
          for (int64_t i = 0; last && i < m; ++i) give(mine + i * stride, j + i);
        }
      } else {
        const Unit* a = nullptr;
        int64_t a_step = 0;
        if constexpr (kNarrow) {
          float* const floats = mine<float>(a_.columns);
          a_step = block_stride<float>(width_of(c_)), a = floats;
          for (int64_t i = 0; i < count; ++i) to_float(narrow_rows(row + i), width_, floats + i * a_step);
        } else if constexpr (kFloats) {
          a_step = z_stride(), a = z_rows(0, 0) + row * a_step;
        } else {
          a_step = pairs_stride(), a = pairs(row / kRows);
        }
        const auto c = [&](int64_t i) -> float* {
          if constexpr (kFloats) return out(i);
          return sum + i * stride;
        };
        multiply<Op, true>(
            width_, n, units, [&](int64_t i) { return a + i; }, a_step, packed, units * P, c, row > 0);
      }
    }
    if constexpr (!kFloats && !kTiles) {
      for (int64_t i = 0; i < width_; ++i) give(sum + i * stride, i);
    }
  }

  void add_bias() {
    float* const out = c_.d_bias + start_;
    if constexpr (kTiles) {
      for (int64_t j = 0; j < width_; ++j) {
        double sum = 0;
        for (int64_t row = 0; row < count_; row += 32) {
          const BF16* const line = reinterpret_cast<const BF16*>(lines(row) + j * 32);
          F32V part{};
          for (int64_t i = 0; i < 32; i += W) part += load(line + i);
          sum += sum_lanes(part);
        }
        out[j] = float(sum);
      }
    } else {
      double* const sum = mine<double>(a_.kernel);
      for (int64_t j = 0; j < width_; ++j) sum[j] = 0;
      const auto add = [&](int64_t j, F32V v) {
        float z[W];
        store(z, v);
        store(sum + j, load(sum + j) + widen(z));
        store(sum + j + W / 2, load(sum + j + W / 2) + widen(z + W / 2));
      };
      for (int64_t i = 0; i < count_; i += Op::kElements) {
        for (int64_t j = 0; j < width_; j += W) {
          const int64_t left = width_ - j;
          if constexpr (kNarrow) {
            add(j, load_upto(narrow_rows(i) + j, left));
          } else if constexpr (kFloats) {
            add(j, load_upto(z_rows(0, 0) + i * z_stride() + j, left));
          } else {  // what follows the block's columns is added to what nobody reads
            const U32V pair = load_raw<U32V>(pairs(i / kRows) + i % kRows / 2 * pairs_stride() + j);
            add(j, bit_cast<F32V>(pair << 16));
            add(j, bit_cast<F32V>(pair & 0xffff0000u));
          }
        }
      }
      for (int64_t j = 0; j < width_; ++j) out[j] = float(sum[j]);
    }
  }

  // --- d hidden alone: statistics and gradient in one pass, the sum relative to the largest logit so far

  void make_d_hidden_alone() {
    const ChapterSums sums = sums_of(0);
    for (start_ = 0; start_ < vocab_; start_ += width_) {
      width_ = least(width_of(c_), vocab_ - start_);
      share(pack_tasks(), [&](int64_t i) { pack(start_, width_, i); });
      share(stripes_, [&](int64_t stripe) {
        const int64_t row = stripe * kRows, end = stripe_end(stripe);
        float* const z = mine<float>(a_.columns);
        const int64_t stride = block_stride<float>(width_of(c_));
        void* const kernel = mine<void>(a_.kernel);
        make_logits(row, end, shared<Unit>(a_.packed), width_, z, stride);
        bool is_over = false;  // the chapter
        for (int64_t j = 0; j < width_; j += kSegment) {
          const int64_t n = least(kSegment, width_ - j), next = start_ + j + n;
          vocab_kernels.add(c_, sums, {z + j, stride, start_ + j, n, row, end}, kernel);
          is_over = next % kChapter == 0 || next == vocab_;
          if (is_over) vocab_kernels.merge(c_, sums, next <= kChapter, row, end);
        }
        float* const factor = mine<float>(a_.factors);
        ZRow* const rows = z_rows(stripe, thread_);
        const StripeOfLogits l{z, stride, start_, width_, row, end};
        const ChapterSums* const unfinished = is_over ? nullptr : &sums;
        if constexpr (kNarrow) {
          T* const out = reinterpret_cast<T*>(z);
          vocab_kernels.exponentials(c_, unfinished, l, out, 2 * stride, factor, kernel);
          for (int64_t i = 0; i < end - row; ++i)
            to_float(out + i * 2 * stride, width_, rows + i * z_stride());
        } else {
          vocab_kernels.exponentials(c_, unfinished, l, rows, z_stride(), factor, kernel);
        }
        for (int64_t i = 0; i < end - row; ++i) {
          if (factor[i] != 1) scale_row(d_hidden(row + i), factor[i]);
        }
        add_d_hidden(stripe, 0, dim_, thread_, start_ > 0);
      });
    }
    share_rows([&](int64_t begin, int64_t end) {
      vocab_kernels.finish(c_, begin, end);
      for (int64_t i = begin; i < end; ++i) finish_d_hidden(i);
    });
  }

  void finish_d_hidden(int64_t i) const {
    const RowState& s = c_.state[i];
    float* const row = d_hidden(i);
    const double k = s.kind == 0 ? s.b / s.sum : s.kind == 1 ? 0.0 : __builtin_nan("");
    scale_row(row, float(k));
    if (s.kind != 0) return;
    const double p = __builtin_exp((s.z_target - s.max) - s.log_sum);
    const T* const y = weight(c_.logits.target[i]);
    const float factor = float((s.a + s.b * p) * s.slope_target);
    write_block(row, dim_,
                [=](int64_t j, int64_t n) { return load_upto(row + j, n) + factor * load_upto(y + j, n); });
  }

  void scale_row(float* x, float factor) const {
    write_block(x, dim_, [=](int64_t i, int64_t n) { return load_upto(x + i, n) * factor; });
  }
};

template <class F>
auto with_worker(const HeadCall& c, F&& f) {
  if (c.tiles) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
    if (!c.emulate) return f(AmxTiles<ProcessorTiles>{}, BF16{});
#endif
    return f(AmxTiles<EmulatedTiles>{}, BF16{});
  }
  if (c.pairs) return f(BFloat16Pairs{}, BF16{});
  if (c.weight_dtype == kBFloat16) return f(FloatUnits{}, BF16{});
  return f(FloatUnits{}, float{});
}

int64_t scratch_bytes(const HeadCall& c, int64_t threads) {
  return with_worker(
      c, [&](auto op, auto type) { return areas_of<decltype(op), decltype(type)>(c, threads).bytes; });
}

int64_t counter_bytes(int64_t threads) { return (3 * threads + 1) * 64; }

void run(const HeadCall& c, void* scratch, int64_t thread, int64_t threads) {
  with_worker(c, [&](auto op, auto type) {
    Worker<decltype(op), decltype(type)>(c, static_cast<char*>(scratch), thread, threads).run();
    return 0;
  });
}

}  // namespace

extern const HeadKernels head_kernels;
const HeadKernels head_kernels = {scratch_bytes, counter_bytes, run};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
