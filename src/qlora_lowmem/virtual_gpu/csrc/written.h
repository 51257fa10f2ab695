// The one kind of value that a virtual GPU can know: what the host itself wrote to a device, sent around since by copies
// and collectives alone.
//
// Programs plan with such values: PyTorch's DistributedDataParallel broadcasts the indices of its gradient buckets,
// Accelerate gathers the sizes of tensors to pad them. Zeros there would be no plan. As long as no kernel was launched
// since the host wrote them, the bytes cannot have changed, and every rank is taken to have written the same.
#pragma once

#include "account.h"

namespace vgpu {

VGPU_SHARED void note_written(const void* device_address, const void* source, uint64_t bytes);
// A copy, or a collective, gave this rank's bytes at `source` to `target`.
VGPU_SHARED void note_copied(const void* target, const void* source, uint64_t bytes);
// Something wrote to a device: nothing is known any more.
VGPU_SHARED void forget_written();
// Reads bytes that are known still. False: they are not.
VGPU_SHARED bool read_written(void* target, const void* source, uint64_t bytes);

}  // namespace vgpu
