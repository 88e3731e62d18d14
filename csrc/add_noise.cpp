// x_t = alpha*x0 + sigma*eps, one read and one write; eps is made on the way (ERD, sec. 2.1).
#include "source.h"

namespace erdfast::ERDFAST_ARCH {

__attribute__((noinline)) static void scale_and_add(float alpha, Parts<const float> x0, float sigma,
                                                    Parts<const float> eps, Parts<float> out) {
  for (int i = 0; i < LANES; i += WIDTH) {
    for (int j = 0; j < 4; ++j) {
      const float* x = x0.data + j * x0.step + i;
      __builtin_prefetch(x + LANES);  // the next block's, while its noise is computed
      store_vec(out.data + j * out.step + i, alpha * load_vec(x) + sigma * load_vec(eps.data + j * eps.step + i));
    }
  }
}

void add_noise(const AddNoise& op) {
  const Layout layout(op.source);
  for_each_task(op.source, layout, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    const float alpha = op.alpha[b], sigma = op.sigma[b];
    Block block;
    alignas(64) Buffer buffer;
    for (int64_t q = begin; q < end; q += LANES) {
      read_block(op.source, layout, b, q, block);
      const Parts<float> out = target_parts(op.out, layout, b, q, buffer);
      scale_and_add(alpha, block.x0, sigma, block.eps, out);
      finish(op.out, layout, b, q, buffer, out.data == buffer[0]);
    }
  });
}

}  // namespace erdfast::ERDFAST_ARCH
