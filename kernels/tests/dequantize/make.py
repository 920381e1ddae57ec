"""Makes the files beside this one: random blocks of every format, and what the `gguf` package says they are worth.

    pip install gguf==0.19.0 numpy
    python kernels/tests/dequantize/make.py

`NAME.blocks` holds stored blocks, `NAME.values` their elements as little-endian f32. The seed is fixed.
"""

import pathlib

import numpy
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGML_QUANT_SIZES

HERE = pathlib.Path(__file__).parent
ELEMENTS = 512
# Where the 16-bit floats of a block are: random bytes there could be infinite or not a number.
HALVES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [],
}

random = numpy.random.default_rng(4)
for name, places in HALVES.items():
    kind = GGMLQuantizationType[name]
    size, bytes_per_block = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (max(ELEMENTS // size, 1), bytes_per_block), dtype=numpy.uint8)
    if name == "MXFP4":
        blocks[:, 0] = random.integers(100, 150, len(blocks))
        blocks[:4, 0] = [0, 1, 2, 254]
    for place in places:
        halves = random.normal(0, 0.05, len(blocks)).astype(numpy.float16)
        blocks[:, place : place + 2] = halves.view(numpy.uint8).reshape(-1, 2)
    values = dequantize(blocks, kind).astype("<f4")
    (HERE / f"{name.lower()}.blocks").write_bytes(blocks.tobytes())
    (HERE / f"{name.lower()}.values").write_bytes(values.tobytes())
