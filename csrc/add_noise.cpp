// x_t = alpha*x0 + sigma*eps, one read and one write; eps is made on the way (ERD, sec. 2.1).
#include "source.h"

namespace erdfast::ERDFAST_ARCH {

void add_noise(const AddNoise& op) {
  const Layout layout(op.source);
  for_each_task(op.source, layout, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    const float alpha = op.alpha[b], sigma = op.sigma[b];
    Block block;
    alignas(64) float buffer[LANES];
    for (int64_t q = begin; q < end; q += LANES) {
      read_block(op.source, layout, b, q, block);
      for (int j = 0; j < 4; ++j) {
        const int count = layout.count(q, j);
        const int64_t offset = layout.offset(q, j);
        float* __restrict out = target(op.out, b, offset, count, buffer);
        const float* __restrict x0 = block.x0[j];
        const float* __restrict eps = block.eps[j];
#pragma omp simd simdlen(16)
        for (int i = 0; i < LANES; ++i) out[i] = alpha * x0[i] + sigma * eps[i];
        finish(op.out, b, offset, count, out, buffer);
      }
    }
  });
}

}  // namespace erdfast::ERDFAST_ARCH
