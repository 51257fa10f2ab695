"""A measured run, and predictions of it that are off by so much."""

from dataclasses import replace

from qlora_lowmem.memory.profile import MemoryProfile, PhasePeak

GIB = 2**30
MEASURED = MemoryProfile(
    device="nvidia-geforce-rtx-4050-laptop-gpu",
    provenance="measured",
    total_bytes=6 * GIB,
    outside_allocator_bytes=GIB // 2,
    phases=(
        PhasePeak("load", 1 * GIB, 2 * GIB, 2 * GIB + GIB // 2),
        PhasePeak("first step", 3 * GIB, 4 * GIB, 4 * GIB + GIB // 2),
        PhasePeak("steady", 2 * GIB, 4 * GIB, 4 * GIB + GIB // 2),
    ),
)


def predicted(allocated: float = 0.0, reserved: float = 0.0) -> MemoryProfile:
    """The measured profile with relative errors in every phase."""
    phases = tuple(
        replace(
            phase, allocated=round(phase.allocated * (1 + allocated)), reserved=round(phase.reserved * (1 + reserved))
        )
        for phase in MEASURED.phases
    )
    return replace(MEASURED, device="rtx-4050-laptop-6gb", provenance="virtual", phases=phases)
