"""What noise levels do to training: closed forms, kernels, ranks, dimensions, and the pages that show them."""
