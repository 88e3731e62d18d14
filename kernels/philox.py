"""Philox4x32-10 and standard normals on the device: the words of erdfast/philox.py, normals within 1e-6 of its.

Each function works on a block of lanes. A lane is one counter (q, sample id low, sample id high, stream)
under the 64-bit seed as key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and yields
four normals by two Box-Muller pairs. Logarithm, sine and cosine are polynomials fitted for this file (minimax
in the error of the normal): libdevice's cos and sin take a slow path that makes cubins of 68-245 KB with a
stack, and lose accuracy in the argument 2*pi*u, whereas here the phase stays a 32-bit integer until it has
been reduced to an eighth of a turn.

Cost per lane, that is per 4 normals, as compiled for sm_90: 19 wide multiplications and 60 other integer
operations, 60 float operations (2 of them square roots).
"""

import triton
import triton.language as tl

POSTERIOR_DOMAIN = tl.constexpr(0x5851F42D4C957F2D)
"""XORed into the seed for the draw from VAE moments (`DOMAINS["posterior"]` of erdfast/philox.py)."""


@triton.jit
def philox_words(seed, q, sample_id, stream):
    """Four blocks of uint32 words, bit for bit those of `erdfast.philox.philox_words`.

    Args:
        seed, sample_id, stream: int64 scalars; of `stream` the low 32 bits count.
        q: (BLOCK,) int32, not negative.

    The seed and all of the counter but q are scalars of the program, and so is what the first rounds make of
    them alone. A product is one 64-bit multiplication (IMAD.WIDE) rather than a high and a low half.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = q.to(tl.uint32)
    c1 = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (stream & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        # The key wraps on purpose: debug builds would otherwise assert that it does not.
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def unit_interval(word):
    """A uint32 word as float32 in (0, 1]: fl32(word >> 1) * 2^-31 + 2^-32, as in all back ends."""
    return (word >> 1).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10


@triton.jit
def minus_two_log(u):
    """-2 ln u for float32 u in [2^-32, 1], relative error 3e-8 of the polynomial and rounding, near 1 too.

    u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): 0x3F3504F3 is sqrt(1/2), where the exponent changes.
    """
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = shifted >> 23
    mantissa = (shifted & 0x007FFFFF) + 0x3F3504F3
    f = mantissa.to(tl.float32, bitcast=True) - 1.0
    p = -0.17400871217250824 * f + 0.2853497266769409
    p = p * f - 0.29829534888267517
    p = p * f + 0.3315517008304596
    p = p * f - 0.3992612659931183
    p = p * f + 0.5000267624855042
    p = p * f - 0.6666781902313232
    p = p * f + 1.0
    return exponent.to(tl.float32) * -1.3862943611198906 + ((f * f) * p - 2.0 * f)


@triton.jit
def cos_sin_turn(word):
    """(cos, sin) of 2*pi*word/2^32 in float32, absolute error below 1e-7.

    The quadrant is taken from the top bits after a shift by an eighth of a turn; what remains lies in
    [-1/2, 1/2) quadrants.
    """
    turned = tl.add(word, 0x20000000, sanitize_overflow=False)
    x = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 9.313225746154785e-10
    z = x * x
    s = -0.004592289216816425 * z + 0.07967590540647507
    s = s * z - 0.6459629535675049
    s = (s * z + 1.570796251296997) * x
    c = -0.020426250994205475 * z + 0.2536063492298126
    c = c * z - 1.2336980104446411
    c = c * z + 1.0
    odd = (turned & 0x40000000) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    # The sign bit by XOR: the sine is negative in quadrants 2 and 3, the cosine in 1 and 2.
    cos_sign = tl.add(turned, 0x40000000, sanitize_overflow=False) & 0x80000000
    cos = (cos.to(tl.uint32, bitcast=True) ^ cos_sign).to(tl.float32, bitcast=True)
    sin = (sin.to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)).to(tl.float32, bitcast=True)
    return cos, sin


@triton.jit
def box_muller(radius_word, phase_word):
    """Two independent standard normals (float32, at most 6.66 in absolute value) from two words."""
    radius = tl.sqrt(minus_two_log(unit_interval(radius_word)))
    cos, sin = cos_sin_turn(phase_word)
    return radius * cos, radius * sin


@triton.jit
def normal4(seed, q, sample_id, stream):
    """The normals of elements q, q+Q, q+2Q and q+3Q of a sample: four (BLOCK,) float32.

    Arguments as for `philox_words`.
    """
    w0, w1, w2, w3 = philox_words(seed, q, sample_id, stream)
    e0, e1 = box_muller(w0, w1)
    e2, e3 = box_muller(w2, w3)
    return e0, e1, e2, e3
