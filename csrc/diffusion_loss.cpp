// One pass over pred and x0: eps again, y = c_x*x0 + c_eps*eps, r = pred - y, the three sums per sample and the gradient
// grad_scale * 2*w/(batch*numel) * r. Reads 2 and writes 1 element per element; the noise and the target are never stored.
#include "source.h"

namespace erdfast::ERDFAST_ARCH {

// Past the caches, to an address that is a multiple of 64.
inline void stream_vec(float* p, Vec value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(value));
#elif defined(__AVX2__)
  __m256 halves[2];
  std::memcpy(halves, &value, sizeof(value));
  _mm256_stream_ps(p, halves[0]);
  _mm256_stream_ps(p + 8, halves[1]);
#else
  store_vec(p, value);
#endif
}

// A gradient of this size leaves the caches before anybody reads it: written past them, its lines need not be fetched first,
// which is a tenth of the time (32x3x256x256).
constexpr int64_t STREAMED_BYTES = int64_t{16} << 20;

inline bool is_streamed(const Array& grad, const Source& source, const Layout& layout) {
  return grad.data && grad.dtype == Dtype::fp32 && !grad.pixel && source.batch * source.numel * 4 >= STREAMED_BYTES &&
         reinterpret_cast<uintptr_t>(grad.data) % 64 == 0 && grad.stride % 16 == 0 &&
         (layout.contiguous || layout.quarter % 16 == 0);
}

// A task adds at most 256 numbers to each lane before float64 takes over.
struct Sums {
  Vec rr{}, rx{}, re{};
};

// All loads of four parts, then their stores: where a sample has 4096 elements, the parts of all arrays lie at the same
// address modulo 4096, and the processor takes a load for the result of a store before it. Never inlined: inside the
// larger function the addresses and sums do not stay in registers.
template <bool streamed>
__attribute__((noinline)) static void accumulate(Sums& sums, Parts<const float> pred, Parts<const float> x0,
                                                 Parts<const float> eps, float c_x, float c_eps, float factor,
                                                 Parts<float> grad) {
  Sums total = sums;
  for (int i = 0; i < LANES; i += WIDTH) {
    Vec scaled[4];
    for (int j = 0; j < 4; ++j) {
      const float *at_pred = pred.data + j * pred.step + i, *at_x0 = x0.data + j * x0.step + i;
      __builtin_prefetch(at_pred + LANES);  // the next block's, while its noise is computed
      __builtin_prefetch(at_x0 + LANES);
      const Vec x = load_vec(at_x0), e = load_vec(eps.data + j * eps.step + i);
      const Vec r = load_vec(at_pred) - (c_x * x + c_eps * e);
      total.rr += r * r;
      total.rx += r * x;
      total.re += r * e;
      scaled[j] = factor * r;
    }
    for (int j = 0; j < 4; ++j) {
      float* g = grad.data + j * grad.step + i;
      streamed ? stream_vec(g, scaled[j]) : store_vec(g, scaled[j]);
    }
  }
  sums = total;
}

void diffusion_loss(const DiffusionLoss& op) {
  const Source& source = op.source;
  const Layout layout(source);
  const int64_t per_sample = tasks_per_sample(layout);
  const bool streamed = is_streamed(op.grad, source, layout);
  std::vector<double> partial(static_cast<size_t>(3 * source.batch * per_sample), 0.0);

  for_each_task(source, layout, [&](int64_t task, int64_t b, int64_t begin, int64_t end) {
    const float c_x = op.c_x[b], c_eps = op.c_eps[b];
    const float factor = static_cast<float>(
        op.grad_scale * 2.0 * op.w[b] / (static_cast<double>(source.batch) * static_cast<double>(source.numel)));
    Sums sums;
    Block block;
    alignas(64) Buffer pred_buffer;
    alignas(64) Buffer grad_buffer;
    for (int64_t q = begin; q < end; q += LANES) {
      read_block(source, layout, b, q, block);
      const Parts<const float> pred = read_parts(op.pred, layout, b, q, pred_buffer);
      const Parts<float> grad = target_parts(op.grad, layout, b, q, grad_buffer);
      const bool buffered = grad.data == grad_buffer[0];
      const auto add = streamed && !buffered ? accumulate<true> : accumulate<false>;
      add(sums, pred, block.x0, block.eps, c_x, c_eps, factor, grad);
      finish(op.grad, layout, b, q, grad_buffer, buffered);
    }
#if defined(__AVX2__)
    if (streamed) _mm_sfence();
#endif
    for (int i = 0; i < WIDTH; ++i) {
      partial[3 * task + 0] += sums.rr[i];
      partial[3 * task + 1] += sums.rx[i];
      partial[3 * task + 2] += sums.re[i];
    }
  });

  if (!op.sums) return;
  double loss = 0.0;
  for (int64_t b = 0; b < source.batch; ++b) {
    double total[3] = {};
    for (int64_t task = b * per_sample; task < (b + 1) * per_sample; ++task)
      for (int k = 0; k < 3; ++k) total[k] += partial[3 * task + k];
    for (int k = 0; k < 3; ++k) op.sums[3 * b + k] = static_cast<float>(total[k]);
    loss += op.w[b] * (total[0] / static_cast<double>(source.numel));
  }
  *op.loss = static_cast<float>(loss / static_cast<double>(source.batch));
}

}  // namespace erdfast::ERDFAST_ARCH
