"""What is known, and what is assumed, of GPUs."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU. What a multiprocessor (SM) does in a clock is in warps' instructions."""

    name: str
    arch: int
    sms: int
    boost: float  #: Hz, the highest clock
    sustained: float  #: Hz, assumed of a step
    dram: float  #: bytes a second that a copy reads and writes
    l2_per_clock: float  #: bytes of all SMs together
    l1: int  #: bytes of an SM
    fma: float  #: float32 FMUL, FADD, FFMA, and IMAD
    alu: float  #: other int32 and comparisons
    mufu: float  #: reciprocals and roots
    fp64: float
    tensor: float  #: bf16 operations a second, dense


#: Instructions that an SM begins in a clock; bytes that it exchanges with L1.
ISSUE, L1_PER_CLOCK = 4.0, 128.0

#: A copy reaches so much of the data sheets' bandwidth: 4.3 of an H200's 4.8 TB/s, assumed, and the
#: same share of the others'.
_OF_PEAK = 4.3 / 4.8

#: SMs, clocks, bytes, tensor cores: NVIDIA's data sheets and architecture white papers of the A100
#: (80 GB SXM), H100 and H200 (SXM). Instructions in a clock: CUDA C++ Programming Guide,
#: "Throughput of Native Arithmetic Instructions", over 32. L2's 5120 bytes a clock: A100 white
#: paper; of the others assumed. Sustained clocks: assumed.
GPUS = {
    "a100": Gpu(
        "a100",
        80,
        sms=108,
        boost=1.41e9,
        sustained=1.275e9,
        dram=2.039e12 * _OF_PEAK,
        l2_per_clock=5120,
        l1=192 << 10,
        fma=2,
        alu=2,
        mufu=0.5,
        fp64=1,
        tensor=312e12,
    ),
    "h100": Gpu(
        "h100",
        90,
        sms=132,
        boost=1.98e9,
        sustained=1.7e9,
        dram=3.35e12 * _OF_PEAK,
        l2_per_clock=5120,
        l1=256 << 10,
        fma=4,
        alu=2,
        mufu=0.5,
        fp64=2,
        tensor=989e12,
    ),
}
GPUS["h200"] = GPUS["h100"]._replace(name="h200", dram=4.3e12)


class Assumed(NamedTuple):
    """What a bound assumes of any GPU."""

    is_sustained: bool  #: the clock
    gap: float  #: seconds between two launches that follow each other
    dram: float  #: of a copy's bytes a second
    l2: float  #: of its bytes a clock
    pipes: float  #: of the instructions a clock
    l1_size: float  #: of L1's bytes, that hold vectors
    sums_leave: bool  #: whether what kernels hand to each other is driven out to DRAM
    #: Of what is not the longest (DRAM, L2, arithmetic, waits), how much is not hidden behind that.
    exposed: float
    waits: bool  #: whether programs wait for what they load, and the last are waited for


#: Everything at its peak, and side by side.
LOWER = Assumed(
    is_sustained=False,
    gap=2e-6,
    dram=1.0,
    l2=1.0,
    pipes=1.0,
    l1_size=1.0,
    sums_leave=False,
    exposed=0.0,
    waits=False,
)

#: DRAM: reads and writes of several streams turn its bus around more often than a copy does. L2:
#: microbenchmarks publish 5.5 to 5.7 TB/s of an H100's 10. L1 holds half as much, as programs are
#: not in step. Pipes: two warps of a scheduler do not fill each other's gaps.
UPPER = Assumed(
    is_sustained=True,
    gap=4e-6,
    dram=0.85,
    l2=0.6,
    pipes=0.6,
    l1_size=0.5,
    sums_leave=True,
    exposed=0.25,
    waits=True,
)

#: Clocks that a load waits for L2 and for DRAM, assumed: microbenchmarks publish about 260 and 480
#: of an idle H100, and here it is busy.
L2_WAIT, DRAM_WAIT = 400.0, 800.0

#: Clocks from an instruction to the next of a warp: of independent ones, where a scheduler has two
#: warps; of dependent ones, by kind (assumed).
APART = 2.0
DEPENDENT = {"SHFL": 24.0, "LDS": 30.0, "BAR": 30.0, "MUFU": 20.0, "fp64": 12.0}
DEPENDENT_ELSE = 5.0
