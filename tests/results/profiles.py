"""A measured run, and predictions of it that are off by so much."""

from dataclasses import replace

from qlora_lowmem.memory.profile import MemoryProfile, Peak

GIB = 2**30
MEASURED = MemoryProfile(
    device="nvidia-geforce-rtx-4050-laptop-gpu",
    provenance="measured",
    total_bytes=6 * GIB,
    outside_allocator_bytes=GIB // 2,
    phases={
        "load": Peak(1 * GIB, 2 * GIB, 2 * GIB + GIB // 2),
        "first step": Peak(3 * GIB, 4 * GIB, 4 * GIB + GIB // 2),
        "steady": Peak(2 * GIB, 4 * GIB, 4 * GIB + GIB // 2),
    },
)


def predicted(allocated: float = 0.0, reserved: float = 0.0) -> MemoryProfile:
    """The measured profile with relative errors in every phase."""
    phases = {
        name: replace(
            peak, allocated=round(peak.allocated * (1 + allocated)), reserved=round(peak.reserved * (1 + reserved))
        )
        for name, peak in MEASURED.phases.items()
    }
    return replace(MEASURED, device="rtx-4050-laptop-6gb", provenance="virtual", phases=phases)
