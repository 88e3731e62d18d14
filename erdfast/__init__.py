"""erdfast: training diffusion transformers from scratch, fast, with every idea about noise levels one line away.

The entry points are `python -m erdfast.train`, `erdfast.sample`, `erdfast.evaluate`, `erdfast.prepare`,
`erdfast.encode`, `erdfast.ema` and `erdfast.export`; other trainers import `erdfast.ops.add_noise`,
`erdfast.ops.diffusion_loss` and `erdfast.process.Process`.
"""

__version__ = "0.1.0"
