"""Speed and memory of devices, from datasheets; a measured profile has the same fields. Pure.

Sources of the numbers (dense rates, without sparsity):

- T4: NVIDIA T4 datasheet (320 GB/s, 65 fp16 TFLOPS, 130 int8 TOPS, 16 GB, PCIe 3 x16).
- V100: NVIDIA V100 datasheet, SXM2 32 GB (900 GB/s, 125 fp16 tensor TFLOPS, NVLink 300 GB/s); its
  tensor cores have no int8: dp4a gives four int8 products per fp32 lane, 4 * 15.7 TOPS.
- A10: NVIDIA A10 datasheet (600 GB/s, 125 fp16 TFLOPS, 250 int8 TOPS, 24 GB, PCIe 4 x16).
- A100: NVIDIA A100 datasheet, SXM (40 GB: 1,555 GB/s; 80 GB: 2,039 GB/s; 312 fp16 TFLOPS, 624 int8
  TOPS, NVLink 600 GB/s both directions).
- L4: NVIDIA L4 datasheet (300 GB/s, 121 fp16 TFLOPS, 242.5 int8 TOPS, 24 GB, PCIe 4 x16).
- L40S: NVIDIA L40S datasheet (864 GB/s, 362 fp16 TFLOPS, 733 int8 TOPS, 48 GB, PCIe 4 x16).
- H100: NVIDIA H100 datasheet, SXM (3.35 TB/s, 989 fp16 TFLOPS, 1,979 int8 TOPS, 80 GB, NVLink
  900 GB/s both directions).
- H200: NVIDIA H200 datasheet, SXM (4.8 TB/s, the rates of H100, 141 GB).
- The fp32 rates of T4 and V100 (8.1 and 15.7 TFLOPS) are from the same datasheets.
- cpu: no datasheet; fitted to one thread, see below. Measure yours with `dist-int8 bench`.

Real code does not reach datasheet rates. `ACHIEVED_BANDWIDTH` is the fraction that copies and
matrix-vector products reach (A100: 1.7 to 1.75 of 2.04 TB/s, gpt-fast; H200: 4.3 of 4.8 TB/s),
`ACHIEVED_RATE` the fraction that large matrix products reach. FlashAttention-2 reaches as much on
A100 (up to 73%, arXiv:2307.08691) and 35% on H100 (arXiv:2407.08608); below compute capability 8.0,
where torch has no flash attention, prompts attend in fp32. Launching takes 25 us of the host per
kernel: 9.9 ms for the about 400 of a decode step of an 8B model beside an H200, launched one by one
(benchmarks/results/gpu, 2026-11-27). `block_overhead_s` is a guess: about 3 us for each of the 9
kernels of a block that is replayed.
"""

from dataclasses import dataclass

ACHIEVED_BANDWIDTH = 0.86
ACHIEVED_RATE = 0.7
ACHIEVED_ATTENTION_HOPPER = 0.35
GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class DeviceProfile:
    """What the cost model knows about one kind of device; rates are those achieved.

    Attributes:
        name: name, such as "a100-80", or the one that a measured profile gives itself.
        memory_bytes: bytes of nominal memory; the budget if none is set.
        int8_bandwidth: bytes/s at which a linear of few rows reads int8 weights.
        float_bandwidth: bytes/s at which a linear of few rows reads 16-bit weights.
        int8_ops: int8 operations/s of a linear of many rows; two operations per weight and row.
        float_ops: operations/s of a 16-bit linear of many rows.
        attention_ops: operations/s of attention over a long prompt.
        overlaps: whether reading and computing overlap (GPUs) or alternate (CPUs).
        block_overhead_s: seconds that a block takes besides its linears, quantization and
            attention: norms, activations and the beginnings of kernels.
        launch_s: seconds that the host takes per kernel, where a GPU's are launched one by one.
        link_bandwidth: bytes/s to the next device of the same host, in one direction.
        link_latency_s: seconds of the smallest message on that link.
        network_bandwidth: bytes/s to another host.
        network_latency_s: seconds of the smallest message to another host.
    """

    name: str
    memory_bytes: int
    int8_bandwidth: float
    float_bandwidth: float
    int8_ops: float
    float_ops: float
    attention_ops: float
    overlaps: bool = True
    block_overhead_s: float = 25e-6
    launch_s: float = 25e-6
    link_bandwidth: float = 25 * GB
    link_latency_s: float = 15e-6
    network_bandwidth: float = 12.5 * GB
    network_latency_s: float = 40e-6


def _datasheet(
    name: str,
    memory_gb: int,
    bandwidth_gb: float,
    int8_tops: float,
    tflops: float,
    attention_tflops: float,
    link_gb: float,
) -> DeviceProfile:
    bandwidth = ACHIEVED_BANDWIDTH * bandwidth_gb * GB
    return DeviceProfile(
        name=name,
        memory_bytes=memory_gb * GB,
        int8_bandwidth=bandwidth,
        float_bandwidth=bandwidth,
        int8_ops=ACHIEVED_RATE * int8_tops * TERA,
        float_ops=ACHIEVED_RATE * tflops * TERA,
        attention_ops=attention_tflops * TERA,
        link_bandwidth=ACHIEVED_BANDWIDTH * link_gb * GB,
    )


#                 memory  memory  int8   fp16    attention,                       link, one
#                 GB      GB/s    TOPS   TFLOPS  achieved                         direction GB/s
_DATASHEETS = (
    _datasheet("t4", 16, 320, 130, 65, ACHIEVED_RATE * 8.1, 16),
    _datasheet("v100", 32, 900, 62.8, 125, ACHIEVED_RATE * 15.7, 150),
    _datasheet("a10", 24, 600, 250, 125, ACHIEVED_RATE * 125, 32),
    _datasheet("a100-40", 40, 1555, 624, 312, ACHIEVED_RATE * 312, 300),
    _datasheet("a100-80", 80, 2039, 624, 312, ACHIEVED_RATE * 312, 300),
    _datasheet("l4", 24, 300, 242.5, 121, ACHIEVED_RATE * 121, 32),
    _datasheet("l40s", 48, 864, 733, 362, ACHIEVED_RATE * 362, 32),
    _datasheet("h100", 80, 3350, 1979, 989, ACHIEVED_ATTENTION_HOPPER * 989, 450),
    _datasheet("h200", 141, 4800, 1979, 989, ACHIEVED_ATTENTION_HOPPER * 989, 450),
)
# Fitted to one thread of an AMD EPYC with AVX-512 VNNI on SmolLM2-135M: a block takes 0.33 to
# 0.59 ms for 1 to 8 rows and 2.9 ms for 64, the bf16 head 3.1 ms for 4; this profile predicts 0.32
# to 0.58, 2.6 and 3.1.
CPU = DeviceProfile(
    name="cpu",
    memory_bytes=16 * GB,
    int8_bandwidth=19 * GB,
    float_bandwidth=24 * GB,
    int8_ops=0.19 * TERA,
    float_ops=0.3 * TERA,
    attention_ops=0.3 * TERA,
    overlaps=False,
    block_overhead_s=100e-6,
    launch_s=0.0,
    link_bandwidth=2 * GB,
    link_latency_s=100e-6,
    network_bandwidth=1 * GB,
    network_latency_s=200e-6,
)
PROFILES = {profile.name: profile for profile in (*_DATASHEETS, CPU)}
DEFAULT_GPU = "a100-80"
