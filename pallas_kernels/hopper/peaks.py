"""The speeds that an H200 reaches, as measured; benchmarks bound times by them.

The vendor's figures are higher: 989 TFLOP/s and 4.8 TB/s.
"""

FLOPS_PER_SECOND = 790e12  # Matrix products in bfloat16.
BYTES_PER_SECOND = 4.3e12  # Device memory.
