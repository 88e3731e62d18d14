// One pass over pred and x0: eps again, y = c_x*x0 + c_eps*eps, r = pred - y, the three sums per sample and the gradient
// grad_scale * 2*w/(batch*numel) * r. Reads 2 and writes 1 element per element; the noise and the target are never stored.
#include "source.h"

namespace erdfast::ERDFAST_ARCH {

void diffusion_loss(const DiffusionLoss& op) {
  const Source& source = op.source;
  const Layout layout(source);
  const int64_t per_sample = tasks_per_sample(layout);
  std::vector<double> partial(static_cast<size_t>(3 * source.batch * per_sample), 0.0);

  for_each_task(source, layout, [&](int64_t task, int64_t b, int64_t begin, int64_t end) {
    const float c_x = op.c_x[b], c_eps = op.c_eps[b];
    const float factor = static_cast<float>(
        op.grad_scale * 2.0 * op.w[b] / (static_cast<double>(source.batch) * static_cast<double>(source.numel)));
    float rr[LANES] = {}, rx[LANES] = {}, re[LANES] = {};
    Block block;
    float pred[LANES], grad[LANES];
    for (int64_t q = begin; q < end; q += LANES) {
      read_block(source, layout, b, q, block);
      for (int j = 0; j < 4; ++j) {
        const int count = layout.count(q, j);
        const int64_t offset = b * source.numel + layout.offset(q, j);
        load(op.pred, offset, count, pred);
        if (count < LANES)  // lanes beyond the end own no element: make their residual vanish
          for (int i = count; i < LANES; ++i) block.x0[j][i] = block.eps[j][i] = 0.0f;
#pragma omp simd simdlen(16)
        for (int i = 0; i < LANES; ++i) {
          const float x0 = block.x0[j][i], eps = block.eps[j][i];
          const float r = pred[i] - (c_x * x0 + c_eps * eps);
          rr[i] += r * r;
          rx[i] += r * x0;
          re[i] += r * eps;
          grad[i] = factor * r;
        }
        if (op.grad.data) store(op.grad, offset, count, grad);
      }
    }
    for (int i = 0; i < LANES; ++i) {
      partial[3 * task + 0] += rr[i];
      partial[3 * task + 1] += rx[i];
      partial[3 * task + 2] += re[i];
    }
  });

  if (!op.sums) return;
  for (int64_t b = 0; b < source.batch; ++b)
    for (int k = 0; k < 3; ++k) {
      double total = 0.0;
      for (int64_t task = b * per_sample; task < (b + 1) * per_sample; ++task) total += partial[3 * task + k];
      op.sums[3 * b + k] = static_cast<float>(total);
    }
}

}  // namespace erdfast::ERDFAST_ARCH
