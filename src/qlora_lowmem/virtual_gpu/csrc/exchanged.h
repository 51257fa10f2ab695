// The one kind of value that a virtual GPU can know: what the host itself wrote to a device and a collective passed on.
//
// PyTorch's DistributedDataParallel plans its gradient buckets with such values: it copies their indices to the card,
// broadcasts them, and copies them back. Zeros there would be no plan. As long as no kernel was launched since the host
// wrote them, the bytes cannot have changed, and every rank is taken to have written the same.
#pragma once

#include "account.h"

namespace vgpu {

VGPU_SHARED void note_written(const void* device_address, const void* source, uint64_t bytes);
// On the device; a collective gave this rank's bytes to `target`, or a copy did.
VGPU_SHARED void note_copied(const void* target, const void* source, uint64_t bytes, bool by_collective);
// Something wrote to a device: nothing is known any more.
VGPU_SHARED void forget_written();
// Reads bytes that a collective delivered. False: they are not known.
VGPU_SHARED bool read_exchanged(void* target, const void* source, uint64_t bytes);

}  // namespace vgpu
